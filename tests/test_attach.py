"""A whole model served: against one group at a time, who votes, what a loss may do, and the way
back.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.bench.models import LanguageModel, mlp, whole_models
from htv.tools.check import aggregated, one_group_at_a_time
from support.layer_table import Module
from support.oracles import by_name

FOUR = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]


@pytest.mark.parametrize("name", whole_models())
@pytest.mark.parametrize("rule", FOUR, **by_name)
def test_whole_model(name, rule):
    model, batch = whole_models()[name]()
    report = htv.check(model, batch, rule)
    assert report.parameters == len(list(model.parameters()))
    assert report.ambiguous < 0.02 and report.error < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", whole_models())
def test_mean_is_plain_grad(name, reduction):
    model, batch = whole_models()[name]()
    targets = torch.randint(0, 4, model(batch).shape[:-1])

    def grads():
        model.zero_grad()
        F.cross_entropy(
            model(batch).flatten(0, -2), targets.flatten(), reduction=reduction
        ).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain = grads()
    with htv.attach(model, htv.Mean()):
        found = grads()
    scale = max(g.abs().max() for g in plain.values())
    for parameter, grad in plain.items():
        torch.testing.assert_close(
            found[parameter], grad, rtol=1e-5, atol=1e-6 * scale.item(), msg=parameter
        )


@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.0), htv.WinsorizedMean(0), htv.MedianOfMeans(1)], **by_name
)
def test_identity_anchors_give_plain_grad(rule):
    model, x = mlp().double(), torch.randn(9, 12).double()
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with htv.attach(model, rule):
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_input_gradients_stay_plain():
    model, x = mlp(), torch.randn(5, 12, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    with htv.attach(model, htv.Median()):
        torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], plain)


def test_packed_sequences_in_both_layouts():
    """Rows of one sequence vote together, whether packed as (total, d) or (1, total, d)."""
    model, x = mlp().double(), torch.randn(11, 12).double()
    bounds = torch.tensor([0, 2, 2, 7, 8, 11], dtype=torch.int32)
    weights = torch.randn(11, 4).double()
    rows = [
        slice(a, b) for a, b in zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True) if b > a
    ]
    parameters = dict(model.named_parameters())
    loss = lambda rows: (model(x[rows]) * weights[rows]).sum()
    contributions = one_group_at_a_time(lambda e: loss(rows[e]), parameters, len(rows))
    for rule in (htv.AndMask(0.5), htv.Median()):
        with htv.attach(model, rule) as handle:
            for lead in ((11,), (1, 11)):
                with handle.packed(bounds):
                    value = (model(x.reshape(*lead, 12)).reshape(11, 4) * weights).sum()
                grads = torch.autograd.grad(value, list(parameters.values()))
                for (name, stacked), grad in zip(contributions.items(), grads, strict=True):
                    torch.testing.assert_close(
                        grad, aggregated(stacked, rule), rtol=1e-9, atol=1e-12, msg=name
                    )


def test_two_forwards_before_one_backward_are_one_vote():
    """Group e votes once, with what it contributes through both forwards (two views, say)."""
    model, x, z = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 4).double()
    parameters = dict(model.named_parameters())
    loss = lambda e: (model(x[e]).square() + model(z[e]).sin()).sum()
    contributions = one_group_at_a_time(lambda e: loss(slice(e, e + 1)), parameters, 6)
    with htv.attach(model, htv.Median()):
        (model(x).square().sum() + model(z).sin().sum()).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(
            p.grad, aggregated(contributions[name], htv.Median()), rtol=1e-10, atol=1e-12
        )


def test_two_backwards_each_aggregate_and_accumulate():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with htv.attach(model, htv.Median()):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        once = model.weight.grad.clone()
        loss.backward()
        torch.testing.assert_close(model.weight.grad, 2 * once)
        model(x).square().sum().backward()
        torch.testing.assert_close(model.weight.grad, 3 * once)


def test_a_forward_without_backward_leaves_nothing_behind():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.WinsorizedMean(1)):
        clean = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        model(torch.randn(6, 12))
        model(torch.randn(3, 12))
        after = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(clean, after, strict=True))


def test_a_backward_that_fails_leaves_nothing_behind():
    model, x = mlp(), torch.randn(6, 12)

    def explode(grad):
        raise ZeroDivisionError

    with htv.attach(model, htv.WinsorizedMean(1)):
        clean = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        y = model[:3](x)
        y.register_hook(explode)
        with pytest.raises(ZeroDivisionError):
            model[3:](y).square().sum().backward()
        model.zero_grad()
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), clean, strict=True))


def test_unused_parameters_keep_no_gradient():
    model = Module(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2), c=torch.randn(3))
    with htv.attach(model, htv.Median()):
        model(torch.randn(4, 3)).sum().backward()
    assert model.a.weight.grad is not None
    assert model.b.weight.grad is None and model.c.grad is None


def test_a_use_the_loss_ignores_does_not_count():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x)
            return self.head(h), self.head(torch.tanh(self.body(h)))

    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    parameters = dict(model.named_parameters())
    contributions = one_group_at_a_time(
        lambda e: model(x[e : e + 1])[0].square().sum(), parameters, 6
    )
    with htv.attach(model, htv.Median()):
        model(x)[0].square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(
            p.grad, aggregated(contributions[name], htv.Median()), rtol=1e-10, atol=1e-12
        )


def test_positions_without_a_batch_dim_of_the_batch_s_size():
    """Five positions and five examples: shapes alone cannot tell them apart, so the mode must."""
    model = LanguageModel(context=5)
    assert htv.check(model, torch.randint(0, 29, (5, 5)), htv.Median())
    scores = Module(
        lambda m, x: x @ x.transpose(1, 2) + m.bias(torch.arange(25).reshape(5, 5) % 7).squeeze(-1),
        bias=nn.Embedding(7, 1),
    )
    assert htv.check(scores, torch.randn(5, 5, 3), htv.Median())


def test_position_ids_given_once_for_all_examples():
    model = Module(lambda m, x, ids: x + m.positions(ids), positions=nn.Embedding(6, 4))
    for ids in (torch.arange(3).reshape(1, 3), torch.arange(3).reshape(1, 3).expand(5, 3)):
        x = torch.randn(5, 3, 4)
        weights = torch.randn(5, 3, 4)
        contributions = one_group_at_a_time(
            lambda e: (model(x[e : e + 1], ids[:1])[0] * weights[e]).sum(),
            dict(model.named_parameters()),
            5,
        )
        with htv.attach(model, htv.Median()):
            (grad,) = torch.autograd.grad((model(x, ids) * weights).sum(), list(model.parameters()))
        torch.testing.assert_close(
            grad, aggregated(contributions["positions.weight"], htv.Median())
        )


def test_exclude_and_callable_rules():
    model, x = mlp().double(), torch.randn(7, 12).double()
    names = [n for n, _ in model.named_parameters()]

    def grads():
        return dict(
            zip(
                names,
                torch.autograd.grad(model(x).square().sum(), list(model.parameters())),
                strict=True,
            )
        )

    plain = grads()
    with htv.attach(model, htv.Median()):
        median = grads()
    cases = [
        (dict(rule=htv.Median(), exclude="*.bias"), lambda n: n.endswith("bias")),
        (
            dict(rule=htv.Median(), exclude=("0", "3.weight")),
            lambda n: n.startswith("0.") or n == "3.weight",
        ),
        (
            dict(rule=lambda n, p: htv.Median() if p.dim() > 1 else None),
            lambda n: plain[n].dim() == 1,
        ),
    ]
    for arguments, is_plain in cases:
        with htv.attach(model, **arguments):
            found = grads()
        for name in names:
            torch.testing.assert_close(
                found[name], (plain if is_plain(name) else median)[name], rtol=1e-10, atol=1e-12
            )


def test_frozen_then_unfrozen_parameters():
    model, x = mlp(), torch.randn(7, 12)
    model[0].weight.requires_grad_(False)
    with htv.attach(model, htv.Median()):
        model(x).sum().backward()
        assert model[0].weight.grad is None
        model.zero_grad()
        model[0].weight.requires_grad_(True)
        model(x).sum().backward()
        unfrozen = model[0].weight.grad
    model.zero_grad()
    with htv.attach(model, htv.Median()):
        model(x).sum().backward()
    assert torch.equal(unfrozen, model[0].weight.grad)


def test_forwards_without_gradient_are_untouched():
    model, x = mlp(), torch.randn(0, 12)  # an empty batch would be refused by a served forward
    with htv.attach(model, htv.Median()), torch.no_grad():
        assert model(x).shape == (0, 4)


def test_detach_restores_the_model_exactly():
    model = mlp()
    own_forward = model[1].forward
    model[3].forward = model[3].forward  # an instance attribute of the user's
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    hooks = [p._backward_hooks for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    handle = htv.attach(model, htv.Median())
    assert list(model.state_dict()) == list(state)
    assert type(model) is nn.Sequential and isinstance(model[0], nn.Linear)
    model(torch.randn(4, 12)).sum().backward()
    handle.detach()
    handle.detach()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert vars(module).get("forward") is before[name].get("forward")
    assert model[1].forward == own_forward
    assert [p._backward_hooks for p in model.parameters()] == hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    htv.attach(model, htv.Median()).detach()


def test_any_optimizer_and_clipping_work_unchanged():
    model, x = mlp(), torch.randn(8, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with htv.attach(model, htv.AndMask(0.2)):
        first = None
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            first = loss.item() if first is None else first
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert loss.item() < first / 2


def test_gradients_have_the_type_of_their_parameter_under_autocast():
    model, x = mlp(), torch.randn(8, 12)
    with htv.attach(model, htv.AndMask(0.2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    model, x = mlp().double(), torch.randn(6, 12).double().requires_grad_()
    whole = Module(lambda m, x: checkpoint(m.inner, x, use_reentrant=use_reentrant), inner=model)
    with htv.attach(model, htv.Median()):
        plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with htv.attach(whole, htv.Median()):
        whole(x).square().sum().backward()
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_stats():
    model, x = nn.Linear(3, 2, bias=False).double(), torch.randn(6, 3).double()
    handle = htv.attach(model, htv.AndMask(0.5), stats=True)
    assert handle.stats() == {}
    model(x).square().sum().backward()
    handle.detach()
    parameters = dict(model.named_parameters())
    stacked = one_group_at_a_time(lambda e: model(x[e]).square().sum(), parameters, 6)["weight"]
    stats = handle.stats()["weight"]
    agreement = stacked.sign().sum(0).abs() / 6
    assert stats.mean_agreement == pytest.approx(agreement.mean().item())
    assert stats.kept_fraction == pytest.approx((agreement >= 0.5).double().mean().item())
    assert stats.m_coherence == pytest.approx(
        (stacked.sum(0).square().sum() / stacked.square().sum()).item()
    )
    noise = stacked.flatten(1).var(0).sum()  # without bias, as the square of the mean
    signal = stacked.flatten(1).mean(0).square().sum() - noise / 6
    wanted = (noise / signal).item() if signal > 0 else torch.inf
    assert stats.noise_scale == pytest.approx(wanted)
