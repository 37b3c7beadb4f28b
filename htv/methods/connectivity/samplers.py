"""Where on a path to look: t drawn at random, (count,) float64 on the CPU, and evenly spaced t.

The same generator in the same state gives the same t.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["path_grid", "sample_clipped_normal", "sample_truncated_normal", "sample_uniform"]


def path_grid(points: int) -> Tensor:
    """Space t evenly from 0 to 1, both included exactly.

    points:  how many, at least 2; ValueError otherwise.

    Returns (points,) float64.

    >>> htv.methods.path_grid(5)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be an int of at least 2, the two ends; got {points!r}")
    return torch.linspace(0, 1, points, dtype=torch.float64)


def sample_uniform(count: int = 1, *, generator: Generator | None = None) -> Tensor:
    """Draw t ~ U(0, 1).

    count:      how many.
    generator:  of random numbers; in the same state it gives the same t. Default: torch's own.

    Returns (count,) float64 on the CPU.

    >>> htv.methods.sample_uniform(3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_clipped_normal(count: int = 1, *, generator: Generator | None = None) -> Tensor:
    """Draw t = .5 + .5 clip(N(0, 1), -.5, .5), as the code of Lubana et al. 2023 does.

    Not a truncated normal: 31% of the draws are exactly .25 and 31% exactly .75.

    count:      how many.
    generator:  of random numbers; in the same state it gives the same t. Default: torch's own.

    Returns (count,) float64 on the CPU.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> t = htv.methods.sample_clipped_normal(100, generator=torch.Generator().manual_seed(0))
    >>> t.min().item(), t.max().item()
    (0.25, 0.75)
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
    """Draw t from N(mean, std^2) given low <= t <= high, by inverting the distribution function.

    The defaults are `sample_clipped_normal` with its ends cut off instead of piled up.

    count:      how many.
    mean:       of the normal distribution.
    std:        its standard deviation, > 0.
    low:        the least t, >= 0.
    high:       the largest t, <= 1.
    generator:  of random numbers; in the same state it gives the same t. Default: torch's own.

    Returns (count,) float64 on the CPU. Raises ValueError for an interval that is empty or has no
    mass.

    >>> t = htv.methods.sample_truncated_normal(100, generator=torch.Generator().manual_seed(0))
    >>> bool(((t > 0.25) & (t < 0.75)).all())
    True
    """
    if not (std > 0 and low < high and 0 <= low and high <= 1):
        raise ValueError(
            f"a truncated normal on the path needs std > 0 and 0 <= low < high <= 1, got {std=}, "
            f"{low=}, {high=}"
        )
    lower, upper = ((torch.tensor(end, dtype=torch.float64) - mean) / std for end in (low, high))
    sign = 1.0
    if lower > 0:  # the lower tail is the one that a distribution function resolves
        sign, lower, upper = -1.0, -upper, -lower
    first, last = torch.special.ndtr(lower), torch.special.ndtr(upper)
    if not last > first:
        raise ValueError(
            f"[low, high] = [{low}, {high}] is too far from mean={mean} for std={std}: no mass is "
            "there"
        )
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    normal: Tensor = sign * torch.special.ndtri(torch.lerp(first, last, uniform))
    return (mean + std * normal).clamp(low, high)
