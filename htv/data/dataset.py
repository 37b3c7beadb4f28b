"""What every source of images returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class DataError(ValueError):
    """Say that a data set is missing or malformed; the message names the path and the remedy."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold images with class labels, split into a training and a test part.

    name:          as reports call it.
    num_classes:   K.
    train_images:  (N, height, width), or (N, 3, height, width) of RGB; float32 in [0, 1].
    train_labels:  (N,) int64 in [0, K).
    test_images:   (M, ...), as train_images.
    test_labels:   (M,) int64 in [0, K).

    >>> images, labels = torch.zeros(4, 8, 8), torch.tensor([0, 1, 0, 1])
    >>> data = htv.data.Dataset("black", 2, images, labels, images, labels)
    >>> len(data.subset(2, seed=0).train_labels), len(data.test_labels)
    (2, 4)
    """

    name: str
    num_classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def subset(self, count: int, seed: int) -> Dataset:
        """Draw training images without replacement; the test part stays.

        count:  how many; all of them if there are fewer.
        seed:   decides which.

        Returns a `Dataset`.
        """
        if count >= len(self.train_labels):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train_labels), generator=generator)[:count]
        return replace(
            self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen]
        )

    def test_subset(self, count: int, seed: int) -> Dataset:
        """Draw test images without replacement; the training part stays.

        count:  how many; all of them if there are fewer.
        seed:   decides which.

        Returns a `Dataset`.
        """
        if count >= len(self.test_labels):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.test_labels), generator=generator)[:count]
        return replace(
            self, test_images=self.test_images[chosen], test_labels=self.test_labels[chosen]
        )
