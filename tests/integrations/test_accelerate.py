"""Accelerate: the gradient at the optimizer's step is one vote of the micro-batches of
`accelerator.accumulate()` and of all processes.
"""

import os
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
    clipped,
    launch,
    logged_of_vectors,
    vectors,
    vote_of_vectors,
    watch,
)

pytest.importorskip("accelerate", reason="needs accelerate: hard-to-vary[trainers]")

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import GradientAccumulationPlugin  # noqa: E402

from htv.integrations.accelerate import measurements, prepare  # noqa: E402
from htv.integrations.voting import TrainerVotes  # noqa: E402

RULE = htv.AndMask(0.4)
ROWS = 16
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def trained(
    micro=1, clip=None, precision="no", rule=RULE, plugin=None, plain=False, each=False, **attach
):
    """Return what was seen at each of two steps of all rows, this rank's part of them here."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    steps = GradientAccumulationPlugin(num_steps=micro, sync_each_batch=each)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_plugin=steps, mixed_precision=precision
    )
    if plugin is not None:  # Accelerate itself shards on GPUs only
        shard(accelerator, plugin)
    model = Net() if precision != "no" else Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle, model, optimizer = prepare(accelerator, model, optimizer, rule=rule, **attach)
    if plugin is not None:
        shard(accelerator, plugin)
    seen = []
    watch(optimizer.optimizer, handle.model, seen)
    for step in range(2):
        x, y = vectors(ROWS, seed=step)
        x, y = x[RANK::RANKS], y[RANK::RANKS]
        for part, targets in zip(x.chunk(micro), y.chunk(micro), strict=True):
            with accelerator.accumulate(model):
                out = model(part.to(torch.float32 if precision != "no" else torch.float64))
                loss = F.cross_entropy(out.double(), targets)
                if plain:
                    (loss / micro).backward()
                else:
                    accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return seen, handle


def shard(accelerator, plugin):
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


def assert_votes(seen, clip=None, rule=RULE, same=assert_same):
    assert len(seen) == 2
    for step, (parameters, grads) in enumerate(seen):
        wanted = vote_of_vectors(rule, parameters, *vectors(ROWS, seed=step))
        same(grads, wanted if clip is None else clipped(wanted, clip))


CASES = {
    "one batch": {},
    "accumulation": {"micro": 4},
    "accumulation and clipping": {"micro": 4, "clip": 0.01},
    "median of micro-batches": {"micro": 4, "rule": htv.MedianOfMeans(4)},
}


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    options = CASES[name]
    wanted = {k: v for k, v in options.items() if k in ("clip", "rule")}
    assert_votes(trained(**options)[0], **wanted)


def test_bf16():
    assert_votes(trained(micro=4, precision="bf16")[0], same=assert_close)


def test_a_backward_that_goes_by_itself_is_refused():
    with pytest.raises(RuntimeError, match=r"accelerator.backward\(loss\) in the place"):
        trained(micro=4, plain=True)


def test_without_an_optimizer_nothing_is_prepared_to_vote():
    with pytest.raises(ValueError, match="needs the optimizer"):
        prepare(Accelerator(cpu=True), Net(), rule=RULE)


class DeepSpeedEngine(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, DeepSpeedEngine])
def test_other_wrappers_are_refused_by_name(wrap):
    model = Net()
    with pytest.raises(htv.UnsupportedError, match=wrap.__name__):
        TrainerVotes(wrap(model), model, RULE, False)
    assert "forward" not in vars(model)


def told(**options):
    """Train; return what was seen at the last step, and the numbers for a logger."""
    seen, handle = trained(stats=True, **options)
    return seen[-1], measurements(handle)


def assert_told(found, rule=RULE, without=()):
    assert not isinstance(found, str), found
    (parameters, _), numbers = found
    wanted = logged_of_vectors(rule, parameters, *vectors(ROWS, seed=1))
    assert len(wanted) == 4 * len(parameters)
    left_out = {name for name in wanted if name.endswith(tuple(without))}
    assert set(numbers) == set(wanted) - left_out
    assert_logged(numbers, {name: wanted[name] for name in numbers})


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("rule", [RULE, htv.Mean(), htv.MedianOfMeans(4)], ids=repr)
def test_numbers_for_a_logger_are_of_the_whole_vote(micro, rule):
    assert_told(told(micro=micro, rule=rule), rule)


def test_one_voter_per_step_is_told_once():
    x, y = vectors(3)
    accelerator = Accelerator(cpu=True)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle, model, optimizer = prepare(accelerator, model, optimizer, rule=RULE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for e in range(3):
            accelerator.backward(F.cross_entropy(model(x[e : e + 1]), y[e : e + 1]))
            optimizer.step()
            optimizer.zero_grad()
    assert len([w for w in told if "one group alone votes" in str(w.message)]) == 1


def plugin_of_fsdp2():
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")


def sharded(**options):
    return trained(plugin=plugin_of_fsdp2(), **options)[0]


def old_sharding():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Net()
    TrainerVotes(FullyShardedDataParallel(model, device_id="cpu"), model, RULE, False)


def two_ranks(micro=1, clip=None, **options):
    warnings.filterwarnings("error", message=".*adds to the aggregate")
    return trained(micro, clip, **options)[0]


JOBS = {
    "one batch": lambda: two_ranks(),
    "accumulation": lambda: two_ranks(micro=4),
    "accumulation and clipping": lambda: two_ranks(micro=4, clip=0.01),
    "bf16": lambda: two_ranks(micro=4, precision="bf16"),
    "median of ranks": lambda: two_ranks(vote="ranks", rule=htv.MedianOfMeans(2)),
    "FSDP2": lambda: sharded(micro=4),
    "FSDP2 and clipping": lambda: sharded(micro=4, clip=0.01),
    "FSDP1": old_sharding,
    "numbers": lambda: told(micro=4),
    "numbers without votes": lambda: told(micro=4, rule=htv.Mean()),
    "numbers of FSDP2": lambda: told(micro=4, plugin=plugin_of_fsdp2()),
    "each batch synchronised": lambda: two_ranks(micro=4, each=True),
}


@pytest.fixture(scope="module")
def ranks():
    return launch(__file__, ranks=2)


@pytest.mark.parametrize("name", ["one batch", "accumulation", "FSDP2"])
def test_two_processes(ranks, name):
    first, second = (found[name] for found in ranks)
    assert not isinstance(first, str), first
    assert_votes(first)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(g, other[1][n]) for n, g in one[1].items()), "ranks differ"


@pytest.mark.parametrize("name", ["accumulation and clipping", "FSDP2 and clipping"])
def test_two_processes_clip_what_was_voted(ranks, name):
    assert not isinstance(ranks[0][name], str), ranks[0][name]
    assert_votes(ranks[0][name], clip=0.01)


def test_two_processes_in_bf16(ranks):
    assert_votes(ranks[0]["bf16"], same=assert_close)


@pytest.mark.parametrize("name", ["numbers", "numbers of FSDP2"])
def test_numbers_for_a_logger_are_of_all_processes(ranks, name):
    for found in ranks:
        assert_told(found[name])


def test_numbers_that_processes_do_not_exchange_are_left_out(ranks):
    for found in ranks:
        assert_told(found["numbers without votes"], htv.Mean(), without=["mean_agreement"])


def test_old_sharding_is_refused_by_name(ranks):
    assert "FSDP1" in ranks[0]["FSDP1"] and "fsdp_version=2" in ranks[0]["FSDP1"]


def test_micro_batches_that_are_all_synchronised_are_refused(ranks):
    assert "no_sync" in ranks[0]["each batch synchronised"]


if __name__ == "__main__":
    answer(JOBS)
