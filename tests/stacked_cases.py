"""What every implementation of htv::stacked is held to: hard inputs, and a budget of rounding against float64."""

import math

import torch

from htv.ops import reference, schema
from htv.rules import Statistic

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics(groups):
    """Every statistic that is defined for so many groups, with parameters in the middle and at the ends."""
    for count in sorted({0, 1, groups // 3, groups, groups + 1}):
        yield from (Statistic(name, count) for name in ("and_mask", "xor_mask", "geometric_mean"))
    yield from (Statistic(name) for name in ("mean", "sign_sum", "sign_agreement"))
    yield from (Statistic("median", side) for side in (-1, 0, 1))
    for count in sorted({0, min(1, (groups - 1) // 2), groups // 4, (groups - 1) // 2}):
        yield from (Statistic(name, count) for name in ("trimmed_mean", "winsorized_mean"))
    buckets = {k for k in (1, 2, 3, groups // 2, groups) if 1 <= k <= groups}
    yield from (Statistic("median_of_means", k) for k in sorted(buckets))
    if groups > 1:
        yield from (Statistic("sand_mask", votes=tau * groups, k=k) for tau in (0.0, 0.3) for k in (0.1, 10.0))


def run(op, grads, statistic):
    """An implementation of the op `stacked` of htv/ops/schema.py."""
    value, mask_sum = op(grads, *schema.numbers(statistic))
    assert value.dtype == reference.compute_dtype(grads.dtype) and value.shape == grads.shape[1:]
    assert mask_sum.dtype == torch.float64 and mask_sum.shape == ()
    return value, mask_sum


def rounding(grads, statistic):
    """What a few roundings of the typical contribution amount to, for when the definition is exact by luck."""
    dtype = reference.compute_dtype(grads.dtype)
    typical = grads.double().abs().nan_to_num(posinf=0).mean(dim=0).amax()
    # float64 has no better oracle than itself; a soft mask amplifies what its argument lost
    factor = 32 if dtype == torch.float64 or statistic.name == "sand_mask" else 4
    return factor * torch.finfo(dtype).eps * typical


def assert_within_budget(op, grads, statistic):
    """No further from float64 than twice the definition's own rounding in the compute type."""
    value, mask_sum = run(op, grads, statistic)
    expected, expected_sum = reference.stacked(grads, statistic)
    exact, exact_sum = reference.stacked(grads.double(), statistic)
    assert torch.equal(value.isnan(), expected.isnan()), statistic
    finite = expected.isfinite() & exact.isfinite()
    assert torch.equal(value[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()]), statistic
    if finite.any():
        own = (expected[finite].double() - exact[finite]).abs().amax()
        tiny = rounding(grads, statistic) + torch.finfo(value.dtype).tiny
        assert (value[finite].double() - exact[finite]).abs().amax() <= 2 * own + tiny, statistic
    if statistic.name == "sand_mask":
        tolerance = 2 * (expected_sum - exact_sum).abs() + 1e-6 * grads.shape[1]
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
    yield (1 + torch.arange(width) / 64).exp2() * (1 + normal.sign() * 2**-20)  # equal in all but their last bits
    yield torch.where(where < 0.5 / groups, math.nan, normal)
    yield torch.where(where < 0.5 / groups, -math.nan, normal)


def counts_per_side(groups):
    """Sorted values; 2, 4, 8 or 16 kept extremes and both sides of where those end; bit planes."""
    return [c for c in (0, 1, 2, 3, 4, 7, 8, 15, 16, 40, (groups - 1) // 2) if 2 * c < groups]
