"""Order statistics of htv::linear in C++ where no group has more than one row, at every CPU level this machine has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htv.ops import backend, reference, schema
from htv.rules import Statistic

pytestmark = [
    pytest.mark.skipif(backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics(groups):
    yield from (Statistic("median", interpolation) for interpolation in (-1, 0, 1))
    for name in ("trimmed_mean", "winsorized_mean"):
        yield from (Statistic(name, count) for count in sorted({0, min(1, (groups - 1) // 2), (groups - 1) // 2}))


def cpp(x, g, offsets, statistic):
    value, mask_sum = torch.ops.htv.linear(x, g, offsets, *schema.numbers(statistic))
    assert mask_sum == 0 and value.dtype == reference.compute_dtype(x.dtype)
    return value


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_equals_definition(x, g, offsets):
    for statistic in statistics(len(offsets) - 1):
        value, (expected, _) = cpp(x, g, offsets, statistic), reference.linear(x, g, offsets, statistic)
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        if statistic.name == "median":
            assert torch.equal(value.nan_to_num(), expected.nan_to_num()), statistic
        else:
            terms = (g.abs().to(value.dtype).t() @ x.abs().to(value.dtype)).nan_to_num(0, 0).amax()
            atol = 4 * torch.finfo(value.dtype).eps * float(terms)  # what the sum's terms may lose
            torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-5, atol=atol)


def factors(kind, rows, out, width, dtype, seed=0):
    """Dense, with the zeros of ReLU on either side, or small integers full of ties."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (width, out))
    if kind == "relu":
        x, g = x.relu(), g * (torch.rand(rows, out, generator=generator) < 0.5)
    elif kind == "ties":
        x, g = x.round(), g.round()
    return x.to(dtype), g.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "relu", "ties"])
@pytest.mark.parametrize("rows", [1, 2, 3, 33, 300])
def test_equals_the_definition(level, kind, dtype, rows):
    assert_equals_definition(*factors(kind, rows, 35, 70, dtype), torch.arange(rows + 1))


@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_groups_without_rows_contribute_zeros(level, kind):
    lengths = [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0] * 9
    assert_equals_definition(*factors(kind, sum(lengths), 5, 20, torch.float32), offsets_of(lengths))


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
            assert torch.equal(cpp(x, -g, offsets, statistic), -cpp(x, g, offsets, statistic)), statistic


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1), min_size=1, max_size=200),
    out=st.integers(1, 70),
    width=st.integers(1, 140),
    kind=st.sampled_from(["dense", "relu", "ties"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, out, width, kind, seed):
    assert_equals_definition(*factors(kind, sum(lengths), out, width, torch.float32, seed), offsets_of(lengths))


def test_the_number_of_threads_changes_no_bit():
    x, g = factors("dense", 100, 90, 300, torch.float32)
    for statistic in statistics(100):
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpp(x, g, torch.arange(101), statistic))
        assert all(torch.equal(value, results[0]) for value in results[1:]), statistic
