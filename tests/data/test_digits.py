"""The bundled digits: scale, split, seed."""

import torch

from htv.data import digits


def test_digits_are_images_in_the_unit_interval():
    data = digits()
    assert data.train_images.shape[1:] == (8, 8) and data.num_classes == 10
    assert len(data.train_images) == len(data.train_labels) and len(data.test_images) == len(
        data.test_labels
    )
    assert len(data.train_images) + len(data.test_images) == 1797
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1


def test_split_is_stratified_seeded_and_disjoint():
    data, again, other = digits(3), digits(3), digits(4)
    assert torch.equal(data.train_images, again.train_images) and torch.equal(
        data.test_labels, again.test_labels
    )
    assert not torch.equal(data.test_labels, other.test_labels)
    shares = [
        labels.bincount(minlength=10) / len(labels)
        for labels in (data.train_labels, data.test_labels)
    ]
    torch.testing.assert_close(*shares, atol=0.005, rtol=0)
    both = torch.cat([data.train_images, data.test_images]).flatten(1)
    everything = torch.cat([other.train_images, other.test_images]).flatten(1)
    assert torch.equal(
        *(t[_lexicographic(t)] for t in (both, everything))
    )  # nothing lost, nothing twice


def _lexicographic(rows):
    return sorted(range(len(rows)), key=lambda i: rows[i].tolist())
