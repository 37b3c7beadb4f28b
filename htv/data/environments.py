"""Problems with environments: one mechanism they share, and shortcuts that differ from one to the
next.

From Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def linear_environments(
    count: int = 4, shared: float = 0.1, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Make a linear regression with one example per environment, x = scale * [identity | shared].

    A feature of its own explains each environment at once; the last feature, weaker, explains
    all of them. All targets are 1.

    count:   E, how many environments; ValueError below 1.
    shared:  the size of the last feature, beside 1 for an environment's own.
    scale:   of x.

    Returns x (E, E + 1) and y (E, 1), float32.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> x, y = htv.data.linear_environments(2, shared=0.5, scale=2)
    >>> x
    tensor([[2., 0., 1.],
            [0., 2., 1.]])
    """
    _check_counts(count=count)
    own = torch.eye(count)
    return scale * torch.cat([own, torch.full((count, 1), shared)], dim=1), torch.ones(count, 1)


@dataclass(frozen=True, eq=False)
class Environments:
    """Hold examples of E environments with two classes, and a test part in which no shortcut works.

    x:         (E, N, *features) float32; the environments have equally many examples.
    y:         (E, N) float32 of 0 and 1.
    test_x:    (M, *features) float32.
    test_y:    (M,) float32 of 0 and 1.
    shortcut:  (*features) bool, which features hold what differs between environments; the others
               hold what they share, and noise.

    >>> data = htv.data.spirals(num_environments=2, per_environment=8, num_test=4, shortcut_dims=1)
    >>> isinstance(data, htv.data.Environments), data.x.shape, data.shortcut
    (True, torch.Size([2, 8, 3]), tensor([False, False,  True]))
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
    """Make two intertwined spirals, the mechanism, beside one linear shortcut per environment.

    Features 0 and 1 are the spiral of the example's class: radius r uniform in [.08, 1], angle
    ``2 pi turns r + pi y``, then r jitters by up to `noise`; both are scaled to deviation 1. The
    others hold ``(2 y - 1) s_e`` with one Gaussian vector s_e per environment: easier by far, but
    useless in the test part, where they are Gaussian noise.

    num_environments:  E.
    per_environment:   N, examples of each.
    num_test:          M, test examples.
    shortcut_dims:     how many features the shortcut has.
    turns:             of each spiral.
    noise:             the largest change of a radius.
    seed:              decides all that is drawn.

    Returns `Environments` with x (E, N, 2 + shortcut_dims). Raises ValueError for counts below 1.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> data = htv.data.spirals(num_environments=4, per_environment=16, num_test=8)
    >>> data.x.shape, data.y.shape, data.test_x.shape
    (torch.Size([4, 16, 34]), torch.Size([4, 16]), torch.Size([8, 34]))
    """
    _check_counts(
        num_environments=num_environments, per_environment=per_environment, num_test=num_test
    )
    _check_counts(shortcut_dims=shortcut_dims)
    if num_environments * per_environment < 2:
        raise ValueError(
            "per_environment must be at least 2 in a single environment: one example has no "
            "deviation"
        )
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
    test_x = torch.cat(
        [test_points / deviation, torch.randn(num_test, shortcut_dims, generator=generator)], dim=-1
    )
    return Environments(x, y, test_x, test_y, torch.arange(2 + shortcut_dims) >= 2)


def patchwork(
    num_environments: int = 8,
    per_environment: int = 64,
    num_test: int = 2000,
    tile: int = 4,
    strength: float = 0.25,
    seed: int = 0,
) -> Environments:
    """Make images of tiles, one of which tells the class in every environment, if weakly.

    A picture of the paper's "patchwork" of solutions. The image is a square of tiles of `tile`
    x `tile` pixels, the smallest that has a tile for every environment and the one they share,
    which is the first; the others are noise. All pixels are Gaussian noise of deviation 1. The
    shared tile adds ``(2 y - 1) * strength`` times a pattern of signs, the environment's own
    ``(2 y - 1)`` times one of its own. Joining the strong tiles explains all training images; in
    the test part only the shared tile tells anything.

    num_environments:  E.
    per_environment:   N, images of each.
    num_test:          M, test images.
    tile:              the side of a tile, in pixels.
    strength:          of the shared tile.
    seed:              decides all that is drawn.

    Returns `Environments` with x (E, N, side, side). Raises ValueError for counts below 1.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> htv.data.patchwork(num_environments=3, per_environment=4, num_test=2).x.shape
    torch.Size([3, 4, 8, 8])
    """
    _check_counts(
        num_environments=num_environments,
        per_environment=per_environment,
        num_test=num_test,
        tile=tile,
    )
    generator = torch.Generator().manual_seed(seed)
    across = (
        math.isqrt(num_environments) + 1
    )  # the least whose square is above the number of environments
    patterns = (
        torch.randint(0, 2, (num_environments + 1, tile, tile), generator=generator) * 2.0 - 1
    )

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
    rows: Tensor = tiles.unflatten(-3, (across, across)).transpose(-3, -2)
    return rows.reshape(*tiles.shape[:-3], across * tile, across * tile)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
