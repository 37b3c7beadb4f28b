"""Folders of idx files, the format MNIST and Fashion-MNIST are published in.

A file is: two zero bytes, a type code, the number of dimensions, one big-endian uint32 per
dimension, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from htv.data.dataset import DataError, Dataset

UNSIGNED_BYTE = 0x08
_PARTS = {"train": "train", "test": "t10k"}
_REMEDY = (
    "give a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte "
    "and t10k-labels-idx1-ubyte, each plain or .gz, such as Debian's package "
    "dataset-fashion-mnist installs"
)


def idx_folder(path: str | Path) -> Dataset:
    """Read a folder of idx files, the format of MNIST and Fashion-MNIST.

    path:  the folder. It holds train-images-idx3-ubyte, train-labels-idx1-ubyte,
           t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or with .gz.

    Returns a `Dataset` called as the folder, with images (N, height, width) float32 in [0, 1] and
    labels (N,) int64.

    Raises `DataError` for a missing or malformed file.

    >>> import pathlib, struct, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> for part, count in {"train": 4, "t10k": 2}.items():
    ...     images = pathlib.Path(folder.name, f"{part}-images-idx3-ubyte")
    ...     _ = images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, count, 2, 2) + bytes(4 * count))
    ...     labels = pathlib.Path(folder.name, f"{part}-labels-idx1-ubyte")
    ...     _ = labels.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count)))
    >>> data = htv.data.idx_folder(folder.name)
    >>> data.train_images.shape, data.train_labels, data.num_classes
    (torch.Size([4, 2, 2]), tensor([0, 1, 2, 3]), 4)
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: {_REMEDY}")
    images, labels = {}, {}
    for part, prefix in _PARTS.items():
        image_file = _find(folder, f"{prefix}-images-idx3-ubyte")
        label_file = _find(folder, f"{prefix}-labels-idx1-ubyte")
        images[part], labels[part] = read_idx(image_file, dims=3), read_idx(label_file, dims=1)
        if len(images[part]) != len(labels[part]):
            raise DataError(
                f"{image_file} holds {len(images[part])} images, but {label_file} holds "
                f"{len(labels[part])} labels"
            )
    if images["train"].shape[1:] != images["test"].shape[1:]:
        sizes = (
            f"{height} x {width}" for height, width in (images[part].shape[1:] for part in _PARTS)
        )
        raise DataError(f"{folder}: training and test images differ in size, {' and '.join(sizes)}")
    num_classes = 1 + max(int(labels[part].max()) for part in _PARTS)
    if num_classes < 2:
        raise DataError(f"{folder}: all labels are 0; at least two classes are needed")

    def tensors(part: str) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images[part]).to(torch.float32).div_(255)
        return pixels, torch.from_numpy(labels[part]).to(torch.int64)

    return Dataset(folder.resolve().name, num_classes, *tensors("train"), *tensors("test"))


def read_idx(path: str | Path, dims: int) -> np.ndarray:
    """The uint8 values of one idx file with `dims` dimensions; a name ending in .gz is unpacked."""
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            shape = _read_header(path, stream, dims)
            size = math.prod(shape)
            values = _read_up_to(stream, size + 1)  # one more than there may be
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}; fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(values) < size:
        raise DataError(
            f"{path} is truncated: {len(values)} of {size} values are there; fetch it again"
        )
    if len(values) > size:
        raise DataError(
            f"{path} goes on after the {size} values its header announces; it is not the file it "
            "claims"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_up_to(stream: BufferedIOBase, size: int) -> bytearray:
    """In parts: what a damaged header announces may be more than fits into memory."""
    values = bytearray()
    while part := stream.read(min(size - len(values), 1 << 24)):
        values += part
    return values


def _read_header(path: Path, stream: BufferedIOBase, dims: int) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{path} is not an idx file: it starts with {magic.hex(' ') or 'nothing'}, not 00 00"
        )
    if magic[2] != UNSIGNED_BYTE:
        raise DataError(
            f"{path} holds values of type 0x{magic[2]:02x}; only unsigned bytes (0x08) are images "
            "here"
        )
    if magic[3] != dims:
        raise DataError(
            f"{path} has {magic[3]} dimensions, {dims} expected: are images and labels swapped?"
        )
    sizes = stream.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DataError(f"{path} is truncated: it ends inside its header; fetch it again")
    shape = struct.unpack(f">{dims}I", sizes)
    if 0 in shape:
        raise DataError(
            f"{path} is empty: its header announces {' x '.join(map(str, shape))} values"
        )
    return shape


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{folder} is not a folder of idx files: {name} (or {name}.gz) is missing; {_REMEDY}"
    )
