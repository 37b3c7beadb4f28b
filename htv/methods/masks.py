"""What the AND-mask does to pure noise: how much survives where groups agree by chance alone.

Contributions are i.i.d. Gaussian with mean 0, d groups. Proposition 2 of Parascandolo et al. 2020, arXiv 2009.00329.
"""

from __future__ import annotations

import math
from numbers import Real

from htv.rules import AndMask

__all__ = ["masked_noise", "masked_noise_bound", "mean_noise", "survival_probability"]


def survival_probability(num_groups: int, tau: float) -> float:
    """The chance that the AND-mask keeps a coordinate of pure noise: that of d fair coins agreeing so far."""
    return sum(math.comb(num_groups, heads) for heads in _agreeing(num_groups, tau)) / 2**num_groups


def mean_noise(num_groups: int, coordinates: int, sigma: float = 1.0) -> float:
    """The expected squared norm of the plain mean: ``n * sigma**2 / d``."""
    _check(coordinates, sigma)
    _agreeing(num_groups, 0.0)
    return coordinates * sigma**2 / num_groups


def masked_noise(num_groups: int, coordinates: int, tau: float, sigma: float = 1.0) -> float:
    """The expected squared norm of the masked mean, exactly.

    Of d values with k positive signs, the squared sum is on average
    ``sigma**2 * (d * (1 - 2 / pi) + (2 * k - d)**2 * 2 / pi)``.
    """
    _check(coordinates, sigma)
    d = num_groups
    squares = ((heads, d * (1 - 2 / math.pi) + (2 * heads - d) ** 2 * 2 / math.pi) for heads in _agreeing(d, tau))
    per_coordinate = math.fsum(math.comb(d, heads) / 2**d * square for heads, square in squares) / d**2
    return coordinates * sigma**2 * per_coordinate


def masked_noise_bound(num_groups: int, coordinates: int, tau: float, sigma: float = 1.0) -> float:
    """An upper bound of `masked_noise`: ``n * sigma**2 * (d - t) * C(d, t) / 2**(d - 1)``, where t signs must agree.

    Where all must, t = d, the factor d - t is replaced by 1: 0 would be no bound.
    """
    _check(coordinates, sigma)
    d = num_groups
    needed = min(heads for heads in _agreeing(d, tau) if 2 * heads >= d)
    return coordinates * sigma**2 * (max(d - needed, 1) * math.comb(d, needed) / 2 ** (d - 1))


def _agreeing(num_groups: int, tau: float) -> list[int]:
    """The numbers of positive signs among d that the mask accepts."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an integer, got {num_groups!r}")
    least = AndMask(tau).statistic(num_groups).count
    return [heads for heads in range(num_groups + 1) if abs(2 * heads - num_groups) >= least]


def _check(coordinates: int, sigma: float) -> None:
    if coordinates < 0:
        raise ValueError(f"coordinates must be >= 0, got {coordinates}")
    if not isinstance(sigma, Real) or not sigma >= 0:
        raise ValueError(f"sigma must be >= 0, got {sigma!r}")
