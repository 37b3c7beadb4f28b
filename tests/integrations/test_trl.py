"""`SFTTrainer` of TRL, with its default loss: the gradient at the optimizer's step is one vote of
all sequences, padded or packed, by an oracle that takes one sequence at a time.
"""

import logging
import tempfile

import pytest
import torch

import htv
from support.trainers import answer, assert_same, clipped, launch, vote, watch

for name in ("transformers", "trl", "datasets"):
    pytest.importorskip(name, reason=f"needs {name}: hard-to-vary[trainers]")

from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from htv.integrations.trl import HtvSFTTrainer, show_head  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
disable_progress_bars()
RULE, SEQUENCES = htv.AndMask(0.5), 16


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(30)}}
    found = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def sequences(count=SEQUENCES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, 33, (5 + i % 3,), generator=generator).tolist() + [2] for i in range(count)
    ]


class Watch(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        watch(optimizer.optimizer, model, self.steps)


def trained(model=None, **options):
    """Return what was seen at the one step of all sequences."""
    seen = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "use_cpu": True, "max_steps": 1, "max_grad_norm": 0,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False,
            "optim": "sgd", "activation_checkpointing": False, "max_length": 32,
            "logging_strategy": "no", "train_sampling_strategy": "sequential",
            "shuffle_dataset": False,
        }  # fmt: skip
        arguments.update(options)
        trainer = HtvSFTTrainer(
            model or llama(),
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_dict({"input_ids": sequences()}),
            processing_class=tokenizer(),
            callbacks=[seen],
            rule=RULE,
        )
        trainer.train()
    return seen.steps


def expected(parameters, make=llama):
    model = make()
    model.load_state_dict(parameters)
    total = sum(len(ids) - 1 for ids in sequences())

    def loss(ids):
        row = torch.tensor([ids])

        def of(model):
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum") / total

        return of

    return vote(RULE, model, [loss(ids) for ids in sequences()])


def batches(per_device, accumulation, **options):
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        **options,
    }


CASES = {
    "one batch": batches(16, 1),
    "accumulation": batches(4, 4),
    "rows one by one": batches(1, 16),
    "clipping": batches(4, 4, max_grad_norm=0.01),
    "padding-free": batches(4, 4, padding_free=True, max_length=None),
    "packing": batches(1, 4, packing=True, num_train_epochs=1, max_steps=-1),
    "checkpointing": batches(4, 4, activation_checkpointing=True),
    "packing and checkpointing": batches(
        1, 4, packing=True, num_train_epochs=1, max_steps=-1, activation_checkpointing=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    (step,) = trained(**CASES[name])
    wanted = expected(step[0])
    assert_same(step[1], clipped(wanted, 0.01) if name == "clipping" else wanted)


def test_adapters_vote():
    peft = pytest.importorskip("peft", reason="needs peft: hard-to-vary[models]")

    def adapted():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(llama(), config).double()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    options = batches(4, 4, padding_free=True, max_length=None)
    ((parameters, grads),) = trained(model=adapted(), **options)
    assert_same(grads, expected(parameters, adapted))


def test_the_loss_is_that_of_trl():
    from trl import SFTTrainer

    losses = []
    for kind, more in ((SFTTrainer, {}), (HtvSFTTrainer, {"rule": htv.Mean()})):
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder, use_cpu=True, max_steps=3, report_to=[], logging_steps=1, bf16=False,
                save_strategy="no", disable_tqdm=True, learning_rate=0.1, optim="sgd",
                eval_strategy="steps", eval_steps=1,
            )  # fmt: skip
            data = Dataset.from_dict({"input_ids": sequences()})
            trainer = kind(
                llama(), args=arguments, train_dataset=data, eval_dataset=data,
                processing_class=tokenizer(), **more,
            )  # fmt: skip
            trainer.train()
        names = ("loss", "entropy", "mean_token_accuracy", "eval_loss")
        losses.append(
            [entry[n] for entry in trainer.state.log_history for n in names if n in entry]
        )
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-4)


HEADS = {
    "log-probabilities": dict(outputs=("log_probs",)),
    "all outputs, a temperature": dict(
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), temperature=0.7
    ),
    "a scale and a softcap": dict(outputs=("entropy",), config=dict(
        logit_scale=0.5, final_logit_softcapping=3.0)),
}  # fmt: skip


def headed(name, shown):
    options = dict(HEADS[name])
    model = llama()
    for key, value in options.pop("config", {}).items():
        setattr(model.config, key, value)
    add_fused_lm_head(model, **options)
    if shown:
        show_head(model)
    return model


def padded():
    rows = sequences(5)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    return dict(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100))


@pytest.mark.parametrize("rule", [htv.Mean(), RULE, htv.Median(), htv.WinsorizedMean(1)], ids=repr)
@pytest.mark.parametrize("name", HEADS)
def test_a_shown_head_votes(name, rule):
    """As trainers by preference use it: a loss on log-probabilities, clipped ratios and entropy."""
    model, batch = headed(name, shown=True), padded()
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.3, 1.5]).double()

    def loss(found, advantages):
        ratio = (found.log_probs - 0.9 * found.log_probs.detach()).exp()
        parts = torch.min(ratio, ratio.clamp(0.8, 1.2)) * advantages[:, None]
        bonus = 0 if found.entropy is None else 0.1 * found.entropy
        return ((parts + bonus) * found.label_mask).sum()

    def one(e):
        mine = {key: value[e : e + 1] for key, value in batch.items()}
        return lambda m: loss(m(**mine, fused_lm_head=True), advantages[e : e + 1])

    wanted = vote(rule, model, [one(e) for e in range(5)])
    with htv.attach(model, rule, batch=("input_ids", "attention_mask", "labels")):
        loss(model(**batch, fused_lm_head=True), advantages).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, wanted)


@pytest.mark.parametrize("name", HEADS)
def test_a_shown_head_computes_what_trls_does(name):
    batch, found = padded(), []
    for shown in (False, True):
        model = headed(name, shown)
        output = model(**batch, fused_lm_head=True)
        output.loss.backward()
        with torch.no_grad():
            plain = model(**batch, fused_lm_head=True)  # TRL's own
        assert torch.equal(model(**batch).logits, llama()(**batch).logits) or "scale" in name
        found.append((output, plain, model.lm_head.weight.grad))
    for key in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        values = [getattr(o, key) for o in (*found[0][:2], *found[1][:2])]
        assert [v is None for v in values] == [values[0] is None] * 4
        for other in values[1:] if values[0] is not None else ():
            torch.testing.assert_close(other.double(), values[0].double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-6)


def test_a_head_that_is_not_shown_is_refused_and_what_has_none_is_told():
    batch, model = padded(), headed("log-probabilities", shown=False)
    with htv.attach(model, RULE):
        with pytest.raises(htv.UnsupportedError, match="'lm_head.weight'.*autograd.Function"):
            model(**batch, fused_lm_head=True).loss.backward()
        with pytest.raises(RuntimeError, match="before htv.attach"):
            show_head(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no fused head.*add_fused_lm_head"):
        show_head(llama())


def test_padding_tokens_that_would_vote_are_refused():
    with pytest.raises(htv.UnsupportedError, match="pad_to_multiple_of"):
        trained(**batches(4, 4, padding_free=True, max_length=None, pad_to_multiple_of=16))


JOBS = {
    "accumulation": lambda: trained(**batches(2, 4)),
    "padding-free": lambda: trained(**batches(2, 4, padding_free=True, max_length=None)),
}


@pytest.mark.slow
def test_two_processes():
    first, second = launch(__file__, ranks=2)
    for name in JOBS:
        assert not isinstance(first[name], str), first[name]
        ((parameters, grads),) = first[name]
        assert_same(grads, expected(parameters))
        assert all(torch.equal(g, second[name][0][1][n]) for n, g in grads.items()), "ranks differ"


if __name__ == "__main__":
    answer(JOBS)
