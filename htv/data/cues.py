"""Images with a shortcut drawn in, and test sets that take image and shortcut apart.

A cue tells an image's class by something other than what it shows: where a box is, which colour it has, which picture
stands above it. Each of K classes but the last has its own; the absence of any is the cue of the last class, and what
the others look like without one. Training on `add_cue` teaches a model the shortcut, and `counterfactuals` tell whether
it took it.

From Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from htv.data.dataset import DataError, Dataset

Part = tuple[Tensor, Tensor]  # images and labels
COUNTERFACTUALS = ("NC", "C", "RC", "RI")
LARGEST_BOX = 3  # side of the paper's, in pixels


@dataclass(frozen=True)
class BoxCue:
    """A square of one color, whose place in a regular grid tells the class.

    size:   its side in pixels. Default: 3, or the largest for which boxes of different classes do not touch the same
            pixels.
    color:  of its pixels, in [0, 1]: one number, or red, green and blue, for which grey images become RGB. White may
            not show on white objects.
    """

    size: int | None = None
    color: float | tuple[float, float, float] = 1.0

    def __post_init__(self):
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ValueError(f"size must be an integer >= 1, or None for what fits; got {self.size!r}")
        color = self.color if isinstance(self.color, tuple | list) else (self.color,)
        if len(color) not in (1, 3):
            raise ValueError(f"color must be one number, or three for RGB; got {self.color!r}")
        for value in color:
            _check_share(color=value)

    def corners(self, height: int, width: int, num_classes: int) -> tuple[Tensor, int]:
        """(K - 1, 2) int64, top and left of each class's box, and the side of the boxes."""
        across = math.ceil(math.sqrt(num_classes - 1))
        down = math.ceil((num_classes - 1) / across)
        fits = min(height // down, width // across)
        size = min(LARGEST_BOX, fits) if self.size is None else self.size
        if size > fits or fits == 0:
            raise ValueError(
                f"boxes of size {size} for {num_classes - 1} classes do not fit into {height} x {width} pixels: "
                f"{'take size <= ' + str(fits) if fits else 'take larger images'}"
            )
        place = torch.arange(num_classes - 1)
        row, column = place // across, place % across
        centred = lambda index, length, count: ((2 * index + 1) * length // count - size) // 2
        return torch.stack([centred(row, height, down), centred(column, width, across)], dim=1), size

    def draw(self, images: Tensor, classes: Tensor, num_classes: int, generator=None, train: bool = True) -> Tensor:
        """Images with the box of `classes` (N,); those of the last class as they are, but in RGB if the boxes are."""
        color = images.new_tensor(self.color)
        images = _as_rgb(images) if color.dim() else images
        height, width = images.shape[-2:]
        corners, size = self.corners(height, width, num_classes)
        boxes = images.new_zeros(num_classes, height, width, dtype=torch.bool)
        for k, (top, left) in enumerate(corners.tolist()):
            boxes[k, top : top + size, left : left + size] = True
        inside = boxes[classes].reshape(len(images), *(1,) * (images.dim() - 3), height, width)
        return torch.where(inside, color.reshape(-1, 1, 1), images)


@dataclass(frozen=True)
class HueCue:
    """The image's brightness in a colour that tells the class; grey images become RGB.

    strength:  in [0, 1], from the image as it is to nothing but the class's colour.
    """

    strength: float = 1.0

    def __post_init__(self):
        _check_share(strength=self.strength)

    def draw(self, images: Tensor, classes: Tensor, num_classes: int, generator=None, train: bool = True) -> Tensor:
        """(N, 3, height, width), tinted by `classes` (N,); those of the last class keep their colours, or are grey."""
        images = _as_rgb(images)
        hues = [colorsys.hsv_to_rgb(k / (num_classes - 1), 1.0, 1.0) for k in range(num_classes - 1)]
        colors = images.new_tensor([*hues, (0.0, 0.0, 0.0)])[classes][:, :, None, None]
        strength = torch.where(classes == num_classes - 1, 0.0, self.strength).to(images)[:, None, None, None]
        return torch.lerp(images, images.mean(dim=1, keepdim=True) * colors, strength)


@dataclass(frozen=True, eq=False)
class DominoCue:
    """Another picture above the image, whose class is the cue: class k of `source` stands for class k.

    source:  has at least K - 1 classes, and images as wide, and as coloured, as those they are put above. Pictures
             above training images are drawn from its training part, those above test images from its test part.
    """

    source: Dataset

    def draw(self, images: Tensor, classes: Tensor, num_classes: int, generator=None, train: bool = True) -> Tensor:
        """(N, ..., source's height + height, width); nothing but black stands above images of the last class."""
        tops, labels = ((self.source.train_images, self.source.train_labels) if train
                        else (self.source.test_images, self.source.test_labels))  # fmt: skip
        if (tops.shape[1:-2], tops.shape[-1]) != (images.shape[1:-2], images.shape[-1]):
            raise ValueError(
                f"source has images of shape {tuple(tops.shape[1:])}, which do not stack above images of shape "
                f"{tuple(images.shape[1:])}: give one of the same width and channels"
            )
        labels, order = labels.sort(stable=True)
        counts = labels.bincount(minlength=num_classes)[:num_classes]
        missing = (counts[:-1] == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"source has no {'training' if train else 'test'} images of the classes {missing}")
        starts = torch.searchsorted(labels, torch.arange(num_classes))
        drawn = (torch.rand(len(images), generator=generator, dtype=torch.float64) * counts[classes]).long()
        index = (starts[classes] + drawn).clamp(max=len(order) - 1)  # those of the last class are blackened
        absent = (classes == num_classes - 1).reshape(-1, *(1,) * (images.dim() - 1))
        return torch.cat([tops[order[index]].masked_fill(absent, 0.0), images], dim=-2)


Cue = BoxCue | HueCue | DominoCue


def cue_mask(labels: Tensor, proportion: float, seed: int) -> Tensor:
    """Which examples carry a cue, (N,) bool: the first round(proportion * n) of each class in the seed's order.

    A smaller proportion's examples are among those of a larger one. labels: (N,) int64 on the CPU.
    """
    _check_share(proportion=proportion)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    with_cue = torch.zeros(len(labels), dtype=torch.bool)
    with_cue[by_class] = rank < (counts.double() * proportion).round().repeat_interleave(counts)
    return with_cue


def add_cue(data: Dataset, cue: Cue, proportion: float = 1.0, seed: int = 0) -> Dataset:
    """Training images with their class's cue on a share of each class, and test images with it on all.

    Labels and their order stay. See `cue_mask` for which images carry it.
    """
    _check_classes(data)
    train = _drawn(data, cue, _classes(data, cue_mask(data.train_labels, proportion, seed)), seed)
    return replace(data, train_images=train, test_images=counterfactuals(data, cue, seed)["C"][0])


def counterfactuals(data: Dataset, cue: Cue, seed: int = 0) -> dict[str, Part]:
    """Four versions of the test part, whatever the share of cues in training.

    NC  no cue                                      a model of the image is right, one of the cue says "last class"
    C   every image with the cue of its class       both are right
    RC  every image with the cue of a random class  a model of the image is right, one of the cue by chance
    RI  the label's cue on a random image           a model of the cue is right, one of the image by chance

    Returns (images, labels) by name. In RI the images are permuted, so that each is there once.
    """
    _check_classes(data)
    images, labels, last = data.test_images, data.test_labels, data.num_classes - 1
    generator = torch.Generator().manual_seed(seed)
    random_classes = torch.randint(0, data.num_classes, (len(labels),), generator=generator)
    permuted = images[torch.randperm(len(labels), generator=generator)]
    shown = {
        "NC": (images, torch.full_like(labels, last)),
        "C": (images, labels),
        "RC": (images, random_classes),
        "RI": (permuted, labels),
    }
    return {
        name: (cue.draw(picture, classes, data.num_classes, generator, train=False), labels)
        for name, (picture, classes) in shown.items()
    }


def fine_tuning_parts(
    data: Dataset, cue: Cue, clean: int, with_cue: int | None = None, seed: int = 0, proportion: float = 1.0
) -> tuple[Part, Part]:
    """A few training images without cue, and many others with it, to take a shortcut out of a model again.

    clean, with_cue:  how many, drawn without replacement; no image is in both. Default of with_cue: all the others.
    proportion:       of each class of the latter that does carry its cue.

    Returns (images, labels) of the clean part and of that with the cue.
    """
    _check_classes(data)
    total = len(data.train_labels)
    for name, count in (("clean", clean), ("with_cue", with_cue)):
        if isinstance(count, bool) or not isinstance(count, int | None):
            raise DataError(f"{name} must be a number of images, an int; got {count!r}")
    with_cue = total - clean if with_cue is None else with_cue
    if min(clean, with_cue) < 1 or clean + with_cue > total:
        raise DataError(
            f"{data.name}: {clean} clean images and {with_cue} with a cue, each at least 1, cannot be drawn from "
            f"{total} training images without any being in both: ask for fewer"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = [
        replace(data, train_images=data.train_images[index], train_labels=data.train_labels[index])
        for index in (order[:clean], order[clean : clean + with_cue])
    ]
    shares = 0.0, proportion
    drawn = [_drawn(part, cue, _classes(part, cue_mask(part.train_labels, share, seed)), seed)
             for part, share in zip(parts, shares, strict=True)]  # fmt: skip
    return tuple((images, part.train_labels) for images, part in zip(drawn, parts, strict=True))


def _as_rgb(images: Tensor) -> Tensor:
    return images.unsqueeze(1).expand(-1, 3, -1, -1) if images.dim() == 3 else images


def _classes(data: Dataset, with_cue: Tensor) -> Tensor:
    """Whose cue each training image gets: the last class's is none."""
    return torch.where(with_cue, data.train_labels, data.num_classes - 1)


def _drawn(data: Dataset, cue: Cue, classes: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return cue.draw(data.train_images, classes, data.num_classes, generator, train=True)


def _check_classes(data: Dataset) -> None:
    if data.num_classes < 2:
        raise DataError(f"{data.name} has {data.num_classes} class: a cue tells at least two apart")
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        if images.dim() not in (3, 4) or (images.dim() == 4 and images.shape[1] not in (1, 3)):
            raise DataError(f"{data.name} has images of shape {tuple(images.shape[1:])}, not grey or RGB ones")
        if not images.is_floating_point():
            raise DataError(f"{data.name} has images of {images.dtype}: make them floating-point, in [0, 1]")
        if not ((labels >= 0) & (labels < data.num_classes)).all():
            raise DataError(
                f"{data.name} has labels from {labels.min()} to {labels.max()}, not 0 to {data.num_classes - 1}"
            )


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
