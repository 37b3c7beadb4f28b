"""What the AND-mask does to pure noise: how much survives where groups agree by chance alone.

Contributions are i.i.d. Gaussian with mean 0, d groups. Proposition 2 of Parascandolo et al. 2020,
arXiv 2009.00329.
"""

from __future__ import annotations

import math
from numbers import Real

from htv.rules import AndMask

__all__ = ["masked_noise", "masked_noise_bound", "mean_noise", "survival_probability"]


def survival_probability(num_groups: int, tau: float) -> float:
    """Compute the chance that the AND-mask keeps a coordinate of pure noise.

    It is the chance that so many of d fair coins agree.

    num_groups:  d.
    tau:         of `htv.AndMask`.

    Returns a float in [0, 1]. Raises TypeError or ValueError for what no mask is defined for.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> htv.methods.survival_probability(num_groups=4, tau=1.0)
    0.125
    """
    outcomes: int = 2**num_groups
    return sum(math.comb(num_groups, heads) for heads in _agreeing(num_groups, tau)) / outcomes


def mean_noise(num_groups: int, coordinates: int, sigma: float = 1.0) -> float:
    """Compute the expected squared norm of the plain mean of pure noise: ``n * sigma**2 / d``.

    num_groups:   d.
    coordinates:  n.
    sigma:        the standard deviation of a contribution, >= 0.

    Returns a float. Raises TypeError or ValueError for anything out of range.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> htv.methods.mean_noise(num_groups=4, coordinates=10)
    2.5
    """
    _check(coordinates, sigma)
    _agreeing(num_groups, 0.0)
    return coordinates * sigma**2 / num_groups


def masked_noise(num_groups: int, coordinates: int, tau: float, sigma: float = 1.0) -> float:
    """Compute the expected squared norm of the masked mean of pure noise, exactly.

    Of d values with k positive signs, the squared sum is on average
    ``sigma**2 * (d * (1 - 2 / pi) + (2 * k - d)**2 * 2 / pi)``.

    num_groups:   d.
    coordinates:  n.
    tau:          of `htv.AndMask`.
    sigma:        the standard deviation of a contribution, >= 0.

    Returns a float. Raises TypeError or ValueError for anything out of range.

    >>> round(htv.methods.masked_noise(num_groups=4, coordinates=10, tau=1.0), 4)
    0.9093
    """
    _check(coordinates, sigma)
    d = num_groups
    squares = (
        (heads, d * (1 - 2 / math.pi) + (2 * heads - d) ** 2 * 2 / math.pi)
        for heads in _agreeing(d, tau)
    )
    per_coordinate = (
        math.fsum(math.comb(d, heads) / 2**d * square for heads, square in squares) / d**2
    )
    return coordinates * sigma**2 * per_coordinate


def masked_noise_bound(num_groups: int, coordinates: int, tau: float, sigma: float = 1.0) -> float:
    """Bound `masked_noise` from above: ``n * sigma**2 * (d - t) * C(d, t) / 2**(d - 1)``.

    t is how many signs must agree. Where all must, t = d, the factor d - t is replaced by 1: 0
    would be no bound.

    num_groups:   d.
    coordinates:  n.
    tau:          of `htv.AndMask`.
    sigma:        the standard deviation of a contribution, >= 0.

    Returns a float. Raises TypeError or ValueError for anything out of range.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329,
    proposition 2.

    >>> htv.methods.masked_noise_bound(num_groups=4, coordinates=10, tau=1.0)
    1.25
    """
    _check(coordinates, sigma)
    d = num_groups
    needed = min(heads for heads in _agreeing(d, tau) if 2 * heads >= d)
    share: float = max(d - needed, 1) * math.comb(d, needed) / 2 ** (d - 1)
    return coordinates * sigma**2 * share


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
