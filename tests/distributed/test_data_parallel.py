"""Under DistributedDataParallel the examples of all ranks vote as those of one process do."""

from functools import partial

import pytest
import torch

import htv
from support import rank_misuse
from support.oracles import RULES, by_name
from support.quick import STREAMING_RULES, quick
from support.rank_jobs import (
    Skipping,
    assert_trains,
    by_power_sgd,
    data_parallel,
    optimized_by_shards,
    resumed,
    skipped,
)
from support.rank_models import aggregated, assert_one_vote, batch, by_ranks, contributions

AND = htv.AndMask(0.4)
STREAMING = quick([rule for rule in RULES if rule.streaming], STREAMING_RULES)
ORDER = quick(
    [rule for rule in RULES if not rule.streaming],
    (htv.Median(), htv.MedianOfMeans(3), htv.WinsorizedMean(1)),
)
BY_RANK = [htv.AndMask(0.8), htv.SandMask(0.3, k=0.5), htv.GeometricMean(0.2), htv.Median()]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_numbers_of_ranks(ranks, world):
    assert_trains(ranks, data_parallel, world, AND)


@pytest.mark.parametrize("rule", STREAMING, **by_name)
def test_streaming_rules(ranks, rule):
    assert_trains(ranks, data_parallel, 2, rule, micro=2)


@pytest.mark.parametrize("rule", ORDER, **by_name)
def test_order_rules_over_the_examples_of_all_ranks(ranks, rule):
    assert_trains(ranks, data_parallel, 3, rule)


def test_ranks_are_the_buckets_of_a_median_of_means(ranks):
    assert_trains(ranks, data_parallel, 4, htv.MedianOfMeans(4), micro=3)


@pytest.mark.parametrize("rule", [*BY_RANK, htv.TrimmedMean(1)], **by_name)
def test_each_rank_is_one_group(ranks, rule):
    assert_trains(ranks, data_parallel, 4, rule, vote="ranks", micro=3)


@pytest.mark.parametrize("order", ["before", "after", "wrapper"])
def test_attached_before_or_after_wrapping(ranks, order):
    assert_trains(ranks, data_parallel, 2, AND, order=order)


@pytest.mark.parametrize("sizes", [[1, 11], [7, 5], [2, 4, 6]], ids=str)
@pytest.mark.parametrize("rule", [AND, htv.SandMask(0.3, k=0.5), htv.Median()], **by_name)
def test_ranks_with_unequal_numbers_of_examples(ranks, rule, sizes):
    """Each rank's loss is its own mean, and counts alike."""
    assert_trains(ranks, data_parallel, len(sizes), rule, sizes=sizes)


SETTINGS = {
    "views of buckets": {"gradient_as_bucket_view": True},
    "views of buckets and micro-batches": {"gradient_as_bucket_view": True, "micro": 3},
    "static graph": {"static_graph": True, "steps": 3},
    "unused layer": {"find_unused_parameters": True, "model": "unused layer"},
    "looking for unused ones": {"find_unused_parameters": True},
    "convolutions": {"model": "images"},
    "convolutions in channels_last": {"model": "images in channels_last"},
    "tied embedding": {"model": "tied"},
    "checkpointed": {"model": "checkpointed"},
    "checkpointed, reentrant": {"model": "checkpointed, reentrant", "static_graph": True},
    "frozen weight": {"model": "frozen weight"},
    "another hook": {"hook": "allreduce_hook"},
    "excluded parameters": {"plain": ("n.weight", "n.bias", "b.bias")},
    "compiled": {"compiled": True, "bucket_cap_mb": 25},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(ranks, settings):
    assert_trains(ranks, data_parallel, 2, AND, **settings)


BY_SUMS = [AND, htv.GeometricMean(0.2), htv.MedianOfMeans(2)]


@pytest.mark.parametrize("rule", BY_SUMS, **by_name)
@pytest.mark.parametrize("uses", [("ab", "a"), ("a", "b")], ids=str)
def test_a_layer_that_some_ranks_skip(ranks, rule, uses):
    found = ranks.run(skipped, 2, rule, uses, "examples")
    assert_one_vote(found, aggregated(contributions_of(uses), rule))


def test_a_layer_that_some_ranks_skip_where_ranks_vote(ranks):
    found = ranks.run(skipped, 2, htv.Median(), ("ab", "a"), "ranks")
    assert_one_vote(
        found, aggregated(by_ranks(contributions_of(("ab", "a")), [6, 6]), htv.Median())
    )


def contributions_of(uses):
    """(E, *shape) per parameter of two ranks' examples, one at a time."""
    (x, y), found = batch(), {}
    for e in range(12):
        net = Skipping().double()
        net.use = uses[e // 6]
        (torch.nn.functional.cross_entropy(net(x[e : e + 1]), y[e : e + 1]) / 12).backward()
        for name, p in net.named_parameters():
            found.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.mark.parametrize("model", ["images", "tied"])
def test_order_rules_of_other_layers(ranks, model):
    assert_trains(ranks, data_parallel, 2, htv.WinsorizedMean(1), model=model)


def test_votes_are_exact_where_sums_are_compressed(ranks):
    """What bf16_compress_hook rounds is the sum; the mask is that of exact contributions."""
    assert_trains(
        ranks, data_parallel, 2, AND, hook="bf16_compress_hook", dtype=torch.float32, tolerance=0.02
    )


def test_a_hook_that_begins_more_collectives_later(ranks):
    """PowerSGD's, whose sums are of low rank: the mask is that of exact contributions."""
    found = ranks.run(by_power_sgd, 3, AND)
    expected = aggregated(contributions("matrices", [4, 4, 4]), AND)
    for name, grad in expected.items():
        assert torch.equal(found[0][name] == 0, grad == 0), name
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:])


def test_votes_of_one_rank_alone_are_said_aloud(ranks):
    """vote='local' is the average of the ranks' own aggregates."""
    found = ranks.run(partial(data_parallel, vote="local"), 2, AND)
    contributed = contributions("net", [6, 6])
    halves = [{k: c[part] for k, c in contributed.items()} for part in (slice(6), slice(6, 12))]
    one, other = (aggregated(half, AND) for half in halves)
    for name in contributed:
        torch.testing.assert_close(found[0][name], one[name] + other[name])


def test_an_optimizer_that_shards_its_state(ranks):
    found = ranks.run(optimized_by_shards, 2, AND)
    for name, step in aggregated(contributions("net", [6, 6]), AND).items():
        torch.testing.assert_close(found[0][name], step, rtol=0, atol=1e-12)
        assert torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize("world", [2, 4, 1])
def test_resumed_with_another_number_of_ranks(ranks, tmp_path, world):
    """A checkpoint of two ranks; the examples are the same, and so is the next step."""
    whole = ranks.run(resumed, 2, AND, str(tmp_path), True)
    found = ranks.run(resumed, world, AND, str(tmp_path), False)
    for name, value in whole[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-9)


def test_nothing_is_kept(ranks):
    assert ranks.run(rank_misuse.forgotten, 2) == [[True] * 3] * 2


def test_a_rank_that_runs_out_of_examples(ranks):
    """Under DistributedDataParallel's join() it has no voter any more; gradients stay averages."""
    found = ranks.run(rank_misuse.joined, 2)
    alone = {k: c[:6] for k, c in contributions("net", [6, 6]).items()}
    assert_one_vote(found[:1], aggregated(alone, AND))
