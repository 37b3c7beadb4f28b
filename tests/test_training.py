"""Ways to train: several losses, mixed precision, gradient scaling, averaged copies, checkpoints,
failures.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import htv
from htv.bench.models import LanguageModel, mlp
from htv.tools.check import aggregated, one_group_at_a_time
from support.layer_table import Module
from support.oracles import by_name

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
MEDIAN = htv.Median()


def square(y):
    return y.square().sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def tracked(model, loss, rule=MEDIAN):
    """Gradients of one attached step; loss: of no arguments."""
    model.zero_grad()
    with htv.attach(model, rule):
        loss().backward()
    return gradients(model)


def contributions(model, loss_of_example, count):
    return one_group_at_a_time(loss_of_example, dict(model.named_parameters()), count)


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_several_losses_of_one_forward_are_one_vote(rule):
    model, x = mlp().double(), torch.randn(6, 12).double()
    losses = lambda y: (y.square().sum(), y[:, 0].sin().sum(), F.softplus(y).sum())
    expected = contributions(model, lambda e: sum(losses(model(x[e : e + 1]))), 6)
    for name, grad in tracked(model, lambda: sum(losses(model(x))), rule).items():
        torch.testing.assert_close(grad, aggregated(expected[name], rule), rtol=1e-10, atol=1e-12)


def test_every_backward_of_its_own_is_a_vote_of_its_own():
    """A loss that is differentiated by itself is aggregated by itself, and the results add up in
    .grad.
    """
    model, x = mlp().double(), torch.randn(6, 12).double()
    first, second = (lambda y: y.square().sum()), (lambda y: y.sin().sum())
    parts = [
        contributions(model, lambda e, f=f: f(model(x[e : e + 1])), 6) for f in (first, second)
    ]
    with htv.attach(model, MEDIAN):
        y = model(x)
        first(y).backward(retain_graph=True)
        second(y).backward()
    for name, grad in gradients(model).items():
        expected = sum(aggregated(part[name], MEDIAN) for part in parts)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


# -- mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_autocast(rule, dtype):
    """Within what half precision itself costs: twice the distance of its plain contributions to
    exact ones.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3))
    x = torch.randn(6, 4, 5)

    def loss(model, x):
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        return (y.to(x.dtype) ** 2).sum()

    low = contributions(model, lambda e: loss(model, x[e : e + 1]), 6)
    exact = copy.deepcopy(model).double()
    high = contributions(exact, lambda e: (exact(x[e : e + 1].double()) ** 2).sum(), 6)
    found = tracked(model, lambda: loss(model, x), rule)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        noise = (low[name] - high[name]).abs().amax(0)
        expected = aggregated(high[name], rule)
        clear = torch.ones_like(noise, dtype=torch.bool)
        if isinstance(rule, htv.AndMask):
            clear = (high[name].abs() > 2 * noise).all(0)
        budget = 6 * 2 * noise.max() + 1e-6
        assert ((grad - expected).abs() <= budget)[clear].all(), name
    assert (found["0.weight"] != 0).any()


def test_contributions_of_half_precision_factors_are_summed_in_float32():
    """4096 rows of 1 * 2**-9: bfloat16 would stop counting at 0.5."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    x = torch.ones(3, 4096, 1, dtype=torch.bfloat16)
    for rule in RULES:
        grad = tracked(model, lambda: (model(x) * 2**-9).sum(), rule)["weight"]
        assert grad.item() == 3 * 8


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_gradient_scaling(rule):
    """Scaling by a power of two commutes with every rule, bit for bit."""
    model, x = mlp(), torch.randn(6, 12)
    expected = tracked(model, lambda: square(model(x)), rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    with htv.attach(model, rule):
        scaler.scale(square(model(x))).backward()
        scaler.unscale_(optimizer)
        for name, grad in gradients(model).items():
            assert torch.equal(grad, expected[name])
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model[0].weight, before)


def test_a_scaled_step_with_infinities_is_skipped():
    model, x = mlp(), torch.randn(6, 12)
    x[2, 3] = torch.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    with htv.attach(model, MEDIAN):
        scaler.scale(square(model(x))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- copies ----------------------------------------------------------------------------------------


def test_averaged_copies_follow_an_attached_model():
    model, x = mlp(), torch.randn(6, 12)
    handle = htv.attach(model, MEDIAN)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model[0].weight.detach().clone()
    averaged.update_parameters(model)
    for _ in range(2):
        optimizer.zero_grad()
        square(model(x)).backward()
        optimizer.step()
        averaged.update_parameters(model)
        expected = 0.5 * expected + 0.5 * model[0].weight.detach()
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    plain = torch.autograd.grad(square(averaged(x)), averaged.module[0].weight)[0]
    handle.detach()
    twin = mlp()
    twin.load_state_dict(averaged.module.state_dict())
    torch.testing.assert_close(plain, torch.autograd.grad(square(twin(x)), twin[0].weight)[0])


def test_state_dicts_pass_between_attached_and_plain_models():
    model, plain = mlp(), mlp()
    with htv.attach(model, MEDIAN):
        model.load_state_dict(plain.state_dict())
        assert list(model.state_dict()) == list(plain.state_dict())
        x = torch.randn(6, 12)
        found = tracked(plain, lambda: square(plain(x)))
        square(model(x)).backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, found[name])


# -- activation checkpointing ----------------------------------------------------------------------

CHECKPOINTED = {
    "lstm": lambda: nn.LSTM(6, 6, num_layers=2, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "convolution": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "used twice": lambda: Module(
        lambda m, x: m.l(torch.tanh(m.l(x))) + m.l.weight[0], l=nn.Linear(6, 6)
    ),
    "positions": lambda: Module(
        lambda m, x: x + m.e(torch.arange(4)) * m.s, e=nn.Embedding(4, 6), s=torch.randn(6)
    ),
}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_layers(name, use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = (
                nn.Linear(6, 6),
                CHECKPOINTED[name](),
                nn.Linear(6, 3),
            )
            self.checkpointed = False

        def forward(self, x):
            x = self.first(x)
            y = (
                checkpoint(self.inner, x, use_reentrant=use_reentrant)
                if self.checkpointed
                else self.inner(x)
            )
            return self.last(y[0] if isinstance(y, tuple) else y)

    model, x = Model().double(), torch.randn(5, 4, 6).double()
    expected = tracked(model, lambda: square(model(x)))
    model.checkpointed = True
    for parameter, grad in tracked(model, lambda: square(model(x))).items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-10, atol=1e-12, msg=parameter)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False)


def test_a_tied_model_with_every_block_checkpointed():
    model, ids = LanguageModel().double(), torch.randint(0, 29, (5, 6))
    expected = tracked(model, lambda: square(model(ids)))
    for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(block)
    found = tracked(model, lambda: square(model(ids)))
    assert found.keys() != expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name.replace(".inner.", ".")], rtol=1e-9, atol=1e-11, msg=name
        )


# -- failures --------------------------------------------------------------------------------------


class Explosion(Exception):
    pass


class Fuse(torch.autograd.Function):
    """Identity whose backward fails."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise Explosion


def explode(x):
    raise Explosion


FAILING = {
    "forward": lambda m, x: explode(m.first(x)),
    "backward": lambda m, x: m.last(Fuse.apply(m.inner(m.first(x))[0])),
    "never backward": lambda m, x: m.last(m.inner(m.first(x))[0]),
    "refused": lambda m, x: (
        m.last(m.inner(m.first(x))[0]) + m.first(x.mean(0) + m.last.bias.sum()).sum()
    ),
}


@pytest.mark.parametrize("accumulating", [False, True], ids=["", "accumulating"])
@pytest.mark.parametrize("failure", FAILING)
def test_nothing_of_a_failed_step_reaches_the_next(failure, accumulating):
    healthy = FAILING["never backward"]
    parts = dict(first=nn.Linear(6, 6), inner=nn.LSTM(6, 6, batch_first=True), last=nn.Linear(6, 3))
    model, x = Module(healthy, **parts).double(), torch.randn(5, 4, 6).double()
    rule = htv.AndMask(0.4)
    expected = tracked(model, lambda: square(model(x)), rule)
    model.zero_grad()
    with htv.attach(model, rule) as handle:
        model.function = FAILING[failure]
        bad = torch.randn(3, 4, 6).double()
        if failure == "never backward":
            model(bad)
        else:
            with pytest.raises((Explosion, htv.UnsupportedError)):
                if accumulating:
                    with handle.accumulate():
                        square(model(bad)).backward()
                else:
                    square(model(bad)).backward()
        model.zero_grad()
        model.function = healthy
        if accumulating:
            with handle.accumulate():
                square(model(x)).backward()
        else:
            square(model(x)).backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)
        with torch.no_grad():
            assert model(x).shape == (5, 4, 3)


class Turned(nn.Module):
    """A batch-first model with a sequence-first block."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.block, self.use_reentrant = (
            nn.Linear(6, 6),
            nn.TransformerEncoderLayer(6, 2, 8, 0.0),
            use_reentrant,
        )

    def forward(self, x):
        y = self.first(x).transpose(0, 1)
        y = (
            self.block(y)
            if self.use_reentrant is None
            else checkpoint(self.block, y, use_reentrant=self.use_reentrant)
        )
        return y.transpose(0, 1)


@pytest.mark.parametrize("length", [3, 5], ids=["T != N", "T == N"])
def test_checkpointed_blocks_with_the_batch_elsewhere(length):
    """Run again, a block sees inputs that alone would not tell where the batch is."""
    x = torch.randn(5, length, 6).double()
    model = Turned(None).double()
    groups = torch.tensor([4, 1, 1, 4, 0])
    gradients_of = {}
    for use_reentrant in (None, False):
        model.use_reentrant = use_reentrant
        with htv.attach(model, MEDIAN) as handle:
            model.zero_grad()
            with handle.groups(groups):
                loss = square(model(x))
            loss.backward()
        gradients_of[use_reentrant] = gradients(model)
    for name, grad in gradients_of[False].items():
        torch.testing.assert_close(grad, gradients_of[None][name], rtol=1e-9, atol=1e-11, msg=name)
    model.use_reentrant = True
    with htv.attach(model, MEDIAN), pytest.raises(RuntimeError, match="use_reentrant=False"):
        square(model(x)).backward()
