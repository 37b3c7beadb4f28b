"""What every source of images returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set is missing or malformed; the message names the path and the remedy."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with class labels, split into a training and a test part.

    train_images, test_images:  (N, height, width), or (N, 3, height, width) of RGB; float32 in [0, 1]
    train_labels, test_labels:  (N,) int64 in [0, num_classes)
    """

    name: str
    num_classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def subset(self, count: int, seed: int) -> Dataset:
        """`count` training images drawn without replacement, all of them if there are fewer; the test part stays."""
        if count >= len(self.train_labels):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train_labels), generator=generator)[:count]
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen])

    def test_subset(self, count: int, seed: int) -> Dataset:
        """The same of the test images; the training part stays."""
        if count >= len(self.test_labels):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.test_labels), generator=generator)[:count]
        return replace(self, test_images=self.test_images[chosen], test_labels=self.test_labels[chosen])
