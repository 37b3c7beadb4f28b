"""Paths through weight space against their formulas and plain autograd."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import htv
from htv.methods import (
    Bezier,
    LinearPath,
    PolygonalChain,
    QuadraticBezier,
    path_grid,
    sample_clipped_normal,
    sample_truncated_normal,
    sample_uniform,
    train_curve,
)


class Net(nn.Module):
    """Tied weights, a frozen parameter, a scalar, a mask of infinities, BatchNorm, two dtypes."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.again = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.again.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0, math.nan]))
        self.to(dtype)
        self.head = nn.Linear(4, 2).double()
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = self.tied(torch.tanh(self.again(x))) * self.scale + self.frozen
        return self.head(x.double())


def explicit(coefficients, models):
    """sum_k c_k theta_k, name by name."""
    named = [dict(m.named_parameters()) for m in models]
    return {
        name: sum(c * p[name] for c, p in zip(coefficients, named, strict=True))
        for name in named[0]
    }


KINDS = {
    "linear": (lambda a, m, n, b: LinearPath(a, b), lambda t: [1 - t, 0, 0, t]),
    "quadratic": (
        lambda a, m, n, b: QuadraticBezier(a, b, m),
        lambda t: [(1 - t) ** 2, 2 * t * (1 - t), 0, t * t],
    ),
    "cubic": (
        lambda a, m, n, b: Bezier(a, b, [m, n]),
        lambda t: [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3],
    ),
    "chain": (
        lambda a, m, n, b: PolygonalChain(a, b, [m, n]),
        lambda t: [max(0.0, 1 - abs(3 * t - k)) for k in range(4)],
    ),
}
USED = {
    "linear": (1, 0, 0, 1),
    "quadratic": (1, 1, 0, 1),
    "cubic": (1, 1, 1, 1),
    "chain": (1, 1, 1, 1),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_points_are_those_of_the_formula(kind, dtype):
    make, formula = KINDS[kind]
    models = [Net(seed, dtype) for seed in range(4)]
    path = make(*models)
    probe = path.probe(models[0])
    for t in [0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0]:
        wide = explicit(formula(t), [copy.deepcopy(m).double() for m in models])
        moved = dict(probe.move(t).named_parameters())
        state, functional = path.state_at(t), path(t)
        for name, value in wide.items():
            rtol = 4 * torch.finfo(moved[name].dtype).eps
            for found in (moved[name], state[name], functional[name]):
                assert found.dtype == moved[name].dtype
                torch.testing.assert_close(
                    found.detach().double(), value.detach(), rtol=rtol, atol=rtol
                )


@EVERY
def test_ends_are_the_models_bit_for_bit(kind):
    models = [Net(seed, torch.float32) for seed in range(4)]
    with torch.no_grad():
        models[1].first.weight[0, 0] = math.inf  # of no account at the ends
        models[0].first.bias.fill_(-0.0)
    path = KINDS[kind][0](*models)
    for t, end in [(0, models[0]), (1, models[3])]:
        expected, found = end.state_dict(), path.state_at(t)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(found[name].nan_to_num(7), value.nan_to_num(7)), name
            assert torch.equal(torch.signbit(found[name]), torch.signbit(value)), name
        Net(9, torch.float32).load_state_dict(found)


@EVERY
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_gradients_reach_control_points_as_by_autograd(kind, t):
    make, formula = KINDS[kind]
    models = [Net(seed) for seed in range(4)]
    path = make(*models)
    for point in path.points:
        for p, group in zip(point, path.layout.groups, strict=True):
            p.requires_grad_(group.trained)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))

    leaves = [copy.deepcopy(m) for m in models]
    buffers = {name: b.clone() for name, b in models[0].named_buffers()}
    F.cross_entropy(
        functional_call(models[0], explicit(formula(t), leaves) | buffers, (x,)), y
    ).backward()
    controls = [leaf for leaf, used in zip(leaves, USED[kind], strict=True) if used]

    F.cross_entropy(functional_call(models[0], path(t), (x,)), y).backward()
    functional = [[p.grad.clone() for p in point if p.requires_grad] for point in path.points]
    path.zero_grad()
    probe = path.probe(models[0])
    for repeat in (1, 2):  # gradients add up
        F.cross_entropy(probe.move(t)(x), y).backward()
        probe.pull_back()
        assert all(p.grad is None for p in probe.model.parameters())
        for k, point in enumerate(path.points):
            pulled = [p.grad for p in point if p.requires_grad]
            for a, b in zip(pulled, functional[k], strict=True):
                torch.testing.assert_close(a, repeat * b, rtol=1e-12, atol=1e-14)
            views = path.layout.views([p if p.grad is None else p.grad for p in point])
            for name, p in controls[k].named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(views[name], repeat * p.grad, rtol=1e-10, atol=1e-13)


@EVERY
def test_gradcheck(kind):
    torch.manual_seed(0)
    models = [nn.Linear(2, 2).double() for _ in range(4)]
    path = KINDS[kind][0](*models)
    for p in path.parameters():
        p.requires_grad_()
    t = torch.tensor(
        [0.2, 0.6, 0.95], dtype=torch.float64, requires_grad=True
    )  # away from the chain's corners
    names = [name for name, _ in path.named_parameters()]

    def values(t, *points):
        state = functional_call(path, dict(zip(names, points, strict=True)), (t,))
        return torch.cat([v.reshape(3, -1) for v in state.values()], dim=1).sin()

    assert torch.autograd.gradcheck(values, (t, *path.parameters()))


def test_several_points_at_once():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2))
    path, x, ts = QuadraticBezier(a, b, copy.deepcopy(a)), torch.randn(5, 3), path_grid(7)
    stacked = vmap(lambda state: functional_call(a, state, (x,)))(path(ts))
    probe = path.probe(a)
    for t, found in zip(ts.tolist(), stacked, strict=True):
        torch.testing.assert_close(found, probe.move(t)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [Bezier, PolygonalChain])
@pytest.mark.parametrize("bends", [1, 2, 3])
def test_middles_given_by_number_lie_on_the_chord(path, bends):
    a, b = Net(0), Net(1)
    curve, line = path(a, b, bends), LinearPath(a, b)
    for t in path_grid(7).tolist():
        found, expected = curve.state_at(t), line.state_at(t)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], equal_nan=True)


def test_state_dicts_need_a_model_and_equal_models():
    a, b = Net(0), Net(1)
    path = LinearPath(a.state_dict(), b.state_dict(), model=a)
    assert all(
        torch.equal(p, q) for p, q in zip(path.points[1], LinearPath(a, b).points[1], strict=True)
    )
    with pytest.raises(TypeError, match="all points are state dicts.*model="):
        LinearPath(a.state_dict(), b.state_dict())
    untied = b.state_dict() | {"tied.weight": torch.zeros(4, 4, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match="end has different values under 'again.weight' and 'tied.weight'"
    ):
        LinearPath(a, untied)


def test_tied_frozen_and_constant_tensors():
    a, b = Net(0), Net(1)
    b.norm.num_batches_tracked += 5
    path = QuadraticBezier(a, b)
    names = [entry.name for group in path.layout.groups for entry in group.entries]
    assert "tied.weight" not in names and "mask" not in names and "norm.running_mean" in names
    assert sum(p.numel() for p in path.parameters() if p.requires_grad) == sum(
        p.numel() for p in a.parameters() if p.requires_grad
    )
    model = path.probe(b).move(0.5)
    assert model.tied.weight is model.again.weight and not model.frozen.requires_grad
    assert (
        torch.equal(model.mask.nan_to_num(), a.mask.nan_to_num())
        and model.norm.num_batches_tracked == 0
    )
    torch.testing.assert_close(model.frozen, (a.frozen + b.frozen) / 2)
    assert torch.equal(b.frozen, Net(1).frozen)  # the model given is not changed
    optimizer = torch.optim.SGD(path.parameters(), lr=0.1, weight_decay=0.5)
    train_curve(
        path, a, [(torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,)))], optimizer
    )
    torch.testing.assert_close(
        path.control_state(1)["frozen"], (a.frozen + b.frozen) / 2
    )  # nothing decays it
    assert not torch.equal(path.control_state(1)["scale"], (a.scale + b.scale) / 2)


def test_integer_buffers_that_differ_are_refused():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    a.register_buffer("order", torch.tensor([0, 1]))
    b.register_buffer("order", torch.tensor([1, 0]))
    with pytest.raises(
        ValueError, match="'order' is torch.int64 and differs between start and end"
    ):
        LinearPath(a, b)
    b.order.copy_(a.order)
    assert torch.equal(LinearPath(a, b).state_at(0.5)["order"], a.order)


def test_other_architectures_are_refused_by_the_first_key():
    a = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(
        ValueError,
        match=r"end is of another architecture: '0.weight' has shape \(4, 2\) instead of",
    ):
        LinearPath(a, nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="end is of another architecture: it has no '2.weight'"):
        LinearPath(a, nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(
        ValueError, match="middle.0. is of another architecture: it has '3.weight' beside"
    ):
        Bezier(a, a, [nn.Sequential(*a, nn.Linear(2, 2))])
    with pytest.raises(
        ValueError, match="'0.weight' of end is torch.float64 instead of torch.float32"
    ):
        LinearPath(a, copy.deepcopy(a).double())
    with pytest.raises(ValueError, match="model is of another architecture"):
        LinearPath(a, a).probe(nn.Linear(2, 2))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="model does not tie '1.weight'"):
        LinearPath(tied, tied).probe(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="lazy parameters"):
        LinearPath(nn.LazyLinear(2), nn.LazyLinear(2))
    with pytest.raises(TypeError, match="end must be a model or a state dict"):
        LinearPath(a, [1, 2])
    with pytest.raises(TypeError, match="middle must be a list"):
        Bezier(a, a, a)
    with pytest.raises(ValueError, match="trained names control points .5."):
        LinearPath(a, a, trained=[5])


def test_t_outside_is_refused_unless_allowed():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    for path in (LinearPath(a, b), QuadraticBezier(a, b), PolygonalChain(a, b)):
        probe = path.probe(a)
        for t in (-0.01, 1.0001):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*extrapolate=True"):
                probe.move(t)
        with pytest.raises(ValueError, match="t must be finite"):
            path(math.nan)
        found = dict(probe.move(1.5, extrapolate=True).named_parameters())
        for name, p in a.named_parameters():
            expected = -0.5 * p + 1.5 * dict(b.named_parameters())[name]
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def test_a_backward_through_weights_that_moved_on_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    probe = QuadraticBezier(model, copy.deepcopy(model)).probe(model)
    loss = probe.move(0.2)(torch.randn(3, 2)).sum()
    probe.move(0.8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no parameter of the probe has a gradient"):
        probe.pull_back()


def test_there_must_be_something_to_pull_back_to():
    model = nn.Linear(2, 2)
    probe = LinearPath(model, copy.deepcopy(model)).probe(model)
    probe.move(0.5)(torch.randn(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="no trained control point"):
        probe.pull_back()


def test_a_probe_starts_at_the_start():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    path = LinearPath(a, b, trained=[0])
    probe = path.probe(b)
    assert torch.equal(probe.model.weight, a.weight) and torch.equal(probe.model.bias, a.bias)
    probe.model(torch.ones(1, 2)).sum().backward()
    probe.pull_back()
    assert torch.equal(path.points[0][0].grad, torch.ones(6))


def test_a_path_is_copied_saved_and_converted_as_any_module():
    a, b = Net(0), Net(1)
    path = QuadraticBezier(a, b, Net(2))
    fresh = QuadraticBezier(a, b)
    fresh.load_state_dict(path.state_dict())
    for other in (fresh, copy.deepcopy(path)):
        for name, value in path.state_at(0.3).items():
            assert torch.equal(other.state_at(0.3)[name].nan_to_num(7), value.nan_to_num(7))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_a_curve_is_training_its_formula(momentum):
    models = [Net(seed) for seed in range(3)]
    path = QuadraticBezier(models[0], models[1], models[2])
    data = [(torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))) for _ in range(3)]
    optimizer = torch.optim.SGD(path.parameters(), lr=0.1, momentum=momentum)
    losses = train_curve(
        path, models[0], data, optimizer, epochs=2, generator=torch.Generator().manual_seed(4)
    )

    middle = copy.deepcopy(models[2])
    plain = torch.optim.SGD(
        [p for p in middle.parameters() if p.requires_grad], lr=0.1, momentum=momentum
    )
    generator = torch.Generator().manual_seed(4)
    for (x, y), loss in zip(data * 2, losses, strict=True):
        t = sample_uniform(1, generator=generator).item()
        state = explicit([(1 - t) ** 2, 2 * t * (1 - t), t * t], [models[0], middle, models[1]])
        expected = F.cross_entropy(functional_call(copy.deepcopy(models[0]), state, (x,)), y)
        plain.zero_grad()
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    found = path.control_state(1)
    for name, p in middle.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-9, atol=1e-12)
    assert torch.equal(path.control_state(0)["first.weight"], models[0].first.weight)


def test_curves_are_trained_under_a_rule():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    x, y = torch.rand(8, 3), torch.randint(2, (8,))
    rule = lambda model: htv.attach(model, htv.AndMask(0.2))
    path = QuadraticBezier(a, b)
    before = path.points[1][0].detach().clone()
    model = path.probe(a).move(0.25)
    rule(model)
    F.cross_entropy(model(x), y).backward()
    masked = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert (masked != 0).any() and (masked == 0).any()

    at_a_quarter = lambda count, generator: torch.full((count,), 0.25)
    optimizer = torch.optim.SGD(path.parameters(), lr=0.5)
    train_curve(path, a, [(x, y)], optimizer, sampler=at_a_quarter, attach=rule)
    torch.testing.assert_close(path.points[1][0].detach(), before - 0.5 * 2 * 0.25 * 0.75 * masked)


def test_training_refuses_what_would_train_nothing():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    batch = [(torch.randn(3, 2), torch.tensor([0, 1, 1]))]
    line = LinearPath(a, b)
    with pytest.raises(ValueError, match="no control point of LinearPath is trained"):
        train_curve(line, a, batch, torch.optim.SGD(line.parameters(), lr=1))
    curve = QuadraticBezier(a, b)
    with pytest.raises(ValueError, match="optimizer has no control point"):
        train_curve(curve, a, batch, torch.optim.SGD(a.parameters(), lr=1))
    optimizer = torch.optim.SGD(curve.parameters(), lr=1)
    with pytest.raises(ValueError, match="data gives no batch"):
        train_curve(curve, a, [], optimizer)
    with pytest.raises(TypeError, match="data is an iterator"):
        train_curve(curve, a, iter(batch), optimizer, epochs=2)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train_curve(curve, a, batch, optimizer, epochs=0)


def test_an_end_may_be_trained():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    path = LinearPath(a, b, trained=[0])
    assert path.trained == [0]
    probe = path.probe(a)
    x = torch.randn(3, 2)
    probe.move(0.25)(x).sum().backward()
    probe.pull_back()
    torch.testing.assert_close(path.layout.views(list(path.points[0]))["bias"], a.bias)
    grads = path.layout.views([p.grad for p in path.points[0]])
    torch.testing.assert_close(grads["bias"], torch.full((2,), 0.75 * 3))
    assert all(p.grad is None for p in path.points[1])


def test_samplers():
    generator = lambda: torch.Generator().manual_seed(1)
    for sample in (sample_uniform, sample_truncated_normal, sample_clipped_normal):
        t = sample(20000, generator=generator())
        assert t.dtype == torch.float64 and t.shape == (20000,) and ((t >= 0) & (t <= 1)).all()
        assert torch.equal(t, sample(20000, generator=generator()))
        assert abs(t.mean() - 0.5) < 0.01
    clipped = sample_clipped_normal(20000, generator=generator())
    for end in (0.25, 0.75):
        assert abs((clipped == end).double().mean() - 0.3085) < 0.01
    assert ((clipped >= 0.25) & (clipped <= 0.75)).all()


@pytest.mark.parametrize(
    "mean, std, low, high", [(0.5, 0.5, 0.25, 0.75), (0.2, 0.1, 0.0, 1.0), (0.0, 0.1, 0.6, 1.0)]
)
def test_the_truncated_normal_is_one(mean, std, low, high):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(2)
    t = sample_truncated_normal(4000, mean=mean, std=std, low=low, high=high, generator=generator)
    expected = stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    assert stats.kstest(t.numpy(), expected.cdf).pvalue > 0.001
    with pytest.raises(ValueError, match="no mass"):
        sample_truncated_normal(1, mean=-5.0, std=0.01, low=0.5, high=0.6)
    with pytest.raises(ValueError, match="needs std > 0"):
        sample_truncated_normal(1, std=0.0)


@pytest.mark.parametrize("points", [2, 6, 7, 10, 22])
def test_the_grid_ends_at_one(points):
    t = path_grid(points)
    assert len(t) == points and t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    with pytest.raises(ValueError, match="at least 2"):
        path_grid(1)
