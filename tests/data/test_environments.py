"""Problems with environments: what they share and what they do not."""

import pytest
import torch

import htv
from htv.data import linear_environments, patchwork, spirals


def test_linear_environments_are_those_of_the_paper():
    x, y = linear_environments()
    assert x.shape == (4, 5) and torch.equal(y, torch.ones(4, 1))
    assert torch.equal(x[:, :4], 3 * torch.eye(4))
    torch.testing.assert_close(x[:, 4], torch.full((4,), 0.3))
    # both the own features alone and the shared one alone explain everything
    for weights in (torch.tensor([1 / 3] * 4 + [0.0]), torch.tensor([0.0] * 4 + [1 / 0.3])):
        torch.testing.assert_close(x @ weights, y[:, 0])


def test_no_environments_are_refused():
    with pytest.raises(ValueError, match="count must be an integer >= 1, got 0"):
        linear_environments(0)


def test_spirals():
    data = spirals(num_environments=5, per_environment=300, num_test=400, shortcut_dims=6, seed=1)
    assert data.x.shape == (5, 300, 8) and data.y.shape == (5, 300)
    assert data.test_x.shape == (400, 8) and data.test_y.shape == (400,)
    assert data.shortcut.tolist() == [False] * 2 + [True] * 6
    signs = 2 * data.y - 1
    cues = data.x[..., 2:] * signs[..., None]
    assert torch.equal(
        cues, cues[:, :1].expand_as(cues)
    )  # one vector per environment, times the class
    assert not torch.allclose(cues[0, 0], cues[1, 0])
    torch.testing.assert_close(data.x[..., :2].flatten(0, 1).std(dim=0), torch.ones(2))
    half = (data.test_x[:, 2:] * (2 * data.test_y - 1)[:, None]).mean(dim=0)
    assert half.abs().max() < 0.3  # tells nothing in the test part


def test_the_angle_tells_the_class_of_a_spiral():
    data = spirals(num_environments=1, per_environment=2000, shortcut_dims=1, noise=0.0)
    points = data.x[0, :, :2]
    radius = points.norm(dim=1)
    scale = (
        radius.max()
    )  # the radius of the outermost is nearly 1, and both coordinates are scaled nearly alike
    angle = torch.atan2(points[:, 1], points[:, 0]) - 2 * torch.pi * 3 * radius / scale
    guess = angle.cos() < 0
    assert ((guess == data.y[0].bool()).float().mean() > 0.95).item()


def test_patchwork():
    data = patchwork(
        num_environments=8, per_environment=50, num_test=3000, tile=3, strength=1.0, seed=2
    )
    assert (
        data.x.shape == (8, 50, 9, 9)
        and data.test_x.shape == (3000, 9, 9)
        and data.shortcut.shape == (9, 9)
    )
    assert (
        not data.shortcut[:3, :3].any() and data.shortcut.sum() == 8 * 9
    )  # the shared tile comes first
    told = (data.x * (2 * data.y - 1)[..., None, None]).mean(dim=1)  # (E, 9, 9)
    tiles = (
        told.unflatten(2, (3, 3))
        .unflatten(1, (3, 3))
        .transpose(2, 3)
        .flatten(1, 2)
        .abs()
        .mean(dim=(2, 3))
    )
    for e in range(8):
        assert (tiles[e] > 0.6).nonzero().flatten().tolist() == [0, e + 1]
    told = (data.test_x * (2 * data.test_y - 1)[:, None, None]).mean(dim=0).abs()
    assert told[data.shortcut].max() < 0.1 and told[:3, :3].min() > 0.9


def test_seeds_decide_everything():
    for make in (spirals, patchwork):
        one, again, other = (
            make(num_environments=2, per_environment=8, num_test=4, seed=s) for s in (3, 3, 4)
        )
        assert torch.equal(one.x, again.x) and torch.equal(one.test_x, again.test_x)
        assert not torch.equal(one.x, other.x)


def test_sewing_is_what_the_mean_does_and_the_mask_does_not():
    """A linear probe on the patchwork, trained by the mean of gradients and by the AND-mask."""
    data = patchwork(num_environments=8, per_environment=64, seed=0)
    ids = torch.arange(8).repeat_interleave(64)
    accuracy, sewn = {}, {}
    for rule in (htv.Mean(), htv.AndMask(1.0)):
        model = torch.nn.Linear(144, 1)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with htv.attach(model, rule) as handle:
            for _ in range(150):
                optimizer.zero_grad()
                with handle.groups(ids):
                    logits = model(data.x.flatten(0, 1).flatten(1))[:, 0]
                torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, data.y.flatten()
                ).backward()
                optimizer.step()
        guess = model(data.test_x.flatten(1))[:, 0] > 0
        accuracy[rule] = (guess == data.test_y.bool()).float().mean().item()
        weights = model.weight.detach().view(12, 12).abs()
        sewn[rule] = (weights[data.shortcut].mean() / weights[:4, :4].mean()).item()
    assert sewn[htv.Mean()] > 0.4 and sewn[htv.AndMask(1.0)] < 0.05
    assert accuracy[htv.AndMask(1.0)] > accuracy[htv.Mean()] + 0.05


@pytest.mark.parametrize(
    "wrong", [{"num_environments": 0}, {"per_environment": 1.5}, {"num_test": -1}]
)
def test_wrong_counts_are_named(wrong):
    (name,) = wrong
    for make in (spirals, patchwork):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            make(**wrong)
    with pytest.raises(ValueError, match="shortcut_dims must be"):
        spirals(shortcut_dims=0)
    with pytest.raises(ValueError, match="per_environment must be at least 2"):
        spirals(1, 1)
