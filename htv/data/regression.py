"""A curve through noisy points, beside inputs that tell the points apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clean_curve", "noisy_curve"]


def clean_curve(x: Tensor) -> Tensor:
    """Compute ``tanh(x) + tanh(-5 x) / 2``, the curve that `noisy_curve` draws points from.

    x:  of any shape, floating point. Returns the same shape.

    >>> htv.data.clean_curve(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.2616])
    """
    return x.tanh() + 0.5 * (-5 * x).tanh()


def noisy_curve(
    identifiers: float, points: int = 20, dims: int = 30, label_noise: float = 0.08, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Make points of a curve whose labels are noisy, each with inputs that belong to it alone.

    A network that learns the labels by heart may do so through these inputs and keep the curve, or
    by bending it.

    identifiers:  the standard deviation of the inputs beside x, >= 0.
    points:       how many, evenly spaced on [-1.5, 1.5].
    dims:         how many inputs there are beside x.
    label_noise:  the standard deviation of the labels' Gaussian noise, >= 0.
    seed:         of noise and inputs. Points and label noise of a seed do not depend on
                  `identifiers`, and the inputs differ by their scale alone.

    Returns inputs (points, 1 + dims), of which the first is x, and labels (points, 1), float32.
    Raises ValueError for negative deviations and counts below 1.

    Bayat et al. 2024, "The pitfalls of memorization", arXiv 2412.07684, figure 3.

    >>> inputs, labels = htv.data.noisy_curve(1.0, points=3, dims=2, label_noise=0)
    >>> inputs.shape, labels.flatten()
    (torch.Size([3, 3]), tensor([-0.4051,  0.0000,  0.4051]))
    """
    if not identifiers >= 0 or not label_noise >= 0:
        raise ValueError(
            f"identifiers and label_noise must not be negative, got {identifiers!r} and "
            f"{label_noise!r}"
        )
    if points < 1 or dims < 1:
        raise ValueError(f"points and dims must be at least 1, got {points} and {dims}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1.5, 1.5, points)[:, None]
    y = clean_curve(x) + label_noise * torch.randn(points, 1, generator=generator)
    return torch.cat([x, identifiers * torch.randn(points, dims, generator=generator)], dim=1), y
