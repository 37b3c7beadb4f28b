"""Problems with environments: one mechanism they share, and shortcuts that differ from one to the next.

From Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def linear_environments(count: int = 4, shared: float = 0.1, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """One example per environment, ``x = scale * [identity | shared]`` and ``y = 1``: a linear regression.

    A feature of its own explains each environment at once; the last feature, weaker, explains all of them.

    Returns x (count, count + 1) and y (count, 1), float32.
    """
    _check_counts(count=count)
    own = torch.eye(count)
    return scale * torch.cat([own, torch.full((count, 1), shared)], dim=1), torch.ones(count, 1)


@dataclass(frozen=True, eq=False)
class Environments:
    """Examples of E environments with two classes, and a test part in which no shortcut works.

    x, y:            (E, N, *features) float32 and (E, N) float32 of 0 and 1; the environments have equally many.
    test_x, test_y:  (M, *features) and (M,).
    shortcut:        (*features) bool, which features hold what differs between environments; the others hold what they
                     share, and noise.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    shortcut: Tensor


def spirals(
    num_environments: int = 16,
    per_environment: int = 1024,
    num_test: int = 2000,
    shortcut_dims: int = 32,
    turns: float = 3.0,
    noise: float = 0.02,
    seed: int = 0,
) -> Environments:
    """Two intertwined spirals, the mechanism, beside a linear shortcut of every environment's own.

    Features 0 and 1 are the spiral of the example's class: radius r uniform in [.08, 1], angle ``2 pi turns r + pi y``,
    then r jitters by up to `noise`; both are scaled to deviation 1. The others hold ``(2 y - 1) s_e``, one Gaussian
    vector s_e per environment: easier by far, but useless in the test part, where they are Gaussian noise.
    """
    _check_counts(num_environments=num_environments, per_environment=per_environment, num_test=num_test)
    _check_counts(shortcut_dims=shortcut_dims)
    if num_environments * per_environment < 2:
        raise ValueError("per_environment must be at least 2 in a single environment: one example has no deviation")
    generator = torch.Generator().manual_seed(seed)

    def mechanism(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 2, shape, generator=generator).float()
        radius = 0.08 + 0.92 * torch.rand(shape, generator=generator)
        angle = 2 * math.pi * turns * radius + math.pi * y
        radius = radius + noise * (2 * torch.rand(shape, generator=generator) - 1)
        return torch.stack([angle.cos() * radius, angle.sin() * radius], dim=-1), y

    points, y = mechanism((num_environments, per_environment))
    cues = torch.randn(num_environments, 1, shortcut_dims, generator=generator)
    deviation = points.flatten(0, 1).std(dim=0)
    x = torch.cat([points / deviation, (2 * y - 1)[..., None] * cues], dim=-1)
    test_points, test_y = mechanism((num_test,))
    test_x = torch.cat([test_points / deviation, torch.randn(num_test, shortcut_dims, generator=generator)], dim=-1)
    return Environments(x, y, test_x, test_y, torch.arange(2 + shortcut_dims) >= 2)


def patchwork(
    num_environments: int = 8,
    per_environment: int = 64,
    num_test: int = 2000,
    tile: int = 4,
    strength: float = 0.25,
    seed: int = 0,
) -> Environments:
    """Images of tiles: one tells the class in every environment, weakly; another one in each environment, strongly.

    A picture of the paper's "patchwork" of solutions. The image is a square of tiles of `tile` x `tile` pixels, the
    smallest that has a tile for every environment and the one they share, which is the first; the others are noise. All
    pixels are Gaussian noise of deviation 1. The shared tile adds ``(2 y - 1) * strength`` times a pattern of signs,
    the environment's own ``(2 y - 1)`` times one of its own. Sewing the strong tiles together explains all training
    images; in the test part only the shared tile tells anything.

    x is (E, N, size, size).
    """
    _check_counts(num_environments=num_environments, per_environment=per_environment, num_test=num_test, tile=tile)
    generator = torch.Generator().manual_seed(seed)
    across = math.isqrt(num_environments) + 1  # the least whose square is above the number of environments
    patterns = torch.randint(0, 2, (num_environments + 1, tile, tile), generator=generator) * 2.0 - 1

    def part(shape: tuple[int, ...], strong: bool) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 2, shape, generator=generator).float()
        sign = (2 * y - 1)[..., None, None]
        tiles = torch.randn(*shape, across**2, tile, tile, generator=generator)
        tiles[..., 0, :, :] += strength * sign * patterns[0]
        for e in range(num_environments if strong else 0):
            tiles[e, :, e + 1] += sign[e] * patterns[e + 1]
        return _sewn(tiles, across), y

    x, y = part((num_environments, per_environment), strong=True)
    test_x, test_y = part((num_test,), strong=False)
    shortcut = torch.zeros(across**2, tile, tile, dtype=torch.bool)
    shortcut[1 : num_environments + 1] = True
    return Environments(x, y, test_x, test_y, _sewn(shortcut, across))


def _sewn(tiles: Tensor, across: int) -> Tensor:
    """(..., across**2, tile, tile) -> (..., across * tile, across * tile)."""
    tile = tiles.shape[-1]
    rows = tiles.unflatten(-3, (across, across)).transpose(-3, -2)
    return rows.reshape(*tiles.shape[:-3], across * tile, across * tile)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
