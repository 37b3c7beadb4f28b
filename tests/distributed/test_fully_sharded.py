"""Under FSDP2 the examples of all ranks vote as those of one process do."""

from functools import partial

import pytest
import torch

import htv
from support.oracles import RULES, by_name
from support.quick import STREAMING_RULES, quick
from support.rank_jobs import (
    assert_trains,
    fully_sharded,
    half_precision_alone,
    stepped_in_backward,
)
from support.rank_models import EXAMPLES, aggregated, assert_one_vote, contributions

AND = htv.AndMask(0.4)
STREAMING = quick([rule for rule in RULES if rule.streaming], STREAMING_RULES)
ORDER = [htv.Median(), htv.MedianOfMeans(2), htv.WinsorizedMean(1)]
BY_RANK = [htv.AndMask(0.8), htv.SandMask(0.3, k=0.5), htv.GeometricMean(0.2), htv.Median()]


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_numbers_of_ranks(ranks, world):
    assert_trains(ranks, fully_sharded, world, AND)


@pytest.mark.parametrize("rule", STREAMING, **by_name)
def test_streaming_rules(ranks, rule):
    assert_trains(ranks, fully_sharded, 2, rule, micro=2)


@pytest.mark.parametrize("rule", ORDER, **by_name)
def test_order_rules_over_the_examples_of_all_ranks(ranks, rule):
    assert_trains(ranks, fully_sharded, 3, rule)


def test_ranks_are_the_buckets_of_a_median_of_means(ranks):
    assert_trains(ranks, fully_sharded, 4, htv.MedianOfMeans(4), micro=3)


@pytest.mark.parametrize("rule", BY_RANK, **by_name)
def test_each_rank_is_one_group(ranks, rule):
    assert_trains(ranks, fully_sharded, 4, rule, vote="ranks", micro=3)


@pytest.mark.parametrize("units", ["layers and root", "layers", "whole"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_what_is_sharded_and_when(ranks, order, units):
    assert_trains(ranks, fully_sharded, 2, AND, order=order, units=units)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_hybrid_sharding(ranks, world, micro):
    """With two ranks there are replicas only: every shard is whole."""
    assert_trains(ranks, fully_sharded, world, AND, replicas=2, micro=micro)


@pytest.mark.parametrize("rule", STREAMING, **by_name)
def test_micro_batches_that_are_reduced_one_by_one(ranks, rule):
    """Sums and votes wait as shards: no rank holds a whole gradient between micro-batches."""
    assert_trains(ranks, fully_sharded, 2, rule, micro=3, waits="set_is_last_backward")


def test_replicas_that_meet_in_the_last_micro_batch(ranks):
    settings = {"replicas": 2, "micro": 3, "waits": "set_requires_all_reduce"}
    assert_trains(ranks, fully_sharded, 4, AND, **settings)
    assert_trains(ranks, fully_sharded, 4, htv.GeometricMean(0.2), **settings)


@pytest.mark.parametrize("rule", [AND, htv.SandMask(0.3, k=0.5)], **by_name)
def test_ranks_with_unequal_numbers_of_examples(ranks, rule):
    assert_trains(ranks, fully_sharded, 3, rule, sizes=[1, 7, 4])


SETTINGS = {
    "kept after forward": {"reshard_after_forward": False},
    "convolutions": {"model": "images"},
    "tied embedding": {"model": "tied", "units": "whole"},
    "unused layer": {"model": "unused layer"},
    "shards of columns": {"columns": True, "micro": 2},
    "shards of columns, each rank one voter": {"columns": True, "vote": "ranks"},
    "checkpointed": {"model": "checkpointed"},
    "frozen weight": {"model": "frozen weight"},
    "excluded parameters": {"plain": ("n.weight", "n.bias", "b.bias")},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(ranks, settings):
    assert_trains(ranks, fully_sharded, 2, AND, **settings)


def test_mixed_precision(ranks):
    """Votes are those of one process that computes in bfloat16; sums are rounded per rank."""
    alone = ranks.run(half_precision_alone, 1, AND)[0]
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    job = partial(fully_sharded, dtype=torch.float32, **dtypes)
    found = ranks.run(job, 2, AND)
    assert_one_vote(found, {name: grad.double() for name, grad in alone.items()}, 0.05)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_sums_in_float16(ranks, world, replicas):
    """They are scaled before they are added up, or once where there is nothing to scatter."""
    half = {"param_dtype": torch.float16, "reduce_dtype": torch.float16}
    job = partial(fully_sharded, dtype=torch.float32, replicas=replicas, **half)
    expected = aggregated(contributions("net", [EXAMPLES // world] * world), htv.AndMask(0.0))
    found = ranks.run(job, world, htv.AndMask(0.0))
    for name, want in expected.items():
        off = (found[0][name].double() - want).abs().max() / want.abs().max()
        assert off <= 0.02, f"{name} is off by {off:.1e}"


@pytest.mark.parametrize("rule", [htv.AndMask(0.8), htv.SandMask(0.3, k=0.5)], **by_name)
def test_each_rank_is_one_group_among_replicas(ranks, rule):
    assert_trains(ranks, fully_sharded, 4, rule, replicas=2, vote="ranks")


def test_hooks_of_parameters_see_the_aggregate(ranks):
    """So an optimizer may step in backward, by register_post_accumulate_grad_hook."""
    expected = aggregated(contributions("net", [6, 6]), AND)
    for found in ranks.run(stepped_in_backward, 2, AND):
        for name, step in expected.items():
            torch.testing.assert_close(found[name], step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("units", ["layers and root", "whole"])
@pytest.mark.parametrize("steps", [1, 2])
def test_votes_of_one_rank_alone(ranks, units, steps):
    """vote='local' is the average of the ranks' own aggregates, in the first step as in others:
    units take gradients at different times, so parameters share no node.
    """
    found = ranks.run(partial(fully_sharded, vote="local", units=units, steps=steps), 2, AND)
    contributed = contributions("net", [6, 6])
    halves = [{k: c[part] for k, c in contributed.items()} for part in (slice(6), slice(6, 12))]
    one, other = (aggregated(half, AND) for half in halves)
    assert_one_vote(found, {name: one[name] + other[name] for name in contributed})
