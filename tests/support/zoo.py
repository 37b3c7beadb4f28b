"""Models people train, as their libraries build them: randomly initialised, tiny, no downloads.

MODELS maps a name to a builder of (model, batch), where batch is what `htv.check` takes. Needs the
extra `models`.
"""

from __future__ import annotations

# isort: off
import support.torchvision_operators  # noqa: F401, before what imports torchvision
# isort: on

import peft
import timm
import torch
import transformers
from timm.models import efficientnet
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

N, T, VOCABULARY = 5, 7, 31  # examples, tokens, words
QUIET = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    **QUIET,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=20, max_position_embeddings=12, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_decoder_layers=2,
    num_heads=2, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    dropout_rate=0.0, use_cache=False, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
    max_position_embeddings=12, dropout=0.0, use_cache=False, decoder_start_token_id=2,
    forced_eos_token_id=None, **QUIET,
)  # fmt: skip
VISION = dict(
    image_size=12, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
)


def tokens(length: int | None = None) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (N, length or T))


def padded(length: int | None = None) -> dict[str, Tensor]:
    """Sentences of different lengths, padded at the end."""
    ids = tokens(length)
    lengths = ids.shape[1] - torch.arange(len(ids)) % ids.shape[1]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def images(size: int = 12) -> Tensor:
    return torch.randn(N, 3, size, size)


# -- Hugging Face ----------------------------------------------------------------------------------


def transformer(model: str, config: str, attention: str = "eager", **options) -> nn.Module:
    config = getattr(transformers, config)(attn_implementation=attention, **options)
    return getattr(transformers, model)(config)


def gpt2(attention: str = "eager"):
    options = dict(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12, use_cache=False
    )
    options |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    return transformer("GPT2LMHeadModel", "GPT2Config", attention, **options), padded()


def llama(attention: str = "eager"):
    return transformer("LlamaForCausalLM", "LlamaConfig", attention, **LLAMA), padded()


def bert(attention: str = "eager"):
    return transformer("BertForMaskedLM", "BertConfig", attention, **BERT), padded()


def t5():
    model = transformer("T5ForConditionalGeneration", "T5Config", **T5)
    return model, padded() | {"decoder_input_ids": tokens(4)}


def vit():
    options = VISION | dict(
        intermediate_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformer("ViTForImageClassification", "ViTConfig", **options), {
        "pixel_values": images()
    }


def beit():
    options = VISION | dict(
        intermediate_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    options |= dict(drop_path_rate=0.0, use_relative_position_bias=True)
    return transformer("BeitForImageClassification", "BeitConfig", **options), {
        "pixel_values": images()
    }


def whisper():
    options = dict(
        vocab_size=VOCABULARY, num_mel_bins=6, d_model=16, dropout=0.0, encoder_layers=2,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, max_source_positions=8, max_target_positions=8, use_cache=False,
        decoder_start_token_id=1, **QUIET,
    )  # fmt: skip
    model = transformer("WhisperForConditionalGeneration", "WhisperConfig", **options)
    return model, {"input_features": torch.randn(N, 6, 16), "decoder_input_ids": tokens(4)}


def whisper_encoder():
    model, batch = whisper()
    return model.get_encoder(), {"input_features": batch["input_features"]}


def mixtral():
    """With more experts than every example can reach; the default implementation of experts knows
    no float64.
    """
    options = LLAMA | dict(
        num_local_experts=8, num_experts_per_tok=2, experts_implementation="eager"
    )
    return transformer("MixtralForCausalLM", "MixtralConfig", **options), {"input_ids": tokens(4)}


def qwen3_moe():
    options = LLAMA | dict(
        head_dim=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12,
        decoder_sparse_step=1, norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip
    return transformer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **options), {"input_ids": tokens(4)}


def switch():
    """A capacity no expert reaches: what it drops depends on the other tokens, of the same example
    alone.
    """
    options = T5 | dict(
        num_experts=4, expert_capacity=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    )
    config = "SwitchTransformersConfig"
    model = transformer(
        "SwitchTransformersForConditionalGeneration", config, router_jitter_noise=0.0, **options
    )
    return model, padded() | {"decoder_input_ids": tokens(4)}


def opt():
    options = dict(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=20,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, dropout=0.0,
        use_cache=False, **QUIET,
    )  # fmt: skip
    return transformer("OPTForCausalLM", "OPTConfig", **options), padded()


def bart():
    model = transformer("BartForConditionalGeneration", "BartConfig", **BART)
    return model, padded() | {"decoder_input_ids": tokens(4)}


def clip_text():
    options = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=20, projection_dim=12,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, bos_token_id=1,
        eos_token_id=VOCABULARY - 1, pad_token_id=0,
    )  # fmt: skip
    batch = padded()
    ends = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(len(ends)), ends] = (
        VOCABULARY - 1
    )  # where the pooled token is looked for
    return transformer("CLIPTextModelWithProjection", "CLIPTextConfig", **options), batch


# -- timm ------------------------------------------------------------------------------------------


def timm_model(name: str, size: int = 16, **options):
    model = timm.create_model(name, pretrained=False, num_classes=3, **options)
    return model, images(size)


def resnet_groupnorm():
    options = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), zero_init_last=False)
    norm = lambda channels, **where: nn.GroupNorm(2, channels, **where)
    return timm_model("resnet18", size=32, norm_layer=norm, **options)


def timm_vit():
    return timm_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2
    )


def convnext():
    return timm_model(
        "convnext_atto", size=32, dims=(4, 8, 8, 8), depths=(1, 1, 1, 1), ls_init_value=0.5
    )


def mlp_mixer():
    return MlpMixer(num_classes=3, img_size=16, patch_size=4, embed_dim=12, num_blocks=2), images(
        16
    )


def swin():
    options = dict(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2)
    )
    return timm_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **options)


def timm_beit():
    return timm_model(
        "beit_base_patch16_224", size=32, img_size=32, embed_dim=16, depth=2, num_heads=2
    )


def efficientnet_frozen_norms():
    """Depthwise and squeeze-excite blocks; the BatchNorms in eval mode, with statistics as if
    trained.
    """
    stages = efficientnet.decode_arch_def(
        [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e2_c8_se0.25_noskip"], ["ir_r1_k5_s1_e2_c8"]]
    )
    model = efficientnet.EfficientNet(
        stages, num_classes=3, num_features=12, stem_size=8, act_layer=nn.SiLU
    )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.eval()
    return model, images(16)


# -- PEFT ------------------------------------------------------------------------------------------


def lora(base, **options):
    """Adapters on a frozen model, as after some training: B is not zero any more."""
    model, batch = base
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, batch


TEXT = {
    "gpt2": gpt2,
    "gpt2-sdpa": lambda: gpt2("sdpa"),
    "llama": llama,
    "llama-sdpa": lambda: llama("sdpa"),
    "bert": bert,
    "bert-sdpa": lambda: bert("sdpa"),
    "t5": t5,
    "bart": bart,
    "opt": opt,
    "clip-text": clip_text,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "switch": switch,
    "gpt2-lora": lambda: lora(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "llama-lora": lambda: lora(llama(), target_modules="all-linear"),
}
MODELS = TEXT | {
    "whisper-encoder": whisper_encoder,
    "whisper": whisper,
    "vit": vit,
    "beit": beit,
    "timm-vit": timm_vit,
    "timm-resnet-groupnorm": resnet_groupnorm,
    "timm-efficientnet-frozen-batchnorm": efficientnet_frozen_norms,
    "timm-convnext": convnext,
    "timm-mlp-mixer": mlp_mixer,
    "timm-swin": swin,
    "timm-beit": timm_beit,
}
