"""Images of the user's own."""

from __future__ import annotations

from pathlib import Path

from htv.data.cifar import cifar_folder, is_cifar
from htv.data.dataset import Dataset
from htv.data.idx import idx_folder


def read_folder(path: str | Path) -> Dataset:
    """Read a folder of idx files or of CIFAR's batches for Python, whichever it is.

    path:  the folder; see `idx_folder` and `cifar_folder`.

    Returns a `Dataset`. Raises `DataError` for what is neither.

    >>> import numpy, pathlib, pickle, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> batch = {b"data": numpy.zeros((2, 3072), numpy.uint8), b"fine_labels": [7, 42]}
    >>> for name in ("train", "test"):
    ...     _ = pathlib.Path(folder.name, name).write_bytes(pickle.dumps(batch))
    >>> htv.data.read_folder(folder.name).name
    'cifar100'
    """
    return cifar_folder(path) if is_cifar(path) else idx_folder(path)
