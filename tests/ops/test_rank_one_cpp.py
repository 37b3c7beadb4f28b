"""Order statistics of htv::linear in C++ where no group has more than one row, at every CPU level
this machine has.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htv.ops import backend
from htv.rules import Statistic
from support import rank_one_cases
from support.rank_one_cases import DTYPES, factors, offsets_of, run, statistics

pytestmark = [
    pytest.mark.skipif(
        backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
    ),
    pytest.mark.usefixtures("one_thread"),
]


LINEAR = torch.ops.htv.linear
cpp = functools.partial(run, LINEAR)
assert_equals_definition = functools.partial(rank_one_cases.assert_equals_definition, LINEAR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "relu", "ties"])
@pytest.mark.parametrize("rows", [1, 2, 3, 33, 300])
def test_equals_the_definition(level, kind, dtype, rows):
    assert_equals_definition(*factors(kind, rows, 35, 70, dtype), torch.arange(rows + 1))


@pytest.mark.parametrize("order", ["floats", "integers"])
@pytest.mark.parametrize("kind", ["dense", "relu", "ties"])
@pytest.mark.parametrize("rows", [65, 130])
def test_any_number_of_extremes(level, kind, rows, order, monkeypatch):
    """Some rows have no gradient at all, and some outputs hardly any."""
    monkeypatch.setenv("HTV_CPU_ORDER", order)
    x, g = factors(kind, rows, 9, 37, torch.float32)
    g[::5] = 0.0
    g[2:, 4] = 0.0
    asked = [
        Statistic(name, count)
        for name in ("trimmed_mean", "winsorized_mean")
        for count in (1, 2, 3, 4, 5, 8, 9, 15, 16, 30)
    ]
    assert_equals_definition(x, g, torch.arange(rows + 1), asked)


@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_groups_without_rows_contribute_zeros(level, kind):
    lengths = [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0] * 9
    assert_equals_definition(
        *factors(kind, sum(lengths), 5, 20, torch.float32), offsets_of(lengths)
    )


@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_nan_and_infinity(level, kind):
    """Also where all but one factor are 0: infinity times 0 is NaN."""
    x, g = factors(kind, 60, 40, 50, torch.float32)
    x[0, 3], x[1, 20], x[2, 20], x[3, 49] = math.nan, math.inf, -math.inf, math.inf
    g[4, 1], g[5, 36], g[3] = math.nan, -math.inf, 0.0
    assert_equals_definition(x, g, torch.arange(61))


def test_products_that_vanish(level):
    """Smaller than the least number of their type: their signs must not count."""
    x, g = factors("dense", 40, 20, 30, torch.float32)
    x[:, ::2] *= 1e-30
    g[:, ::2] *= 1e-30
    assert_equals_definition(x, g, torch.arange(41))


def test_denormal_and_negative_zeros(level):
    x, g = factors("relu", 50, 20, 30, torch.float32)
    x[:, ::2] *= -1e-20
    g[:, ::3] *= 1e-20
    assert_equals_definition(x, -g, torch.arange(51))


def test_odd(level):
    x, g = factors("dense", 130, 20, 30, torch.float32)
    for statistic in statistics(130):
        offsets = torch.arange(131)
        if statistic.name != "median" or statistic.count == 0:
            assert torch.equal(cpp(x, -g, offsets, statistic), -cpp(x, g, offsets, statistic)), (
                statistic
            )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1), min_size=1, max_size=200),
    out=st.integers(1, 70),
    width=st.integers(1, 140),
    kind=st.sampled_from(["dense", "relu", "ties"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, out, width, kind, seed):
    assert_equals_definition(
        *factors(kind, sum(lengths), out, width, torch.float32, seed), offsets_of(lengths)
    )


def test_the_number_of_threads_changes_no_bit():
    x, g = factors("dense", 100, 90, 300, torch.float32)
    for statistic in statistics(100):
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpp(x, g, torch.arange(101), statistic))
        assert all(torch.equal(value, results[0]) for value in results[1:]), statistic
