"""A median of k means, k / ranks of which are a rank's own, is that of one process."""

from functools import partial

import pytest
import torch

import htv
from htv.ops.functional import apply_rule
from support import rank_misuse
from support.quick import quick_pairs
from support.rank_jobs import (
    assert_trains,
    data_parallel,
    fully_sharded,
    half_precision_alone,
    process_group,
)
from support.rank_models import aggregated, assert_one_vote, contributions

JOBS = {"ddp": data_parallel, "fsdp": fully_sharded, "process group": process_group}
WORLDS = quick_pairs([(2, 2), (2, 3), (4, 2), (4, 3)], [(2, 2), (4, 3)])
jobs = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())


@jobs
@pytest.mark.parametrize(("world", "means"), WORLDS)
def test_the_groups_of_one_backward_are_cut(ranks, job, world, means):
    sizes = [2 * means if world == 2 else means] * world
    assert_trains(ranks, job, world, htv.MedianOfMeans(means * world), sizes=sizes)


@jobs
@pytest.mark.parametrize(("world", "means"), WORLDS)
def test_micro_batches_are_buckets(ranks, job, world, means):
    sizes = [2 * means if world == 2 else means] * world
    rule = htv.MedianOfMeans(means * world)
    assert_trains(ranks, job, world, rule, sizes=sizes, micro=means)


SETTINGS = {
    "unused layer": {"model": "unused layer"},
    "convolutions": {"model": "images"},
    "tied embedding": {"model": "tied"},
    "excluded parameters": {"plain": ("n.weight", "n.bias", "b.bias")},
    "of two examples": {"sizes": [2, 2]},
}
OF_JOBS = {
    "ddp": {
        "convolutions in channels_last": {"model": "images in channels_last"},
        "unused layer": {"find_unused_parameters": True, "model": "unused layer"},
        "views of buckets": {"gradient_as_bucket_view": True},
        "static graph": {"static_graph": True, "steps": 3},
        "checkpointed": {"model": "checkpointed"},
        "checkpointed, reentrant": {"model": "checkpointed, reentrant", "static_graph": True},
        "another hook": {"hook": "allreduce_hook"},
        "compiled": {"compiled": True, "bucket_cap_mb": 25},
    },
    "fsdp": {
        "tied embedding": {"model": "tied", "units": "whole"},
        "shards of columns": {"columns": True},
        "checkpointed": {"model": "checkpointed"},
        "with replicas": {"replicas": 2},  # what layers recorded is exchanged
    },
    "process group": {
        "convolutions in channels_last": {"model": "images in channels_last"},
        "one long block": {"long": True},
    },
}
CASES = {
    f"{name}, {case}": (JOBS[name], settings)
    for name, own in OF_JOBS.items()
    for case, settings in {**SETTINGS, **own}.items()
}


@pytest.mark.parametrize(("job", "settings"), CASES.values(), ids=CASES.keys())
def test_settings(ranks, job, settings):
    assert_trains(ranks, job, 2, htv.MedianOfMeans(4), **settings)
    if not settings.keys() & {"static_graph", "replicas"}:  # torch's own limit; htv's
        assert_trains(ranks, job, 2, htv.MedianOfMeans(4), micro=2, **settings)


@jobs
@pytest.mark.parametrize("buckets", [4, 5])
def test_one_rank(ranks, job, buckets):
    """Its buckets are those of one process, of unequal size, too."""
    assert_trains(ranks, job, 1, htv.MedianOfMeans(buckets))


@jobs
@pytest.mark.parametrize("means", [2, 3])
def test_half_precision(ranks, job, means):
    """Sums of buckets are rounded on their rank, as those of a rank are: two may cancel then."""
    rule = htv.MedianOfMeans(2 * means)
    alone = ranks.run(half_precision_alone, 1, rule)[0]
    for micro in (1, means):
        one, other = ranks.run(partial(job, dtype=torch.bfloat16, micro=micro), 2, rule)
        for parameter, want in alone.items():
            assert one[parameter].dtype == torch.bfloat16
            assert torch.equal(one[parameter], other[parameter])
            off = (one[parameter].double() - want.double()).abs().max() / want.abs().max()
            assert off <= 0.02, f"{parameter} is off by {off:.1e}"


def by_layer(name: str, parameter: torch.Tensor) -> htv.Rule:
    """Return a rule of another kind for every layer, two of several means."""
    rules = {"a": htv.MedianOfMeans(4), "n": htv.Median(), "b": htv.MedianOfMeans(2)}
    rules["c"] = htv.MedianOfMeans(6) if parameter.ndim == 2 else htv.AndMask(0.4)
    return rules[name[0]]


@jobs
@pytest.mark.parametrize("size", ["several buckets", "one"])
def test_rules_of_all_kinds_together(ranks, job, size):
    settings = {
        data_parallel: {"bucket_cap_mb": 25},
        fully_sharded: {"units": "whole"},
        process_group: {},
    }[job]
    job = partial(job, **(settings if size == "one" else {}))
    expected = {
        name: len(c) * apply_rule(c, by_layer(name, c[0]))
        for name, c in contributions("net", [6, 6]).items()
    }
    assert_one_vote(ranks.run(job, 2, by_layer), expected)


def test_rows_of_any_number(ranks):
    """As many as an exchange of what layers record refuses."""
    for found, alone in ranks.run(rank_misuse.many_voters, 2, 16000, htv.MedianOfMeans(4)):
        for name, want in alone.items():
            torch.testing.assert_close(found[name], want, rtol=0, atol=1e-12)


def test_groups_of_several_examples(ranks):
    rule = htv.MedianOfMeans(6)
    found = ranks.run(rank_misuse.groups_on_one_rank_each, 2, rule)
    contributed = {k: c.unflatten(0, (6, 2)).sum(1) for k, c in contributions("net").items()}
    assert_one_vote(found, aggregated(contributed, rule))


def test_a_micro_batch_that_zero_grad_drops_is_no_bucket(ranks):
    rule = htv.MedianOfMeans(4)
    job = partial(rank_misuse.dropped_micro_batch, set_to_none=True, views=False, rule=rule)
    assert_one_vote(ranks.run(job, 2), aggregated(contributions("net", [6, 6]), rule))


@pytest.mark.parametrize("uses", [("a", "ab"), ("ab", "a")], ids=["the first", "the last"])
def test_a_micro_batch_that_does_not_reach_a_layer(ranks, uses):
    """Its groups contribute zeros there, as they do in one process."""
    found = ranks.run(rank_misuse.layer_left_out_once, 2, htv.MedianOfMeans(4), uses)
    for got, alone in found:
        assert_one_vote([found[0][0], got], alone)
