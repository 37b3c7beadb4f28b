"""Majorities and minorities: who is in which group, and what tells the class."""

import math

import pytest
import torch

from htv.data import (
    DataError,
    Dataset,
    backgrounds,
    clean_curve,
    digits,
    flipped_shortcut,
    noisy_curve,
)


def test_the_flipped_shortcut_is_that_of_the_paper():
    data = flipped_shortcut(seed=3)
    for part, minority in ((data.train, 99), (data.test, 500)):
        assert (
            part.x.shape == (1000, 1800)
            and part.x.dtype == torch.float32
            and part.minority.sum() == minority
        )
        sign, told = 2 * part.y - 1, 2 * part.shortcut - 1
        for feature, to, scale in ((0, sign, 1), (1, told, 5)):
            values = part.x[:, feature] * to / scale  # -1 with deviation .12
            assert abs(values.mean() + 1) < 0.02 and abs(values.std() - 0.12) < 0.015
        assert abs(part.x[:, 2:].std() - 0.5) < 0.01 and abs(part.y.double().mean() - 0.5) < 0.06
        assert torch.equal(part.groups, 2 * part.y + part.shortcut)
        assert torch.equal(part.minority, (part.groups == 1) | (part.groups == 2))
    assert len(data.validation) == 0
    again, other = flipped_shortcut(seed=3), flipped_shortcut(seed=4)
    assert torch.equal(data.test.x, again.test.x) and not torch.equal(data.train.y, other.train.y)
    assert not flipped_shortcut(noise=0.0).train.x[:, 2:].any()


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="dims must be at least 2"):
        flipped_shortcut(dims=1)
    with pytest.raises(ValueError, match="got 1001 of 1000 and 500 of 1000"):
        flipped_shortcut(minority=1001)


def test_backgrounds_have_the_groups_they_should():
    images = digits()
    data = backgrounds(images, minority=0.1, seed=1)
    held = round(0.2 * len(images.train_labels))
    assert len(data.train) == len(images.train_labels) - held and len(data.validation) == 2 * held
    assert len(data.test) == 2 * len(images.test_labels)
    for k in (0, 1):
        assert abs(data.train.minority[data.train.y == k].double().mean() - 0.1) < 0.002
    for part in (data.validation, data.test):
        sizes = torch.bincount(part.groups, minlength=4)
        assert sizes[0] == sizes[1] and sizes[2] == sizes[3]
        assert torch.equal(part.y[: len(part) // 2], part.y[len(part) // 2 :])
    assert torch.equal(data.test.y[: len(images.test_labels)], (images.test_labels >= 5).long())
    again, other = (
        backgrounds(images, minority=0.1, seed=1),
        backgrounds(images, minority=0.1, seed=2),
    )
    assert torch.equal(data.train.x, again.train.x) and not torch.equal(
        data.train.shortcut, other.train.shortcut
    )


def test_the_light_tells_the_shortcut_and_images_stand_in_it():
    blank = Dataset(
        "blank",
        3,
        torch.zeros(40, 8, 6),
        torch.arange(40) % 3,
        torch.zeros(9, 8, 6),
        torch.arange(9) % 3,
    )
    data = backgrounds(blank, strength=0.4)
    x, light = data.train.x[:, 0], data.train.shortcut
    assert x.shape[1:] == (8, 6) and light.unique().tolist() == [0, 1]
    for k in (0, 1):
        assert x[light == k].min() >= 0.2 * k and x[light == k].max() <= 0.2 + 0.2 * k
        assert abs(x[light == k].mean() - (0.1 + 0.2 * k)) < 0.02
    grey = Dataset(
        "grey",
        2,
        torch.rand(20, 8, 6),
        torch.arange(20) % 2,
        torch.ones(4, 8, 6),
        torch.arange(4) % 2,
    )
    shown = backgrounds(grey, strength=0.4)
    assert (shown.test.x == 1).all()  # an image hides what is behind it
    x = shown.train.x[:, 0]
    fits = lambda image: (
        ((x >= image - 1e-6) & (x <= image + 0.4 * (1 - image) + 1e-6)).flatten(1).all(dim=1).any()
    )
    assert sum(fits(image) for image in grey.train_images) == len(shown.train) == 16


def test_images_that_will_not_do_are_refused():
    rgb = Dataset(
        "rgb",
        2,
        torch.zeros(4, 3, 8, 8),
        torch.arange(4) % 2,
        torch.zeros(2, 3, 8, 8),
        torch.arange(2),
    )
    with pytest.raises(DataError, match=r"rgb has images of shape \(3, 8, 8\); grey"):
        backgrounds(rgb)
    for bad in ({"minority": 0.0}, {"minority": 0.6}, {"validation": 1.0}, {"strength": 0.0}):
        with pytest.raises(ValueError, match="minority must lie in"):
            backgrounds(digits(), **bad)


def test_the_noisy_curve():
    x, y = noisy_curve(0.001, seed=2)
    assert x.shape == (20, 31) and y.shape == (20, 1)
    torch.testing.assert_close(x[:, 0], torch.linspace(-1.5, 1.5, 20))
    assert (
        math.isclose(x[:, 1:].std(), 0.001, rel_tol=0.1)
        and 0.04 < (y - clean_curve(x[:, :1])).std() < 0.13
    )
    none, scaled = noisy_curve(0.0, seed=2), noisy_curve(0.01, seed=2)
    assert torch.equal(none[1], y) and not none[0][:, 1:].any()
    torch.testing.assert_close(scaled[0][:, 1:], 10 * x[:, 1:])
    assert math.isclose(
        clean_curve(torch.tensor(0.5)), math.tanh(0.5) - math.tanh(2.5) / 2, rel_tol=1e-6
    )
    for bad in (
        {"identifiers": -1.0},
        {"identifiers": 1.0, "points": 0},
        {"identifiers": 1.0, "label_noise": -0.1},
    ):
        with pytest.raises(ValueError, match="must"):
            noisy_curve(**bad)
