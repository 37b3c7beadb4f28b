"""htv::stacked in C++ against its definition, at every CPU level this machine has."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htv.ops import backend, reference, schema
from htv.ops.statistics import names
from htv.rules import Statistic
from support import stacked_cases
from support.stacked_cases import DTYPES, counts_per_side, delicate_values, run, statistics

pytestmark = [
    pytest.mark.skipif(
        backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
    ),
    pytest.mark.usefixtures("one_thread"),
]

GROUPS = (1, 2, 3, 4, 5, 8, 17, 33, 64, 100, 257, 1000)
# Every way of ranking and both sides of where it ends (in csrc/cpu: sort_registers.h,
# select_kernel.cpp, stacked_kernel.cpp)
READ_IN_PLACE = (1, 2, 3, 7, 8)
ONE_NETWORK = (9, 15, 16)
TWO_RUNS = (17, 18, 31, 32)
FOUR_RUNS = (33, 34, 35, 36, 63, 64)
BIT_PLANES = (
    65,
    95,
    96,
    97,
    127,
    128,
    129,
    256,
    993,
    1100,
)  # 31 words of 32 bits are counted in bytes: 992
WIDTHS = (0, 1, 15, 16, 17, 1000, 1024, 1025, 2100)


STACKED = torch.ops.htv.stacked
cpp = functools.partial(run, STACKED)
assert_within_budget = functools.partial(stacked_cases.assert_within_budget, STACKED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_values(level, dtype):
    generator = torch.Generator().manual_seed(0)
    for groups in GROUPS:
        grads = torch.randn(groups, 37, generator=generator, dtype=torch.float64).to(dtype)
        for statistic in statistics(groups):
            assert_within_budget(grads, statistic)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(level, width):
    grads = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    for statistic in statistics(9):
        assert_within_budget(grads, statistic)


EVERY_WAY = (*READ_IN_PLACE, *ONE_NETWORK, *TWO_RUNS, *FOUR_RUNS, *BIT_PLANES)
EXACT = [(dtype, groups) for dtype in (torch.float64, torch.float32) for groups in EVERY_WAY]
EXACT += [
    (dtype, groups) for dtype in (torch.bfloat16, torch.float16) for groups in (8, 16, 32, 64, 65)
]


@pytest.mark.parametrize(("dtype", "groups"), EXACT, ids=str)
def test_medians_are_exact(level, dtype, groups):
    for grads in delicate_values(groups):
        for side in (-1, 0, 1):
            statistic = Statistic("median", side)
            expected, _ = reference.stacked(grads.to(dtype), statistic)
            torch.testing.assert_close(
                cpp(grads.to(dtype), statistic)[0], expected, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    "groups",
    [
        *READ_IN_PLACE,
        *ONE_NETWORK,
        *(17, 31, 32, 33, 64, 97),
        *(pytest.param(groups, marks=pytest.mark.slow) for groups in (256, 1100)),
    ],
)
def test_trimmed_and_winsorized_means(level, dtype, groups):
    for grads in delicate_values(groups):
        grads = grads.to(dtype)
        for count in counts_per_side(groups):
            for name in ("trimmed_mean", "winsorized_mean"):
                statistic = Statistic(name, count)
                assert_within_budget(grads, statistic)
                value, mirrored = cpp(grads, statistic)[0], cpp(-grads, statistic)[0]
                torch.testing.assert_close(mirrored, -value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", (0, 1, 3, 8, 20, 40))
@pytest.mark.parametrize("name", ("trimmed_mean", "winsorized_mean"))
def test_ends_of_integers_are_exact(level, name, count):
    """Sums of small integers are exact, so every copy of an end is counted or not."""
    for groups in (81, 100, 256):
        grads = torch.randint(
            -3, 4, (groups, 200), generator=torch.Generator().manual_seed(count)
        ).double()
        expected, _ = reference.stacked(grads, Statistic(name, count))
        torch.testing.assert_close(
            cpp(grads, Statistic(name, count))[0], expected, rtol=1e-15, atol=1e-15
        )


@pytest.mark.parametrize("groups", (1, 3, 8, 9, 40, 70, 300))
def test_means_of_buckets_that_are_undefined_surface(level, groups):
    grads = torch.randn(groups, 200, generator=torch.Generator().manual_seed(groups))
    where = torch.rand(grads.shape, generator=torch.Generator().manual_seed(groups + 1))
    grads = torch.where(where < 0.2, math.inf, torch.where(where > 0.8, -math.inf, grads))
    for buckets in {1, (groups + 1) // 2, max(1, groups - 1)}:
        assert_within_budget(grads, Statistic("median_of_means", buckets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_zeros_and_the_sign_of_zero(level, dtype):
    """Small integers: every sum is exact, so values and masks must match to the last bit."""
    generator = torch.Generator().manual_seed(1)
    for groups in (1, 2, 4, 8, 16, 64):
        grads = torch.randint(-1, 2, (groups, 333), generator=generator).to(dtype)
        grads = torch.where(
            torch.rand(grads.shape, generator=generator) < 0.5, grads, -grads
        )  # zeros of both signs
        for statistic in statistics(groups):
            if statistic.name in ("geometric_mean", "sand_mask", "trimmed_mean", "median_of_means"):
                assert_within_budget(grads, statistic)
                continue
            value, mask_sum = cpp(grads, statistic)
            expected, expected_sum = reference.stacked(grads, statistic)
            assert torch.equal(value, expected) and mask_sum == expected_sum, statistic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(level, dtype):
    generator = torch.Generator().manual_seed(2)
    for groups in (1, 2, 3, 6, 7, 40):
        grads = torch.randn(groups, 500, generator=generator)
        where = torch.rand(grads.shape, generator=generator)
        grads[where < 0.10] = math.inf
        grads[(where >= 0.10) & (where < 0.2)] = -math.inf
        grads[:, 250:][where[:, 250:] > 0.9] = math.nan
        for statistic in statistics(groups):
            assert_within_budget(grads.to(dtype), statistic)


@pytest.mark.parametrize("name", names())
def test_one_nan_poisons_its_coordinate_only(level, name):
    grads = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    grads[:, 7] = torch.tensor([1.0, -1.0, 2.0, math.nan, -2.0, 3.0])
    statistic = Statistic(name, count=1, votes=1.0, k=1.0)
    value, mask_sum = cpp(grads, statistic)
    assert value.isnan().nonzero().flatten().tolist() == [7]
    rest = torch.cat([grads[:, :7], grads[:, 8:]], dim=1).contiguous()
    torch.testing.assert_close(mask_sum, cpp(rest, statistic)[1])


def test_the_sign_of_a_sum_whose_mean_is_too_small_for_its_type(level):
    grads = torch.zeros(5, 20)
    grads[0], grads[1, :10] = 1e-45, -3e-45
    value, _ = cpp(grads, Statistic("geometric_mean"))
    assert (value[10:] > 0).all() and (value[:10] < 0).all()


def test_a_mask_hides_infinities(level):
    grads = torch.tensor([[math.inf], [-math.inf], [1.0], [-1.0]])
    value, mask_sum = cpp(grads, Statistic("and_mask", 1))
    assert value.item() == 0 and mask_sum == 0


def test_large_magnitudes_do_not_overflow(level):
    grads = torch.tensor([[3e38, 1e-45], [3e38, 1e-45]])
    assert torch.equal(cpp(grads, Statistic("median"))[0], grads[0])
    geometric, _ = cpp(grads, Statistic("geometric_mean"))
    torch.testing.assert_close(geometric, torch.tensor([3e38, 1e-10]), rtol=1e-5, atol=0)


def test_geometric_mean_of_many_small_values(level):
    grads = torch.full((5000, 3), -1e-7)
    value, _ = cpp(grads, Statistic("geometric_mean", 1))
    torch.testing.assert_close(
        value.double(), torch.full((3,), -1.001e-7, dtype=torch.float64), rtol=1e-5, atol=0
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(), groups=st.integers(1, 70), width=st.integers(1, 140), seed=st.integers(0, 2**31)
)
def test_any_shape(data, groups, width, seed):
    statistic = data.draw(st.sampled_from(list(statistics(groups))))
    assert_within_budget(
        torch.randn(groups, width, generator=torch.Generator().manual_seed(seed)), statistic
    )


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(4)
    few, some, many = (
        torch.randn(e, p, generator=generator)
        for e, p in ((5, 200_001), (33, 200_001), (70, 50_003))
    )
    cases = [
        (grads, statistic) for grads in (few, some, many) for statistic in statistics(len(grads))
    ]
    for grads, statistic in cases:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpp(grads, statistic))
        for value, mask_sum in results[1:]:
            assert torch.equal(value, results[0][0]) and mask_sum == results[0][1], statistic


@pytest.mark.parametrize(
    ("grads", "name", "count", "message"),
    [
        (torch.ones(3), "mean", 0, "grads must have 2 dimensions, got 1"),
        (torch.ones(3, 4).t(), "mean", 0, "grads must be contiguous"),
        (
            torch.ones(3, 4, dtype=torch.int32),
            "mean",
            0,
            "grads must be float64, float32, bfloat16 or float16",
        ),
        (torch.ones(0, 4), "mean", 0, "needs at least one group"),
        (torch.ones(3, 4), 11, 0, "unknown statistic 11"),
        (torch.ones(4, 4), "trimmed_mean", 2, "count must satisfy 0 <= 2 \\* count < groups"),
        (torch.ones(4, 4), "winsorized_mean", -1, "count must satisfy 0 <= 2 \\* count < groups"),
        (torch.ones(4, 4), "median_of_means", 5, "count must be 1 to 4 buckets, got 5"),
        (torch.ones(4, 4), "median", 2, "count must be -1, 0 or 1"),
    ],
)
def test_bad_arguments(grads, name, count, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.htv.stacked(
            grads, name if isinstance(name, int) else schema.code(name), count, 0.0, 0.0
        )
