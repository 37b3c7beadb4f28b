"""Losses with derivatives of the input, over the examples of several ranks."""

from functools import partial

import pytest

import htv
from htv.tools.check import one_group_at_a_time
from support.oracles import by_name
from support.rank_jobs import differentiated, penalised
from support.rank_models import EXAMPLES, aggregated, assert_one_vote, batch, made
from support.ranks import Raised


def expected(rule):
    model, (x, _) = made(), batch()
    loss = lambda e: penalised(model, x[e : e + 1], EXAMPLES)
    return aggregated(one_group_at_a_time(loss, dict(model.named_parameters()), EXAMPLES), rule)


@pytest.mark.parametrize("rule", [htv.AndMask(0.4), htv.Median()], **by_name)
def test_data_parallel(ranks, rule):
    found = ranks.run(partial(differentiated, way="ddp"), 2, rule)
    assert_one_vote(found, expected(rule))


def test_a_process_group_alone(ranks):
    rule = htv.AndMask(0.4)
    found = ranks.run(partial(differentiated, way="process_group"), 2, rule)
    assert_one_vote(found, expected(rule))


def test_sharded_models_are_refused(ranks):
    found = ranks.outcomes(partial(differentiated, way="fsdp"), 2, htv.AndMask(0.4))
    assert all(isinstance(outcome, Raised) for outcome in found)
    assert all(outcome.kind == "UnsupportedError" for outcome in found)
    assert "htv.distributed.ddp" in found[0].message and "'c.weight'" in found[0].message
