"""Every architecture of transformers, timm and PEFT, tiny, with random weights: no downloads.

`catalogue()` maps a name such as "causal/llama" to a builder that yields (model, arguments,
what they are) as often as there is another way to call it; the first that runs is taken. Needs the
extra `models`.
"""

from __future__ import annotations

# isort: off
import support.torchvision_operators  # noqa: F401, before what imports torchvision
# isort: on

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial

import peft
import timm
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N, T, VOCABULARY, SIDE = 5, 8, 96, 32  # examples, tokens, words, pixels
LARGEST = 75_000_000  # parameters

Arguments = dict[str, object]
Built = tuple[nn.Module, Arguments, str]
Builder = Callable[[], Iterator[Built]]

# -- Hugging Face: kinds, and what of transformers' model mappings is of each ----------------------

TASKS = {
    "causal": ["CAUSAL_LM"],
    "masked": ["MASKED_LM"],
    "seq2seq": ["SEQ_TO_SEQ_CAUSAL_LM"],
    "image-text": [
        "IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    ],
    "vision": [
        "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION",
        "MASKED_IMAGE_MODELING", "IMAGE_TO_IMAGE", "BACKBONE",
    ],
    "audio": ["SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "AUDIO_XVECTOR"],
    "text": ["TOKEN_CLASSIFICATION", "TEXT_ENCODING"],
}  # fmt: skip

# -- tiny configurations ---------------------------------------------------------------------------

# The first expression that fits a field's name tells its size; None keeps what it is.
SIZES = [
    (r"(.*_)?vocab_size(_.*)?|vocabulary_size", VOCABULARY),
    (r"(temporal_|spatial_)?(merge_size|merge)|type_vocab_size|num_channels|in_channels", None),
    (r"num_labels|temporal_patch_size|tubelet_size|num_frames|conv_kernel|d_conv|n_fft", None),
    (r"(n_group|topk_group|n_groups|num_expert_group|mamba_n_groups)", 1),
    (r".*lora_rank|.*_rank|r", 8),
    (r"rotary_dim|.*head_dim|d_kv|head_size|.*head_width", "head"),
    (r".*num_(key_value|kv)_heads|num_kv_heads|.*kv_n_heads", "shared"),
    (r"(.*_)?(num_|n_)?(attention_)?heads?|n_head|encoder_attention_heads|.*_heads", "heads"),
    (r"(num_experts_per_tok|top_?k|moe_top_?k|.*_experts_per_tok.*|.*topk)", 2),
    (r"(n_|num_).*experts?|n_routed_experts", 4),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*(num|n)_.*(hidden_)?layers?|n_layers?|.*_layers|depth|num_blocks|layers", 2),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|feed_forward.*|.*intermediate.*)", 48),
    (r"max_(source|target)_positions", 32),
    (r".*(max|n)_.*(position|length).*|max_len.*|max_seq.*|n_positions|n_ctx|seq_length", 64),
    (r"image_size|img_size|input_size", SIDE),
    (r"(vision_)?patch_size", 8),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel", 16),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|dim|width|embed_size"
     r"|hidden_channels|d_embed|d_inner|output_dim|projection_dim|proj_dim|out_hidden_size"
     r"|word_embed_proj_dim|emb_dim|feature_dim|bottleneck_dim|conv_dim|encoder_dim|decoder_dim)",
     "wide"),
    (r"(mamba_)?d_state|state_size|ssm_state_size|.*chunk_size", 8),
    (r"sliding_window|.*window_size|attention_window", None),
]  # fmt: skip
SCALES = [
    dict(wide=32, heads=4, head=8, shared=2),
    dict(wide=32, heads=4, head=8, shared=4),
    dict(wide=64, heads=4, head=16, shared=2),
    {},
]
# What fields become whose default is none, though the model needs it.
MISSING = {"num_experts_per_tok": 2, "head_dim": "head", "vocab_size": VOCABULARY}
# What a family needs beside what the names of fields tell.
FAMILIES = {
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(expand=1),
    "perceiver": dict(d_latents=32, num_latents=8, qk_channels=32, v_channels=32),
    "textnet": dict(stem_out_channels=16, image_size=(2 * SIDE, 2 * SIDE)),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["mamba", "hybrid"], layer_types=["mamba", "hybrid"]),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"], layer_types=["mamba", "hybrid"]),
}
COMMON_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrunk(name: str, value: object, scale: dict[str, int]) -> object:
    """What a field of a configuration becomes."""
    if value is None and scale and name in MISSING:
        size = MISSING[name]
        return scale[size] if isinstance(size, str) else size
    if isinstance(value, bool) or value is None:
        return False if name in ("use_cache", "use_mems_eval") else value
    if re.search(r"drop(out|_path|_rate)|layerdrop|jitter", name) and isinstance(
        value, int | float
    ):
        return type(value)(0)
    if isinstance(value, int):
        if name.endswith(("_token_id", "_token_index")):
            return value if value < VOCABULARY else VOCABULARY - 2
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                size = scale.get(size) if isinstance(size, str) else size
                return value if size is None else min(value, size)
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        if re.fullmatch(r"(.*_)?depths?|layers|num_.*blocks|layer_nums|.*_layers", name):
            return type(value)(min(v, 1) for v in value)
        if re.search(r"heads", name):
            return type(value)(min(v, 2) for v in value)
        if re.search(r"size|dims?$|channels|widths?$|planes", name) and scale:
            if re.search(r"image|img|patch|kernel|stride|window|pool|merge|input_size", name):
                return value
            smallest = min(value)
            return type(value)(
                max(8, round(16 * v / smallest / 8) * 8) if v > 8 else v for v in value
            )
    if isinstance(value, dict) and "mrope_section" in value:
        half = scale.get("head", 128) // 2
        return value | {"mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    return value


def options(config_class: type, scale: dict[str, int]) -> dict[str, object]:
    """Keyword arguments of a tiny configuration, with those of the ones inside it."""
    if scale:
        found = {}
        for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
            value = f.default
            if value is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
                value = f.default_factory()
            small = shrunk(f.name, value, scale)
            if small is not value and small != value and f.init:
                found[f.name] = small
        extra = FAMILIES.get(config_class.model_type, {})
        found |= {name: value for name, value in extra.items() if hasattr(config_class, name)}
    else:
        found = {}
    for name, inner in config_class.sub_configs.items():
        if inner is transformers.AutoConfig:
            with contextlib.suppress(Exception):
                inner = type(getattr(config_class(), name))
        if hasattr(inner, "sub_configs") and inner is not type(None):
            found[name] = inner(**options(inner, scale))
    return found


def token_ids(config: transformers.PreTrainedConfig) -> None:
    """Give every special token an id of its own, the highest ones."""
    free = iter(range(VOCABULARY - 1, 3, -1))
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    given: dict[str, int] = {}
    for part in filter(None, parts):
        for name, value in list(vars(part).items()):
            if not re.fullmatch(r".*_token_(id|index)", name):
                continue
            if name in COMMON_TOKENS:
                if value is not None:
                    setattr(part, name, COMMON_TOKENS[name])
                elif name == "pad_token_id" and part is config:
                    setattr(part, name, 0)
            elif name == "decoder_start_token_id":
                setattr(part, name, 1)
            elif isinstance(value, int) or name.startswith("image_token"):
                short = name.rsplit("_", 1)[0]
                given.setdefault(short, next(free) if short not in given else 0)
                setattr(part, name, given[short])


def rotary_sections(config: transformers.PreTrainedConfig) -> None:
    """Of positions in time, height and width, where a text model inside another has rotary ones."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        rope, heads = (
            getattr(part, "rope_parameters", None),
            getattr(part, "num_attention_heads", 0),
        )
        if isinstance(rope, dict) and "rope_theta" in rope and heads:
            half = (getattr(part, "head_dim", None) or part.hidden_size // heads) // 2
            rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]


def configurations(config_class: type) -> Iterator[transformers.PreTrainedConfig | Exception]:
    """Tiny ones, the smallest first; or why one of that scale cannot be made."""
    for scale in SCALES:
        try:
            config = config_class(**options(config_class, scale))
            token_ids(config)
            if scale:
                rotary_sections(config)
            for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
                if part is not None:
                    part.use_cache = False
                    part._experts_implementation = "eager"  # the others know no float64
            yield config
        except Exception as error:
            yield error


# -- their inputs ----------------------------------------------------------------------------------


def attribute(config: object, *names: str, default: object = None) -> object:
    """The first of these a configuration, or one inside it, has."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for part in [config, *filter(None, inner)]:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def sentences(length: int = T, top: int = 60) -> dict[str, Tensor]:
    """Of different lengths, padded at the end."""
    ids = torch.randint(5, top, (N, length))
    lengths = length - torch.arange(N) % (length // 2)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictures(config: object) -> list[Tensor]:
    channels = attribute(config, "num_channels", "in_channels", default=3)
    size = attribute(config, "image_size", "img_size", default=2 * SIDE)
    sides = [size] if not isinstance(size, list | tuple) else []
    shapes = [tuple(size)[-2:]] if not sides else [(size, size)]
    shapes += [(2 * SIDE, 2 * SIDE), (SIDE, SIDE), (4 * SIDE, 4 * SIDE), (224, 224)]
    channels = channels if isinstance(channels, int) else 3
    found = [torch.randn(N, channels, *shape) for shape in dict.fromkeys(shapes)]
    frames = attribute(config, "num_frames", default=2)
    return found + [torch.randn(N, int(frames), channels, *shapes[0])]


def sounds(config: object, name: str) -> list[Tensor]:
    mels = attribute(
        config, "num_mel_bins", "feature_size", "input_feat_per_channel",
        "feature_projection_input_dim", default=16,
    )  # fmt: skip
    length = attribute(config, "max_length", "max_source_positions", default=32)
    waves = [torch.randn(N, samples) for samples in (1600, 6400, 16000)]
    frames = [
        torch.randn(N, mels, 2 * length), torch.randn(N, length, mels), torch.randn(N, 32, mels),
        torch.randn(N, mels, 64), torch.randn(N, 1, 64, mels), torch.randn(N, 1, 1024, mels),
    ]  # fmt: skip
    return waves + frames if name == "input_values" else frames + waves


def arguments(model: nn.Module, kind: str) -> Iterator[tuple[Arguments, str]]:
    """Ways to call a model, the fullest first."""
    config, taken = model.config, inspect.signature(model.forward).parameters
    decoder: Arguments = {}
    if kind in ("seq2seq", "audio", "image-text") and "decoder_input_ids" in taken:
        decoder = {"decoder_input_ids": torch.randint(5, 60, (N, 4))}
    if "use_cache" in taken:
        decoder["use_cache"] = False
    text = {key: value for key, value in sentences().items() if key in taken}
    if kind == "audio":
        for name in ("input_values", "input_features", "audio_values", "input_ids"):
            if name in taken:
                for sound in sounds(config, name):
                    yield {name: sound, **decoder}, "sound"
        return
    if kind == "vision":
        name = next((n for n in ("pixel_values", "pixel_values_videos") if n in taken), None)
        for picture in pictures(config) if name else ():
            yield {name: picture, **decoder}, "images"
        return
    if kind == "image-text" and "pixel_values" in taken and "image_grid_thw" not in taken:
        token = attribute(config, "image_token_id", "image_token_index")
        for picture in pictures(config):
            given = {"pixel_values": picture, **decoder}
            if "input_ids" not in taken:
                yield given, "images and text" if decoder else "images"
                continue
            counts = (0,) if token is None else (*tokens_of_an_image(model, given, token), 16, 1)
            for count in dict.fromkeys(counts):
                ids = torch.randint(5, 60, (N, T))
                ids[:, T - 1] = 2  # where the text ends, which some look for
                if count:
                    ids = torch.cat([torch.full((N, count), token), ids], dim=1)
                mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in taken else {}
                yield {"input_ids": ids, **mask, **given}, "images and text"
    if "input_ids" in taken:
        yield {**text, **decoder}, "text alone" if kind == "image-text" else "text"
        yield {"input_ids": torch.randint(5, 60, (N, 64)), **decoder}, "text"
        yield {"input_ids": torch.randint(5, 60, (N, T)), **decoder}, "text"


def tokens_of_an_image(model: nn.Module, given: Arguments, token: int) -> list[int]:
    """How many tokens stand for an image, as the model's own error tells."""
    ids = torch.randint(5, 60, (N, T))
    ids[:, 0] = token
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    except Exception as error:
        numbers = [int(n) for n in re.findall(r"\d+", str(error))]
        return [n // N for n in reversed(numbers) if n % N == 0 and 0 < n // N <= 600]
    return [1]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def hugging_face(kind: str, model_type: str, name: str) -> Iterator[Built]:
    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    last: Exception | None = None
    for config in configurations(config_class):
        if isinstance(config, Exception):
            last = last or config
            continue
        try:
            with torch.device("meta"):
                parameters = size(model_class(config))
        except Exception:  # what looks at values while it is made
            parameters = 0
        if parameters > LARGEST:
            last = last or ValueError(f"{parameters / 1e6:.0f} million parameters")
            continue
        try:
            model = model_class(config)
        except Exception as error:
            last = last or error
            continue
        for given, what in arguments(model, kind):
            yield model, given, what
    if last is not None:
        raise last


def causal_of(family: str) -> Iterator[Built]:
    """A tiny language model for adapters."""
    yield from hugging_face(
        "causal", family, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    )


# -- timm ------------------------------------------------------------------------------------------

SMALL = (
    "test", "femto", "atto", "pico", "zepto", "nano", "xxs", "xxtiny", "xx_small", "_xs", "xsmall",
    "tiny", "_t0", "_b0", "_s0", "_t_", "_t", "18", "small", "_s", "_0",
)  # fmt: skip


def smallest(names: list[str]) -> str:
    """The one whose name promises the least."""
    rank = lambda name: next((i for i, word in enumerate(SMALL) if word in name), len(SMALL))
    return min(names, key=lambda name: (rank(name), len(name), name))


def timm_model(name: str) -> Iterator[Built]:
    last: Exception | None = None
    for given in ({"img_size": 64}, {"img_size": 128}, {}):
        try:
            model = timm.create_model(name, pretrained=False, num_classes=3, **given)
        except Exception as error:
            last = error
            continue
        if size(model) > LARGEST:
            last = ValueError(f"{size(model) / 1e6:.0f} million parameters")
            continue
        side = model.default_cfg.get("input_size", (3, 224, 224))[-1]
        for pixels in [given["img_size"]] if given else [64, 96, 128, side]:
            yield model, {"x": torch.randn(N, 3, pixels, pixels)}, "images"
    if last is not None:
        raise last


# -- PEFT ------------------------------------------------------------------------------------------


def adapted(kind: str, family: str = "llama") -> Iterator[Built]:
    """An adapter on a frozen model, as after some training."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {f.name for f in dataclasses.fields(config_class)}
    wanted = dict(
        task_type="CAUSAL_LM", r=4, rank=4, num_virtual_tokens=4, adapter_len=4, adapter_layers=1,
        target_modules=["q_proj", "v_proj"], feedforward_modules=[], n_frequency=50,
        total_step=10, token_indices=[5, 6, 7], num_tasks=1, vector_length=4, num_vectors=16,
        topk=2, oft_block_size=0, block_size=4, num_prompt_tokens=4, encoder_hidden_size=16,
    )  # fmt: skip
    if kind == "LN_TUNING":
        wanted["target_modules"] = ["input_layernorm", "post_attention_layernorm"]
    if kind == "OFT":
        wanted.pop("r")
        wanted["oft_block_size"] = 4
    given = {key: value for key, value in wanted.items() if key in fields}
    last: Exception | None = None
    for left_out in ((), ("r",), ("feedforward_modules",), ("block_size",), ("rank",)):
        try:
            base, batch, _ = next(causal_of(family))
            chosen = {key: value for key, value in given.items() if key not in left_out}
            model = peft.get_peft_model(base, config_class(**chosen))
        except Exception as error:
            last = last or error
            continue
        if "task_ids" in inspect.signature(model.forward).parameters and kind in (
            "POLY", "MULTITASK_PROMPT_TUNING",
        ):  # fmt: skip
            yield model, batch | {"task_ids": torch.zeros(N, dtype=torch.long)}, "text"
        yield model, batch, "text"
    raise last


def by_class(mapping: dict[str, object]) -> list[tuple[str, str]]:
    """Each class of a mapping with its family: of several, the one it is called after."""
    found: dict[str, str] = {}
    for family, offered in mapping.items():
        name = offered if isinstance(offered, str) else offered[0]
        if family in CONFIG_MAPPING:
            own = name.lower().startswith(family.replace("_", ""))
            if name not in found or own:
                found[name] = family
    return list(found.items())


def catalogue() -> dict[str, Builder]:
    """Every architecture by name: the kinds of TASKS, "timm" and "peft"."""
    found: dict[str, Builder] = {}
    classes: set[str] = set()
    for kind, tasks in TASKS.items():
        for task in tasks:
            for name, family in by_class(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")):
                if name in classes:
                    continue
                classes.add(name)
                key = f"{kind}/{family}"
                if key in found:
                    key += f"-{task.lower().replace('_', '-')}"
                found[key] = partial(hugging_face, kind, family, name)
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        if models:
            found[f"timm/{module}"] = partial(timm_model, smallest(models))
    for kind in sorted(kind.name for kind in peft.PeftType):
        found[f"peft/{kind.lower()}"] = partial(adapted, kind)
    return found
