"""The handwritten digits that scikit-learn carries with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from htv.data.dataset import Dataset
from htv.errors import require


def digits(seed: int = 0, test_share: float = 0.2) -> Dataset:
    """Load scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 10 classes.

    seed:        decides the split alone.
    test_share:  the share of the images that is the test part, in (0, 1). Both parts have the
                 classes' shares.

    Returns a `Dataset`. Needs scikit-learn (extra `cli`), and raises ImportError without it.

    >>> data = htv.data.digits()
    >>> data.train_images.shape, data.test_images.shape
    (torch.Size([1437, 8, 8]), torch.Size([360, 8, 8]))
    """
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
