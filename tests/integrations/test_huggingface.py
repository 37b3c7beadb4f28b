"""Hugging Face `Trainer`: the gradient at the optimizer's step is one vote of all micro-batches and
ranks, by an oracle that takes one row at a time.
"""

import logging
import os
import tempfile
import warnings

import pytest
import torch

import htv
from support.trainers import (
    answer,
    assert_close,
    assert_logged,
    assert_same,
    clipped,
    launch,
    logged,
    vote,
    watch,
)

pytest.importorskip("transformers", reason="needs transformers: hard-to-vary[trainers]")
pytest.importorskip("accelerate", reason="needs accelerate: hard-to-vary[trainers]")

from transformers import (  # noqa: E402
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

from htv.integrations.huggingface import HtvTrainer  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY, LENGTH, ROWS = 41, 7, 16
RULE = htv.AndMask(0.5)
KEYS = [f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)]  # zero but for rounding


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def rows():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, LENGTH + 1, (2 * ROWS,), generator=generator).tolist()
    ids = torch.randint(3, VOCABULARY, (2 * ROWS, LENGTH), generator=generator)
    return [{"input_ids": i[:n].tolist()} for i, n in zip(ids, lengths, strict=True)]


def collate(items):
    ids = torch.zeros(len(items), LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        ids[row, :n] = labels[row, :n] = torch.tensor(item["input_ids"])
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def expected(parameters, chosen, smoothing=0.0, rule=RULE, total=None):
    """The vote of some rows, each alone, as parts of the loss that Trainer has for all."""
    model = gpt2()
    model.load_state_dict(parameters, strict=False)
    if total is None:  # Trainer counts first tokens, too
        total = sum(len(row["input_ids"]) for row in chosen)

    def loss(row):
        batch = collate([row])

        def of(model):
            if not smoothing:
                return model(**batch, num_items_in_batch=total).loss
            logits = model(batch["input_ids"]).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            return (
                torch.nn.functional.cross_entropy(
                    logits, labels, reduction="sum", label_smoothing=smoothing
                )
                / total
            )

        return of

    return vote(rule, model, [loss(row) for row in chosen], plain=KEYS)


class Watch(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        watch(optimizer.optimizer, model, self.steps)


def trained(model=None, rule=RULE, resume=None, attach=None, data=None, collator=None, **options):
    """Return what was seen at each step, and the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "use_cpu": True, "max_steps": 2, "max_grad_norm": 0,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "logging_strategy": "no",
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        arguments.update(options)
        seen = Watch()
        trainer = HtvTrainer(
            model or gpt2(),
            TrainingArguments(**arguments),
            train_dataset=data or rows(),
            eval_dataset=rows()[:4],
            data_collator=collator or collate,
            callbacks=[seen],
            rule=rule,
            attach={"exclude": KEYS, **(attach or {})},
        )
        trainer.train(resume_from_checkpoint=resume)
    return seen.steps, trainer


def at_steps(**options):
    return trained(**options)[0]


def batches(per_device, accumulation, **options):
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        **options,
    }


def resumed(**options):
    """The second of two steps, by a trainer that starts at a checkpoint of the first."""
    folder = os.environ.get("HTV_TEST_FOLDER") or tempfile.mkdtemp()
    keep = {"output_dir": folder, "save_strategy": "steps", "save_steps": 1}
    trained(**options, **keep)
    return at_steps(resume=f"{folder}/checkpoint-1", **options, **keep)


def assert_votes(steps, smoothing=0.0, rule=RULE, norm=None, first=0, same=assert_same):
    assert len(steps) == 2 - first
    for number, (parameters, grads) in enumerate(steps, start=first):
        chosen = rows()[number * ROWS : (number + 1) * ROWS]
        wanted = expected(parameters, chosen, smoothing, rule)
        if norm is not None:
            wanted = clipped(wanted, norm)
        same(grads, wanted)


REENTRANT = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
}
CASES = {
    "one batch": (batches(16, 1), {}),
    "accumulation": (batches(4, 4), {}),
    "accumulation and clipping": (batches(4, 4, max_grad_norm=0.01), {"norm": 0.01}),
    "rows one by one": (batches(1, 16), {}),
    "label smoothing": (batches(4, 4, label_smoothing_factor=0.1), {"smoothing": 0.1}),
    "checkpointing": (batches(4, 4, activation_checkpointing=True), {}),
    "reentrant checkpointing": (batches(4, 4, **REENTRANT), {}),
    "evaluation in between": (batches(4, 4, eval_strategy="steps", eval_steps=1), {}),
}
BETWEEN_RANKS = {
    "one batch": (batches(8, 1), {}),
    "accumulation": (batches(2, 4), {}),
    "accumulation and clipping": (batches(2, 4, max_grad_norm=0.01), {"norm": 0.01}),
    "rows one by one": (batches(1, 8), {}),
    "label smoothing": (batches(2, 4, label_smoothing_factor=0.1), {"smoothing": 0.1}),
    "checkpointing": (batches(2, 4, activation_checkpointing=True), {}),
    "reentrant checkpointing": (batches(2, 4, **REENTRANT), {}),
    "evaluation in between": (batches(2, 4, eval_strategy="steps", eval_steps=1), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    options, wanted = CASES[name]
    assert_votes(at_steps(**options), **wanted)


def test_order_rules_need_no_accumulation():
    assert_votes(at_steps(**batches(16, 1), rule=htv.Median()), rule=htv.Median())
    with pytest.raises(ValueError, match="MedianOfMeans"):
        at_steps(**batches(4, 4), rule=htv.Median())


def test_a_bucket_of_a_median_is_a_micro_batch():
    rule = htv.MedianOfMeans(4)
    assert_votes(at_steps(**batches(4, 4), rule=rule), rule=rule)


def test_bf16():
    model = gpt2().float()
    assert_votes(at_steps(model=model, **batches(4, 4, bf16=True)), same=assert_close)


def test_rows_sorted_by_length_all_vote():
    options = batches(4, 4, train_sampling_strategy="group_by_length", max_steps=1)
    (step,) = at_steps(data=rows()[:ROWS], **options)
    assert_same(step[1], expected(step[0], rows()[:ROWS]))


def test_resuming_continues():
    assert_votes(resumed(**batches(4, 4)), first=1)


def test_the_last_step_of_an_epoch_has_fewer_micro_batches():
    options = batches(4, 4, max_steps=-1, num_train_epochs=1)
    first, last = at_steps(data=rows()[:22], **options)
    assert_same(first[1], expected(first[0], rows()[:16]))
    assert_same(last[1], expected(last[0], rows()[16:22]))


def test_packed_sequences_vote():
    options = batches(8, 2, remove_unused_columns=False)
    for flags in (True, False):
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flags)
        steps = at_steps(collator=collator, **options)
        for number, (parameters, grads) in enumerate(steps):
            chosen = rows()[number * ROWS : (number + 1) * ROWS]
            total = sum(len(row["input_ids"]) - 1 for row in chosen)
            wanted = expected(parameters, chosen, total=total)
            assert_same(grads, wanted)


def test_one_voter_per_step_is_told_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        at_steps(**batches(1, 1))
    told = [str(w.message) for w in told if "one group alone votes" in str(w.message)]
    assert len(told) == 1 and "per_device_train_batch_size=1" in told[0]


def test_the_model_is_plain_before_and_after():
    model = gpt2()
    _, trainer = trained(model=model, **batches(16, 1))
    assert trainer.htv_handle is None and "forward" not in vars(model)
    assert "backward" not in vars(trainer.accelerator)


def told(**options):
    """Train; return what was seen at the steps, and what was logged at them."""
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    steps, trainer = trained(attach={"stats": True}, **logs, **options)
    return steps, trainer.state.log_history


def assert_told(found):
    assert not isinstance(found, str), found
    steps, history = found
    for number, (parameters, _) in enumerate(steps):
        model, batch = gpt2(), collate(rows()[number * ROWS : (number + 1) * ROWS])
        model.load_state_dict(parameters, strict=False)
        wanted = logged(RULE, model, lambda model, batch=batch: model(**batch).loss, KEYS)
        names = {n.rpartition("/")[2] for n in wanted}
        assert names == {"kept_fraction", "mean_agreement", "m_coherence", "noise_scale"}
        assert_logged(history[number], wanted)


@pytest.mark.parametrize("options", [batches(16, 1), batches(4, 4)], ids=["", "accumulation"])
def test_how_far_examples_agree_is_logged(options):
    assert_told(told(**options))


def test_how_far_examples_of_two_processes_agree_is_logged(quick_ranks):
    for found in quick_ranks:
        assert_told(found["logged"])


def test_optimizers_that_step_inside_backward_are_refused():
    model = gpt2()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(htv.UnsupportedError, match="optim='sgd'"):
        at_steps(model=model, **batches(4, 4))


JOBS = {name: lambda o=options: at_steps(**o) for name, (options, _) in BETWEEN_RANKS.items()}
JOBS["resumed"] = lambda: resumed(**batches(2, 4))
JOBS["bf16"] = lambda: at_steps(model=gpt2().float(), **batches(2, 4, bf16=True))


JOBS["logged"] = lambda: told(**batches(2, 4))


QUICK = ["accumulation and clipping", "reentrant checkpointing", "resumed"]
SLOW = [name for name in JOBS if name not in (*QUICK, "logged")]


def ranks(folder, names):
    return launch(__file__, *names, ranks=2, HTV_TEST_FOLDER=str(folder))


@pytest.fixture(scope="module")
def quick_ranks(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("quick"), [*QUICK, "logged"])


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("slow"), SLOW)


def assert_two_processes(found, name):
    first, second = (rank[name] for rank in found)
    assert not isinstance(first, str), first
    options = {"bf16": {"same": assert_close}, "resumed": {"first": 1}}
    assert_votes(first, **options.get(name, BETWEEN_RANKS.get(name, (0, {}))[1]))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(g, other[1][n]) for n, g in one[1].items()), "ranks differ"


@pytest.mark.parametrize("name", QUICK)
def test_two_processes(quick_ranks, name):
    assert_two_processes(quick_ranks, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_more(slow_ranks, name):
    assert_two_processes(slow_ranks, name)


def test_nothing_is_left_after_an_error():
    class Failing(TrainerCallback):
        def on_substep_end(self, *_, **__):
            raise ZeroDivisionError

    model = gpt2()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[], **batches(4, 4))
        trainer = HtvTrainer(
            model, arguments, train_dataset=rows(), data_collator=collate, rule=RULE,
            callbacks=[Failing()],
        )  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert "forward" not in vars(model) and "backward" not in vars(trainer.accelerator)


if __name__ == "__main__":
    answer(JOBS)
