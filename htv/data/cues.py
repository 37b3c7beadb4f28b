"""Images with a shortcut drawn in, and test sets that take image and shortcut apart.

A cue tells an image's class by something other than what it shows: where a box is, which colour it
has, which picture stands above it. Each of K classes but the last has its own; the absence of any
is the cue of the last class, and what the others look like without one. Training on `add_cue`
teaches a model the shortcut, and `counterfactuals` tell whether it took it.

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
    """Draw a square of one color, whose place in a regular grid tells the class.

    size:   its side in pixels. Default: 3, or the largest for which boxes of different classes do
            not touch the same pixels.
    color:  of its pixels, in [0, 1]: one number, or red, green and blue, for which grey images
            become RGB. White may not show on white objects.

    Raises ValueError for a size below 1 and a color outside of [0, 1].

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> image, label = torch.zeros(1, 4, 4), torch.tensor([1])
    >>> htv.data.BoxCue(size=1).draw(image, label, num_classes=5)
    tensor([[[0., 0., 1., 0.],
             [0., 0., 0., 0.],
             [0., 0., 0., 0.],
             [0., 0., 0., 0.]]])
    """

    size: int | None = None
    color: float | tuple[float, float, float] = 1.0

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ValueError(
                f"size must be an integer >= 1, or None for what fits; got {self.size!r}"
            )
        color = self.color if isinstance(self.color, tuple | list) else (self.color,)
        if len(color) not in (1, 3):
            raise ValueError(f"color must be one number, or three for RGB; got {self.color!r}")
        for value in color:
            _check_share(color=value)

    def corners(self, height: int, width: int, num_classes: int) -> tuple[Tensor, int]:
        """Return where the boxes are.

        height, width:  of the images, in pixels.
        num_classes:    K; the last class has no box.

        Returns (K - 1, 2) int64, top and left of each class's box, and the side of the boxes.
        Raises ValueError if boxes of this size do not fit.
        """
        across = math.ceil(math.sqrt(num_classes - 1))
        down = math.ceil((num_classes - 1) / across)
        fits = min(height // down, width // across)
        size = min(LARGEST_BOX, fits) if self.size is None else self.size
        if size > fits or fits == 0:
            raise ValueError(
                f"boxes of size {size} for {num_classes - 1} classes do not fit into {height} x "
                f"{width} pixels: {'take size <= ' + str(fits) if fits else 'take larger images'}"
            )
        place = torch.arange(num_classes - 1)
        row, column = place // across, place % across
        top = ((2 * row + 1) * height // down - size) // 2
        left = ((2 * column + 1) * width // across - size) // 2
        return torch.stack([top, left], dim=1), size

    def draw(
        self,
        images: Tensor,
        classes: Tensor,
        num_classes: int,
        generator: torch.Generator | None = None,
        train: bool = True,
    ) -> Tensor:
        """Return the images with the boxes of their classes.

        images:       (N, height, width) or (N, 3, height, width), floating point.
        classes:      (N,) int64 in [0, num_classes), whose box each image gets. Images of the last
                      class stay as they are, but become RGB if the boxes are.
        num_classes:  K.
        generator:    not used: nothing is drawn at random.
        train:        not used: the boxes are the same in training and test.
        """
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
    """Tint an image in a color that tells the class, with its brightness; grey images become RGB.

    strength:  in [0, 1], from the image as it is to nothing but the class's color. ValueError
               outside.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> grey, labels = torch.full((2, 1, 1), 0.5), torch.tensor([0, 2])
    >>> htv.data.HueCue().draw(grey, labels, num_classes=3).flatten(1)
    tensor([[0.5000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.5000]])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_share(strength=self.strength)

    def draw(
        self,
        images: Tensor,
        classes: Tensor,
        num_classes: int,
        generator: torch.Generator | None = None,
        train: bool = True,
    ) -> Tensor:
        """Return the images tinted by class, (N, 3, height, width).

        images:       (N, height, width) or (N, 3, height, width), floating point.
        classes:      (N,) int64 in [0, num_classes), whose color each image gets. Images of the
                      last class keep their colors, or are grey.
        num_classes:  K.
        generator:    not used: nothing is drawn at random.
        train:        not used: the colors are the same in training and test.
        """
        images = _as_rgb(images)
        hues = [
            colorsys.hsv_to_rgb(k / (num_classes - 1), 1.0, 1.0) for k in range(num_classes - 1)
        ]
        colors = images.new_tensor([*hues, (0.0, 0.0, 0.0)])[classes][:, :, None, None]
        strength = torch.where(classes == num_classes - 1, 0.0, self.strength).to(images)[
            :, None, None, None
        ]
        return torch.lerp(images, images.mean(dim=1, keepdim=True) * colors, strength)


@dataclass(frozen=True, eq=False)
class DominoCue:
    """Put another picture above the image: class k of `source` is the cue of class k.

    source:  a data set of at least K - 1 classes, whose images are as wide, and have as many
             channels, as those they are put above. Pictures above training images are drawn from
             its training part, those above test images from its test part.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> tops = torch.tensor([[[0.1, 0.1]], [[0.2, 0.2]]])
    >>> source = htv.data.Dataset("tops", 2, tops, torch.arange(2), tops, torch.arange(2))
    >>> images, labels = torch.zeros(2, 1, 2), torch.tensor([1, 2])
    >>> htv.data.DominoCue(source).draw(images, labels, num_classes=3).flatten(1)
    tensor([[0.2000, 0.2000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000]])
    """

    source: Dataset

    def draw(
        self,
        images: Tensor,
        classes: Tensor,
        num_classes: int,
        generator: torch.Generator | None = None,
        train: bool = True,
    ) -> Tensor:
        """Return the images with a picture above each: (N, ..., source's height + height, width).

        images:       (N, height, width) or (N, channels, height, width), floating point.
        classes:      (N,) int64 in [0, num_classes), which class of `source` the picture is of.
                      Above images of the last class everything is black.
        num_classes:  K.
        generator:    decides which pictures of a class are drawn. Default: torch's own.
        train:        whether to draw from the training part of `source`, or from its test part.

        Raises ValueError for pictures that do not fit and classes of which `source` has none.
        """
        tops, labels = ((self.source.train_images, self.source.train_labels) if train
                        else (self.source.test_images, self.source.test_labels))  # fmt: skip
        if (tops.shape[1:-2], tops.shape[-1]) != (images.shape[1:-2], images.shape[-1]):
            raise ValueError(
                f"source has images of shape {tuple(tops.shape[1:])}, which do not stack above "
                f"images of shape {tuple(images.shape[1:])}: give one of the same width and "
                "channels"
            )
        labels, order = labels.sort(stable=True)
        counts = labels.bincount(minlength=num_classes)[:num_classes]
        missing = (counts[:-1] == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"source has no {'training' if train else 'test'} images of the classes {missing}"
            )
        starts = torch.searchsorted(labels, torch.arange(num_classes))
        drawn = (
            torch.rand(len(images), generator=generator, dtype=torch.float64) * counts[classes]
        ).long()
        index = (starts[classes] + drawn).clamp(
            max=len(order) - 1
        )  # those of the last class are blackened
        absent = (classes == num_classes - 1).reshape(-1, *(1,) * (images.dim() - 1))
        return torch.cat([tops[order[index]].masked_fill(absent, 0.0), images], dim=-2)


Cue = BoxCue | HueCue | DominoCue


def cue_mask(labels: Tensor, proportion: float, seed: int) -> Tensor:
    """Choose which examples carry a cue: the first round(proportion * n) of each class's n.

    labels:      (N,) int64, on the CPU.
    proportion:  in [0, 1]; ValueError outside. The examples of a smaller one are among those of
                 a larger one.
    seed:        decides the order.

    Returns (N,) bool.

    >>> htv.data.cue_mask(torch.tensor([0, 1, 0, 1]), 0.5, seed=0)
    tensor([ True,  True, False, False])
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
    """Draw cues into a data set: into a share of each class's training images, and all test images.

    data:        images of at least two classes, floating point, grey or RGB.
    cue:         a `BoxCue`, `HueCue` or `DominoCue`.
    proportion:  the share of each class's training images that carry it; `cue_mask` tells which.
    seed:        decides which these are, and what the cue draws.

    Returns the `Dataset`; labels and their order stay. Raises `DataError` for other images and
    labels, and ValueError for a proportion outside of [0, 1].

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> images, labels = torch.zeros(4, 4, 4), torch.tensor([0, 1, 0, 1])
    >>> data = htv.data.Dataset("black", 2, images, labels, images, labels)
    >>> cued = htv.data.add_cue(data, htv.data.BoxCue(size=1), proportion=0.5)
    >>> cued.train_images.sum(dim=(1, 2)), cued.test_images.sum(dim=(1, 2))
    (tensor([1., 0., 0., 0.]), tensor([1., 0., 1., 0.]))
    """
    _check_classes(data)
    train = _drawn(data, cue, _classes(data, cue_mask(data.train_labels, proportion, seed)), seed)
    return replace(data, train_images=train, test_images=counterfactuals(data, cue, seed)["C"][0])


def counterfactuals(data: Dataset, cue: Cue, seed: int = 0) -> dict[str, Part]:
    """Make four versions of the test part, which tell whether a model relies on the cue.

    | name | test images | a model of the image is right | a model of the cue |
    |---|---|---|---|
    | NC | without a cue | always | says the last class |
    | C | with the cue of their class | always | is always right |
    | RC | with the cue of a random class | always | is right by chance |
    | RI | a random image, with the cue of the label | by chance | is always right |

    data:  images of at least two classes, floating point, grey or RGB.
    cue:   a `BoxCue`, `HueCue` or `DominoCue`.
    seed:  decides the random classes and images.

    Returns (images, labels) by name. In RI the images are permuted, so that each is there once.
    Raises `DataError` for other images and labels.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> images, labels = torch.zeros(2, 4, 4), torch.tensor([0, 1])
    >>> data = htv.data.Dataset("black", 2, images, labels, images, labels)
    >>> shown = htv.data.counterfactuals(data, htv.data.BoxCue(size=1))
    >>> {name: images.sum().item() for name, (images, labels) in shown.items()}
    {'NC': 0.0, 'C': 1.0, 'RC': 1.0, 'RI': 1.0}
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
    data: Dataset,
    cue: Cue,
    clean: int,
    with_cue: int | None = None,
    seed: int = 0,
    proportion: float = 1.0,
) -> tuple[Part, Part]:
    """Draw a few training images without a cue, and many others with it, to fine-tune a model on.

    data:      images of at least two classes, floating point, grey or RGB.
    cue:       a `BoxCue`, `HueCue` or `DominoCue`.
    clean:     how many images without the cue, drawn without replacement.
    with_cue:  how many with it; no image is in both parts. Default: all the others.
    seed:      decides which images these are, and what the cue draws.
    proportion:  of each class of the second part that does carry its cue.

    Returns two pairs (images, labels), the clean part and that with the cue. Raises `DataError` if
    there are not so many images, and as `add_cue` does.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> images, labels = torch.zeros(4, 4, 4), torch.tensor([0, 1, 0, 0])
    >>> data = htv.data.Dataset("black", 2, images, labels, images, labels)
    >>> parts = htv.data.fine_tuning_parts(data, htv.data.BoxCue(size=1), clean=1)
    >>> [(tuple(images.shape), images.sum().item()) for images, labels in parts]
    [((1, 4, 4), 0.0), ((3, 4, 4), 2.0)]
    """
    _check_classes(data)
    total = len(data.train_labels)
    for name, count in (("clean", clean), ("with_cue", with_cue)):
        if isinstance(count, bool) or not isinstance(count, int | None):
            raise DataError(f"{name} must be a number of images, an int; got {count!r}")
    with_cue = total - clean if with_cue is None else with_cue
    if min(clean, with_cue) < 1 or clean + with_cue > total:
        raise DataError(
            f"{data.name}: {clean} clean images and {with_cue} with a cue, each at least 1, "
            f"cannot be drawn from {total} training images without any being in both: ask for "
            "fewer"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = [
        replace(data, train_images=data.train_images[index], train_labels=data.train_labels[index])
        for index in (order[:clean], order[clean : clean + with_cue])
    ]
    shares = 0.0, proportion
    drawn = [_drawn(part, cue, _classes(part, cue_mask(part.train_labels, share, seed)), seed)
             for part, share in zip(parts, shares, strict=True)]  # fmt: skip
    without, with_ = drawn
    return (without, parts[0].train_labels), (with_, parts[1].train_labels)


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
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        if images.dim() not in (3, 4) or (images.dim() == 4 and images.shape[1] not in (1, 3)):
            raise DataError(
                f"{data.name} has images of shape {tuple(images.shape[1:])}, not grey or RGB ones"
            )
        if not images.is_floating_point():
            raise DataError(
                f"{data.name} has images of {images.dtype}: make them floating-point, in [0, 1]"
            )
        if not ((labels >= 0) & (labels < data.num_classes)).all():
            raise DataError(
                f"{data.name} has labels from {labels.min()} to {labels.max()}, not 0 to "
                f"{data.num_classes - 1}"
            )


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
