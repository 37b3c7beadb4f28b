"""htv::linear in CUDA against its definition, groups of at most one row: the kernels, run by the
emulator.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htv.ops import schema
from htv.rules import Statistic
from support import rank_one_cases as cases
from support.quick import quick
from support.rank_one_cases import (
    DTYPES,
    KINDS,
    ROWS,
    SHAPES,
    assert_counts,
    assert_equals_definition,
    factors,
    offsets_of,
)


@pytest.fixture
def linear(emulated):
    return emulated.linear


@pytest.mark.parametrize("dtype", quick(DTYPES, (torch.float32,)), ids=str)
@pytest.mark.parametrize(("lengths", "out", "width"), SHAPES, ids=lambda v: str(v)[:20])
def test_masks_and_sign_sums(linear, dtype, lengths, out, width):
    cases.assert_counts_hold(linear, dtype, lengths, out, width)


@pytest.mark.parametrize("dtype", quick(DTYPES, (torch.float32, torch.bfloat16)), ids=str)
def test_nan_and_infinity(linear, dtype):
    cases.assert_holds_with_nan_and_infinity(linear, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_products_that_vanish(linear, dtype):
    cases.assert_holds_where_products_vanish(linear, dtype)


@pytest.mark.parametrize("rows", quick(ROWS, ROWS[::3]))
@pytest.mark.parametrize("kind", KINDS)
def test_order_statistics(linear, kind, rows):
    for dtype in DTYPES if rows in (3, 24, 65) else (torch.float32,):
        cases.assert_order_statistics_hold(linear, dtype, kind, rows)


@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_groups_without_rows_contribute_zeros(linear, kind):
    cases.assert_groups_without_rows_are_zeros(linear, kind)


def test_values_that_do_not_fit_shared_memory(linear, monkeypatch):
    monkeypatch.setenv("HTV_EMULATED_SHARED", "2048")
    assert_equals_definition(linear, *factors("dense", 80, 5, 21, torch.float32), torch.arange(81))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 1), min_size=1, max_size=80),
    out=st.integers(1, 20),
    width=st.integers(1, 40),
    kind=st.sampled_from(["dense", "relu", "ties"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(linear, lengths, out, width, kind, seed):
    x, g = factors(kind, sum(lengths), out, width, torch.float32, seed)
    assert_counts(linear, x, g, offsets_of(lengths))
    assert_equals_definition(linear, x, g, offsets_of(lengths))


@pytest.mark.parametrize(
    ("lengths", "statistic", "message"),
    [
        ([2, 1], Statistic("median"), "groups of at most one row"),
        ([1, 1, 1], Statistic("geometric_mean", 1), "does not serve statistic"),
        ([1, 1, 1], Statistic("winsorized_mean", 2), "2 \\* count < groups"),
    ],
)
def test_refusals(linear, lengths, statistic, message):
    x, g = factors("dense", 3, 2, 2, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        linear(x, g, offsets_of(lengths), *schema.numbers(statistic))
