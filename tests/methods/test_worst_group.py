"""Accuracy by group, who is drawn how often, and losses on groups that are absent from a batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from htv.methods import (
    GroupAccuracy,
    GroupDRO,
    balanced_subset,
    environment_means,
    group_accuracy,
    group_weights,
    irm_penalty,
    select_model,
    upweighted,
    weighted_sampler,
)

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3, 3])


def test_accuracy_by_group():
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 1, 1]).bool()
    found = group_accuracy(correct, GROUPS, 4)
    assert (
        found.accuracies[:2] == (0.75, 0.5)
        and math.isnan(found.accuracies[2])
        and found.accuracies[3] == 1
    )
    assert found.sizes == (4, 2, 0, 4) and found.worst == 0.5 and found.average == 0.8
    assert found.weighted((1, 8, 0, 1)) == pytest.approx(0.1 * 0.75 + 0.8 * 0.5 + 0.1)
    for sizes, message in (
        ((1, 1, 1, 1), r"groups \[2\] have training"),
        ((1, 1), "name 4"),
        ((0,) * 4, "all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            found.weighted(sizes)


def test_selection():
    looks = [GroupAccuracy((1.0, a), (90, 10)) for a in (0.2, 0.6, 0.6)] + [
        GroupAccuracy((0.8, 0.7), (90, 10))
    ]
    assert select_model(looks) == 3 and select_model(looks, "average") == 1
    assert select_model(looks, "average", (10, 90)) == 3
    with pytest.raises(ValueError, match="by must be"):
        select_model(looks, "best")
    with pytest.raises(ValueError, match="history is empty"):
        select_model([])


def test_weights_draw_groups_equally_often():
    weights = group_weights(GROUPS)
    assert torch.allclose(
        environment_means(weights, GROUPS, 4, absent="zero"),
        torch.tensor([0.25, 0.5, 0, 0.25]).double(),
    )
    sampler = weighted_sampler(weights, 6000)
    drawn = sampler(torch.Generator().manual_seed(0))
    assert len(drawn) == 6000 and torch.equal(drawn, sampler(torch.Generator().manual_seed(0)))
    shares = torch.bincount(GROUPS[drawn], minlength=4) / 6000
    assert torch.allclose(shares, torch.tensor([1, 1, 0, 1]) / 3, atol=0.03)
    assert len(weighted_sampler(weights)(torch.Generator())) == 10
    assert (
        weighted_sampler(torch.tensor([0, 3, 0]), 4)(torch.Generator()).tolist() == [1] * 4
    )  # counts will do
    for bad in (torch.zeros(3), torch.tensor([1.0, -1]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="weights must be"):
            weighted_sampler(bad)


def test_balanced_subsets():
    chosen = [balanced_subset(GROUPS, seed) for seed in range(30)]
    for ids in chosen:
        assert torch.equal(ids, ids.unique()) and torch.bincount(GROUPS[ids]).tolist() == [
            2,
            2,
            0,
            2,
        ]
    assert torch.equal(chosen[0], balanced_subset(GROUPS, 0))
    assert torch.cat(chosen).unique().tolist() == list(range(10))  # everyone has a chance


def test_upweighting():
    assert upweighted(torch.tensor([True, False]), 5).tolist() == [5, 1]
    for wrong, factor, message in (
        (torch.tensor([1]), 5, "boolean"),
        (torch.tensor([True]), 0, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            upweighted(wrong, factor)


def test_losses_where_groups_are_absent():
    torch.manual_seed(0)
    outputs, targets = (
        torch.randn(4, 2, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, 1, 0]),
    )
    groups = torch.tensor([0, 0, 2, 2])
    each = lambda out, y: F.cross_entropy(out, y, reduction="none")
    losses = each(outputs, targets)
    means = environment_means(losses, groups, 4, absent="zero")
    assert torch.allclose(
        means, torch.stack([losses[:2].mean(), means[1] * 0, losses[2:].mean(), means[3] * 0])
    )
    dro = GroupDRO(4, step_size=1.0).double()
    loss = dro(means)
    expected = (
        means.detach().exp() / means.detach().exp().sum()
    )  # absent groups fall behind those with a loss
    assert torch.allclose(dro.weights, expected) and torch.allclose(loss, expected @ means)
    present = irm_penalty(outputs, targets, groups // 2, 2, each)
    assert torch.allclose(
        irm_penalty(outputs, targets, groups, 4, each, absent="zero"), present / 2
    )
    assert torch.autograd.gradcheck(
        lambda o: irm_penalty(o, targets, groups, 4, each, absent="zero"), outputs
    )
    for call in (
        lambda: environment_means(losses, groups, 4),
        lambda: irm_penalty(outputs, targets, groups, 4, each),
    ):
        with pytest.raises(ValueError, match=r"environments \[1, 3\] are missing"):
            call()
    with pytest.raises(ValueError, match="absent must be"):
        environment_means(losses, groups, 4, absent="nan")
    with pytest.raises(ValueError, match="ids is empty"):
        environment_means(losses[:0], groups[:0], 4, absent="zero")


def test_bad_groups_are_named():
    correct = torch.ones(2, dtype=torch.bool)
    for groups, message in (
        (torch.tensor([0, 4]), "below num_groups=4, got values from 0 to 4"),
        (torch.tensor([0, -1]), "from -1 to 0"),
        (torch.tensor([0.0, 1.0]), r"\(N,\) int64"),
        (torch.zeros(0, dtype=torch.int64), "at least one example"),
    ):
        with pytest.raises(ValueError, match=message):
            group_accuracy(correct, groups, 4)
    with pytest.raises(ValueError, match="correct must be boolean"):
        group_accuracy(correct.int(), torch.tensor([0, 1]), 2)
