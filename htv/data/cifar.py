"""Folders of CIFAR-10 or CIFAR-100 as their authors publish them for Python: pickled batches.

A pickle can run anything when `pickle` loads it; `htv.data.pickles` calls nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from htv.data import pickles
from htv.data.dataset import DataError, Dataset

_SIDE = 32
# a file that tells which -> name, classes, training files, test files, key of the labels
_KINDS = {
    "data_batch_1": (
        "cifar10",
        10,
        [f"data_batch_{n}" for n in range(1, 6)],
        ["test_batch"],
        b"labels",
    ),
    "train": ("cifar100", 100, ["train"], ["test"], b"fine_labels"),
}
_REMEDY = (
    "give a folder with data_batch_1 to data_batch_5 and test_batch (CIFAR-10), or train and test "
    "(CIFAR-100)"
)


def is_cifar(path: str | Path) -> bool:
    """Whether it is a folder that looks like one of CIFAR's."""
    return any((Path(path) / name).is_file() for name in _KINDS)


def cifar_folder(path: str | Path) -> Dataset:
    """Read a folder of CIFAR-10 or CIFAR-100, as their authors publish them for Python.

    path:  the folder. It holds data_batch_1 to data_batch_5 and test_batch (CIFAR-10), or train and
           test (CIFAR-100). The files are pickles; nothing in them is run.

    Returns a `Dataset` with images (N, 3, 32, 32) float32 in [0, 1] and labels (N,) int64.

    Raises `DataError` for a missing or malformed file.

    >>> import numpy, pathlib, pickle, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> batch = {b"data": numpy.zeros((2, 3072), numpy.uint8), b"fine_labels": [7, 42]}
    >>> for name in ("train", "test"):
    ...     _ = pathlib.Path(folder.name, name).write_bytes(pickle.dumps(batch))
    >>> data = htv.data.cifar_folder(folder.name)
    >>> data.name, data.train_images.shape, data.train_labels
    ('cifar100', torch.Size([2, 3, 32, 32]), tensor([ 7, 42]))
    """
    folder = Path(path)
    kind = next((kind for name, kind in _KINDS.items() if (folder / name).is_file()), None)
    if kind is None:
        raise DataError(f"{folder} is not a folder of CIFAR's batches for Python: {_REMEDY}")
    name, num_classes, train, test, key = kind

    def part(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [_read_batch(folder / name, key, num_classes) for name in names]
        images, labels = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True)
        )
        return images.to(torch.float32).div_(255), labels

    return Dataset(name, num_classes, *part(train), *part(test))


def _read_batch(path: Path, key: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = pickles.load(path)
        if type(batch) is not dict or not {b"data", key} <= set(batch):
            raise pickles.PickleError(f"it has no {key.decode()} beside data")
        images, labels = pickles.array(batch[b"data"]), _labels(batch[key])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_REMEDY}") from error
    except pickles.PickleError as error:
        raise DataError(f"{path} is not one of CIFAR's batches: {error}") from error
    if (
        images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != 3 * _SIDE**2
        or len(images) == 0
    ):
        raise DataError(
            f"{path} holds data of {images.dtype} {images.shape}, not uint8 (N, {3 * _SIDE**2})"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {len(images)} images, but labels of {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"{path} holds labels from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}"
        )
    return images.reshape(-1, 3, _SIDE, _SIDE), labels.astype(np.int64)


def _labels(value: object) -> np.ndarray:
    if type(value) is not list:
        return pickles.array(value)
    if not all(type(label) is int and abs(label) < 1 << 63 for label in value):
        raise pickles.PickleError("its labels are a sequence of something else than integers")
    return np.array(value, dtype=np.int64)
