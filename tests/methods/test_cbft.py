"""Connectivity-based fine-tuning: its losses, what a step does to theta, and rules on top of it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import htv
from htv.methods.cbft import CBFT, barrier_loss, head_inputs, head_of, invariance_loss

f64 = torch.float64


def random(*shape, seed=0, dtype=f64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", [0.1, 1.0, 3.0])
def test_barrier_loss_and_its_gradient(barrier):
    logits, targets = random(7, 4).requires_grad_(), torch.arange(7) % 4
    mean = F.cross_entropy(logits, targets)
    loss = barrier_loss(logits, targets, barrier)
    assert loss.item() == pytest.approx(abs(barrier - mean.item()))
    (grad,) = torch.autograd.grad(loss, logits)
    (plain,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(grad, (1 if mean > barrier else -1) * plain)
    assert torch.autograd.gradcheck(lambda x: barrier_loss(x, targets, barrier), logits)


def by_loops(features, labels, others, other_labels, num_classes):
    total = 0.0
    for k in range(num_classes):
        mine, theirs = features[labels == k], others[other_labels == k]
        if len(mine) and len(theirs) and mine.mean(0).any() and theirs.mean(0).any():
            unit = lambda rows: rows.mean(0) / rows.mean(0).norm()
            total = total + (unit(mine) - unit(theirs)).square().sum()
    return total / num_classes


def test_invariance_loss_is_that_of_loops_and_skips_missing_classes():
    labels, others = torch.tensor([0, 0, 1, 3, 3, 3, 4]), torch.tensor([3, 1, 1, 0, 2])
    a, b = random(7, 5).requires_grad_(), random(5, 5, seed=1).requires_grad_()
    found = invariance_loss(a, labels, b, others, 6)
    wanted = by_loops(a, labels, b, others, 6)
    torch.testing.assert_close(found, wanted)
    grads = torch.autograd.grad(found, (a, b))
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, (a, b)))
    assert not grads[0][6].any() and not grads[1][4].any() and grads[0][0].any()
    assert torch.autograd.gradcheck(lambda a, b: invariance_loss(a, labels, b, others, 6), (a, b))


def test_invariance_loss_of_no_common_class_is_zero():
    a, b = random(3, 5).requires_grad_(), random(2, 5, seed=1).requires_grad_()
    loss = invariance_loss(a, torch.tensor([0, 0, 1]), b, torch.tensor([2, 3]), 4)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (a, b)))
    empty = invariance_loss(a[:0], torch.tensor([], dtype=torch.long), b, torch.tensor([2, 3]), 4)
    assert empty == 0


def test_features_that_are_all_zero_have_no_direction_and_no_gradient():
    a, b = random(4, 3), random(4, 3, seed=1)
    a[:2] = 0
    a.requires_grad_(), b.requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    loss = invariance_loss(a, labels, b, labels, 2)
    torch.testing.assert_close(loss, by_loops(a, labels, b, labels, 2))
    grads = torch.autograd.grad(loss, (a, b))
    assert (
        all(g.isfinite().all() for g in grads) and not grads[0][:2].any() and not grads[1][:2].any()
    )


def test_invariance_loss_of_halves_is_accumulated_wide_and_nan_shows():
    labels = torch.arange(3000) % 2
    a, b = ((1 + random(3000, 4, seed=s, dtype=torch.float32)).to(torch.bfloat16) for s in (0, 1))
    found, wide = (
        invariance_loss(a, labels, b, labels, 2),
        invariance_loss(a.double(), labels, b.double(), labels, 2),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(invariance_loss(a, labels, b, labels, 2), found, rtol=0, atol=0)
    a[0, 0] = float("nan")
    assert invariance_loss(a, labels, b, labels, 2).isnan()


def test_bad_input_of_the_invariance_loss_is_named():
    x, y = random(3, 5), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"features must be \(N, D\) and \(M, D\)"):
        invariance_loss(x, y, x[:, :4], y, 2)
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        invariance_loss(x, y[:2], x, y, 2)
    for labels, message in ((y, r"\[0, 1\), got some from 0 to 1"), (-y, r"got some from -1 to 0")):
        with pytest.raises(ValueError, match=message):
            invariance_loss(x, labels, x, labels, 1)


# -- features --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh()
        )
        self.classify = nn.Linear(8, 4)

    def forward(self, x):
        return self.classify(self.body(x))


def made(norm=False, dtype=f64, seed=0):
    torch.manual_seed(seed)
    return Net(norm).to(dtype)


def batch(seed, count=10, dtype=f64):
    return random(count, 6, seed=seed, dtype=dtype), torch.arange(count) % 4


def test_penultimate_features_of_any_module():
    net, (x, _) = made(), batch(1)
    assert head_of(net) is net.classify and head_of(net, "body.2") is net.body[2]
    with head_inputs(head_of(net)) as seen:
        net(x)
    (features,) = seen
    torch.testing.assert_close(features, net.body(x))
    assert features.requires_grad and not net.classify._forward_pre_hooks
    with pytest.raises(
        ValueError, match="head='nope' is no module of the model, which has body, body.0"
    ):
        head_of(net, "nope")
    with pytest.raises(ValueError, match="no Linear"):
        head_of(nn.Conv2d(1, 1, 1))


# -- a step ----------------------------------------------------------------------------------------


def fixed(t):
    return lambda count, generator: torch.full((count,), t, dtype=f64)


def moved_away(net):
    """The model of theta_C, and then of theta."""
    anchor = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * random(*p.shape, seed=p.numel()))
    return anchor


def cbft_of(net, lr=0.1, **options):
    """One that was made at theta_C, with theta elsewhere now."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    tuner = CBFT(net, optimizer, 4, **options)
    return tuner, moved_away(net)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.7, 1.0])
def test_the_barrier_reaches_theta_by_the_chain_rule(t):
    net = made()
    tuner, anchor = cbft_of(net, sampler=fixed(t), terms=["barrier"])
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    start = {name: p.detach() for name, p in anchor.named_parameters()}
    clean, (x, y) = batch(1), batch(2)
    mixed = {name: t * start[name] + (1 - t) * theta[name] for name in theta}
    loss = (1.0 - F.cross_entropy(functional_call(net, mixed, (x,)), y)).abs()
    grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    found = tuner.step(clean, (x, y))
    torch.testing.assert_close(found, {"barrier": loss.detach()})
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), theta[name].detach() - 0.1 * grads[name])


def written_out(net, anchor, clean, cue, t, lr, terms, invariant=True, alternate=True):
    """theta after a step, by autograd of the formulas."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    start = {name: p.detach() for name, p in anchor.named_parameters()}

    def barrier(theta):
        mixed = {name: t * start[name] + (1 - t) * theta[name] for name in theta}
        return (1.0 - F.cross_entropy(functional_call(net, mixed, (cue[0],)), cue[1])).abs()

    def here(theta):
        features = lambda x: torch.tanh(F.linear(x, theta["body.0.weight"], theta["body.0.bias"]))
        logits = F.linear(features(clean[0]), theta["classify.weight"], theta["classify.bias"])
        total = F.cross_entropy(logits, clean[1]) if "cross_entropy" in terms else 0
        if "invariance" in terms and invariant:
            total = total + by_loops(features(clean[0]), clean[1], features(cue[0]), cue[1], 4)
        return total

    def step(loss, theta):
        grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        pairs = zip(theta.items(), grads, strict=True)
        return {
            n: (p - lr * (0 if g is None else g)).detach().requires_grad_() for (n, p), g in pairs
        }

    if not alternate:
        return step(barrier(theta) + here(theta), theta)
    between = step(barrier(theta), theta)
    return step(here(between), between)


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_step_is_that_of_the_formulas(alternate, warm_up):
    net = made()
    tuner, anchor = cbft_of(net, sampler=fixed(0.4), alternate=alternate, warm_up=warm_up)
    clean, cue = batch(1, 9), batch(2, 14)
    wanted = written_out(net, anchor, clean, cue, 0.4, 0.1, tuner.terms, warm_up == 0, alternate)
    losses = tuner.step(clean, cue)
    assert list(losses) == ["barrier", "cross_entropy", *(["invariance"] if warm_up == 0 else [])]
    torch.testing.assert_close({n: p.detach() for n, p in net.named_parameters()},
                               {n: p.detach() for n, p in wanted.items()})  # fmt: skip
    assert ("invariance" in tuner.step(clean, cue)) and tuner.steps == 2


@pytest.mark.parametrize(
    "terms",
    [["cross_entropy"], ["invariance"], ["barrier", "invariance"], ["cross_entropy", "barrier"]],
)
def test_terms_left_out_are_not_descended(terms):
    net = made()
    tuner, _ = cbft_of(net, terms=terms)
    before = copy.deepcopy(net.state_dict())
    losses = tuner.step(batch(1), batch(2))
    assert set(losses) == set(terms)
    assert not torch.equal(net.state_dict()["body.0.weight"], before["body.0.weight"])
    touched = not torch.equal(net.state_dict()["classify.weight"], before["classify.weight"])
    assert touched == (terms != ["invariance"])


def test_theta_is_restored_bit_for_bit_even_by_errors():
    net = made(norm=True, dtype=torch.float32)
    tuner, anchor = cbft_of(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="stop"), tuner._at(0.3):
        for name, p in net.named_parameters():
            start = dict(anchor.named_parameters())[name]
            torch.testing.assert_close(p, 0.3 * start + 0.7 * before[name])
        net(batch(1, dtype=torch.float32)[0])
        assert net.body[1].num_batches_tracked == 1
        raise RuntimeError("stop")
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_running_statistics_are_those_of_theta_alone():
    net = made(norm=True)
    tuner, _ = cbft_of(net, lr=0.0, terms=["barrier", "cross_entropy"])
    clean = batch(1)
    other = copy.deepcopy(net)
    other(clean[0])
    tuner.step(clean, batch(2, 30))
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_it_composes_with_a_rule():
    """Under AndMask each example votes: on the barrier's loss at theta_t, and on the sum of the
    others at theta.
    """
    net, rule = made(), htv.AndMask(0.5)
    tuner, anchor = cbft_of(net, sampler=fixed(0.4))
    clean, (x, y) = batch(1, 9), batch(2, 14)
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    start = dict(anchor.named_parameters())

    mixed = {
        name: (0.4 * start[name] + 0.6 * theta[name]).detach().requires_grad_() for name in theta
    }
    sign = -1 if F.cross_entropy(functional_call(net, mixed, (x,)), y) < 1 else 1
    grads = {name: [] for name in mixed}
    for i in range(14):  # a vote for each example
        part = (
            0.6
            * sign
            * F.cross_entropy(functional_call(net, mixed, (x[i : i + 1],)), y[i : i + 1])
            / 14
        )
        for name, g in zip(mixed, torch.autograd.grad(part, list(mixed.values())), strict=True):
            grads[name].append(g)
    wanted = {
        name: theta[name] - 0.1 * 14 * htv.and_mask(torch.stack(g), 0.5)
        for name, g in grads.items()
    }

    between = {}
    tuner.optimizer.register_step_post_hook(
        lambda *_: between.update(
            {n: p.detach().clone() for n, p in net.named_parameters() if n not in between}
        )
    )
    plain = copy.deepcopy(net)
    with htv.attach(net, rule):
        losses = tuner.step(clean, (x, y))
    torch.testing.assert_close(between, wanted)
    assert set(losses) == {"barrier", "cross_entropy", "invariance"}
    unmasked = CBFT(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 4, sampler=fixed(0.4))
    unmasked.load_state_dict({**tuner.state_dict(), "steps": 0})
    unmasked.step(clean, (x, y))
    assert not torch.equal(net.body[0].weight, plain.body[0].weight)


def test_a_rule_that_is_the_mean_changes_nothing():
    nets = made(), made()
    for net in nets:
        tuner, _ = cbft_of(net)
        handle = htv.attach(net, htv.Mean()) if net is nets[0] else None
        for step in range(3):
            tuner.step(batch(step), batch(10 + step, 12))
        if handle:
            handle.detach()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict())


def test_it_resumes_where_it_was():
    def run(interrupted):
        net = made()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        tuner = CBFT(net, optimizer, 4, warm_up=2, seed=3)
        for step in range(6):
            tuner.step(batch(step), batch(10 + step))
            if interrupted and step == 2:
                states = copy.deepcopy(
                    (net.state_dict(), optimizer.state_dict(), tuner.state_dict())
                )
                net = made(seed=5)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
                tuner = CBFT(net, optimizer, 4, warm_up=2)
                for resumed, state in zip((net, optimizer, tuner), states, strict=True):
                    resumed.load_state_dict(state)
        return net.state_dict()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_bad_arguments_are_named():
    net = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for options, message in [
        ({"terms": ["barier"]}, "terms must be some of barrier, cross_entropy, invariance"),
        ({"terms": []}, "terms must be some of"),
        ({"warm_up": -1}, "warm_up must be a number of steps"),
        ({"warm_up": 1.5}, "warm_up must be a number of steps"),
        ({"barrier": 0}, "barrier must be a loss above 0"),
        ({"barrier": math.inf}, "barrier must be a loss above 0"),
        ({"head": "nope"}, "no module"),
        ({"num_classes": 0}, "num_classes must be a number of classes >= 1, got 0"),
        ({"num_classes": 4.0}, "num_classes must be a number"),
        ({"model": made()}, "optimizer has no parameter of the model that is trained"),
        ({"model": made().requires_grad_(False)}, "every parameter of model is frozen"),
    ]:
        with pytest.raises(ValueError, match=message):
            CBFT(**{"model": net, "optimizer": optimizer, "num_classes": 4} | options)
    state = CBFT(net, optimizer, 4).state_dict()
    other = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"'body.0.weight' has shape \(8, 6\) there, none here"):
        CBFT(other, torch.optim.SGD(other.parameters(), lr=0.1), 4).load_state_dict(state)
    with pytest.raises(ValueError, match="not one of CBFT's"):
        CBFT(net, optimizer, 4).load_state_dict(net.state_dict())


@pytest.mark.parametrize("terms", [("barrier",), ("cross_entropy",), ("invariance",)])
@pytest.mark.parametrize("num_classes", [3, 5])
def test_batches_that_do_not_fit_change_nothing(terms, num_classes):
    net = made()
    before = copy.deepcopy(net.state_dict())
    x, y = batch(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"batch_size|one per row of features, got \(9,\)"):
        CBFT(net, optimizer, 4, terms=terms).step((x, y[:-1]), (x, y[:-1]))
    tuner = CBFT(net, optimizer, num_classes, terms=terms)
    with pytest.raises(
        ValueError, match=rf"shape \(\d+, {num_classes}\), for num_classes={num_classes}; got"
    ):
        tuner.step((x, y), (x, y))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_a_head_may_be_called_by_name():
    class Named(Net):
        def forward(self, x):
            return self.classify(input=self.body(x))

    nets = made(), Named().double()
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        cbft_of(net)[0].step(batch(1), batch(2))
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_a_head_that_sees_examples_twice_is_refused():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(-x)

    torch.manual_seed(0)
    net = Twice().double()
    tuner = CBFT(net, torch.optim.SGD(net.parameters(), lr=0.1), 4)
    with pytest.raises(RuntimeError, match=r"called 2 times, with \[20, 20\] rows for 20 examples"):
        tuner.step(batch(1), batch(2))
