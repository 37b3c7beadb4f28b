"""How far the examples of all ranks agree is told on each of them, as one process tells it."""

from functools import partial

import pytest
import torch

import htv
from support import rank_misuse
from support.agreements import agreements, assert_agreements
from support.oracles import RULES, by_name
from support.quick import STREAMING_RULES, quick
from support.rank_jobs import assert_tells, data_parallel, fully_sharded, pipelined, process_group
from support.rank_models import contributions

AND = htv.AndMask(0.4)
VOTING = quick([r for r in RULES if r.streaming and r != htv.Mean()], STREAMING_RULES)
WITHOUT_VOTES = ("mean_agreement",)
WAYS = {"ddp": data_parallel, "fsdp": fully_sharded, "process_group": process_group}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@by_way
@pytest.mark.parametrize("rule", VOTING, **by_name)
def test_rules_that_send_votes(ranks, way, rule):
    assert_tells(ranks, way, 2, rule, micro=2)


@by_way
@pytest.mark.parametrize("world", [1, 3])
def test_numbers_of_ranks(ranks, way, world):
    assert_tells(ranks, way, world, AND)


@by_way
@pytest.mark.parametrize("rule", [htv.Mean(), htv.MedianOfMeans(2)], **by_name)
def test_rules_that_send_no_votes_do_not_tell_how_signs_agree(ranks, way, rule):
    settings = {} if way is process_group else {"order": "before"}
    assert_tells(ranks, way, 2, rule, micro=2, unknown=WITHOUT_VOTES, **settings)


@by_way
@pytest.mark.parametrize("rule", [htv.Median(), htv.MedianOfMeans(3)], **by_name)
def test_order_rules_that_exchange_factors(ranks, way, rule):
    assert_tells(ranks, way, 2, rule)


@pytest.mark.parametrize("way", [data_parallel, fully_sharded])
@pytest.mark.parametrize("rule", [AND, htv.SandMask(0.3, k=0.5), htv.Median()], **by_name)
def test_each_rank_is_one_group(ranks, way, rule):
    assert_tells(ranks, way, 4, rule, vote="ranks", micro=3)


@by_way
def test_unequal_numbers_of_examples(ranks, way):
    assert_tells(ranks, way, 3, AND, sizes=[1, 7, 4])


@by_way
@pytest.mark.parametrize("model", ["tied", "images"])
def test_models(ranks, way, model):
    units = {"units": "whole"} if way is fully_sharded else {}
    assert_tells(ranks, way, 2, AND, model=model, **units)


@pytest.mark.parametrize("world, micro", [(2, 1), (4, 3)])
def test_replicas_count_once(ranks, world, micro):
    assert_tells(ranks, fully_sharded, world, AND, replicas=2, micro=micro)


def test_micro_batches_that_are_reduced_one_by_one(ranks):
    assert_tells(ranks, fully_sharded, 2, AND, micro=3, waits="set_is_last_backward")


def test_shards_of_columns(ranks):
    assert_tells(ranks, fully_sharded, 2, htv.GeometricMean(0.2), columns=True)


def test_sums_in_half_precision(ranks):
    settings = {"dtype": torch.float32, "reduce_dtype": torch.float16, "tolerance": 0.01}
    assert_tells(ranks, fully_sharded, 2, AND, **settings)


def test_another_communication_hook(ranks):
    """Which halves the type of sums: energies are exact, sums as they came."""
    settings = {"hook": "bf16_compress_hook", "dtype": torch.float32, "tolerance": 0.05}
    assert_tells(ranks, data_parallel, 2, AND, **settings)


SETTINGS = {
    "views of buckets": {"gradient_as_bucket_view": True, "micro": 2},
    "static graph": {"static_graph": True, "steps": 3},
    "looking for unused ones": {"find_unused_parameters": True},
    "compiled": {"compiled": True, "bucket_cap_mb": 25},
    "checkpointed, reentrant": {"model": "checkpointed, reentrant", "static_graph": True},
    "frozen weight": {"model": "frozen weight"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(ranks, settings):
    assert_tells(ranks, data_parallel, 2, AND, **settings)


def test_a_rank_that_runs_out_of_examples(ranks):
    """Under join() it takes its part in what is summed still, and has no voter."""
    alone = {k: c[:6] for k, c in contributions("net", [6, 6]).items()}
    for told in ranks.run(partial(rank_misuse.joined, stats=True), 2):
        assert_agreements(told, agreements(alone, AND))


def test_each_rank_tells_of_its_own_vote(ranks):
    contributed = contributions("net", [6, 6])
    found = ranks.run(partial(data_parallel, vote="local", stats=True), 2, AND)
    for told, part in zip(found, (slice(6), slice(6, 12)), strict=True):
        assert_agreements(told, agreements({k: c[part] for k, c in contributed.items()}, AND))


@pytest.mark.parametrize("rule", [AND, htv.MedianOfMeans(3)], **by_name)
def test_micro_batches_of_a_pipeline(ranks, rule):
    found = ranks.run(partial(pipelined, stats=True), 2, rule)
    contributed = contributions("net", share=1.0)
    names = {"0.": "a.", "2.": "n."}, {"0.": "b.", "2.": "c."}
    both = {
        names[rank][name[:2]] + name[2:]: told
        for rank, own in enumerate(found)
        for name, told in own.items()
    }
    assert_agreements(both, agreements(contributed, rule))
