"""The micro-batches of a pipeline vote as one batch does."""

from functools import partial

import pytest

import htv
from support.oracles import by_name
from support.rank_jobs import pipelined
from support.rank_models import aggregated, assert_one_vote, contributions
from support.ranks import Raised

RULES = [
    htv.AndMask(0.4),
    htv.SandMask(0.3, k=0.5),
    htv.GeometricMean(0.2),
    htv.MedianOfMeans(3),
]


@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
@pytest.mark.parametrize("scale", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_micro_batches_vote_together(ranks, rule, scale, schedule):
    found = ranks.run(partial(pipelined, schedule=schedule, scale=scale), 2, rule)
    contributed = contributions("net", share=1.0 if scale else 12.0)
    assert_one_vote([{**found[0], **found[1]}], aggregated(contributed, rule))


def test_a_stage_alone_is_refused(ranks):
    found = ranks.outcomes(partial(pipelined, serve=False), 2, htv.AndMask(0.4), patience=5)
    assert isinstance(found[0], Raised)
    # The schedule raises an error of its own, from this one.
    assert "htv.distributed.pipeline(schedule, handle)" in found[0].trace
