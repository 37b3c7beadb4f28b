"""Reading idx folders: what was written comes back, and every kind of damage is named."""

import gzip
import struct

import numpy as np
import pytest
import torch

from htv.data import DataError, idx_folder

IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"


def idx_bytes(values, code=0x08, shape=None):
    shape = values.shape if shape is None else shape
    return (
        struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
        + values.astype(np.uint8).tobytes()
    )


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    parts = {"train": 20, "t10k": 6}
    return {
        **{IMAGES.format(p): random.integers(0, 256, (n, 4, 3)) for p, n in parts.items()},
        **{LABELS.format(p): np.arange(n) % 5 for p, n in parts.items()},
    }


@pytest.fixture
def folder(tmp_path, arrays):
    for name, values in arrays.items():
        (tmp_path / name).write_bytes(idx_bytes(values))
    return tmp_path


def check(data, arrays):
    train, test = IMAGES.format("train"), IMAGES.format("t10k")
    assert data.num_classes == 5
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    np.testing.assert_allclose(data.train_images.numpy(), arrays[train] / 255, rtol=1e-6)
    np.testing.assert_allclose(data.test_images.numpy(), arrays[test] / 255, rtol=1e-6)
    assert data.train_labels.tolist() == arrays[LABELS.format("train")].tolist()
    assert data.test_labels.tolist() == arrays[LABELS.format("t10k")].tolist()


def test_round_trip(folder, arrays):
    data = idx_folder(folder)
    check(data, arrays)
    assert data.name == folder.name


def test_round_trip_gzipped(tmp_path, arrays):
    for name, values in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
    check(idx_folder(str(tmp_path)), arrays)


def test_subset_is_seeded_and_leaves_the_test_part(folder):
    data = idx_folder(folder)
    few, again, other = data.subset(8, seed=1), data.subset(8, seed=1), data.subset(8, seed=2)
    assert torch.equal(few.train_images, again.train_images) and not torch.equal(
        few.train_images, other.train_images
    )
    assert few.train_images.shape == (8, 4, 3) and few.test_images is data.test_images
    for image, label in zip(few.train_images, few.train_labels, strict=True):  # still pairs
        (match,) = (data.train_images == image).flatten(1).all(dim=1).nonzero()
        assert data.train_labels[match] == label
    assert data.subset(100, seed=0) is data


TRAIN = IMAGES.format("train")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TRAIN, lambda raw: b"\x89PNG" + raw[4:], "not an idx file: it starts with 89 50 4e 47"),
        (TRAIN, lambda raw: b"", "not an idx file: it starts with nothing"),
        (TRAIN, lambda raw: raw[:2] + b"\x0d" + raw[3:], "type 0x0d"),
        (TRAIN, lambda raw: raw[:3] + b"\x01" + raw[4:], "1 dimensions, 3 expected"),
        (TRAIN, lambda raw: raw[:10], "ends inside its header"),
        (TRAIN, lambda raw: raw[:-1], "truncated: 239 of 240 values"),
        (TRAIN, lambda raw: raw + b"\0", "goes on after the 240 values"),
        (
            TRAIN,
            lambda raw: raw[:4] + struct.pack(">I", 0) + raw[8:],
            "empty: its header announces 0 x 4 x 3",
        ),
        (TRAIN, lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "truncated: 240 of 7922816"),
        (LABELS.format("t10k"), lambda raw: idx_bytes(np.zeros(5)), "6 images, but .* 5 labels"),
        (
            IMAGES.format("t10k"),
            lambda raw: idx_bytes(np.zeros((6, 3, 3))),
            "differ in size, 4 x 3 and 3 x 3",
        ),
    ],
)
def test_damage_is_named(folder, name, damage, message):
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        idx_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-12], lambda raw: b"no gzip at all", lambda raw: raw[:30]]
)
def test_damaged_gzip_is_named(folder, damage):
    plain = folder / TRAIN
    (folder / f"{TRAIN}.gz").write_bytes(damage(gzip.compress(plain.read_bytes())))
    plain.unlink()
    with pytest.raises(DataError, match="not a complete gzip file.*fetch it again"):
        idx_folder(folder)


@pytest.mark.parametrize("missing", [TRAIN, LABELS.format("t10k")])
def test_a_missing_file_is_named_with_the_remedy(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(
        DataError, match=rf"{missing} \(or {missing}.gz\) is missing; give a folder with"
    ):
        idx_folder(folder)


def test_what_is_no_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        idx_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        idx_folder(tmp_path / "file")


def test_labels_of_one_class_are_refused(folder):
    for part, count in (("train", 20), ("t10k", 6)):
        (folder / LABELS.format(part)).write_bytes(idx_bytes(np.zeros(count)))
    with pytest.raises(DataError, match="at least two classes"):
        idx_folder(folder)
