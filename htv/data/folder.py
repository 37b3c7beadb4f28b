"""Images of the user's own."""

from __future__ import annotations

from pathlib import Path

from htv.data.cifar import cifar_folder, is_cifar
from htv.data.dataset import Dataset
from htv.data.idx import idx_folder


def read_folder(path: str | Path) -> Dataset:
    """A folder of idx files, grey, or of CIFAR's batches for Python, RGB. DataError for what is neither."""
    return cifar_folder(path) if is_cifar(path) else idx_folder(path)
