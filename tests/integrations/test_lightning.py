"""Lightning: the gradient at the optimizer's step is one vote of all micro-batches and devices."""

import logging
import os
import tempfile
import warnings

import pytest
import torch
import torch.nn.functional as F

import htv
from support.trainers import (
    Net,
    answer,
    assert_close,
    assert_logged,
    assert_same,
    at_step,
    clipped,
    launch,
    logged_of_vectors,
    vectors,
    vote_of_vectors,
)

pytest.importorskip("lightning", reason="needs lightning: hard-to-vary[trainers]")

import lightning  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from htv.integrations.lightning import HtvCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RULE, ROWS = htv.AndMask(0.4), 16


class Watched(torch.optim.SGD):
    """Keeps what it steps with: Lightning runs the backward inside `step`, behind its hooks."""

    def __init__(self, model, seen):
        super().__init__(model.parameters(), lr=0.1)
        self.model, self.seen = model, seen

    def step(self, closure=None):
        loss = closure()
        self.seen.append(at_step(self.model))
        super().step()
        return loss


class Task(lightning.LightningModule):
    """Classify vectors; what is seen at the optimizer's steps is kept in `seen`."""

    def __init__(self, manual=0, clip=None, callback=None, shard=False, finishes=True):
        super().__init__()
        self.net, self.automatic_optimization = Net(), not manual
        self.manual, self.clip, self.shard, self.finishes = manual, clip, shard, finishes
        self.__dict__["callback"], self.seen = callback, []

    def configure_model(self):
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net.first, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, number):
        x, y = batch
        loss = F.cross_entropy(self.net(x.to(self.net.last.weight.dtype)).double(), y)
        if self.manual:
            self.step_by_hand(loss, number)
        return loss

    def step_by_hand(self, loss, number):
        last = (number + 1) % self.manual == 0
        ddp = self.trainer.strategy.model
        waits = not last and hasattr(ddp, "no_sync")
        with ddp.no_sync() if waits else torch.enable_grad():
            self.manual_backward(loss / self.manual)
        if last:
            optimizer = self.optimizers()
            if self.finishes:
                self.callback.finish()
            if self.clip:
                self.clip_gradients(optimizer, self.clip)
            optimizer.step()
            optimizer.zero_grad()

    def validation_step(self, batch, number):
        self.log("validation", batch[0].mean())

    def configure_optimizers(self):
        return Watched(self.net, self.seen)


def fitted(
    micro=1,
    clip=None,
    manual=False,
    devices=1,
    strategy="auto",
    precision="64-true",
    rule=RULE,
    finishes=True,
    logger=False,
    shard=False,
    rows=ROWS,
    size=None,
    **attach,
):
    """Return what was seen at the steps of two epochs, each of which is one step."""
    callback = HtvCallback(rule, accumulate=manual and micro > 1, **attach)
    task = Task(micro if manual else 0, clip, callback, shard, finishes)
    if shard:  # precision="64-true" is not for this strategy
        task.net.double()
    data = TensorDataset(*vectors(rows))
    loader = DataLoader(data, batch_size=size or rows // (micro * devices))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, logger=logger,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=1 if manual else micro, precision=precision,
            gradient_clip_val=None if manual else clip, callbacks=[callback],
            log_every_n_steps=1, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(task, loader, DataLoader(data, batch_size=4))
    left = type(vars(task).get("forward")).__module__  # Lightning leaves a method there under DDP
    assert callback.handle is None and not left.startswith("htv")
    return task.seen


def assert_votes(seen, clip=None, rule=RULE, same=assert_same):
    assert not isinstance(seen, str), seen
    assert len(seen) == 2
    for parameters, grads in seen:
        wanted = vote_of_vectors(rule, parameters, *vectors(ROWS))
        same(grads, wanted if clip is None else clipped(wanted, clip))


CASES = {
    "one batch": {},
    "accumulation": {"micro": 4},
    "accumulation and clipping": {"micro": 4, "clip": 0.01},
    "rows one by one": {"micro": 16},
    "by hand": {"manual": True},
    "by hand, accumulation": {"micro": 4, "manual": True},
    "by hand, accumulation and clipping": {"micro": 4, "manual": True, "clip": 0.01},
    "median": {"rule": htv.Median()},
    "median of micro-batches": {"micro": 4, "rule": htv.MedianOfMeans(4)},
}


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    options = CASES[name]
    wanted = {k: v for k, v in options.items() if k in ("clip", "rule")}
    assert_votes(fitted(**options), **wanted)


def test_bf16():
    assert_votes(fitted(micro=4, precision="bf16-mixed"), same=assert_close)


def test_a_step_by_hand_before_its_vote_ended_is_refused():
    with pytest.raises(RuntimeError, match="handle.finish()"):
        fitted(micro=4, manual=True, finishes=False)


def test_one_voter_per_step_is_told_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted(rows=2, size=1)
    assert len([w for w in told if "one group alone votes" in str(w.message)]) == 1


class Kept(Logger):
    """Keeps what is logged."""

    name = version = ""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step):
        self.rows.append(metrics)


def told(**options):
    """Fit; return what was seen at the steps, and what was logged."""
    logger = Kept()
    return fitted(stats=True, logger=logger, **options), logger.rows


def assert_told(found):
    """What is logged last is of the last step: all its micro-batches, all devices."""
    assert not isinstance(found, str), found
    seen, rows = found
    rows = [row for row in rows if any(name.startswith("htv/") for name in row)]
    wanted = logged_of_vectors(RULE, seen[-1][0], *vectors(ROWS))
    assert_logged(rows[-1], {n.replace("htv/", "htv/net.", 1): v for n, v in wanted.items()})


@pytest.mark.parametrize("options", [{}, {"micro": 4}, {"micro": 4, "manual": True}], ids=str)
def test_how_far_examples_agree_is_logged(options):
    assert_told(told(**options))


def test_nothing_is_left_after_an_error():
    class Failing(Task):
        def validation_step(self, batch, number):
            raise ZeroDivisionError

    callback = HtvCallback(RULE)
    task, loader = Failing(callback=callback), DataLoader(TensorDataset(*vectors(4)), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, precision="64-true", num_sanity_val_steps=0,
        callbacks=[callback], enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        trainer.fit(task, loader, loader)
    assert callback.handle is None and "forward" not in vars(task)


def ddp(**options):
    return lambda: fitted(devices=2, strategy="ddp", **options)


def fully_sharded(**options):
    return lambda: fitted(
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        shard=True,
        precision="32-true",
        **options,
    )


JOBS = {
    "one batch": ddp(),
    "accumulation": ddp(micro=4),
    "accumulation and clipping": ddp(micro=4, clip=0.01),
    "by hand, accumulation": ddp(micro=4, manual=True),
    "by hand, accumulation and clipping": ddp(micro=4, manual=True, clip=0.01),
    "bf16": ddp(micro=4, precision="bf16-mixed"),
    "numbers": lambda: told(devices=2, strategy="ddp", micro=4),
    "FSDP2": fully_sharded(micro=4),
    "FSDP2 and clipping": fully_sharded(micro=4, clip=0.01),
}


@pytest.fixture(scope="module")
def ranks():
    return launch(__file__, ranks=2)


@pytest.mark.parametrize("name", [n for n in JOBS if n not in ("bf16", "numbers")])
def test_two_devices(ranks, name):
    first, second = (found[name] for found in ranks)
    assert_votes(first, clip=0.01 if "clipping" in name else None)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(g, other[1][n]) for n, g in one[1].items()), "ranks differ"


def test_two_devices_are_logged_together(ranks):
    assert_told(ranks[0]["numbers"])


def test_two_devices_in_bf16(ranks):
    assert_votes(ranks[0]["bf16"], same=assert_close)


if __name__ == "__main__":
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "tests")  # ranks were started already
    answer(JOBS)
