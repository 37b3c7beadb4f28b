"""Cues are where they should be, on whom they should be, and the counterfactual sets differ in
nothing else.
"""

from dataclasses import replace

import pytest
import torch

from htv.data import (
    BoxCue,
    DataError,
    Dataset,
    DominoCue,
    HueCue,
    add_cue,
    counterfactuals,
    cue_mask,
    digits,
    fine_tuning_parts,
)


def made(train=40, test=12, classes=4, shape=(10, 8), name="made"):
    """Images of noise below the brightness of a box, each different."""
    generator = torch.Generator().manual_seed(0)
    images = lambda count: 0.9 * torch.rand(count, *shape, generator=generator)
    labels = lambda count: torch.arange(count) % classes
    return Dataset(name, classes, images(train), labels(train), images(test), labels(test))


def boxed(images):
    """The class each image's box stands for in `made`: places of a 2 x 2 grid, 3 for none."""
    white = (images == 1).flatten(1, -3).any(1) if images.dim() > 3 else images == 1
    cells = white.unflatten(2, (2, 4)).unflatten(1, (2, 5)).sum(dim=(2, 4)).flatten(1)
    assert bool(((cells == 9).sum(1) <= 1).all()) and bool(((cells == 9) | (cells == 0)).all())
    return torch.where((cells == 9).any(1), (cells == 9).long().argmax(1), 3)


@pytest.mark.parametrize("shape", [(10, 8), (3, 10, 8)])
def test_the_place_of_the_box_tells_the_class(shape):
    data = made(shape=shape)
    images = add_cue(data, BoxCue()).train_images
    assert torch.equal(boxed(images), data.train_labels)
    last = data.train_labels == 3
    assert torch.equal(images[last], data.train_images[last])
    assert torch.equal(images[images != 1], data.train_images[images != 1])


@pytest.mark.parametrize(
    ("shape", "classes", "size"),
    [((8, 8), 10, 2), ((28, 28), 10, 3), ((5, 40), 7, 2), ((4, 4), 2, 3)],
)
def test_boxes_fit_and_do_not_meet(shape, classes, size):
    corners, found = BoxCue().corners(*shape, classes)
    assert found == size and len(corners) == classes - 1
    canvas = torch.zeros(shape)
    for top, left in corners.tolist():
        canvas[top : top + size, left : left + size] += 1
    assert canvas.max() == 1 and canvas.sum() == (classes - 1) * size**2


def test_boxes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="size 3 for 9 classes do not fit into 8 x 8 pixels: take size <= 2"
    ):
        add_cue(digits(), BoxCue(size=3))
    with pytest.raises(ValueError, match="take larger images"):
        BoxCue().corners(1, 1, 10)
    with pytest.raises(ValueError, match="size must be an integer >= 1"):
        BoxCue(size=0)
    with pytest.raises(ValueError, match="color must lie in"):
        BoxCue(color=2)
    with pytest.raises(ValueError, match="three for RGB"):
        BoxCue(color=(1, 0))


@pytest.mark.parametrize("shape", [(10, 8), (3, 10, 8)])
def test_boxes_in_color_make_grey_images_rgb(shape):
    data = made(shape=shape)
    images = add_cue(data, BoxCue(color=(1, 0, 0))).train_images
    rgb = data.train_images.reshape(40, -1, 10, 8).expand(-1, 3, -1, -1)
    red = (images == torch.tensor([1.0, 0, 0])[:, None, None]).all(1)
    assert torch.equal(boxed(red.float()), data.train_labels)
    assert torch.equal(torch.where(red[:, None], 0, images), torch.where(red[:, None], 0, rgb))
    assert counterfactuals(data, BoxCue(color=(1, 0, 0)))["NC"][0].shape == (12, 3, 10, 8)


@pytest.mark.parametrize("proportion", [0.0, 0.3, 0.6, 1.0])
def test_each_class_has_its_share_of_cues(proportion):
    labels = torch.tensor([0] * 10 + [1] * 20 + [3] * 7)[torch.randperm(37)]
    mask = cue_mask(labels, proportion, seed=1)
    assert labels[mask].bincount(minlength=4).tolist() == [
        round(proportion * n) for n in (10, 20, 0, 7)
    ]
    assert torch.equal(mask, cue_mask(labels, proportion, seed=1))
    assert bool(cue_mask(labels, max(proportion, 0.9), seed=1)[mask].all())
    if 0 < proportion < 1:
        assert not torch.equal(mask, cue_mask(labels, proportion, seed=2))


def test_training_carries_its_share_and_test_all():
    data = made()
    cued = add_cue(data, BoxCue(), 0.5, seed=3)
    mask = cue_mask(data.train_labels, 0.5, 3)
    assert torch.equal(boxed(cued.train_images), torch.where(mask, data.train_labels, 3))
    assert torch.equal(boxed(cued.test_images), data.test_labels)
    with pytest.raises(ValueError, match=r"proportion must lie in \[0, 1\]"):
        add_cue(data, BoxCue(), 60)


def test_counterfactual_sets():
    data = made(test=400)
    sets = counterfactuals(data, BoxCue(), seed=0)
    assert list(sets) == ["NC", "C", "RC", "RI"]
    assert all(torch.equal(labels, data.test_labels) for _, labels in sets.values())
    under = lambda images: torch.where(images == 1, 0, images)
    covered = under(sets["C"][0])
    assert torch.equal(sets["NC"][0], data.test_images)
    assert torch.equal(boxed(sets["C"][0]), data.test_labels)
    random = boxed(sets["RC"][0])
    assert (
        random.bincount(minlength=4).min() > 70
        and 0.15 < (random == data.test_labels).double().mean() < 0.35
    )
    outside = (sets["RC"][0] != 1) & (sets["C"][0] != 1)
    assert torch.equal(sets["RC"][0][outside], covered[outside])  # the images are those of C
    images = sets["RI"][0]
    assert torch.equal(boxed(images), data.test_labels)
    matches = ((images[:, None] == data.test_images) | (images[:, None] == 1)).flatten(2).all(2)
    assert bool((matches.sum(1) == 1).all()) and bool((matches.sum(0) == 1).all())  # a permutation
    assert (
        0.15
        < (data.test_labels[matches.long().argmax(1)] == data.test_labels).double().mean()
        < 0.35
    )
    again, other = (counterfactuals(data, BoxCue(), seed=s) for s in (0, 1))
    assert all(torch.equal(sets[name][0], again[name][0]) for name in sets)
    assert not torch.equal(sets["RI"][0], other["RI"][0])


def test_hues_tell_the_class_and_grey_is_none():
    data = made()
    images = add_cue(data, HueCue()).train_images
    assert images.shape == (40, 3, 10, 8)
    grey = data.train_images
    for k, color in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]):
        of = data.train_labels == k
        torch.testing.assert_close(
            images[of], grey[of, None] * torch.tensor(color).float()[:, None, None]
        )
    assert counterfactuals(data, HueCue())["NC"][0].shape == (12, 3, 10, 8)
    rgb = made(shape=(3, 10, 8))
    tinted = add_cue(rgb, HueCue(strength=0.25)).train_images
    of = rgb.train_labels == 0
    bright = rgb.train_images[of].mean(1)
    torch.testing.assert_close(tinted[of][:, 0], 0.75 * rgb.train_images[of][:, 0] + 0.25 * bright)
    torch.testing.assert_close(tinted[of][:, 1], 0.75 * rgb.train_images[of][:, 1])
    assert torch.equal(tinted[rgb.train_labels == 3], rgb.train_images[rgb.train_labels == 3])
    with pytest.raises(ValueError, match="strength"):
        HueCue(strength=-1)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_dominoes_stand_above(channels):
    data, source = (
        made(shape=(*channels, 10, 8)),
        made(train=30, test=9, classes=3, shape=(*channels, 5, 8)),
    )
    cue = DominoCue(source)

    def of(tops, images, labels):
        """The class in `source` of what stands above; 3 for black."""
        same = (tops[:, None] == images).flatten(2).all(2)
        black = (tops == 0).flatten(1).all(1)
        assert bool((same.any(1) | black).all())
        return torch.where(black, 3, labels[same.long().argmax(1)])

    cued = add_cue(data, cue)
    assert cued.train_images.shape == (40, *channels, 15, 8)
    tops = cued.train_images[..., :5, :]
    assert torch.equal(of(tops, source.train_images, source.train_labels), data.train_labels)
    assert torch.equal(cued.train_images[..., 5:, :], data.train_images)
    assert len(tops[data.train_labels == 0].unique(dim=0)) > 3  # drawn anew for each
    sets = counterfactuals(data, cue)
    assert torch.equal(
        of(sets["RI"][0][..., :5, :], source.test_images, source.test_labels), data.test_labels
    )
    assert not sets["NC"][0][..., :5, :].any()


def test_dominoes_that_do_not_stack_are_refused():
    with pytest.raises(
        ValueError, match=r"shape \(5, 7\), which do not stack above images of shape \(10, 8\)"
    ):
        add_cue(made(), DominoCue(made(shape=(5, 7))))
    with pytest.raises(ValueError, match=r"no training images of the classes \[2\]"):
        add_cue(made(), DominoCue(made(classes=2)))


def test_fine_tuning_parts_are_disjoint():
    data = made()
    (clean, clean_labels), (cued, cued_labels) = fine_tuning_parts(data, BoxCue(), clean=10, seed=1)
    assert len(clean) == 10 and len(cued) == 30
    assert torch.equal(boxed(cued), cued_labels) and not (clean == 1).any()

    def origin(images):
        return (
            ((images[:, None] == data.train_images) | (images[:, None] == 1))
            .flatten(2)
            .all(2)
            .long()
            .argmax(1)
        )

    drawn = torch.cat([origin(clean), origin(cued)])
    assert sorted(drawn.tolist()) == list(range(40))
    assert torch.equal(data.train_labels[drawn], torch.cat([clean_labels, cued_labels]))
    (again, _), (fewer, _) = fine_tuning_parts(data, BoxCue(), clean=10, with_cue=5, seed=1)
    assert torch.equal(again, clean) and torch.equal(fewer, cued[:5])
    half = fine_tuning_parts(data, BoxCue(), clean=10, seed=1, proportion=0.5)[1]
    assert 0 < (boxed(half[0]) == 3).sum() - (half[1] == 3).sum() < 30
    for wrong in ({"clean": 0}, {"clean": 40}, {"clean": 20, "with_cue": 21}):
        with pytest.raises(DataError, match="40 training images without any being in both"):
            fine_tuning_parts(data, BoxCue(), **wrong)


def test_what_no_cue_fits_is_refused():
    with pytest.raises(DataError, match="at least two apart"):
        add_cue(made(classes=1), BoxCue())
    for shape in ((8,), (4, 10, 8)):
        with pytest.raises(DataError, match="not grey or RGB"):
            counterfactuals(made(shape=shape), HueCue())
    data = made()
    with pytest.raises(DataError, match="made has images of torch.uint8: make them floating-point"):
        add_cue(replace(data, train_images=(data.train_images * 255).byte()), BoxCue())
    with pytest.raises(DataError, match="made has labels from 0 to 3, not 0 to 2"):
        counterfactuals(replace(data, num_classes=3), BoxCue())


def test_arguments_of_the_wrong_kind_are_named():
    with pytest.raises(ValueError, match="color must lie in .*, got 'red'"):
        BoxCue(color="red")
    with pytest.raises(ValueError, match="strength must lie in .*, got '1'"):
        HueCue("1")
    with pytest.raises(ValueError, match="proportion must lie in .*, got None"):
        add_cue(made(), BoxCue(), None)
    for wrong in ({"clean": 0.25}, {"clean": True}, {"clean": 10, "with_cue": 20.0}):
        with pytest.raises(DataError, match="must be a number of images, an int"):
            fine_tuning_parts(made(), BoxCue(), **wrong)
