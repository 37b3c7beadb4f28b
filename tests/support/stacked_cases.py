"""What every implementation of htv::stacked is held to: hard inputs, and a budget of rounding
against float64.
"""

import math

import torch

from htv.ops import reference, schema
from htv.rules import Statistic
from support import budgets

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics(groups):
    """Every statistic that is defined for so many groups, with parameters in the middle and at the
    ends.
    """
    for count in sorted({0, 1, groups // 3, groups, groups + 1}):
        yield from (Statistic(name, count) for name in ("and_mask", "xor_mask", "geometric_mean"))
    yield from (Statistic(name) for name in ("mean", "sign_sum", "sign_agreement"))
    yield from (Statistic("median", side) for side in (-1, 0, 1))
    for count in sorted({0, min(1, (groups - 1) // 2), groups // 4, (groups - 1) // 2}):
        yield from (Statistic(name, count) for name in ("trimmed_mean", "winsorized_mean"))
    buckets = {k for k in (1, 2, 3, groups // 2, groups) if 1 <= k <= groups}
    yield from (Statistic("median_of_means", k) for k in sorted(buckets))
    if groups > 1:
        yield from (
            Statistic("sand_mask", votes=tau * groups, k=k)
            for tau in (0.0, 0.3)
            for k in (0.1, 10.0)
        )


def run(op, grads, statistic):
    """An implementation of the op `stacked` of htv/ops/schema.py."""
    value, mask_sum = op(grads, *schema.numbers(statistic))
    assert value.dtype == reference.compute_dtype(grads.dtype) and value.shape == grads.shape[1:]
    assert mask_sum.dtype == torch.float64 and mask_sum.shape == ()
    return value, mask_sum


def assert_within_budget(op, grads, statistic):
    """No further from float64 than what rounding may come to with these contributions."""
    value, mask_sum = run(op, grads, statistic)
    expected, expected_sum = reference.stacked(grads, statistic)
    exact, exact_sum = reference.stacked(grads.double(), statistic)
    assert torch.equal(value.isnan(), expected.isnan()), statistic
    finite = expected.isfinite() & exact.isfinite()
    assert torch.equal(value[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()]), (
        statistic
    )
    budget = budgets.statistic_budget(grads.double(), statistic, value.dtype)
    assert ((value.double() - exact).abs() <= budget)[finite].all(), statistic
    if statistic.name == "sand_mask":
        tolerance = 1e-6 * grads.shape[1]
        assert (mask_sum - exact_sum).abs() <= tolerance, statistic
    else:
        assert mask_sum == expected_sum, statistic


def delicate_values(groups, width=130):
    """Contributions whose order is easily got wrong."""
    generator = torch.Generator().manual_seed(groups)
    normal = torch.randn(groups, width, generator=generator)
    where = torch.rand(groups, width, generator=generator)
    zeros = torch.where(where < 0.5, 0.0, -0.0)
    yield normal
    yield normal * 1e-44  # denormal in float32
    yield torch.randint(-2, 3, (groups, width), generator=generator).float()  # ties
    yield torch.where(where < 0.4, normal, zeros)
    yield torch.where(where < 0.1, math.inf, torch.where(where > 0.9, -math.inf, normal))
    yield (1 + torch.arange(width) / 64).exp2() * (
        1 + normal.sign() * 2**-20
    )  # equal in all but their last bits
    yield torch.where(where < 0.5 / groups, math.nan, normal)
    yield torch.where(where < 0.5 / groups, -math.nan, normal)


def counts_per_side(groups):
    """Sorted values; 2, 4, 8 or 16 kept extremes and both sides of where those end; bit planes."""
    return [c for c in (0, 1, 2, 3, 4, 7, 8, 15, 16, 40, (groups - 1) // 2) if 2 * c < groups]


# Where kernels change their ways, on a GPU: every network and both sides of where it ends
# (csrc/cuda/rank_by_network.h), then counting.
NETWORKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 49, 63, 64)
COUNTING = (65, 96, 257)


# ---- what holds for an implementation `op`, whatever it runs on ----


def assert_holds_on_random_values(op, dtype, groups):
    grads = torch.randn(
        groups, 40 if groups < 65 else 8, generator=torch.Generator().manual_seed(0)
    )
    for statistic in statistics(groups):
        assert_within_budget(op, grads.to(dtype), statistic)


def assert_holds_at_every_alignment(op, dtype, width):
    """Rows of any length, and of any first address."""
    for groups in (3, 20, 40, 70)[: 3 if width > 100 else 4]:
        storage = torch.randn(
            groups * width + 8, generator=torch.Generator().manual_seed(width)
        ).to(dtype)
        for shift in (0, 1, 2):
            grads = storage[shift : shift + groups * width].view(groups, width)
            for statistic in (
                Statistic("and_mask", groups // 2),
                Statistic("median"),
                Statistic("winsorized_mean", 1),
            ):
                assert_within_budget(op, grads, statistic)


def assert_medians_are_exact(op, dtype, groups):
    for grads in delicate_values(groups, 130 if groups < 65 else 20):
        for side in (-1, 0, 1):
            statistic = Statistic("median", side)
            expected, _ = reference.stacked(grads.to(dtype), statistic)
            value, _ = run(op, grads.to(dtype), statistic)
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def assert_inner_means_hold(op, dtype, groups):
    """Trimmed and winsorized means of delicate values, which are odd."""
    for grads in delicate_values(groups, 50 if groups < 65 else 9):
        grads = grads.to(dtype)
        for count in counts_per_side(groups):
            for name in ("trimmed_mean", "winsorized_mean"):
                statistic = Statistic(name, count)
                assert_within_budget(op, grads, statistic)
                value, mirrored = run(op, grads, statistic)[0], run(op, -grads, statistic)[0]
                torch.testing.assert_close(mirrored, -value, rtol=0, atol=0, equal_nan=True)


def assert_holds_with_ties_and_zeros(op, dtype, groups):
    """Zeros of either sign among them."""
    generator = torch.Generator().manual_seed(groups)
    grads = torch.randint(-1, 2, (groups, 100 if groups < 65 else 24), generator=generator).to(
        dtype
    )
    grads = torch.where(torch.rand(grads.shape, generator=generator) < 0.5, grads, -grads)
    for statistic in statistics(groups):
        if statistic.name in ("geometric_mean", "sand_mask", "trimmed_mean", "median_of_means"):
            assert_within_budget(op, grads, statistic)
            continue
        value, mask_sum = run(op, grads, statistic)
        expected, expected_sum = reference.stacked(grads, statistic)
        assert torch.equal(value, expected) and mask_sum == expected_sum, statistic


def assert_holds_with_nan_and_infinity(op, dtype, groups):
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(groups, 120, generator=generator)
    where = torch.rand(grads.shape, generator=generator)
    grads[where < 0.10] = math.inf
    grads[(where >= 0.10) & (where < 0.2)] = -math.inf
    grads[:, 60:][where[:, 60:] > 0.9] = math.nan
    for statistic in statistics(groups):
        assert_within_budget(op, grads.to(dtype), statistic)


def assert_undefined_bucket_means_surface(op, groups):
    grads = torch.randn(groups, 60, generator=torch.Generator().manual_seed(groups))
    where = torch.rand(grads.shape, generator=torch.Generator().manual_seed(groups + 1))
    grads = torch.where(where < 0.2, math.inf, torch.where(where > 0.8, -math.inf, grads))
    for buckets in {1, (groups + 1) // 2, max(1, groups - 1)}:
        assert_within_budget(op, grads, Statistic("median_of_means", buckets))


def assert_hard_searches_end(op, groups):
    """Values that linear interpolation misjudges: of many magnitudes, in two heaps, one far off."""
    generator = torch.Generator().manual_seed(groups)
    normal = torch.randn(groups, 10, generator=generator)
    far = normal.clone()
    far[0], far[-1] = 3e38, -3e38
    heaps = torch.where(normal > 0, 1.0, 1e-30) + normal.abs() * 1e-35
    for grads in (
        normal.exp() ** 20,
        normal.sign() * normal.exp() ** 20,
        far,
        heaps,
        normal.bfloat16().float(),
    ):
        for statistic in (
            Statistic("median"),
            Statistic("trimmed_mean", groups // 3),
            Statistic("median", -1),
        ):
            assert_within_budget(op, grads, statistic)


def assert_twice_gives_the_same_bits(op, groups):
    grads = torch.randn(groups, 301, generator=torch.Generator().manual_seed(4))
    for statistic in statistics(groups):
        (a, mask_a), (b, mask_b) = run(op, grads, statistic), run(op, grads, statistic)
        assert torch.equal(a, b) and mask_a == mask_b, statistic
