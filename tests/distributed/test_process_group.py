"""With nothing but `attach(process_group=...)`, ranks meet where accumulate() ends."""

import pytest

import htv
from htv.ops.functional import apply_rule
from support import rank_misuse
from support.oracles import RULES, by_name
from support.quick import quick
from support.rank_jobs import assert_trains, process_group
from support.rank_models import assert_one_vote, contributions

KEPT = (htv.AndMask(0.4, rescale=True), htv.SandMask(0.3, k=0.5), htv.GeometricMean(0.2))
STREAMING = quick([rule for rule in RULES if rule.streaming], KEPT)


@pytest.mark.parametrize("rule", [*STREAMING, htv.MedianOfMeans(2)], **by_name)
def test_rules(ranks, rule):
    assert_trains(ranks, process_group, 2, rule, micro=2)


@pytest.mark.parametrize("world", [3, 4])
def test_numbers_of_ranks(ranks, world):
    assert_trains(ranks, process_group, world, htv.AndMask(0.4))


@pytest.mark.parametrize("model", ["unused layer", "images", "tied"])
def test_models(ranks, model):
    assert_trains(ranks, process_group, 2, htv.AndMask(0.4), model=model)


def test_one_long_block_with_finish(ranks):
    assert_trains(ranks, process_group, 2, htv.AndMask(0.4), long=True, micro=3)


def with_a_median(name, parameter):
    return htv.Median() if name == "c.weight" else htv.AndMask(0.4)


def test_a_block_that_raises_leaves_nothing(ranks):
    expected = {
        name: len(c) * apply_rule(c, with_a_median(name, None))
        for name, c in contributions("net", [6, 6]).items()
    }
    found = ranks.run(rank_misuse.after_a_block_that_raised, 2, with_a_median)
    assert_one_vote(found, expected)


def test_excluded_parameters_are_averaged(ranks):
    assert_trains(ranks, process_group, 2, htv.AndMask(0.4), plain=("n.weight", "b.bias"))
