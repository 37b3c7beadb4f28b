"""Recurrent layers beyond the rows of the layer table: their states, parts of their results,
weights of any origin, and what a step costs.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import htv
from htv.autograd.aggregation import ContributionBuffer
from htv.autograd.recurrent import CELLS
from htv.engine.graph_reading import grouped_rows_of
from htv.engine.handlers.recurrent import MODULES
from htv.tools.check import aggregated, one_group_at_a_time
from support.layer_table import Module
from support.oracles import by_name

N, T, D, H = 5, 4, 3, 4  # as many steps as features of the state
LENGTHS = torch.tensor([2, 4, 1, 4, 3])
RULES = [htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
KINDS = [*CELLS]


@pytest.fixture(autouse=True)
def one_thread_in_float64():
    """For calls this small more threads only wait for each other."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def made(kind: str, inputs: int = D, **options) -> nn.Module:
    if kind.startswith("rnn"):
        options["nonlinearity"] = kind.removeprefix("rnn_")
    return MODULES[kind][0](inputs, H, **options)


class FromStates(nn.Module):
    """A layer from given first states, (N, layers * directions, size) each; the loss of a row is of
    all it returns, or of the results in `used`.
    """

    def __init__(self, layer: nn.Module, packed: bool = False, used=(0, 1, 2)):
        super().__init__()
        self.layer, self.packed, self.used = layer, packed, used

    def forward(self, x, lengths, *states):
        states = tuple(s.transpose(0, 1).contiguous() for s in states)
        if self.packed:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, last = self.layer(x, states if len(states) > 1 else states[0])
        y = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0] if self.packed else y
        last = last if isinstance(last, tuple) else (last,)
        found = [y, *(h.transpose(0, 1) for h in last)]
        return [found[i].square().flatten(1).sum(1) * (i + 1) for i in self.used if i < len(found)]


def states_of(layer: nn.Module) -> list[torch.Tensor]:
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or H, H) if isinstance(layer, nn.LSTM) else (H,)
    return [torch.randn(N, count, size) for size in sizes]


SHAPES = {
    "plain": {},
    "two layers both ways": {"num_layers": 2, "bidirectional": True},
    "no bias, backwards too": {"bias": False, "bidirectional": True},
}
CASES = [(kind, shape) for kind in KINDS for shape in SHAPES.values()]
CASES += [("lstm", {"proj_size": 2, "bidirectional": True})]


def compared(model: nn.Module, batch: tuple, rule: htv.Rule) -> None:
    """Compare votes, outputs and the inputs' gradients with one example at a time and torch's."""
    parameters = dict(model.named_parameters())
    loss = lambda batch: sum(row.sum() for row in model(*batch))
    parts = one_group_at_a_time(
        lambda e: loss([t[e : e + 1] for t in batch]), parameters, len(batch[0])
    )
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in batch]
    wanted = [t for t in leaves if t.requires_grad]
    plain, plain_grads = loss(leaves), torch.autograd.grad(loss(leaves), wanted)
    with htv.attach(model, rule):
        served = loss(leaves)
        grads = torch.autograd.grad(served, [*wanted, *parameters.values()])
    torch.testing.assert_close(served, plain, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, plain_grads, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for (name, stacked), got in zip(parts.items(), grads[len(wanted) :], strict=True):
        torch.testing.assert_close(got, aggregated(stacked, rule), rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_first_states_and_their_gradients(kind, options, packed, rule):
    layer = made(kind, batch_first=True, **options)
    model = FromStates(layer, packed)
    compared(model, (torch.randn(N, T, D), LENGTHS, *states_of(layer)), rule)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,)], ids=["output", "last h", "last c"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_the_results_alone(kind, used, packed):
    if used == (2,) and kind != "lstm":
        pytest.skip("it has no c")
    layer = made(kind, batch_first=True, bidirectional=True)
    model = FromStates(layer, packed, used)
    compared(model, (torch.randn(N, T, D), LENGTHS, *states_of(layer)), htv.Median())


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps(kind, steps):
    layer = made(kind, batch_first=True, bidirectional=True)
    lengths = torch.full((N,), steps)
    for packed in (False, True):
        batch = torch.randn(N, steps, D), lengths, *states_of(layer)
        compared(FromStates(layer, packed), batch, htv.Median())


# -- derivatives of the input in the loss ----------------------------------------------------------


def slope(model, batch):
    """A loss of the derivatives of all results by all inputs; of them with a graph themselves."""
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in batch]
    wanted = [t for t in leaves if t.requires_grad]
    results = sum(row.sum() for row in model(*leaves))
    found = torch.autograd.grad(results, wanted, create_graph=True)
    return results + sum(g.square().sum() for g in found)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("excluded", ["none", "weight_hh", "_ih", "weight_hr"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_derivatives_by_input_and_states(kind, options, excluded, packed):
    layer = made(kind, batch_first=True, **options)
    model, rule = FromStates(layer, packed), htv.Median()
    parameters = dict(model.named_parameters())
    exclude = [name for name in parameters if excluded in name]
    if excluded != "none" and not exclude:
        pytest.skip("it has no such weight")
    batch = torch.randn(N, T, D), LENGTHS, *states_of(layer)
    parts = one_group_at_a_time(
        lambda e: slope(model, [t[e : e + 1] for t in batch]), parameters, N
    )
    with htv.attach(model, rule, exclude=exclude):
        slope(model, batch).backward()
    for name, p in parameters.items():
        want = parts[name].sum(0) if name in exclude else aggregated(parts[name], rule)
        torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10, msg=name)


def test_a_derivative_by_a_plain_weight_that_the_first_state_is_made_of():
    """What the layer does with the weight counts once, and so does what the state does."""

    def forward(m, x):
        state = (x[:, 0] @ m.r.weight_hh_l0[:D, :H])[None]
        return m.r(x.transpose(0, 1), (state, state))[0].transpose(0, 1)

    model = Module(forward, r=nn.LSTM(D, H))
    x, weight = torch.randn(N, T, D).requires_grad_(), model.r.weight_hh_l0

    def derivatives():
        return torch.autograd.grad(model(x).square().sum(), [x, weight], create_graph=True)

    plain = derivatives()
    with htv.attach(model, htv.Median(), exclude="r.weight_hh_l0"):
        served = derivatives()
    for got, want in zip(served, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# -- weights, checkpoints, types -------------------------------------------------------------------


def functional(m, x):
    """A GRU whose weights are computed from parameters."""
    weights = [m.i.exp(), m.h / m.h.norm(), m.b + 1, m.b * 2]
    return torch.gru(x, x.new_zeros(1, len(x), H), weights, True, 1, 0.0, True, False, True)[0]


def checkpointed(m, x):
    return checkpoint(m.r, x, use_reentrant=False)[0]


def tied(m, x):
    weights = [m.i, m.h, m.i, m.h]
    states = x.new_zeros(2, len(x), H)
    return torch.rnn_tanh(x, states, weights, False, 1, 0.0, True, True, True)[0]


def written_to(m, x):
    y, (h, c) = m.r(x)
    return y.mul_(2).sum(1) + h.add_(1)[0] * c.sin_()[0]


MODELS = {
    "computed weights": lambda: Module(
        functional, i=torch.randn(3 * H, D), h=torch.randn(3 * H, H), b=torch.randn(3 * H)
    ),
    "both directions have the same weights": lambda: Module(
        tied, i=torch.randn(H, D), h=torch.randn(H, H)
    ),
    **{
        f"checkpointed {kind}": lambda kind=kind: Module(
            checkpointed, r=made(kind, batch_first=True, num_layers=2)
        )
        for kind in KINDS
    },
    "results written to": lambda: Module(written_to, r=nn.LSTM(D, H, batch_first=True)),
}


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, rule):
    assert htv.check(MODELS[name](), torch.randn(N, T, D), rule).error < 1e-10


def test_a_weight_computed_from_the_batch():
    def forward(m, x):
        weights = [m.i, x.mean().expand(H, H)]
        states = x.new_zeros(1, len(x), H)
        return torch.rnn_tanh(x, states, weights, False, 1, 0.0, True, False, True)[0]

    model = Module(forward, i=torch.randn(H, D))
    with (
        htv.attach(model, htv.Median()),
        pytest.raises(htv.UnsupportedError, match="'i'.*from the batch.*exclude='i'"),
    ):
        model(torch.randn(N, T, D))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """Gradients are not much further from float32's than torch's own."""
    model = Module(lambda m, x: m.r(x)[0], r=made(kind, num_layers=2, batch_first=True).float())
    x = torch.randn(N, T, D, dtype=torch.float32)

    def grads(autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        return torch.autograd.grad(y.float().square().sum(), list(model.parameters()))

    exact, plain = grads(autocast=False), grads()
    with htv.attach(model, htv.Mean()):
        served = grads()
    exact, plain, served = (
        torch.cat([g.flatten() for g in found]) for found in (exact, plain, served)
    )
    assert (served - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_the_graph_tells_where_the_examples_are_in_every_result():
    model = Module(lambda m, x: m.r(x), r=nn.LSTM(D, H))
    with htv.attach(model, htv.Median(), batch_dim=1):
        y, last = model(torch.randn(T, N, D))
    assert grouped_rows_of(y.grad_fn, y.output_nr).layout.dim == 1
    for stacked in last:
        assert grouped_rows_of(*stacked.grad_fn.next_functions[0]).layout.dim == 0


def test_a_second_backward():
    model = Module(lambda m, x: m.r(x)[0], r=nn.LSTM(D, H, batch_first=True))
    parameters = list(model.parameters())
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(N, T, D)).square().sum()
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- what a step costs -----------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(model, steps: int) -> int:
    x = torch.randn(N, steps, D)
    with Counted() as counted:
        model(x).sum().backward()
    return counted.count


@pytest.mark.parametrize(("kind", "most"), [("lstm", 15), ("gru", 11), ("rnn_tanh", 5)])
def test_operations_of_one_more_time_step(kind, most):
    model = Module(lambda m, x: m.r(x)[0], r=made(kind, batch_first=True))
    with htv.attach(model, htv.Median()):
        few, more = (operations(model, steps) for steps in (10, 20))
    assert more - few <= 10 * most


@pytest.mark.parametrize("kind", KINDS)
def test_all_steps_are_one_use(kind, monkeypatch):
    parts, record = [], ContributionBuffer.record
    monkeypatch.setattr(
        ContributionBuffer,
        "record",
        lambda self, factors, born=-1: (
            parts.append(self.parameter_name) or record(self, factors, born)
        ),
    )
    model = Module(lambda m, x: m.r(x)[0], r=made(kind, batch_first=True, num_layers=2))
    with htv.attach(model, htv.Median()):
        model(torch.randn(N, T, D)).sum().backward()
    assert sorted(parts) == sorted(name for name, _ in model.named_parameters())
