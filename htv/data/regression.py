"""A curve through noisy points, beside inputs that tell the points apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clean_curve", "noisy_curve"]


def clean_curve(x: Tensor) -> Tensor:
    """``tanh(x) + tanh(-5 x) / 2``."""
    return x.tanh() + 0.5 * (-5 * x).tanh()


def noisy_curve(
    identifiers: float, points: int = 20, dims: int = 30, label_noise: float = 0.08, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points on [-1.5, 1.5] whose labels are noisy, each with inputs that belong to it alone.

    A network that learns the labels by heart may do so through the identifiers and keep the curve, or by bending it.

    identifiers:  the standard deviation of the `dims` Gaussian inputs beside x.

    Returns inputs (points, 1 + dims), of which the first is x, and labels (points, 1), float32. Points and label noise
    of a seed do not depend on `identifiers`, and these differ by their scale alone. Bayat et al. 2024, arXiv
    2412.07684, figure 3.
    """
    if not identifiers >= 0 or not label_noise >= 0:
        raise ValueError(f"identifiers and label_noise must not be negative, got {identifiers!r} and {label_noise!r}")
    if points < 1 or dims < 1:
        raise ValueError(f"points and dims must be at least 1, got {points} and {dims}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1.5, 1.5, points)[:, None]
    y = clean_curve(x) + label_noise * torch.randn(points, 1, generator=generator)
    return torch.cat([x, identifiers * torch.randn(points, dims, generator=generator)], dim=1), y
