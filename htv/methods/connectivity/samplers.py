"""Where on a path to look: t drawn at random, (count,) float64 on the CPU, and evenly spaced t.

The same generator in the same state gives the same t.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["path_grid", "sample_clipped_normal", "sample_truncated_normal", "sample_uniform"]


def path_grid(points: int) -> Tensor:
    """`points` evenly spaced t from 0 to 1, both included exactly: (points,) float64."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be an int of at least 2, the two ends; got {points!r}")
    return torch.linspace(0, 1, points, dtype=torch.float64)


def sample_uniform(count: int = 1, *, generator: Generator | None = None) -> Tensor:
    """t ~ U(0, 1)."""
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_clipped_normal(count: int = 1, *, generator: Generator | None = None) -> Tensor:
    """t = .5 + .5 clip(N(0, 1), -.5, .5), as the public code of Lubana et al. 2023 (arXiv 2211.08422) draws it.

    Not a truncated normal: 31% of the draws are exactly .25 and 31% exactly .75.
    """
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return 0.5 + 0.5 * normal.clamp(-0.5, 0.5)


def sample_truncated_normal(
    count: int = 1,
    *,
    mean: float = 0.5,
    std: float = 0.5,
    low: float = 0.25,
    high: float = 0.75,
    generator: Generator | None = None,
) -> Tensor:
    """t from N(mean, std^2) given that low <= t <= high, by inverting the distribution function.

    The defaults are `sample_clipped_normal` with its ends cut off instead of piled up.
    """
    if not (std > 0 and low < high and 0 <= low and high <= 1):
        raise ValueError(
            f"a truncated normal on the path needs std > 0 and 0 <= low < high <= 1, got {std=}, {low=}, {high=}"
        )
    lower, upper = ((torch.tensor(end, dtype=torch.float64) - mean) / std for end in (low, high))
    sign = 1.0
    if lower > 0:  # the lower tail is the one that a distribution function resolves
        sign, lower, upper = -1.0, -upper, -lower
    first, last = torch.special.ndtr(lower), torch.special.ndtr(upper)
    if not last > first:
        raise ValueError(f"[low, high] = [{low}, {high}] is too far from mean={mean} for std={std}: no mass is there")
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    normal = sign * torch.special.ndtri(torch.lerp(first, last, uniform))
    return (mean + std * normal).clamp(low, high)
