"""CIFAR's batches are read as published, and a pickle that wants more than arrays is refused."""

import os
import pickle

import numpy as np
import pytest
import torch

from htv.data import DataError, cifar_folder, read_folder


def batch(count, seed, key=b"labels", classes=10):
    generator = np.random.default_rng(seed)
    return {b"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            key: generator.integers(0, classes, count).tolist(), b"batch_label": b"a"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    batches = {**{f"data_batch_{n}": batch(4, n) for n in range(1, 6)}, "test_batch": batch(3, 9)}
    for name, content in batches.items():
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


def test_cifar10(folder):
    data = read_folder(folder)
    assert (data.name, data.num_classes) == ("cifar10", 10)
    assert data.train_images.shape == (20, 3, 32, 32) and data.test_images.shape == (3, 3, 32, 32)
    second = batch(4, 2)
    assert torch.equal(data.train_labels[4:8], torch.tensor(second[b"labels"]))
    pixels = torch.from_numpy(second[b"data"]).float() / 255
    assert torch.equal(data.train_images[4:8].flatten(1), pixels)  # red, green, blue, row by row


def test_cifar100(tmp_path):
    for name, count in {"train": 6, "test": 2}.items():
        (tmp_path / name).write_bytes(
            pickle.dumps(batch(count, 0, b"fine_labels", 100), protocol=2)
        )
    data = cifar_folder(str(tmp_path))
    assert data.num_classes == 100 and len(data.train_labels) == 6


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps({b"data": Malicious()}),
            r"it asks for \w+.mkdir, which no batch of images needs",
        ),
        (b"no pickle", "not one of CIFAR's batches"),
        (pickle.dumps([1]), "has no labels beside data"),
        (
            pickle.dumps({**batch(4, 0), b"data": np.zeros((4, 9), np.uint8)}),
            r"uint8 \(4, 9\), not uint8 \(N, 3072\)",
        ),
        (pickle.dumps({**batch(4, 0), b"labels": [1]}), "4 images, but labels of int64 \\(1,\\)"),
        (
            pickle.dumps({**batch(4, 0), b"labels": [[0], [1, 2], [3], [4]]}),
            "not one of CIFAR's batches: .*sequence",
        ),
        (
            pickle.dumps({**batch(4, 0), b"labels": [0, 1, 2, 10]}),
            "labels from 0 to 10, not 0 to 9",
        ),
    ],
)
def test_damage_is_named(folder, content, message, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        cifar_folder(folder)
    assert "data_batch_3" in str(caught.value) and not (folder / "made-by-a-pickle").exists()


def test_what_is_missing_is_named(folder, tmp_path_factory):
    (folder / "test_batch").unlink()
    with pytest.raises(
        DataError, match="test_batch cannot be read: .*; give a folder with data_batch_1"
    ):
        cifar_folder(folder)
    with pytest.raises(DataError, match="not a folder of CIFAR's batches"):
        cifar_folder(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="idx"):
        read_folder(tmp_path_factory.mktemp("nothing"))
