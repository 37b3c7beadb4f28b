"""Folders of CIFAR-10 or CIFAR-100 as their authors publish them for Python: pickled batches.

A pickle can run anything when it is loaded; here it can build NumPy arrays and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from htv.data.dataset import DataError, Dataset

_SIDE = 32
_KINDS = {  # a file that tells which -> name, classes, training files, test files, key of the labels
    "data_batch_1": ("cifar10", 10, [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], b"labels"),
    "train": ("cifar100", 100, ["train"], ["test"], b"fine_labels"),
}
_REMEDY = "give a folder with data_batch_1 to data_batch_5 and test_batch (CIFAR-10), or train and test (CIFAR-100)"
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def is_cifar(path: str | Path) -> bool:
    """Whether it is a folder that looks like one of CIFAR's."""
    return any((Path(path) / name).is_file() for name in _KINDS)


def cifar_folder(path: str | Path) -> Dataset:
    """Read the batches of a folder: images (N, 3, 32, 32). Raises DataError for anything malformed."""
    folder = Path(path)
    kind = next((kind for name, kind in _KINDS.items() if (folder / name).is_file()), None)
    if kind is None:
        raise DataError(f"{folder} is not a folder of CIFAR's batches for Python: {_REMEDY}")
    name, num_classes, train, test, key = kind

    def part(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [_read_batch(folder / name, key, num_classes) for name in names]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True))
        return images.to(torch.float32).div_(255), labels

    return Dataset(name, num_classes, *part(train), *part(test))


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NEW_NUMPY else module, name)


_NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2


def _read_batch(path: Path, key: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as stream:
            batch = _ArraysOnly(stream, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_REMEDY}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is not one of CIFAR's batches: {error}") from error
    if not isinstance(batch, dict) or not {b"data", key} <= set(batch):
        raise DataError(f"{path} is not one of CIFAR's batches: it has no {key.decode()} beside data")
    try:
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[key])
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{path} is not one of CIFAR's batches: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * _SIDE**2 or len(images) == 0:
        raise DataError(f"{path} holds data of {images.dtype} {images.shape}, not uint8 (N, {3 * _SIDE**2})")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path} holds {len(images)} images, but labels of {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path} holds labels from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}")
    return images.reshape(-1, 3, _SIDE, _SIDE), labels.astype(np.int64)
