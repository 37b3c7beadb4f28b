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

from htv.integrations.trl import HtvSFTTrainer  # noqa: E402

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
