"""Losses along paths, barriers, BatchNorm's statistics and mechanistic similarity."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from htv.methods import (
    LinearPath,
    QuadraticBezier,
    barrier,
    evaluate_along,
    mechanistic_similarity,
    path_grid,
    reestimate_batchnorm,
)


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def convnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(4 * 9, 5),
                         nn.BatchNorm1d(5, momentum=None))  # fmt: skip


def classes(n: int, *shape: int, of: int = 3) -> TensorDataset:
    return TensorDataset(torch.randn(n, *shape), torch.randint(of, (n,)))


def test_losses_and_accuracies_are_those_of_each_point():
    a, b = mlp(0), mlp(1)
    before = copy.deepcopy(a.state_dict())
    data = {"NC": classes(23, 4), "RI": classes(9, 4)}
    loaders = {name: DataLoader(d, batch_size=5) for name, d in data.items()}
    path = QuadraticBezier(a, b, mlp(2))
    profile = evaluate_along(path, a, loaders, points=7)
    assert torch.equal(profile.t, path_grid(7)) and list(profile.losses) == ["NC", "RI"]
    for index, t in enumerate(profile.t.tolist()):
        model = mlp(3).eval()
        model.load_state_dict(path.state_at(t))
        for name, d in data.items():
            x, y = d.tensors
            loss = F.cross_entropy(model(x), y)
            torch.testing.assert_close(
                profile.losses[name][index].float(), loss.detach(), rtol=1e-5, atol=1e-6
            )
            assert profile.accuracies[name][index] == (model(x).argmax(1) == y).double().mean()
    assert (
        all(torch.equal(a.state_dict()[name], value) for name, value in before.items())
        and a.training
    )
    for name, found in profile.barriers.items():
        losses = profile.losses[name]
        excess = losses - (1 - profile.t) * losses[0] - profile.t * losses[-1]
        assert found.height == pytest.approx(max(0.0, excess.max().item()), abs=1e-12)
        assert losses[profile.t == found.t] == found.loss


def test_points_may_be_named_and_lie_outside():
    a, b = mlp(0), mlp(1)
    data = {"test": [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]}
    profile = evaluate_along(LinearPath(a, b), a, data, [0.5, 1.5], extrapolate=True)
    assert profile.t.tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="both ends"):
        _ = profile.barriers
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        evaluate_along(LinearPath(a, b), a, data, [0.5, 1.5])


def test_other_criteria_and_batches():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    batch = {"x": torch.randn(5, 2), "y": torch.randn(5, 1)}
    run = lambda model, batch: model(batch[0]["x"])
    profile = evaluate_along(
        LinearPath(a, b), a, {"D": [(batch, batch["y"])]}, 3, criterion=F.mse_loss, forward=run
    )
    torch.testing.assert_close(
        profile.losses["D"][0].float(), F.mse_loss(a(batch["x"]), batch["y"]).detach()
    )
    assert profile.accuracies["D"].isnan().all()


def test_data_sets_that_could_not_be_gone_through_are_refused():
    a, b = mlp(0), mlp(1)
    path, batches = LinearPath(a, b), [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    with pytest.raises(TypeError, match=r"datasets\['test'\] is an iterator"):
        evaluate_along(path, a, {"test": iter(batches)})
    with pytest.raises(ValueError, match=r"datasets\['test'\] gives no examples"):
        evaluate_along(path, a, {"test": []})
    with pytest.raises(ValueError, match="datasets is empty"):
        evaluate_along(path, a, {})


def test_barriers():
    t = path_grid(5)
    found = barrier(t, torch.tensor([1.0, 2.0, 5.0, 2.0, 3.0]))
    assert (found.height, found.t, found.loss) == (3.0, 0.5, 5.0)
    flat = barrier(t, torch.tensor([1.0, 0.5, 0.2, 0.5, 1.0]))  # below the chord everywhere
    assert (flat.height, flat.t) == (0.0, 0.0)
    assert math.isnan(barrier(t, torch.tensor([1.0, 2.0, math.nan, 2.0, 3.0])).height)
    assert barrier(t, torch.tensor([1.0, 2.0, math.inf, 2.0, 3.0])).height == math.inf
    beyond = barrier(
        torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]), torch.tensor([9.0, 1.0, 1.5, 1.0, 9.0])
    )
    assert (beyond.height, beyond.t) == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"\(T,\)"):
        barrier(t, torch.zeros(4))


def test_statistics_are_averages_over_the_data():
    model = convnet(0)
    nn.init.constant_(model[1].running_mean, math.nan)
    x = torch.randn(11, 1, 5, 5)
    model[0].eval()
    flags = [m.training for m in model.modules()]
    reestimate_batchnorm(model, [x[:4], (x[4:8], None), [x[8:]]])
    assert [m.training for m in model.modules()] == flags
    assert (
        model[1].momentum == 0.1 and model[6].momentum is None and model[1].num_batches_tracked == 3
    )
    with torch.no_grad():
        first = [model[0](part) for part in (x[:4], x[4:8], x[8:])]
        parts = [f.transpose(0, 1).flatten(1) for f in first]
        for statistic, found in [
            (lambda p: p.mean(1), model[1].running_mean),
            (lambda p: p.var(1), model[1].running_var),
        ]:
            expected = sum(len(f) * statistic(p) for f, p in zip(first, parts, strict=True)) / 11
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Dropout is off, and the first BatchNorm normalises by its batch meanwhile.
        second = [model[5](F.relu(F.batch_norm(f, None, None, *model[1].parameters(),
                                               training=True)).flatten(1))
                  for f in first]  # fmt: skip
        expected = sum(len(s) * s.mean(0) for s in second) / 11
        torch.testing.assert_close(model[6].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_shared_unused_and_absent_batchnorms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.plain = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x):
            return self.norm(input=x + 2) + self.norm(x) + self.plain(x)

    model, x = Net(), torch.randn(6, 2)
    model.unused.running_mean.fill_(3)
    reestimate_batchnorm(model, [x])
    torch.testing.assert_close(model.norm.running_mean, x.mean(0) + 1)
    assert model.unused.running_mean.eq(3).all() and not model.norm._forward_pre_hooks
    with pytest.raises(ValueError, match="no batch.*'norm'"):
        reestimate_batchnorm(model, [])
    reestimate_batchnorm(mlp(0), [])  # nothing to do


def test_batches_without_examples_are_no_data():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(6, 3)
    reestimate_batchnorm(model, [x[:0], x, x[:0]])
    expected = model[0](x).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    with pytest.raises(ValueError, match="no examples to re-estimate the statistics of '1' from"):
        reestimate_batchnorm(model, [x[:0]])
    torch.testing.assert_close(model[1].running_mean, expected)
    with pytest.raises(
        ValueError, match="a batch gives BatchNorm1d '1' a single value per channel.*larger batches"
    ):
        reestimate_batchnorm(model, [x, x[:1]])
    assert not model[1]._forward_pre_hooks and model[1].momentum == 0.1


def test_statistics_of_instances():
    model, x = nn.InstanceNorm1d(3, track_running_stats=True), torch.randn(6, 3, 5) + 2
    reestimate_batchnorm(model, [x[:4], x[4:]])
    torch.testing.assert_close(model.running_mean, x.mean((0, 2)))
    torch.testing.assert_close(model.running_var, x.var(2).mean(0))
    with pytest.raises(ValueError, match="InstanceNorm1d '' has running statistics"):
        evaluate_along(LinearPath(model, model), model, {"D": [(x, x)]}, criterion=F.mse_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_half_precision_are_averages_too(dtype):
    """Of 300 batches: the last ones would move nothing, and the first ones would weigh too much."""
    data = [(torch.randn(n, 2) + t / 100).to(dtype) for t in range(300) for n in (4, 12)]
    model = nn.BatchNorm1d(2, momentum=0.3).to(dtype)
    reestimate_batchnorm(model, [data[0][:0], *data])
    exact = nn.BatchNorm1d(2).double()
    reestimate_batchnorm(exact, [x.double() for x in data])
    assert model.running_mean.dtype == dtype and model.momentum == 0.3
    for name in ("running_mean", "running_var"):
        found, wanted = getattr(model, name).double(), getattr(exact, name)
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0)


def test_statistics_are_reestimated_at_every_point():
    a, b = convnet(0), convnet(1)
    data, bn_data = (
        {"test": [(torch.randn(8, 1, 5, 5), torch.randint(5, (8,)))]},
        [torch.randn(16, 1, 5, 5)],
    )
    path = LinearPath(a, b)
    with pytest.raises(ValueError, match="BatchNorm2d '1' has running statistics.*bn_data="):
        evaluate_along(path, a, data)
    with pytest.raises(ValueError, match="no batch"):
        evaluate_along(path, a, data, bn_data=[])
    with pytest.raises(TypeError, match="bn_data is an iterator"):
        evaluate_along(path, a, data, bn_data=iter(bn_data))
    with pytest.raises(ValueError, match="'interpolated'"):
        evaluate_along(path, a, data, bn_data="none")
    found = evaluate_along(path, a, data, 5, bn_data=bn_data)
    without = evaluate_along(path, a, data, 5, bn_data="interpolated")
    for index, t in enumerate(found.t.tolist()):
        model = convnet(2).eval()
        model.load_state_dict(path.state_at(t))
        (x, y), = data["test"]  # fmt: skip
        torch.testing.assert_close(
            without.losses["test"][index].float(), F.cross_entropy(model(x), y).detach()
        )
        reestimate_batchnorm(model, bn_data)
        torch.testing.assert_close(
            found.losses["test"][index].float(), F.cross_entropy(model(x), y).detach()
        )
    assert not torch.allclose(found.losses["test"], without.losses["test"])


class Reads(nn.Module):
    """A linear classifier of two features, the object's and the cue's, with the weights given."""

    def __init__(self, thing: float, cue: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([thing, cue]))

    def forward(self, x):
        score = x @ self.weight
        return torch.stack([-score, score], dim=1)


@pytest.fixture
def counterfactuals():
    y = torch.arange(400) % 2
    sign = 2.0 * y - 1
    other = sign[torch.randperm(400)]
    return {
        name: DataLoader(TensorDataset(torch.stack([thing, cue], dim=1), y), batch_size=64)
        for name, (thing, cue) in {
            "C": (sign, sign), "random cue": (sign, other), "random thing": (other, sign),
            "brightness": (sign, sign),
        }.items()
    }  # fmt: skip


def test_which_interventions_models_are_invariant_to(counterfactuals):
    thing, cue = Reads(2.0, 0.0), Reads(0.0, 2.0)
    report = mechanistic_similarity(thing, cue, counterfactuals, "C", tolerance=0.01,
                                    paths={"itself": LinearPath(thing, cue)})  # fmt: skip
    assert {name: found.invariant for name, found in report.interventions.items()} == {
        "random cue": (True, False), "random thing": (False, True), "brightness": (True, True),
    }  # fmt: skip
    assert report.differing == ["random cue", "random thing"] and not report.similar
    change = report.interventions["random cue"].changes[1]
    assert change == pytest.approx(
        report.profiles["linear"].losses["random cue"][-1]
        - report.profiles["linear"].losses["C"][-1]
    )
    assert (
        list(report.barriers) == ["linear", "itself"]
        and report.barriers["linear"] == report.barriers["itself"]
    )
    assert report.connected["linear"]  # the loss is convex in these weights
    assert mechanistic_similarity(
        thing, Reads(3.0, 0.0), counterfactuals, "C", tolerance=0.01
    ).similar


def test_a_barrier_under_one_intervention_disconnects():
    class Product(Reads):
        def forward(self, x):
            return torch.stack([0 * x[:, 0], 3 * self.weight[0] * self.weight[1] * x[:, 0]], dim=1)

    ends = Product(1.0, 1.0), Product(-1.0, -1.0)  # equal functions; at t = .5 all is lost
    y = torch.arange(10) % 2
    data = {"C": [(torch.stack([2.0 * y - 1, y], 1), y)], "blank": [(torch.zeros(10, 2), y)]}
    report = mechanistic_similarity(*ends, data, "blank", tolerance=0.1)
    assert report.similar and not report.connected["linear"]
    assert (
        report.barriers["linear"]["blank"].height == 0 and report.barriers["linear"]["C"].t == 0.5
    )
    states = [end.state_dict() for end in ends]
    again = mechanistic_similarity(*states, data, "blank", tolerance=0.1, model=ends[0])
    assert again.barriers == report.barriers


def test_reports_refuse_bad_arguments(counterfactuals):
    a = Reads(1.0, 0.0)
    with pytest.raises(ValueError, match="base='NC' is not among"):
        mechanistic_similarity(a, a, counterfactuals, "NC", tolerance=0.1)
    with pytest.raises(ValueError, match="no intervention"):
        mechanistic_similarity(a, a, {"C": counterfactuals["C"]}, "C", tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance must be"):
        mechanistic_similarity(a, a, counterfactuals, "C", tolerance=-0.1)
    for path, message in ((LinearPath(Reads(2.0, 0.0), a),
                           "its start has another 'weight' than first"),
                          (LinearPath(a, Reads(0.0, 1.0)),
                           "its end has another 'weight' than second")):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"paths\['other'\] does not lead from first to second: {message}"
        ):
            mechanistic_similarity(a, a, counterfactuals, "C", tolerance=0.1, paths={"other": path})
