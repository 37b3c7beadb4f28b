"""htv::stacked in CUDA against its definition: the kernels themselves, run by the emulator."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htv.rules import Statistic
from support import stacked_cases as cases
from support.quick import quick
from support.stacked_cases import (
    COUNTING,
    DTYPES,
    NETWORKS,
    assert_within_budget,
    delicate_values,
    statistics,
)


@pytest.fixture
def stacked(emulated):
    return emulated.stacked


@pytest.mark.parametrize("dtype", quick(DTYPES, (torch.float32, torch.bfloat16)), ids=str)
@pytest.mark.parametrize("groups", (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100, 1000))
def test_random_values(stacked, dtype, groups):
    cases.assert_holds_on_random_values(stacked, dtype, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 31, 100, 2050))
def test_every_alignment(stacked, dtype, width):
    cases.assert_holds_at_every_alignment(stacked, dtype, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", (*NETWORKS, *COUNTING))
def test_medians_are_exact(stacked, dtype, groups):
    cases.assert_medians_are_exact(stacked, dtype, groups)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("groups", quick((*NETWORKS, 97, 300), (*NETWORKS[::3], 97)))
def test_trimmed_and_winsorized_means(stacked, dtype, groups):
    cases.assert_inner_means_hold(stacked, dtype, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", (1, 2, 4, 16, 64, 128))
def test_ties_zeros_and_the_sign_of_zero(stacked, dtype, groups):
    cases.assert_holds_with_ties_and_zeros(stacked, dtype, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", (2, 3, 7, 40, 70))
def test_nan_and_infinity(stacked, dtype, groups):
    cases.assert_holds_with_nan_and_infinity(stacked, dtype, groups)


@pytest.mark.parametrize("groups", (1, 3, 8, 9, 40, 70, 150))
def test_means_of_buckets_that_are_undefined_surface(stacked, groups):
    cases.assert_undefined_bucket_means_surface(stacked, groups)


@pytest.mark.parametrize("bytes_of_shared_memory", (2048, 6144))
def test_values_that_do_not_fit_shared_memory(stacked, monkeypatch, bytes_of_shared_memory):
    """Fewer coordinates to a block, then none: passes read the values again."""
    monkeypatch.setenv("HTV_EMULATED_SHARED", str(bytes_of_shared_memory))
    for grads in delicate_values(100, 40):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for statistic in (
                Statistic("median"),
                Statistic("median", 1),
                Statistic("winsorized_mean", 7),
            ):
                assert_within_budget(stacked, grads.to(dtype), statistic)
            assert_within_budget(stacked, grads.to(dtype), Statistic("median_of_means", 45))


@pytest.mark.parametrize("groups", (70, 513))
def test_hard_searches(stacked, groups):
    cases.assert_hard_searches_end(stacked, groups)


@pytest.mark.parametrize("groups", (5, 33, 70))
def test_twice_gives_the_same_bits(stacked, groups):
    """The emulator reverses the threads every second time: a missing barrier would show."""
    cases.assert_twice_gives_the_same_bits(stacked, groups)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(), groups=st.integers(1, 80), width=st.integers(1, 40), seed=st.integers(0, 2**31)
)
def test_any_shape(stacked, data, groups, width, seed):
    statistic = data.draw(st.sampled_from(list(statistics(groups))))
    dtype = data.draw(st.sampled_from(DTYPES))
    grads = torch.randn(groups, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_within_budget(stacked, grads, statistic)
