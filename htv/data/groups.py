"""Problems in which a shortcut goes with the class for most examples, the majority, and against it
for a few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.data.cues import cue_mask
from htv.data.dataset import DataError, Dataset

__all__ = ["Grouped", "GroupedPart", "backgrounds", "flipped_shortcut"]


@dataclass(frozen=True, eq=False)
class GroupedPart:
    """Hold examples of two classes, and what a shortcut suggests for each.

    x:         (N, *features) float32.
    y:         (N,) int64, the class.
    shortcut:  (N,) int64, the class the shortcut suggests.

    >>> y, shortcut = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    >>> part = htv.data.GroupedPart(torch.zeros(3, 2), y, shortcut)
    >>> part.groups, part.minority
    (tensor([0, 3, 2]), tensor([False, False,  True]))
    """

    x: Tensor
    y: Tensor
    shortcut: Tensor

    @property
    def groups(self) -> Tensor:
        """(N,) int64, ``2 y + shortcut``: four groups."""
        return 2 * self.y + self.shortcut

    @property
    def minority(self) -> Tensor:
        """(N,) bool, where the shortcut misleads."""
        return self.y != self.shortcut

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Grouped:
    """Hold the three parts of a problem in which a shortcut misleads on a minority.

    train:       mostly examples of the majority.
    validation:  as the function that makes it says; it may have no examples.
    test:        likewise.

    >>> data = htv.data.flipped_shortcut(train=20, test=10, minority=2, test_minority=5, dims=4)
    >>> isinstance(data, htv.data.Grouped), int(data.train.minority.sum())
    (True, 2)
    """

    train: GroupedPart
    validation: GroupedPart
    test: GroupedPart


def flipped_shortcut(
    noise: float = 0.5,
    train: int = 1000,
    test: int = 1000,
    minority: int = 99,
    test_minority: int = 500,
    dims: int = 1800,
    seed: int = 0,
) -> Grouped:
    """Make a shortcut five times as large as the feature it goes with, and features to memorise by.

    With s = 2 y - 1 and y a fair coin, feature 0 is ``(.12 n - 1) s`` with n Gaussian; feature 1,
    the shortcut, is five times an independent copy of it, with its sign flipped on the minority;
    the others are Gaussian noise. Without noise a linear classifier comes to rely on feature 0;
    with noise it learns the minority by heart instead.

    noise:          the deviation of the other features.
    train:          how many training examples.
    test:           how many test examples.
    minority:       how many training examples are of the minority.
    test_minority:  how many test examples are.
    dims:           how many features there are, at least 2.
    seed:           decides all that is drawn.

    Returns `Grouped` with x (N, dims) and an empty validation part. Raises ValueError for a
    minority larger than its part, and for dims below 2.

    Bayat et al. 2024, "The pitfalls of memorization", arXiv 2412.07684, figure 1.

    >>> data = htv.data.flipped_shortcut(train=20, test=10, minority=2, test_minority=5, dims=4)
    >>> data.train.x.shape, int(data.train.minority.sum()), int(data.test.minority.sum())
    (torch.Size([20, 4]), 2, 5)
    """
    if dims < 2:
        raise ValueError(f"dims must be at least 2, for the feature and the shortcut; got {dims}")
    if not 0 <= minority <= train or not 0 <= test_minority <= test:
        raise ValueError(
            f"minority and test_minority must be from 0 to train and test, got {minority} of "
            f"{train} and {test_minority} of {test}"
        )
    generator = torch.Generator().manual_seed(seed)

    def part(count: int, flipped: int) -> GroupedPart:
        y = torch.randint(0, 2, (count,), generator=generator)
        shortcut = y.clone()
        shortcut[torch.randperm(count, generator=generator)[:flipped]] ^= 1
        pair = 0.12 * torch.randn(count, 2, generator=generator) - 1
        pair *= torch.stack([2 * y - 1, 5 * (2 * shortcut - 1)], dim=1)
        return GroupedPart(
            torch.cat([pair, noise * torch.randn(count, dims - 2, generator=generator)], 1),
            y,
            shortcut,
        )

    return Grouped(part(train, minority), part(0, 0), part(test, test_minority))


def backgrounds(
    data: Dataset,
    minority: float = 0.05,
    validation: float = 0.2,
    strength: float = 0.5,
    seed: int = 0,
) -> Grouped:
    """Make a two-class problem of any images, whose shortcut is the light they are shown in.

    Class 0 is the first half of the data set's classes, class 1 the second. Images stand before
    noise, darker where the shortcut is 0 and lighter where it is 1: a pixel is
    ``image + (1 - image) * strength * (u + shortcut) / 2``, u uniform in [0, 1], pixel by pixel.
    In validation and test every image is there twice, once in each light, so that the groups of a
    class are equally large.

    data:        grey images, (N, height, width).
    minority:    the share of each class's training images in the other class's light, in (0, .5].
    validation:  the share of training images that is kept for validation, in (0, 1).
    strength:    of the light, in (0, 1].
    seed:        decides all that is drawn.

    Returns `Grouped` with x (N, 1, height, width). Raises `DataError` for images that are not grey,
    and ValueError for shares out of range.

    After Waterbirds of Sagawa et al. 2019, "Distributionally robust neural networks",
    arXiv 1911.08731.

    >>> images, labels = torch.zeros(40, 8, 8), torch.arange(40) % 4
    >>> data = htv.data.Dataset("black", 4, images, labels, images, labels)
    >>> grouped = htv.data.backgrounds(data, minority=0.25)
    >>> grouped.train.x.shape, int(grouped.train.minority.sum()), len(grouped.test)
    (torch.Size([32, 1, 8, 8]), 8, 80)
    """
    if data.train_images.dim() != 3:
        raise DataError(
            f"{data.name} has images of shape {tuple(data.train_images.shape[1:])}; grey ones are "
            "needed"
        )
    if not 0 < minority <= 0.5 or not 0 < validation < 1 or not 0 < strength <= 1:
        raise ValueError(
            "minority must lie in (0, 0.5], validation in (0, 1), strength in (0, 1]; got "
            f"{minority!r}, {validation!r}, {strength!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    half = math.ceil(data.num_classes / 2)

    def shown(images: Tensor, y: Tensor, shortcut: Tensor) -> GroupedPart:
        light = (
            strength * (torch.rand(images.shape, generator=generator) + shortcut[:, None, None]) / 2
        )
        return GroupedPart(torch.lerp(light, torch.ones(()), images)[:, None], y, shortcut)

    def balanced(images: Tensor, labels: Tensor) -> GroupedPart:
        y = (labels >= half).long().repeat(2)
        return shown(images.repeat(2, 1, 1), y, torch.arange(2).repeat_interleave(len(images)))

    order = torch.randperm(len(data.train_labels), generator=generator)
    kept, held = order.split(
        [len(order) - round(validation * len(order)), round(validation * len(order))]
    )
    y = (data.train_labels[kept] >= half).long()
    shortcut = torch.where(cue_mask(y, 1 - minority, seed), y, 1 - y)
    return Grouped(
        shown(data.train_images[kept], y, shortcut),
        balanced(data.train_images[held], data.train_labels[held]),
        balanced(data.test_images, data.test_labels),
    )
