"""htv::stacked in CUDA against its definition: the kernels themselves, run by the emulator."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacked_cases import DTYPES, assert_within_budget, counts_per_side, delicate_values, run, statistics

from htv.ops import reference
from htv.rules import Statistic

# Every network and both sides of where it ends (csrc/cuda/order.h), then counting
NETWORKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 49, 63, 64)
COUNTING = (65, 96, 257)


@pytest.fixture
def stacked(emulated):
    return emulated.stacked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100, 1000))
def test_random_values(stacked, dtype, groups):
    grads = torch.randn(groups, 40 if groups < 65 else 8, generator=torch.Generator().manual_seed(0))
    for statistic in statistics(groups):
        assert_within_budget(stacked, grads.to(dtype), statistic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 31, 100, 2050))
def test_every_alignment(stacked, dtype, width):
    """Rows of any length, and of any first address."""
    for groups in (3, 20, 40, 70)[: 3 if width > 100 else 4]:
        storage = torch.randn(groups * width + 8, generator=torch.Generator().manual_seed(width)).to(dtype)
        for shift in (0, 1, 2):
            grads = storage[shift : shift + groups * width].view(groups, width)
            for statistic in (Statistic("and_mask", groups // 2), Statistic("median"), Statistic("winsorized_mean", 1)):
                assert_within_budget(stacked, grads, statistic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", (*NETWORKS, *COUNTING))
def test_medians_are_exact(stacked, dtype, groups):
    for grads in delicate_values(groups, 130 if groups < 65 else 20):
        for side in (-1, 0, 1):
            statistic = Statistic("median", side)
            expected, _ = reference.stacked(grads.to(dtype), statistic)
            value, _ = run(stacked, grads.to(dtype), statistic)
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("groups", (*NETWORKS, 97, 300))
def test_trimmed_and_winsorized_means(stacked, dtype, groups):
    for grads in delicate_values(groups, 50 if groups < 65 else 9):
        grads = grads.to(dtype)
        for count in counts_per_side(groups):
            for name in ("trimmed_mean", "winsorized_mean"):
                statistic = Statistic(name, count)
                assert_within_budget(stacked, grads, statistic)
                value, mirrored = run(stacked, grads, statistic)[0], run(stacked, -grads, statistic)[0]
                torch.testing.assert_close(mirrored, -value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_zeros_and_the_sign_of_zero(stacked, dtype):
    generator = torch.Generator().manual_seed(1)
    for groups in (1, 2, 4, 16, 64, 128):
        grads = torch.randint(-1, 2, (groups, 100 if groups < 65 else 24), generator=generator).to(dtype)
        grads = torch.where(torch.rand(grads.shape, generator=generator) < 0.5, grads, -grads)
        for statistic in statistics(groups):
            if statistic.name in ("geometric_mean", "sand_mask", "trimmed_mean", "median_of_means"):
                assert_within_budget(stacked, grads, statistic)
                continue
            value, mask_sum = run(stacked, grads, statistic)
            expected, expected_sum = reference.stacked(grads, statistic)
            assert torch.equal(value, expected) and mask_sum == expected_sum, statistic


@pytest.mark.parametrize("groups", (2, 3, 7, 40, 70))
def test_nan_and_infinity(stacked, groups):
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(groups, 120, generator=generator)
    where = torch.rand(grads.shape, generator=generator)
    grads[where < 0.10] = math.inf
    grads[(where >= 0.10) & (where < 0.2)] = -math.inf
    grads[:, 60:][where[:, 60:] > 0.9] = math.nan
    for dtype in DTYPES:
        for statistic in statistics(groups):
            assert_within_budget(stacked, grads.to(dtype), statistic)


@pytest.mark.parametrize("groups", (1, 3, 8, 9, 40, 70, 150))
def test_means_of_buckets_that_are_undefined_rank_last(stacked, groups):
    grads = torch.randn(groups, 60, generator=torch.Generator().manual_seed(groups))
    where = torch.rand(grads.shape, generator=torch.Generator().manual_seed(groups + 1))
    grads = torch.where(where < 0.2, math.inf, torch.where(where > 0.8, -math.inf, grads))
    for buckets in {1, (groups + 1) // 2, max(1, groups - 1)}:
        assert_within_budget(stacked, grads, Statistic("median_of_means", buckets))


@pytest.mark.parametrize("bytes_of_shared_memory", (2048, 6144))
def test_values_that_do_not_fit_shared_memory(stacked, monkeypatch, bytes_of_shared_memory):
    """Fewer coordinates to a block, then none: passes read the values again."""
    monkeypatch.setenv("HTV_EMULATED_SHARED", str(bytes_of_shared_memory))
    for grads in delicate_values(100, 40):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for statistic in (Statistic("median"), Statistic("median", 1), Statistic("winsorized_mean", 7)):
                assert_within_budget(stacked, grads.to(dtype), statistic)
            assert_within_budget(stacked, grads.to(dtype), Statistic("median_of_means", 45))


@pytest.mark.parametrize("groups", (70, 513))
def test_hard_searches(stacked, groups):
    """Values that linear interpolation misjudges: over many magnitudes, in two heaps, one far away."""
    generator = torch.Generator().manual_seed(groups)
    normal = torch.randn(groups, 10, generator=generator)
    far = normal.clone()
    far[0], far[-1] = 3e38, -3e38
    heaps = torch.where(normal > 0, 1.0, 1e-30) + normal.abs() * 1e-35
    for grads in (normal.exp() ** 20, normal.sign() * normal.exp() ** 20, far, heaps, normal.bfloat16().float()):
        for statistic in (Statistic("median"), Statistic("trimmed_mean", groups // 3), Statistic("median", -1)):
            assert_within_budget(stacked, grads, statistic)


def test_twice_gives_the_same_bits(stacked):
    """The emulator runs threads in the other order every second time: a missing barrier would show."""
    generator = torch.Generator().manual_seed(4)
    for groups in (5, 33, 70):
        grads = torch.randn(groups, 301, generator=generator)
        for statistic in statistics(groups):
            (a, mask_a), (b, mask_b) = run(stacked, grads, statistic), run(stacked, grads, statistic)
            assert torch.equal(a, b) and mask_a == mask_b, statistic


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), groups=st.integers(1, 80), width=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape(stacked, data, groups, width, seed):
    statistic = data.draw(st.sampled_from(list(statistics(groups))))
    dtype = data.draw(st.sampled_from(DTYPES))
    grads = torch.randn(groups, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_within_budget(stacked, grads, statistic)
