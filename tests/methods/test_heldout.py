"""Twins and folds: who is trained on what, whose logits are stored, and that a run goes on where it
stopped.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from htv.methods import Batches, Draw, KFold, Twins, best_draw, class_balanced_loss, cross_mistakes

N, K = 31, 3


def problem():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    x = torch.randn(N, 5, generator=generator) + 2 * F.one_hot(y, 5)
    return x, y


def perceptron():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, K))


def noisy():
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, K)
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.5)


def make(kind, factory=perceptron, optimizer=adam, **kwargs):
    return kind(
        factory, problem()[1], optimizer, **({"folds": 4} if kind is KFold else {}), **kwargs
    )


def batches(epochs=4, sampler=None):
    return Batches(TensorDataset(*problem()), epochs, 8, sampler, seed=3)


def test_the_loss_is_a_sum_of_class_means():
    torch.manual_seed(0)
    logits, targets = (
        torch.randn(9, 4, dtype=torch.float64, requires_grad=True),
        torch.tensor([0] * 6 + [2] * 3),
    )
    each = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(class_balanced_loss(logits, targets), each[:6].mean() + each[6:].mean())
    assert torch.autograd.gradcheck(lambda l: class_balanced_loss(l, targets), logits)


def test_a_step_is_that_of_the_formulas():
    """Both nets see the batch, each is trained on its half; then confident mistakes of the other
    become labels.
    """
    twins, (x, y) = make(Twins, optimizer=sgd, seed=2), problem()
    state = twins.state_dict()
    nets = [perceptron() for _ in range(2)]
    for net, saved in zip(nets, state["nets"], strict=True):
        net.load_state_dict(saved)
    optimizer, labels = sgd([p for net in nets for p in net.parameters()]), y.clone()
    a = (state["held_out_by"] == 1)[:, None].float()  # B holds it out: A is trained on it
    generator = torch.Generator()
    generator.set_state(state["generator"])
    for _ in range(6):
        torch.randint(2**62, (), generator=generator)  # the seed of the networks' dropout
        both = [net(x) for net in nets]
        held_in, held_out = a * both[0] + (1 - a) * both[1], (1 - a) * both[0] + a * both[1]
        loss = sum(
            F.cross_entropy(held_in, labels, reduction="none")[labels == c].mean()
            for c in labels.unique()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        p, said = held_out.softmax(1).max(1)
        flips = torch.rand(N, generator=generator) < (p - 1 / K) * K / (K - 1)
        labels = torch.where(flips, said, labels)
        assert torch.allclose(twins.step(x, torch.arange(N), y), loss)
        assert torch.equal(twins.labels, labels)
    assert twins.flip_rate == (labels != y).double().mean() > 0
    held_out = ((1 - a) * nets[0](x) + a * nets[1](x)).detach()
    found = twins.draw(batches())
    assert torch.allclose(found.held_out, held_out) and found.flip_rate == twins.flip_rate
    assert torch.equal(found.wrong, torch.stack([net(x).argmax(1) != y for net in nets], dim=1))


def test_only_the_half_held_in_is_trained_on():
    """An example reaches one of the twins, and all of the folds' networks but its own."""
    x, y = problem()
    changed = x.clone()
    changed[0] += 1
    for kind in (Twins, KFold):
        for stacked in (False, True):
            one, other = (make(kind, optimizer=sgd, stacked=stacked) for _ in range(2))
            one.step(x, torch.arange(N), y)
            other.step(changed, torch.arange(N), y)
            same = [
                torch.equal(p, q) for p, q in zip(one.predict(x), other.predict(x), strict=True)
            ]
            assert same.count(True) == 1 and same.index(True) == one.held_out_by[0]


WEIGHTS = torch.linspace(0.1, 1, N)
SAMPLERS = {
    "shuffled": None,
    "weighted": lambda generator: torch.multinomial(WEIGHTS, N, generator=generator),
    "with replacement": lambda generator: torch.randint(0, N, (60,), generator=generator),
}


@pytest.mark.parametrize("kind", [Twins, KFold])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_cached_row_belongs_to_its_example(kind, sampler):
    run, x = make(kind), problem()[0]
    run.fit(batches(sampler=sampler))
    table, by = run.held_out_table(batches(sampler=sampler)), run.held_out_by
    for i in range(N):
        with torch.no_grad():
            assert torch.allclose(table[i], run.nets[by[i]].eval()(x[i : i + 1])[0], atol=1e-6)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("kind", [Twins, KFold])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("factory, stacked", [(noisy, False), (perceptron, True)])
def test_going_on_equals_not_stopping_bit_for_bit(kind, sampler, factory, stacked, tmp_path):
    course = batches(sampler=sampler)
    falling = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    options = {"stacked": stacked, "schedule": falling if factory is noisy else None}
    whole = make(kind, factory, **options)
    assert whole.fit(course)
    for stop in (0, 3, 5):
        first = make(kind, factory, **options)
        assert not first.fit(course, max_steps=stop)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        torch.rand(7)  # what else draws from torch's generator does not matter
        second = make(kind, factory, **options)
        second.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert second.fit(course) and second.steps == whole.steps
        assert same(second.state_dict(), whole.state_dict())
    assert torch.equal(second.held_out_table(course), whole.held_out_table(course))


def test_torchs_generator_is_left_alone_and_seeds_matter():
    before = torch.get_rng_state()
    one, again, other = (make(Twins, noisy, seed=seed) for seed in (1, 1, 2))
    for run in (one, again, other):
        run.fit(batches())
    assert torch.equal(before, torch.get_rng_state())
    assert same(one.state_dict(), again.state_dict()) and not torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("kind", [Twins, KFold])
def test_one_forward_for_all_is_equal(kind):
    apart, stacked = (make(kind, optimizer=sgd, stacked=on) for on in (False, True))
    for run in (apart, stacked):
        run.fit(batches())
    assert torch.allclose(
        apart.held_out_table(batches()), stacked.held_out_table(batches()), atol=1e-4
    )
    if kind is Twins:
        assert torch.equal(apart.labels, stacked.labels) and stacked.flip_rate > 0
    x = problem()[0]
    for net, logits in zip(stacked.nets, stacked.predict(x), strict=True):
        with torch.no_grad():
            assert torch.allclose(net(x), logits, atol=1e-6)


def test_what_cannot_be_stacked_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.b = nn.Linear(5, 5)
            self.b.weight = self.a.weight

    for factory, message in (
        (noisy, "the buffer '1.running_mean'"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1)), "the dropout '1'"),
        (Tied, "shared between modules"),
    ):
        with pytest.raises(ValueError, match=message):
            make(Twins, factory, stacked=True)


def test_a_repeated_example_is_overwritten_once():
    twins, (x, y) = make(Twins), problem()
    ids = torch.tensor([4, 4, 4, 7])
    for _ in range(30):
        twins.step(x[ids], ids, y[ids])
    untouched = torch.ones(N, dtype=torch.bool)
    untouched[ids] = False
    assert torch.equal(twins.labels[untouched], y[untouched])


def test_groups_of_mistakes():
    wrong = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool()
    found = {way: cross_mistakes(wrong, way).tolist() for way in ("or", "and", "xor")}
    assert found == {
        "or": [False, True, True, True],
        "and": [False, False, False, True],
        "xor": [False, True, True, False],
    }
    draw = Draw(torch.tensor([0, 0, 1, 1]), torch.zeros(4, 2), wrong, 0.25)
    assert draw.groups().tolist() == [0, 1, 3, 3] and draw.degenerate() == [1]
    assert draw.groups("and").tolist() == [0, 0, 2, 3] and draw.degenerate("and") == [0]
    for bad in (wrong[:, :1], wrong.float()):
        with pytest.raises(ValueError, match=r"wrong must be \(N, 2\)"):
            cross_mistakes(bad)
    with pytest.raises(ValueError, match="combine must be"):
        cross_mistakes(wrong, "nor")


def test_the_best_draw_flips_most_and_is_not_degenerate():
    targets = torch.tensor([0, 0, 1, 1])
    mixed, single = (
        torch.tensor([[0, 1], [0, 0], [0, 0], [1, 1]]).bool(),
        torch.zeros(4, 2, dtype=torch.bool),
    )
    draws = [
        Draw(targets, torch.zeros(4, 2), wrong, rate)
        for wrong, rate in ((mixed, 0.1), (mixed, 0.2), (single, 1))
    ]
    assert best_draw(draws) is draws[1]
    with pytest.raises(ValueError, match=r"every draw is degenerate.*draw 0: classes \[0, 1\]"):
        best_draw(draws[2:])
    with pytest.raises(ValueError, match="draws is empty"):
        best_draw([])


def test_minorities_are_found():
    """A shortcut that holds for nine in ten: XRM overwrites the labels of the others."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (300,), generator=generator)
    minority = torch.arange(300) < 30
    sign = 2.0 * y - 1
    x = torch.cat(
        [(5 * torch.where(minority, -sign, sign))[:, None], 0.3 * torch.randn(300, 200)], dim=1
    )
    twins = Twins(
        lambda: nn.Linear(201, 2, bias=False),
        y,
        lambda p: torch.optim.SGD(p, lr=0.02),
        stacked=True,
    )
    for _ in range(200):
        twins.step(x, torch.arange(300), y)
    assert torch.equal(twins.labels != y, minority)
    assert twins.labels.max() == 1 and math.isclose(twins.flip_rate, 0.1)


def test_mistakes_are_named():
    x, y = problem()
    for targets, message in (
        (y.float(), r"\(N,\) int64"),
        (y - 1, r"from -1 to 1"),
        (torch.zeros(4, dtype=torch.int64), "at least 2 classes"),
        (torch.tensor([0, 2, 2]), r"classes \[1\] have no example to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            Twins(perceptron, targets, adam)
    with pytest.raises(ValueError, match=r"classes \[3\] have no example"):
        Twins(perceptron, y, adam, num_classes=4)
    twins = Twins(lambda: nn.Linear(5, 4), y, adam)
    with pytest.raises(ValueError, match=r"returned \(31, 4\) for 31 examples of 3 classes"):
        twins.step(x, torch.arange(N), y)
    with pytest.raises(ValueError, match=r"returned \(\d+, 4\) for"):
        KFold(lambda: nn.Linear(5, 4), y, adam).step(x, torch.arange(N), y)
    twins = make(Twins)
    with pytest.raises(ValueError, match=r"label of id 1 in the batch is not targets\[1\]"):
        twins.step(x[:2], torch.tensor([0, 1]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"y must be \(2,\), a label for each id, got \(2, 1\)"):
        twins.step(x[:2], torch.tensor([0, 1]), y[:2, None])
    diverged = make(Twins)
    nn.init.constant_(diverged.nets[0][0].weight, math.nan)
    for look in (diverged.draw, diverged.held_out_table):
        with pytest.raises(ValueError, match="not finite: training diverged"):
            look(batches())
    with pytest.raises(ValueError, match="names 2 examples, but the batch holds 3"):
        twins.step(x[:3], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="targets name 31 examples, the data set holds 5"):
        twins.fit(Batches(TensorDataset(x[:5], y[:5]), 1, 2))
    with pytest.raises(ValueError, match="folds must be from 2 to"):
        KFold(perceptron, y, adam, folds=1)
    shared = perceptron()
    for factory in (lambda: shared, lambda: nn.Sequential(shared, nn.Linear(K, K))):
        for kwargs in ({}, {"stacked": True}):
            with pytest.raises(
                ValueError, match=r"new network at every call: .* the parameter '(0\.)?0\.weight'"
            ):
                Twins(factory, y, adam, **kwargs)
    shared.requires_grad_(False)
    assert (
        Twins(lambda: nn.Sequential(shared, nn.Linear(K, K)), y, adam).step(x, torch.arange(N), y)
        > 0
    )
    for kind in (Twins, KFold):
        with pytest.raises(ValueError, match="ids is empty"):
            make(kind).step(x[:0], torch.arange(0), y[:0])
    with pytest.raises(
        ValueError, match=r"targets must be \(4,\), a class for each example, got \(1,\)"
    ):
        twins.wrong(x[:4], y[:1])
    two, three = (KFold(perceptron, y, adam, folds=folds) for folds in (2, 3))
    for run, other in ((two, three), (two, twins), (twins, two)):
        with pytest.raises(
            ValueError,
            match=r"the state is not of a \w+ of 2 networks: it has \d networks and holds",
        ):
            run.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state is of stacked=False, this run of stacked=True"):
        make(Twins, stacked=True).load_state_dict(twins.state_dict())
    with pytest.raises(ValueError, match="one has a schedule"):
        falling = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)
        make(Twins, schedule=falling).load_state_dict(twins.state_dict())
    with pytest.raises(ValueError, match="state is of 31 examples"):
        Twins(perceptron, y[:20], adam).load_state_dict(twins.state_dict())
    repeated = TensorDataset(x, y, torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match="30 of 31 examples have no row"):
        make(Twins).held_out_table(Batches(repeated, 1, 8))
