"""Rules: validated when made, printable, pickleable, resolved for a number of groups."""

import pickle

import numpy as np
import pytest

import htv
from htv.rules import Rule
from support.oracles import RULES, by_name


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_frozen_printable_pickleable(rule):
    assert eval(repr(rule), vars(htv)) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, pickle.loads(pickle.dumps(rule))}) == 1
    field = next(iter(vars(rule)), "anything")
    with pytest.raises(AttributeError):
        setattr(rule, field, 0.1)


@pytest.mark.parametrize(
    "make", [htv.AndMask, htv.XorMask, htv.GeometricMean, lambda tau: htv.SandMask(tau, 1.0)]
)
@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan"), float("inf")])
def test_tau_out_of_range(make, tau):
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\]"):
        make(tau)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: htv.AndMask("0.4"), TypeError, "tau"),
        (lambda: htv.AndMask(True), TypeError, "tau"),
        (lambda: htv.AndMask(0.4, rescale=1), TypeError, "rescale"),
        (lambda: htv.SandMask(0.4, 0), ValueError, "k must"),
        (lambda: htv.SandMask(0.4, float("inf")), ValueError, "k must"),
        (lambda: htv.Median("mean"), ValueError, "interpolation"),
        (lambda: htv.MedianOfMeans(0), ValueError, "k must be >= 1"),
        (lambda: htv.MedianOfMeans(2.0), TypeError, "k must be an integer"),
        (lambda: htv.TrimmedMean(-1), ValueError, "trim"),
        (lambda: htv.TrimmedMean(0.5), ValueError, "trim"),
        (lambda: htv.WinsorizedMean(0.7), ValueError, "winsorize"),
        (lambda: htv.WinsorizedMean(True), TypeError, "winsorize"),
        (lambda: htv.WinsorizedMean("1"), TypeError, "winsorize"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "groups", "message"),
    [
        (htv.TrimmedMean(2), 4, "use at most 1"),
        (htv.WinsorizedMean(3), 6, "use at most 2"),
        (htv.MedianOfMeans(4), 3, "needs at least 4 groups, got 3"),
        (htv.SandMask(0.4, 1.0), 1, "needs at least 2 groups"),
        (htv.Median(), 0, "needs at least 1 group"),
        (htv.Mean(), 0, "needs at least 1 group"),
    ],
)
def test_too_few_groups(rule, groups, message):
    with pytest.raises(ValueError, match=message):
        rule.statistic(groups)


@pytest.mark.parametrize(
    ("tau", "groups"), [(t, 50) for t in (0.2, 0.4, 0.6, 0.8)] + [(0.2, 25), (0.6, 25)]
)
def test_thresholds_are_exact_at_ties(tau, groups):
    """A float mean of signs misses these; |sum of signs| == tau * E must be kept."""
    assert htv.AndMask(tau).statistic(groups).count == round(tau * groups)


def test_threshold_of_full_agreement_is_every_group():
    assert all(htv.AndMask(1.0).statistic(e).count == e for e in range(1, 2000))


def test_threshold_rounds_up_between_integers():
    assert htv.AndMask(0.41).statistic(10).count == 5
    assert htv.AndMask(1 / 3).statistic(3).count == 1


@pytest.mark.parametrize("groups", range(1, 41))
@pytest.mark.parametrize("percent", [1, 2, 4, 8, 25, 49])
def test_fractions_are_nearest_ranks(groups, percent):
    """As many values are winsorized as numpy's nearest percentile of the ranks 0..E-1 says."""
    count = htv.WinsorizedMean(percent / 100).statistic(groups).count
    assert count == np.percentile(np.arange(groups), percent, method="nearest")


def test_the_papers_percentiles():
    assert [htv.WinsorizedMean(c / 100).statistic(100).count for c in (0, 1, 2, 4, 8)] == [
        0,
        1,
        2,
        4,
        8,
    ]
    assert htv.WinsorizedMean(0.01).statistic(32).count == 0


def test_the_base_is_not_a_rule():
    with pytest.raises(TypeError, match="not a complete rule"):
        Rule().statistic(3)
