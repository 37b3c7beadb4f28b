"""Distributions of torch whose parameters are partly learnt, partly computed from the batch, as
agents use them: in a training step of their own, with ratios, entropies and divergences.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as d
from torch import nn

import htv
from htv.tools.check import aggregated, one_group_at_a_time

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
N = 5


class Agent(nn.Module):
    """Means of three actions and a value; the deviation is a parameter."""

    def __init__(self):
        super().__init__()
        self.mean, self.value = nn.Linear(4, 3), nn.Linear(4, 1)
        self.log_std = nn.Parameter(torch.randn(1, 3) * 0.3)

    def forward(self, x):
        return self.mean(x), self.value(x).squeeze(-1)


def tanh_normal(mean, log_std):
    normal = d.Independent(d.Normal(mean, log_std.exp()), 1)
    return d.TransformedDistribution(normal, [d.transforms.TanhTransform()])


# A distribution, and what makes values of it from any numbers.
MADE = {
    "Normal": (lambda m, s: d.Normal(m, s.exp()), None),
    "Independent": (lambda m, s: d.Independent(d.Normal(m, s.expand_as(m).exp()), 1), None),
    "squashed": (tanh_normal, torch.tanh),
    "Laplace": (lambda m, s: d.Laplace(m, s.exp()), None),
    "Cauchy": (lambda m, s: d.Cauchy(m, s.exp()), None),
    "StudentT": (lambda m, s: d.StudentT(s.exp() + 2, m, 1.0), None),
    "LogNormal": (lambda m, s: d.LogNormal(m, s.exp()), torch.exp),
    "Gamma": (lambda m, s: d.Gamma(F.softplus(m) + 0.1, s.exp()), torch.exp),
    "Beta": (lambda m, s: d.Beta(F.softplus(m) + 1, s.exp() + 1), torch.sigmoid),
    "Dirichlet": (lambda m, s: d.Dirichlet(F.softplus(m) + s.exp()), lambda a: a.softmax(-1)),
    "Categorical": (lambda m, s: d.Categorical(logits=m + s), lambda a: a.argmax(-1)),
    "Bernoulli": (lambda m, s: d.Bernoulli(logits=m + s), lambda a: (a > 0).double()),
    "mixture": (
        lambda m, s: d.MixtureSameFamily(d.Categorical(logits=s[0]), d.Normal(m, 1.0)),
        lambda a: a[:, 0],
    ),
    "low rank": (
        lambda m, s: d.LowRankMultivariateNormal(
            m, s.exp()[..., None].expand(len(m), 3, 1), torch.ones_like(m)
        ),
        None,
    ),
}
NO_ENTROPY = {"squashed", "mixture"}


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", MADE)
def test_a_step_of_an_agent(name, rule):
    make, values = MADE[name]
    model, x, a = Agent().double(), torch.randn(N, 4).double(), torch.randn(N, 3).double()
    old, advantage = torch.randn(2, N).double()
    actions = a.clamp(-2, 2) if values is None else values(a.clamp(-2, 2))

    def loss(x, actions, old, advantage):
        mean, value = model(x)
        policy = make(mean, model.log_std)
        log_prob = policy.log_prob(actions)
        log_prob = log_prob.sum(-1) if log_prob.dim() > 1 else log_prob
        ratio = (0.1 * (log_prob - old)).exp()
        parts = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + value**2
        if name not in NO_ENTROPY:
            entropy = policy.entropy()
            parts = parts + 0.1 * (entropy.sum(-1) if entropy.dim() > 1 else entropy)
        return parts.sum()

    batch = x, actions, old, advantage
    with htv.attach(model, rule) as handle:
        with handle.forward(*batch):
            found = loss(*batch)
        found.backward()
    torch.testing.assert_close(found.detach(), loss(*batch).detach())
    parts = one_group_at_a_time(
        lambda e: loss(*(t[e : e + 1] for t in batch)), dict(model.named_parameters()), N
    )
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[key], rule), msg=key)


def test_an_entropy_of_parameters_alone_is_no_examples():
    """It never meets the batch: refused, until the mean is brought to the same shape first."""
    model, x = Agent().double(), torch.randn(N, 4).double()
    with htv.attach(model, htv.Median()) as handle:
        with handle.forward(x):
            mean, _ = model(x)
            alone = d.Normal(torch.zeros(3).double(), model.log_std[0].exp()).entropy().sum()
            loss = mean.square().sum()
        with pytest.raises(htv.UnsupportedError, match="'log_std' reached the loss"):
            (loss + alone).backward()
        model.zero_grad()
        with handle.forward(x):
            mean, _ = model(x)
            entropy = d.Normal(mean, model.log_std.exp()).entropy().sum(-1)
            loss = mean.square().sum() + entropy.mean()
        loss.backward()
    torch.testing.assert_close(model.log_std.grad, torch.ones_like(model.log_std))
