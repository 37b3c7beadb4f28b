"""Easy and hard examples, and subsets that share none."""

import pytest
import torch
from torch import nn

from htv.methods import disjoint_subsets, easy_examples


def mixture(count: int = 600):
    """Two thirds of the examples are told apart by their first feature; the labels of the rest are
    drawn by lot.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator)
    x = torch.randn(count, 5, generator=generator)
    separable = torch.arange(count) < 2 * count // 3
    x[separable, 0] = 8.0 * (2 * labels[separable] - 1)
    x[~separable, 0] = 0
    return x, labels, separable


def test_what_can_be_told_apart_is_easy():
    x, labels, separable = mixture()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    before = [p.clone() for p in model.parameters()]
    model.eval()
    easy = easy_examples(model, x, labels, learning_rate=0.05, batch_size=50)
    assert easy[separable].double().mean() > 0.99
    assert 0.3 < easy[~separable].double().mean() < 0.7
    assert (
        all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        and not model.training
    )
    torch.manual_seed(0)
    one = easy_examples(model[0], x, labels, seed=1)
    assert torch.equal(one, easy_examples(model[0], x, labels, seed=1))


def test_subsets_share_nothing_and_come_from_the_pool():
    pool = torch.arange(100) % 3 == 0
    train, test = disjoint_subsets(pool, (20, 14), seed=3)
    assert len(train) == 20 and len(test) == 14
    assert sorted([*train.tolist(), *test.tolist()]) == pool.nonzero().flatten().tolist()
    again = disjoint_subsets(pool.nonzero().flatten(), (20, 14), seed=3)
    assert torch.equal(train, again[0]) and torch.equal(test, again[1])
    assert not torch.equal(train, disjoint_subsets(pool, (20, 14), seed=4)[0])


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match="the pool has 5 examples, too few for disjoint subsets of 4 and 2"
    ):
        disjoint_subsets(torch.arange(5), (4, 2))
    with pytest.raises(ValueError, match="sizes"):
        disjoint_subsets(torch.arange(5), (4, 0))
    with pytest.raises(ValueError, match="pool names an example twice"):
        disjoint_subsets(torch.tensor([3, 1, 3]), (1, 1))
    with pytest.raises(ValueError, match=r"pool must be a tensor, .* got shape \(2, 3\)"):
        disjoint_subsets(torch.ones(2, 3, dtype=torch.bool), (1, 1))
    x, labels, _ = mixture(9)
    with pytest.raises(ValueError, match="one entry per example"):
        easy_examples(nn.Linear(5, 2), x, labels[:8])
    with pytest.raises(ValueError, match="epochs"):
        easy_examples(nn.Linear(5, 2), x, labels, epochs=0)
