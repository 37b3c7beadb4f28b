"""htv::linear in CUDA against its definition, groups of at most one row: the kernels, run by the emulator."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_one_cases import DTYPES, assert_equals_definition, factors, offsets_of

from htv.ops import reference, schema
from htv.rules import Statistic


@pytest.fixture
def linear(emulated):
    return emulated.linear


def counted(groups):
    for count in sorted({0, 1, groups // 3, groups, groups + 1}):
        yield from (Statistic(name, count) for name in ("and_mask", "xor_mask"))
    yield from (Statistic("mean"), Statistic("sign_sum"))


def assert_counts(linear, x, g, offsets):
    """Signs, masks and NaN are those of the definition; what is kept is torch's own sum."""
    dtype = reference.compute_dtype(x.dtype)
    total = g.to(dtype).t() @ x.to(dtype)
    for statistic in counted(len(offsets) - 1):
        value, mask_sum = linear(x, g, offsets, *schema.numbers(statistic))
        expected, expected_sum = reference.linear(x, g, offsets, statistic)
        assert value.dtype == dtype and mask_sum == expected_sum, statistic
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        if statistic.name == "sign_sum":
            expected = expected.round()  # E * (sum / E) of integers
        else:
            expected = torch.where((expected == 0) & (value == 0), 0, total)
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), statistic


SHAPES = [
    ([1], 1, 1),
    ([1, 1], 3, 2),
    ([1] * 7, 65, 193),
    ([1] * 127, 128, 128),
    ([1] * 130, 129, 20),
    ([1] * 300, 10, 50),
    ([1] * 520, 5, 9),
    ([0, 1, 1, 0, 1], 5, 7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "out", "width"), SHAPES, ids=lambda v: str(v)[:20])
def test_masks_and_sign_sums(linear, dtype, lengths, out, width):
    for kind in ("ties", "dense", "relu"):
        assert_counts(linear, *factors(kind, sum(lengths), out, width, dtype), offsets_of(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(linear, dtype):
    """Also where all but one factor are 0, in one row or in different ones: only infinity times 0 is NaN."""
    x, g = factors("relu", 60, 40, 50, dtype)
    x[0, 3], x[1, 20], x[2, 20], x[3, 49] = math.nan, math.inf, -math.inf, math.inf
    g[4, 1], g[5, 36], g[3] = math.nan, -math.inf, 0.0
    assert_counts(linear, x, g, torch.arange(61))
    assert_equals_definition(linear, x, g, torch.arange(61))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_products_that_vanish(linear, dtype):
    """They are smaller than the least number of their type: their signs do not count."""
    x, g = factors("dense", 40, 20, 30, torch.float64)
    small = 1e-170 if dtype == torch.float64 else 1e-23
    x[:, ::2] *= small
    g[:, ::2] *= small
    assert_counts(linear, x.to(dtype), g.to(dtype), torch.arange(41))
    assert_equals_definition(linear, x.to(dtype), g.to(dtype), torch.arange(41))


# Every network's both sides, then counting
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 24, 33, 64, 65, 150])
@pytest.mark.parametrize("kind", ["dense", "relu", "ties"])
def test_order_statistics(linear, kind, rows):
    out, width = (9, 140) if rows < 65 else (5, 21)
    for dtype in DTYPES if rows in (3, 24, 65) else (torch.float32,):
        assert_equals_definition(linear, *factors(kind, rows, out, width, dtype), torch.arange(rows + 1))


@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_groups_without_rows_contribute_zeros(linear, kind):
    few = [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]
    for lengths in (few, few * 9):
        assert_equals_definition(linear, *factors(kind, sum(lengths), 5, 20, torch.float32), offsets_of(lengths))


def test_values_that_do_not_fit_shared_memory(linear, monkeypatch):
    monkeypatch.setenv("HTV_EMULATED_SHARED", "2048")
    assert_equals_definition(linear, *factors("dense", 80, 5, 21, torch.float32), torch.arange(81))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
