"""Losses with derivatives of the input, of any order: against one group at a time, and refusals."""

import copy
import gc
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import htv
from htv.autograd.linear import _Linear
from htv.tools.check import one_group_at_a_time
from support import layer_table
from support.layer_table import LAYERS, Module
from support.oracles import RULES, by_name, stat

FIVE = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1), htv.SandMask(0.3, k=0.5)]


@pytest.fixture(autouse=True)
def one_thread_in_float64():
    """For calls this small more threads only wait for each other."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def given(*tensors: Tensor) -> list[Tensor]:
    """Return leaves that want a gradient."""
    return [t.detach().requires_grad_() for t in tensors]


def along(y: Tensor, x: Tensor) -> Tensor:
    """Return dy/dx of every row, which may be differentiated again."""
    return grad(y.sum(), x, create_graph=True)[0]


def contributions(model, loss, batch, members):
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    of_group = lambda e: loss(model, *(t[members[e]] for t in batch))
    return one_group_at_a_time(of_group, parameters, len(members))


def assert_votes(model, contributed, rule, exclude=(), within=1e-9):
    """Compare gradients with what a rule makes of contributions, but for coordinates at which one
    is rounding noise.
    """
    compared = wanted = 0
    for name, p in model.named_parameters():
        c = contributed.get(name)
        if c is None:
            assert p.grad is None or not p.grad.any()
            continue
        c = c.numpy()
        want = len(c) * stat(htv.Mean() if name in exclude else rule, c)
        got = (torch.zeros_like(p) if p.grad is None else p.grad).double().numpy()
        size = max(np.abs(c).max(), 1e-300)
        clear = ((np.abs(c) > 1e-11 * size) | (c == 0)).all(0)
        compared, wanted = compared + clear.sum(), wanted + p.numel()
        got, want = got[clear], want[clear]
        np.testing.assert_allclose(got, want, rtol=0, atol=within * size, err_msg=name)
    assert compared >= 0.8 * wanted


def assert_exact(model, loss, batch, rule, members=None, step=None, exclude=(), oracle=None):
    """Compare the attached model's gradients of a loss, a sum over examples, with one group at a
    time.

    members:  the examples of every group; default: one each.
    step:     (handle, loss) -> runs the backward; default: at once.
    oracle:   the batch for the comparison, where it is another.
    """
    oracle = batch if oracle is None else oracle
    members = [[e] for e in range(len(oracle[0]))] if members is None else members
    with mock.patch.object(F, "layer_norm", by_hand):
        contributed = contributions(copy.deepcopy(model), loss, oracle, members)
    model.zero_grad()
    with htv.attach(model, rule, exclude=exclude) as handle:
        run = partial(loss, model)
        if step is None:
            run(*batch).backward()
        else:
            step(handle, run)
    assert_votes(model, contributed, rule, exclude)


def by_hand(x, shape, weight=None, bias=None, eps=1e-5):
    """Layer norm, without torch's, whose third derivatives take mean and rstd for constants."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


# -- real cases ------------------------------------------------------------------------------------


def mlp(inputs=1, outputs=1, act=nn.Tanh):
    return nn.Sequential(
        nn.Linear(inputs, 8), act(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, outputs)
    )


def logistic(model, t):
    """u' = u (1 - u), and u(0) = 1/2 at every example's own share."""
    (t,) = given(t)
    u = model(t)
    residual = along(u, t) - u * (1 - u)
    return residual.square().sum() + (model(torch.zeros_like(t)) - 0.5).square().sum()


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_an_ordinary_differential_equation(rule):
    assert_exact(mlp(), logistic, [torch.rand(7, 1)], rule)


def poisson(model, xy):
    """u_xx + u_yy = sin(x) y."""
    (xy,) = given(xy)
    first = along(model(xy), xy)
    second = along(first[:, 0], xy)[:, 0] + along(first[:, 1], xy)[:, 1]
    return (second - xy[:, 0].sin() * xy[:, 1]).square().sum()


@pytest.mark.parametrize("rule", FIVE, **by_name)
@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.Softplus])
def test_second_derivatives(rule, act):
    assert_exact(mlp(2, act=act), poisson, [torch.randn(7, 2)], rule)


def beam(model, x):
    """u_xxxx = u."""
    (x,) = given(x)
    u = d = model(x)
    for _ in range(4):
        d = along(d, x)
    return (d - u).square().sum()


def test_fourth_derivatives():
    assert_exact(mlp(), beam, [torch.randn(7, 1)], htv.Median())


class Messages(nn.Module):
    """Energies of molecules, by messages along all pairs of atoms."""

    def __init__(self):
        super().__init__()
        self.kinds = nn.Embedding(4, 5)
        self.edge, self.mix = nn.Linear(6, 5), nn.Linear(5, 5, bias=False)
        self.norm, self.scale = nn.LayerNorm(5), nn.Parameter(torch.randn(5))
        self.out = nn.Linear(5, 1)

    def forward(self, kinds, positions):
        h = self.kinds(kinds)
        apart = positions[:, :, None] - positions[:, None] + 0.1
        distance = apart.square().sum(-1, keepdim=True).sqrt()
        for _ in range(2):
            pairs = h[:, None].expand(-1, h.shape[1], -1, -1)
            messages = F.silu(self.edge(torch.cat([pairs, distance], -1)))
            h = h + self.scale * self.norm(self.mix(messages.sum(2)))
        return self.out(h).sum(1)


def matching(model, kinds, positions, energy, forces):
    (positions,) = given(positions)
    found = model(kinds, positions)
    force = -along(found, positions)
    return (found - energy).square().sum() + (force - forces).square().sum()


@pytest.mark.parametrize("rule", FIVE, **by_name)
def test_energies_and_forces(rule):
    batch = torch.randint(0, 4, (7, 3)), torch.randn(7, 3, 3), torch.randn(7, 1)
    assert_exact(Messages(), matching, [*batch, torch.randn(7, 3, 3)], rule)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.group = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4)
        self.b, self.layer = nn.Conv2d(4, 4, 3, groups=2, dilation=1), nn.LayerNorm((4, 2, 2))
        self.slope, self.out = nn.PReLU(), nn.Linear(16, 1)

    def forward(self, x):
        h = self.slope(self.group(self.a(x)))
        return self.out(torch.tanh(self.layer(self.b(h))).flatten(1))


def penalised(model, real, fake, share):
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    slopes = along(model(mixed), mixed).flatten(1).norm(dim=1)
    return (model(fake) - model(real)).sum() + 10 * (slopes - 1).square().sum()


@pytest.mark.parametrize("rule", FIVE, **by_name)
def test_gradient_penalty_of_a_critic(rule):
    batch = torch.randn(7, 2, 8, 8), torch.randn(7, 2, 8, 8), torch.rand(7, 1, 1, 1)
    assert_exact(Critic(), penalised, batch, rule)


def score_matching(model, x):
    """Half the square of the score, plus its divergence."""
    (x,) = given(x)
    score = model(x)
    divergence = sum(along(score[:, i], x)[:, i] for i in range(x.shape[1]))
    return (score.square().sum(1) / 2 + divergence).sum()


@pytest.mark.parametrize("rule", FIVE, **by_name)
def test_score_matching(rule):
    assert_exact(mlp(3, 3), score_matching, [torch.randn(7, 3)], rule)


def adversarial(model, ids, steps):
    """Virtual adversarial training: a step along the slope at the embedded tokens."""
    h = model.words(ids)
    slope = along(model.head(h).square(), h)
    return model.head(h + steps * slope).exp().sum()


def test_slopes_at_the_embedded_tokens():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": mlp(4)})
    batch = torch.randint(0, 5, (7, 3)), torch.rand(7, 1, 1)
    assert_exact(model, adversarial, batch, htv.Median())


# -- every layer -----------------------------------------------------------------------------------


def outputs_of(model, x):
    leaves = pytree.tree_leaves(model(*x))
    return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]


def slopes(order, model, *batch):
    """The outputs, and the squares of their first and maybe second derivatives by the inputs."""
    x = [t.detach().requires_grad_(t.is_floating_point()) for t in batch]
    free = [t for t in x if t.requires_grad]
    outputs = outputs_of(model, x)
    total = sum(y.cos().sum() for y in outputs)
    derived = sum(y.sin().sum() for y in outputs)
    for _ in range(order):
        if derived.requires_grad:  # else the model is linear
            found = grad(derived, free, create_graph=True, allow_unused=True)
            found = [g for g in found if g is not None]
            total = total + sum(g.square().sum() for g in found)
            derived = sum(g.sin().sum() for g in found)
    return total


# Torch has no second derivative of one, and power iterations differ from call to call.
NOT = {"embedding bag, weighted", "spectral_norm", "spectral_norm of a convolution"}


def _grids_have_second_derivatives() -> bool:
    """Those of an older torch have none, with or without htv."""
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    y = F.grid_sample(x, torch.zeros(1, 1, 1, 2, requires_grad=True), align_corners=False)
    (slope,) = grad(y.square().sum(), x, create_graph=True)
    try:
        slope.sum().backward()
    except RuntimeError:
        return False
    return True


if not _grids_have_second_derivatives():
    NOT |= {"spatial transformer", "one transformation, expanded", "one grid, expanded"}
    NOT |= {"a learnt image"}


@pytest.mark.parametrize(("order", "rule"), [(1, htv.Median()), (2, htv.AndMask(0.4))])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, order, rule):
    model, batch = LAYERS[layer]()
    batch = batch if isinstance(batch, tuple) else (batch,)
    tensors = all(isinstance(t, Tensor) and len(t) == layer_table.N for t in batch)
    if layer in NOT or not tensors or not any(t.is_floating_point() for t in batch):
        pytest.skip("no derivative, or no input that has one")
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            vars(module).update({k: 0.0 for k in ("p", "dropout") if hasattr(module, k)})
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    with sdpa_kernel(SDPBackend.MATH):
        assert_exact(model.double(), partial(slopes, order), batch, rule)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 6])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_where_sizes_coincide(layer, size, monkeypatch):
    """As many examples as tokens or features: nothing is taken for what mixes examples."""
    monkeypatch.setattr(layer_table, "N", size)
    test_layer(layer, 2, htv.Median())


@pytest.mark.parametrize(
    "norm", [F.layer_norm, lambda x, _: F.instance_norm(x)], ids=["layer", "instance"]
)
def test_third_derivatives_of_norms_are_not_torchs(norm):
    """Where this fails, torch has learnt it: docs/supported.md says otherwise."""
    x = torch.randn(3, 2, 6)

    def third(norm):
        (leaf,) = given(x)
        second = along(along(norm(leaf, (6,)).sin(), leaf).sin(), leaf)
        return grad(second.square().sum(), leaf)[0]

    assert (third(norm) - third(by_hand)).abs().max() > 1e-3


# -- who votes, and how one trains -----------------------------------------------------------------

IDS = torch.tensor([2, 0, 2, 1, 0, 2, 3])


def by_ids(handle, loss, batch, **settings):
    with handle.groups(IDS, **settings):
        loss(*batch).backward()


@pytest.mark.parametrize("rule", FIVE, **by_name)
def test_groups_by_unsorted_ids(rule):
    batch = torch.randn(7, 2, 8, 8), torch.randn(7, 2, 8, 8), torch.rand(7, 1, 1, 1)
    members = [(IDS == e).nonzero().flatten() for e in range(4)]
    step = lambda handle, loss: by_ids(handle, loss, batch)
    assert_exact(Critic(), penalised, batch, rule, members, step)


CLOUD = mlp, poisson, lambda: [torch.randn(7, 2)]
IMAGES = (
    lambda _: Critic(),
    penalised,
    lambda: [torch.randn(7, 2, 8, 8), torch.randn(7, 2, 8, 8), torch.rand(7, 1, 1, 1)],
)


@pytest.mark.parametrize("case", [CLOUD, IMAGES], ids=["linear", "images"])
def test_groups_whose_means_count_once(case):
    make, loss, drawn = case
    batch, members = drawn(), [(IDS == e).nonzero().flatten() for e in range(4)]
    step = lambda handle, loss: by_ids(handle, loss, batch, weight="equal")

    def weighted(model, first, *rest):
        share = 7 / (4 * len(first)) if len(first) < 7 else 1.0
        return loss(model, first, *rest) * share

    assert_exact(make(2), weighted, batch, htv.Median(), members, step)


def test_packed_sequences():
    batch, members = [torch.randn(7, 2)], [[0, 1, 2], [3], [4, 5, 6]]

    def step(handle, loss):
        with handle.packed([0, 3, 4, 7]):
            loss(*batch).backward()

    assert_exact(mlp(2), poisson, batch, htv.Median(), members, step)


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(2, 6), nn.LayerNorm((6,)), nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x)) * self.scale))


def heat(model, points):
    (points,) = given(points)
    first = along(model(points), points)
    return (first[..., 0] - along(first[..., 1], points)[..., 1]).square().sum()


def by_tokens(handle, loss, batch, mask=None):
    with handle.tokens(mask):
        loss(*batch).backward()


VOTING = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("mask", [None, VOTING], ids=["all", "some"])
def test_every_point_votes(mask):
    """A point of a cloud is a token: it contributes what it would in a batch of points."""
    clouds = torch.randn(3, 4, 2)
    step = lambda handle, loss: by_tokens(handle, loss, [clouds], mask)
    points = [clouds.reshape(12, 2) if mask is None else clouds[mask]]
    assert_exact(Pointwise(), heat, [clouds], htv.Median(), step=step, oracle=points)


def test_tokens_of_a_norm_over_two_dims():
    model, x = nn.Sequential(nn.LayerNorm((2, 3)), nn.Tanh()), torch.randn(3, 4, 2, 3)
    step = lambda handle, loss: by_tokens(handle, loss, [x])
    rows = [x.reshape(12, 2, 3)]
    assert_exact(model, partial(slopes, 1), [x], htv.Median(), step=step, oracle=rows)


def test_examples_in_dim_1():
    model, x = Pointwise(), torch.randn(4, 7, 2)
    with mock.patch.object(F, "layer_norm", by_hand):
        contributed = contributions(
            copy.deepcopy(model), heat, [x.transpose(0, 1)], [[e] for e in range(7)]
        )
    with htv.attach(model, htv.WinsorizedMean(1), batch_dim=1):
        heat(model, x).backward()
    assert_votes(model, contributed, htv.WinsorizedMean(1))


def test_micro_batches():
    batch = torch.randn(8, 1)

    def step(handle, loss):
        with handle.accumulate():
            for part in batch.split(2):
                loss(part).backward()

    assert_exact(mlp(), logistic, [batch], htv.AndMask(0.4), step=step)


@pytest.mark.parametrize("frozen", [{"0.weight"}, {"2.weight", "2.bias"}, {"0.bias", "4.weight"}])
def test_frozen_parameters(frozen):
    model = mlp(2)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    assert_exact(model, poisson, [torch.randn(7, 2)], htv.Median())


@pytest.mark.parametrize("exclude", [("0.weight",), ("2.bias", "4.weight"), ("2.weight",)])
def test_excluded_parameters(exclude):
    assert_exact(mlp(2), poisson, [torch.randn(7, 2)], htv.Median(), exclude=exclude)


EXCLUDED = {
    "linear": ("a.weight", "a.bias"),
    "convolutions": ("c.weight", "c.bias", "t.weight", "t.bias"),
    "norms": ("n.weight", "n.bias", "g.weight", "g.bias"),
    "bilinear": ("m.weight", "m.bias"),
}


@pytest.mark.parametrize("kind", EXCLUDED)
def test_gradients_of_excluded_parameters_have_graphs_too(kind):
    """As of a penalty on the gradient of a head that keeps its plain gradient."""
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4), "n": nn.LayerNorm(4), "m": nn.Bilinear(4, 4, 3),
            "c": nn.Conv1d(3, 4, 2, stride=2), "g": nn.GroupNorm(2, 4),
            "t": nn.ConvTranspose1d(4, 2, 3, stride=2),
        }
    )  # fmt: skip
    # Half of a layer at a time, so that a served Function has a plain argument.
    halves = [tuple(n for n in EXCLUDED[kind] if n.endswith(e)) for e in (".weight", ".bias")]

    def forward(x):
        h = model["n"](torch.tanh(model["a"](x)))
        h = model["m"](h, x)[:, :, None] * h[:, None]
        return model["t"](torch.tanh(model["g"](model["c"](h)))).sin()

    model.forward = forward

    def loss(x, wanted):
        parameters = [p for n, p in model.named_parameters() if n in wanted]
        found = grad(model(x).square().sum(), parameters, create_graph=True)
        return sum(g.square().sum() for g in found)

    x = torch.randn(5, 4)
    for wanted in halves:
        model.zero_grad()
        loss(x, wanted).backward()
        plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with htv.attach(model, htv.Mean(), exclude=wanted):
            loss(x, wanted).backward()
        for name, p in model.named_parameters():
            want = plain.get(name, torch.zeros_like(p))
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, want)


def test_derivatives_without_a_graph_are_no_votes():
    """As of forces that are looked at, or weigh a loss as constants."""

    def loss(model, x):
        (x,) = given(x)
        u = model(x)
        (slope,) = grad(u.sum(), x, retain_graph=True)
        assert not slope.requires_grad and all(p.grad is None for p in model.parameters())
        return (u * slope).square().sum()

    assert_exact(mlp(), loss, [torch.randn(7, 1)], htv.Median())


class Forces(nn.Module):
    """Takes the derivative in its forward, and goes on with it."""

    def __init__(self, outputs):
        super().__init__()
        self.energy, self.after, self.outputs = mlp(3), nn.Linear(3, 2), outputs

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            e = self.energy(x)
            of = {"sum": e.sum(), "a scaled mean": e.mean() * 2}.get(self.outputs, e)
            beside = {"rows": torch.ones_like(e), "other rows": x[:, :1].detach().flip(0)}
            (slope,) = grad(of, x, beside.get(self.outputs), create_graph=True)
        return e, self.after(slope)


def forced(model, x):
    e, after = model(x.detach().clone())
    return e.square().sum() + after.square().sum()


@pytest.mark.parametrize("outputs", ["rows", "sum"])
def test_derivatives_that_a_forward_goes_on_with(outputs):
    assert_exact(Forces(outputs), forced, [torch.randn(7, 3)], htv.Median())


@pytest.mark.parametrize("outputs", ["a scaled mean", "other rows"])
def test_derivatives_of_what_a_forward_mixes_are_lost(outputs):
    model, x = Forces(outputs), torch.randn(7, 3)
    with htv.attach(model, htv.Median()), pytest.raises(htv.UnsupportedError) as caught:
        forced(model, x)
    assert "'after.weight'" in str(caught.value) and "lost that" in str(caught.value)


def test_a_block_around_a_training_step():
    def step(handle, loss):
        with handle.forward(batch):
            value = loss(batch)
        value.backward()

    batch = torch.randn(7, 2)
    assert_exact(mlp(2), poisson, [batch], htv.Median(), step=step)


def test_loops_of_torch_autograd_functional():
    """jacobian and hessian without vectorize=True."""

    def loss(model, x):
        hessian = torch.autograd.functional.hessian(lambda x: model(x).sum(), x, create_graph=True)
        jacobian = torch.autograd.functional.jacobian(
            lambda x: model(x).sum(0), x, create_graph=True
        )
        return hessian.square().sum() + jacobian.sin().sum()

    assert_exact(mlp(2), loss, [torch.randn(5, 2)], htv.Median())


def test_statistics_are_of_all_uses():
    model, x = mlp(), torch.rand(7, 1)
    contributed = contributions(copy.deepcopy(model), logistic, [x], [[e] for e in range(7)])
    with htv.attach(model, htv.AndMask(0.4), stats=True) as handle:
        logistic(model, x).backward()
        found = handle.stats()
    for name, c in contributed.items():
        want = c.sign().sum(0).abs().mean() / 7
        assert abs(found[name].mean_agreement - want) < 1e-9


def assert_near(model, wide, share):
    for p, w in zip(model.parameters(), wide.parameters(), strict=True):
        if w.grad is None:
            assert p.grad is None
            continue
        assert p.grad.dtype == p.dtype
        assert (p.grad.double() - w.grad).abs().max() < share * w.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_types(dtype):
    """The mean is that of the plain model to rounding."""
    model, x = mlp(2).to(dtype), torch.randn(16, 2).to(dtype)
    wide = copy.deepcopy(model).double()
    slopes(2, wide, x.double()).backward()
    with htv.attach(model, htv.Mean()):
        slopes(2, model, x).backward()
    assert_near(model, wide, 20 * torch.finfo(dtype).eps)


def test_autocast():
    model, x = mlp(2).float(), torch.randn(16, 2, dtype=torch.float32)
    wide = copy.deepcopy(model).double()
    slopes(1, wide, x.double()).backward()
    with htv.attach(model, htv.Mean()), torch.autocast("cpu", dtype=torch.bfloat16):
        slopes(1, model, x).backward()
    assert_near(model, wide, 0.1)


def test_nothing_is_kept():
    model, (_, loss, drawn) = Critic(), IMAGES
    served = lambda: sum(isinstance(o, BackwardCFunction) for o in gc.get_objects())
    with htv.attach(model, htv.Median()):
        gc.collect()
        gc.disable()
        try:
            before = served()
            value = loss(model, *drawn())
            assert served() > before
            value.backward()
            del value
            assert served() == before
        finally:
            gc.enable()


# -- refused ---------------------------------------------------------------------------------------

MIXED = {
    "the square of a sum": lambda u: u.sum().square(),
    "a softmax over examples": lambda u: (u.softmax(0) * u).sum(),
    "logsumexp": lambda u: u.logsumexp(0).sum(),
    "a norm": lambda u: u.norm(),
    "centred": lambda u: (u - u.mean(0)).square().sum(),
    "a variance": lambda u: u.std(0).sum(),
    "similarities": lambda u: (u @ u.T).exp().sum(),
    "a Gram matrix": lambda u: (u.T @ u).square().sum(),
    "similarities by einsum": lambda u: torch.einsum("ni,mi->nm", u, u).exp().sum(),
    "the square of a product": lambda u: (u[:, 0] @ u[:, 0]).square(),
    "a weighted sum of examples": lambda u: (torch.ones(2, len(u)) @ u).exp().sum(),
    "a matrix by a column": lambda u: (u.T @ u[:, 0]).square().sum(),
    "differences": lambda u: (u[:, None] - u[None]).square().sum(),
    "sums so far": lambda u: u.cumsum(0).square().sum(),
}


@pytest.mark.parametrize("name", MIXED)
def test_derivatives_of_what_mixes_examples(name):
    def loss(model, x, of):
        (x,) = given(x)
        u = model(x)
        (slope,) = grad(of(u), x, create_graph=True)
        return (u + slope).square().sum()

    model, x = mlp(), torch.randn(7, 1)
    with htv.attach(model, htv.Median()):
        with pytest.raises(htv.UnsupportedError, match="brings examples together") as caught:
            loss(model, x, MIXED[name])
        assert "'4.weight'" in str(caught.value) and "u.sum()" in str(caught.value)
        loss(model, x, Tensor.sum).backward()  # as it says


APART = {
    "a mean": lambda u: u.mean() * len(u),
    "powers": lambda u: u.square().sum() + u.exp().sum(),
    "a norm": lambda u: u.norm(dim=1).sum(),
    "a softmax over classes": lambda u: (torch.cat([u, u.square()], 1).log_softmax(1)[:, 0]).sum(),
    "transposed": lambda u: u.T.exp().sum(),
    "in parts": lambda u: sum(part.sin().sum() for part in u.split(1)),
    "by einsum": lambda u: torch.einsum("ni,ni->n", u, u).exp().sum(),
    "by bmm": lambda u: (u[:, :, None] @ u[:, None]).exp().sum(),
    "times a matrix": lambda u: (u @ torch.ones(1, 3)).exp().sum(),
    "a matrix times": lambda u: (torch.ones(3, 1) @ u.T).exp().sum(),
}


@pytest.mark.parametrize("name", APART)
def test_derivatives_of_what_keeps_examples_apart(name):
    def loss(model, x):
        (x,) = given(x)
        u = model(x)
        return (u + grad(APART[name](u), x, create_graph=True)[0]).square().sum()

    assert_exact(mlp(), loss, [torch.randn(7, 1)], htv.Median())


def test_one_group_may_mix_its_examples():
    def loss(model, x):
        (x,) = given(x)
        u = model(x)
        return (u + grad(u.sum().square(), x, create_graph=True)[0]).square().sum()

    model, x = mlp(), torch.randn(7, 1)
    loss(model, x).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with htv.attach(model, htv.AndMask(0.4), allow_single=True) as handle:
        with handle.groups(torch.zeros(7, dtype=torch.long)):
            loss(model, x).backward()
    for p, want in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, want)


def test_derivatives_by_parameters():
    model, (x,) = mlp(), given(torch.randn(7, 1))
    with htv.attach(model, htv.Median()):
        with pytest.raises(RuntimeError, match="the input alone") as caught:
            model(x).sum().backward(create_graph=True)
        assert "'4.weight'" in str(caught.value)
        u = model(x)
        with pytest.raises(RuntimeError, match="create_graph=True asks for"):
            grad(u.sum(), [x, *model.parameters()], create_graph=True)
        slope = along(u, x)  # as it says
        slope.square().sum().backward()
        assert all(p.grad is not None for p in list(model.parameters())[:-1])


def test_batches_of_gradients():
    model, (x,) = mlp(), given(torch.randn(7, 1))
    with htv.attach(model, htv.Median()):
        u = model(x)
        beside = torch.ones(2, *u.shape)
        with pytest.raises(RuntimeError, match="once for every output") as caught:
            grad(u, x, beside, create_graph=True, is_grads_batched=True)
        assert "'4.weight'" in str(caught.value)
        again = [grad(u, x, b, create_graph=True)[0] for b in beside]  # as it says
        assert all(slope.requires_grad for slope in again)


def test_functions_without_a_derivative_of_their_backward():
    model, (x,) = mlp(), given(torch.randn(7, 1))
    without = staticmethod(lambda ctx, grad: None)
    with mock.patch.object(_Linear, "differentiable", without):
        with htv.attach(model, htv.Median()):
            with pytest.raises(RuntimeError, match="no derivative of the backward of Linear") as e:
                along(model(x), x)
            assert "exclude='4.weight', '4.bias'" in str(e.value)
        with htv.attach(model, htv.Median(), exclude="*"):
            along(model(x), x).square().sum().backward()  # as it says


def test_reentrant_checkpoints_are_torchs_to_refuse():
    for reentrant in (True, False):
        run = lambda m, x, r=reentrant: checkpoint(m.body, x, use_reentrant=r)
        model, x = Module(run, body=mlp()), torch.rand(7, 1)
        if reentrant:
            with (
                htv.attach(model, htv.Median()),
                pytest.raises(RuntimeError, match="use_reentrant"),
            ):
                logistic(model, x)
        else:
            assert_exact(model, logistic, [x], htv.Median())
