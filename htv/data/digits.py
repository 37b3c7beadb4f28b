"""The handwritten digits that scikit-learn carries with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from htv.data.dataset import Dataset
from htv.errors import require


def digits(seed: int = 0, test_share: float = 0.2) -> Dataset:
    """1,797 images of 8 x 8 pixels, 10 classes. The split keeps the classes' shares and depends on `seed` alone."""
    require("htv.data.digits", "cli", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16)  # pixels count from 0 to 16
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_share, stratify=bunch.target, random_state=seed
    )

    def part(index: np.ndarray) -> tuple[Tensor, Tensor]:
        return images[index], labels[index]

    return Dataset("digits", 10, *part(train), *part(test))
