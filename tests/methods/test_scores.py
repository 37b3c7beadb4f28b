"""Memorisation and influence by their definitions; gradient norms against a loop over examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from htv.methods import SubsetScores, squared_gradient_norms, train_on_subsets
from htv.methods.ensemble import Ensemble


def counted(seed=0, models=12, examples=5, tests=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(models, width, generator=generator) < 0.6
        for width in (examples, examples, tests)
    )


def test_scores_are_differences_of_shares():
    members, correct, tested = counted()
    scores = SubsetScores(5, 4)
    scores.add(*(part[:7] for part in (members, correct, tested)))
    scores.add(*(part[7:] for part in (members, correct, tested)))
    assert scores.models == 12
    for i in range(5):
        inside, outside = members[:, i], ~members[:, i]
        share = lambda hits, of: hits[of].double().mean()
        assert math.isclose(
            scores.memorisation()[i], share(correct[:, i], inside) - share(correct[:, i], outside)
        )
        for t in range(4):
            expected = share(tested[:, t], inside) - share(tested[:, t], outside)
            assert math.isclose(scores.influence()[t, i], expected, abs_tol=1e-12)
    again = SubsetScores(5, 4)
    again.load_state_dict(scores.state_dict())
    scores.add(members, ~correct, ~tested)
    assert again.models == 12 and not torch.equal(again.influence(), scores.influence())
    with pytest.raises(ValueError, match="other sizes"):
        SubsetScores(6, 4).load_state_dict(scores.state_dict())


def test_what_was_never_left_out_is_not_known():
    scores = SubsetScores(3)
    scores.add(
        torch.tensor([[True, False, True], [True, False, False]]),
        torch.ones(2, 3, dtype=torch.bool),
    )
    assert scores.memorisation().isnan().tolist() == [
        True,
        True,
        False,
    ] and scores.influence().shape == (0, 3)
    assert scores.memorisation()[2] == 0


def problem():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 6, generator=generator) + 3 * F.one_hot(y, 6)
    y = y.clone()
    y[:4] = (y[:4] + 1) % 3  # wrong labels can only be learnt by heart
    return x, y


def perceptron():
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def trained(parts=(24,), **kwargs):
    (x, y), scores = problem(), SubsetScores(60, 10)
    for models in parts:
        train_on_subsets(
            scores,
            perceptron,
            (x, y),
            (x[:10] + 0.1, y[:10]),
            sgd,
            models=models,
            epochs=30,
            batch_size=16,
            **kwargs,
        )
    return scores


def test_wrong_labels_are_learnt_by_heart():
    before = torch.get_rng_state()
    scores = trained()
    assert torch.equal(before, torch.get_rng_state())
    found = scores.memorisation()
    assert found[:4].mean() > 0.5 and found[4:].mean() < 0.2
    assert scores.influence().diagonal()[:4].mean() > 0.4  # of an example on its neighbour
    assert torch.allclose(scores._in.sum(), torch.tensor(24 * 42.0).double())


def test_side_by_side_equals_one_by_one_however_many_at_a_time():
    one = trained()
    for other in (trained(stacked=False), trained((10, 1, 13))):
        assert torch.equal(one._in, other._in)
        assert (
            one.memorisation() - other.memorisation()
        ).abs().mean() < 0.01  # rounding may turn a prediction
    assert not torch.equal(one._in, trained(seed=1)._in)


def test_a_network_learns_from_its_own_batch_alone():
    nets = [perceptron() for _ in range(3)]
    x, y = problem()
    batch = torch.stack([torch.arange(8), torch.arange(8, 16), torch.arange(30, 38)])
    ensemble = Ensemble(nets, stacked=True)
    assert torch.allclose(
        ensemble(x[batch], True, own=True),
        torch.stack([n(x[i]) for n, i in zip(nets, batch, strict=True)]),
        atol=1e-6,
    )
    loss = (
        F.cross_entropy(
            ensemble(x[batch], True, own=True).flatten(0, 1), y[batch].flatten(), reduction="sum"
        )
        / 8
    )
    grads = torch.autograd.grad(loss, ensemble.parameters())
    for m, net in enumerate(nets):
        own = torch.autograd.grad(
            F.cross_entropy(net(x[batch[m]]), y[batch[m]]), list(net.parameters())
        )
        assert all(
            torch.allclose(grad[m], part, atol=1e-6) for grad, part in zip(grads, own, strict=True)
        )


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 5), nn.Linear(5, 4)
        self.conv, self.norm, self.head = (
            nn.Conv1d(4, 3, 3, padding=1),
            nn.LayerNorm(3),
            nn.Linear(3, 2),
        )

    def forward(self, ids):
        hidden = self.inner(self.embed(ids)).relu()
        return self.head(self.norm(self.conv(hidden.mT).mT).mean(dim=1))


@pytest.mark.parametrize("exclude", [(), ("head",), ("*.bias", "embed")])
def test_gradient_norms_are_those_of_a_loop(exclude):
    torch.manual_seed(0)
    model, ids, y = Sequence().double(), torch.randint(0, 7, (9, 6)), torch.randint(0, 2, (9,))
    each = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    found = squared_gradient_norms(model, zip(ids.split(4), y.split(4), strict=True), each, exclude)
    counts = lambda name: (
        not (
            exclude
            and (name.startswith(exclude[-1]) or ("*.bias" in exclude and name.endswith(".bias")))
        )
    )
    parameters = [p for name, p in model.named_parameters() if counts(name)]
    for i in range(9):
        grads = torch.autograd.grad(each((ids[i : i + 1], y[i : i + 1])).sum(), parameters)
        assert math.isclose(found[i], sum(grad.square().sum() for grad in grads), rel_tol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_mistakes_are_named():
    x, y = problem()
    members, correct, tested = counted()
    for arguments, message in (
        ((members, correct), r"test_correct must be boolean \(12, 4\)"),
        ((members.int(), correct, tested), "members must be boolean"),
        ((members, correct[:3], tested), r"correct must be boolean \(12, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SubsetScores(5, 4).add(*arguments)
    with pytest.raises(ValueError, match="examples must be at least 1"):
        SubsetScores(0)
    go = lambda **kwargs: train_on_subsets(
        SubsetScores(60),
        perceptron,
        (x, y),
        None,
        sgd,
        **{"models": 2, "epochs": 1, "batch_size": 8, **kwargs},
    )
    for kwargs, message in (
        ({"share": 1.0}, "inside and outside"),
        ({"models": 0}, "at least 1, got 0, 1, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            go(**kwargs)
    untrained = lambda: pytest.fail("a network was made before the examples were looked at")
    for scores, train, test, message in (
        (
            SubsetScores(50),
            (x, y),
            None,
            "train must hold the 50 examples .* got 60 inputs and 60 targets",
        ),
        (SubsetScores(60), (x, y[:50]), None, "train must hold .* got 60 inputs and 50 targets"),
        (SubsetScores(60, 4), (x, y), None, "test must hold the 4 examples .* got 0 inputs"),
        (SubsetScores(60), (x, y), (x, y), "test must hold the 0 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            train_on_subsets(scores, untrained, train, test, sgd, models=2, epochs=1, batch_size=8)
    shared = perceptron()
    with pytest.raises(ValueError, match="new network at every call"):
        train_on_subsets(
            SubsetScores(60), lambda: shared, (x, y), None, sgd, models=2, epochs=1, batch_size=8
        )
    model = perceptron()
    for batches, losses, message in (
        ([], lambda b: F.cross_entropy(model(x), y, reduction="none"), "batches is empty"),
        ([0], lambda b: F.cross_entropy(model(x), y), "one loss per example, shape"),
        (
            [0],
            lambda b: F.cross_entropy(model(x), y, reduction="none")[:5],
            "returned 5 losses, but parameter",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            squared_gradient_norms(model, batches, losses)
    with pytest.raises(ValueError, match="no parameter to measure"):
        squared_gradient_norms(model, [0], lambda b: None, exclude="*")
