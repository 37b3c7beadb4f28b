"""The baselines change the gradient, with the right derivative, by the paper's value."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from htv.methods import (
    DomainAdversary,
    GroupDRO,
    environment_means,
    fishr_penalty,
    iga_penalty,
    irm_penalty,
    l1_penalty,
    l2_penalty,
    reverse_gradient,
)

IDS = torch.tensor([0, 2, 1, 0, 1, 2, 2])
E = 3


def each_loss(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")


class Problem:
    def __init__(self):
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
        self.head = nn.Linear(5, 1).double()
        self.parameters = [*self.body.parameters(), *self.head.parameters()]
        self.x, self.y = torch.randn(7, 4).double(), torch.randint(0, 2, (7,)).double()

    def penalty(self, name):
        features = self.body(self.x)
        outputs = self.head(features)
        losses = each_loss(outputs, self.y)
        risks = environment_means(losses, IDS, E)
        torch.manual_seed(1)
        return {
            "l1": lambda: l1_penalty(self.parameters),
            "l2": lambda: l2_penalty(self.parameters),
            "irm": lambda: irm_penalty(outputs, self.y, IDS, E, each_loss),
            "iga": lambda: iga_penalty(risks, self.parameters),
            "fishr": lambda: fishr_penalty(features, outputs, losses, IDS, E),
            "dann": lambda: DomainAdversary(5, E).double()(features, IDS),
            "group dro": lambda: GroupDRO(E, step_size=2.0).double()(risks),
        }[name]()


NAMES = ["l1", "l2", "irm", "iga", "fishr", "dann", "group dro"]


@pytest.mark.parametrize("name", NAMES)
def test_every_penalty_changes_the_gradient(name):
    problem = Problem()
    erm = each_loss(problem.head(problem.body(problem.x)), problem.y).mean()
    plain = torch.autograd.grad(erm, problem.parameters, retain_graph=True)
    both = torch.autograd.grad(erm + problem.penalty(name), problem.parameters)
    first = problem.parameters[0]
    assert (
        not torch.allclose(both[0], plain[0], rtol=1e-4)
        and both[0].isfinite().all()
        and first.shape == both[0].shape
    )


@pytest.mark.parametrize("name", ["l2", "irm", "iga", "fishr"])
def test_its_derivative_is_that_of_its_value(name):
    problem = Problem()

    def value(weight):
        with torch.no_grad():
            problem.body[0].weight.copy_(weight)
        return problem.penalty(name)

    weight = problem.body[0].weight.detach().clone()
    (analytic,) = torch.autograd.grad(value(weight), problem.body[0].weight)
    for index in ((0, 0), (2, 3), (4, 1)):
        step = torch.zeros_like(weight)
        step[index] = 1e-5
        numeric = (value(weight + step) - value(weight - step)) / 2e-5
        assert analytic[index].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-10)


def test_gradcheck():
    x, y = torch.randn(7, 4).double(), torch.randint(0, 2, (7,)).double()

    def penalties(weight):
        outputs = x @ weight
        losses = each_loss(outputs, y)
        return (
            irm_penalty(outputs, y, IDS, E, each_loss),
            fishr_penalty(x, outputs, losses, IDS, E),
            iga_penalty(environment_means(losses, IDS, E), [weight]),
        )

    assert torch.autograd.gradcheck(penalties, torch.randn(4, 1).double().requires_grad_())


def test_values_by_hand():
    problem = Problem()
    outputs = problem.head(problem.body(problem.x))
    slopes, grads = [], []
    for e in range(E):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        risk = each_loss(outputs * scale, problem.y)[IDS == e].mean()
        slopes.append(torch.autograd.grad(risk, scale, retain_graph=True)[0])
        grads.append(
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(risk, problem.parameters, retain_graph=True)
                ]
            )
        )
    torch.testing.assert_close(problem.penalty("irm"), torch.stack(slopes).square().mean())
    torch.testing.assert_close(
        problem.penalty("iga"), torch.stack(grads).var(dim=0, unbiased=False).sum()
    )

    features = problem.body(problem.x).detach()
    head = dict(problem.head.named_parameters())
    loss = lambda p, f, y: each_loss(functional_call(problem.head, p, (f[None],)), y[None])[0]
    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(head, features, problem.y)
    flat = torch.cat([g.flatten(1) for g in per_example.values()], dim=1)
    variances = torch.stack([flat[IDS == e].var(dim=0, unbiased=False) for e in range(E)])
    wanted = (variances - variances.mean(dim=0)).square().sum(dim=1).mean()
    torch.testing.assert_close(problem.penalty("fishr"), wanted)
    assert l1_penalty([torch.tensor([1.0, -2.0]), torch.tensor(3.0)]) == 6
    assert l2_penalty([torch.tensor([1.0, -2.0]), torch.tensor(3.0)]) == 14


def test_identical_environments_cost_nothing():
    x, y = torch.randn(3, 4).double().repeat(2, 1), torch.tensor([0.0, 1, 1]).double().repeat(2)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = torch.randn(4, 1).double().requires_grad_()
    outputs = x @ weight
    losses = each_loss(outputs, y)
    assert iga_penalty(environment_means(losses, ids, 2), [weight]) < 1e-20
    assert fishr_penalty(x, outputs, losses, ids, 2) < 1e-20


def test_the_adversary_descends_while_features_climb():
    features = torch.randn(7, 5, requires_grad=True)
    adversary = DomainAdversary(5, E, strength=2.0)
    adversary(features, IDS).backward()
    plain = features.detach().clone().requires_grad_()
    guess = [p.grad.clone() for p in adversary.guess.parameters()]
    adversary.zero_grad()
    F.cross_entropy(adversary.guess(plain), IDS).backward()
    torch.testing.assert_close(features.grad, -2 * plain.grad)
    for one, p in zip(guess, adversary.guess.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
    x = torch.ones(2, requires_grad=True)
    assert (
        torch.equal(reverse_gradient(x, 3.0), x)
        and reverse_gradient(x, 3.0).sum().backward() is None
    )
    assert torch.equal(x.grad, torch.full((2,), -3.0))


def test_group_dro_turns_to_the_hardest():
    dro = GroupDRO(3, step_size=0.5)
    risks = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    value = dro(risks)
    wanted = [math.exp(0.5 * r) for r in (1, 2, 4)]
    torch.testing.assert_close(dro.weights, torch.tensor(wanted) / sum(wanted))
    value.backward()
    torch.testing.assert_close(risks.grad, dro.weights)
    for _ in range(40):
        dro(risks)
    assert dro.weights[2] > 0.99 and "weights" in dro.state_dict()


def test_means_of_environments():
    values = torch.arange(7.0)
    torch.testing.assert_close(environment_means(values, IDS, E), torch.tensor([1.5, 3.0, 4.0]))
    assert environment_means(values[:, None, None].expand(7, 2, 3), IDS, E).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: environment_means(torch.zeros(6), IDS, E), "values hold 6 examples, ids 7"),
        (lambda: environment_means(torch.zeros(7), IDS, 4), r"environments \[3\] are missing"),
        (lambda: iga_penalty([torch.zeros(())], []), "at least 2 environments"),
        (
            lambda: irm_penalty(torch.zeros(7, 1), IDS, IDS, E, lambda o, t: o.mean()),
            "one value per example",
        ),
        (lambda: iga_penalty([torch.zeros(()), torch.zeros(())], []), "parameters is empty"),
        (lambda: l1_penalty(iter(())), "parameters is empty"),
        (lambda: l2_penalty([]), "parameters is empty"),
        (lambda: GroupDRO(0), "num_environments must be at least 1"),
        (lambda: GroupDRO(2, step_size=0), "step_size must be above 0"),
        (lambda: GroupDRO(2)(torch.zeros(3)), "one per environment"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_environments_may_be_integers_of_any_width(dtype):
    outputs, targets = torch.randn(7, 1, requires_grad=True), torch.randn(7)
    loss = lambda o, t: (o[:, 0] - t).square()
    penalty = lambda ids: irm_penalty(outputs, targets, ids, E, loss)
    assert torch.equal(penalty(IDS.to(dtype)), penalty(IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_environments_take_risks_of_any_dtype(dtype):
    risks = torch.tensor([1.0, 3.0], dtype=dtype, requires_grad=True)
    dro = GroupDRO(2, step_size=1.0)
    dro(risks).backward()
    assert risks.grad.dtype == dtype and dro.weights.dtype == torch.float32
    torch.testing.assert_close(
        risks.grad, torch.tensor([1.0, 3.0]).softmax(0).to(dtype), rtol=1e-2, atol=0
    )


def test_weights_move_in_a_module_that_is_cast_to_half_precision():
    """A step adds a thousandth to a logarithm: bfloat16 would keep equal weights for ever."""
    risks, exact, cast = torch.tensor([1.0, 0.5, 0.25]), GroupDRO(3, 1e-3), GroupDRO(3, 1e-3)
    cast = torch.nn.ModuleList([cast]).to(torch.bfloat16)[0]
    for _ in range(1000):
        exact(risks)
        cast(risks.bfloat16())
    assert exact.weights.max() > 0.4 and cast.weights.dtype == torch.float32
    torch.testing.assert_close(cast.weights, exact.weights)
