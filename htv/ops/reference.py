"""What every statistic means, in plain PyTorch: the definition kernels are tested against, and the path taken
wherever no kernel serves. Runs on any device and in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.rules import Statistic

SAND_UNDEFINED = 1e-17  # the soft mask where variance and excess agreement are both 0, as its authors chose
LOG_OFFSET = 1e-10  # keeps the logarithm of the geometric mean finite


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half-precision values are computed and returned in float32, all others in their own type."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def stacked(grads: Tensor, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The statistic of stacked contributions over dim 0.

    grads: (E, *shape), floating point, E >= 1.
    Returns ``value`` (*shape), in `compute_dtype`, without the factor E and not yet normalised; and ``mask_sum`` (),
    float64, the sum of the rule's mask over all coordinates (0 for rules without a mask).
    A coordinate with a NaN among its E values is NaN and counts 0 in `mask_sum`.
    """
    values = grads.to(compute_dtype(grads.dtype))
    value, mask = STATISTICS[statistic.name](values, statistic)
    has_nan = values.isnan().any(dim=0)
    value = torch.where(has_nan, torch.nan, value)
    if mask is None:
        return value, torch.zeros((), dtype=torch.float64, device=grads.device)
    return value, torch.where(has_nan, 0, mask).sum(dtype=torch.float64)


def sign_sum(values: Tensor) -> Tensor:
    """Sum over dim 0 of the signs, as int64; sign(0) = 0."""
    return (values > 0).sum(dim=0) - (values < 0).sum(dim=0)


def _keep(values: Tensor, statistic: Statistic) -> Tensor:
    return sign_sum(values).abs() >= statistic.count


def _mean(values: Tensor, statistic: Statistic):
    return values.mean(dim=0), None


def _and_mask(values: Tensor, statistic: Statistic):
    keep = _keep(values, statistic)
    return torch.where(keep, values.mean(dim=0), 0), keep


def _xor_mask(values: Tensor, statistic: Statistic):
    drop = ~_keep(values, statistic)
    return torch.where(drop, values.mean(dim=0), 0), drop


def _geometric_mean(values: Tensor, statistic: Statistic):
    keep = _keep(values, statistic)
    magnitude = (values.abs() + LOG_OFFSET).log().mean(dim=0).exp()
    return torch.where(keep, values.mean(dim=0).sign() * magnitude, 0), keep


def _sand_mask(values: Tensor, statistic: Statistic):
    excess = (sign_sum(values).abs().to(values.dtype) - statistic.votes) / len(values)
    mask = torch.tanh(statistic.k / values.var(dim=0) * excess).clamp(min=0)
    mask = torch.where(mask.isnan(), SAND_UNDEFINED, mask)
    return torch.where(mask == 0, 0, mask * values.mean(dim=0)), mask


def _mean_of_signs(values: Tensor, statistic: Statistic):
    return values.sign().mean(dim=0), None


def _sign_agreement(values: Tensor, statistic: Statistic):
    return values.sign().sum(dim=0).abs() / len(values), None


def midpoint(lower: Tensor, higher: Tensor) -> Tensor:
    """(lower + higher) / 2 that neither overflows nor rounds when both are equal."""
    return torch.where(lower == higher, lower, 0.5 * lower + 0.5 * higher)


def _median(values: Tensor, statistic: Statistic):
    ranked = values.sort(dim=0).values
    lower, higher = ranked[(len(values) - 1) // 2], ranked[len(values) // 2]
    return (midpoint(lower, higher) if statistic.count == 0 else lower if statistic.count < 0 else higher), None


def _trimmed_mean(values: Tensor, statistic: Statistic):
    count = statistic.count
    return values.sort(dim=0).values[count : len(values) - count].mean(dim=0), None


def _winsorized_mean(values: Tensor, statistic: Statistic):
    ranked = values.sort(dim=0).values
    low, high = ranked[statistic.count], ranked[len(values) - 1 - statistic.count]
    return torch.minimum(torch.maximum(ranked, low), high).mean(dim=0), None


def _median_of_means(values: Tensor, statistic: Statistic):
    means = torch.stack([bucket.mean(dim=0) for bucket in values.tensor_split(statistic.count)])
    return _median(means, Statistic("median"))


STATISTICS = {
    "mean": _mean,
    "and_mask": _and_mask,
    "xor_mask": _xor_mask,
    "geometric_mean": _geometric_mean,
    "sand_mask": _sand_mask,
    "sign_sum": _mean_of_signs,
    "sign_agreement": _sign_agreement,
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "winsorized_mean": _winsorized_mean,
    "median_of_means": _median_of_means,
}


def linear(x: Tensor, grad_output: Tensor, offsets: Tensor, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The statistic of a linear layer's contributions by forming all of them: E x O x I memory, for tests.

    x: (R, I); grad_output: (R, O); offsets: (E + 1,) int64, rows of group e are offsets[e]:offsets[e + 1].
    Returns what `stacked` returns for the (E, O, I) contributions, times E.
    """
    dtype = compute_dtype(torch.promote_types(x.dtype, grad_output.dtype))
    bounds = offsets.tolist()
    contributions = torch.stack(
        [grad_output[a:b].to(dtype).t() @ x[a:b].to(dtype) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    )
    value, mask_sum = stacked(contributions, statistic)
    return value * len(contributions), mask_sum
