"""Batches of all environments, and who votes."""

import pytest
import torch
from torch import nn

import htv
from htv.methods import (
    environment_batches,
    environment_groups,
    join_environments,
    require_environments,
)
from htv.ops.functional import apply_rule


def batch(count, value=0.0):
    return torch.full((count, 3), value), torch.full((count,), int(value))


def test_batches_are_joined_with_their_ids():
    (x, y), ids = join_environments([batch(2, 5.0), batch(1, 7.0), batch(3, 6.0)])
    assert (
        x.shape == (6, 3)
        and y.tolist() == [5, 5, 7, 6, 6, 6]
        and ids.tolist() == [0, 0, 1, 2, 2, 2]
    )


def test_loaders_are_drawn_from_side_by_side():
    loaders = [[batch(2, 1.0), batch(1, 2.0)], [batch(1, 3.0), batch(1, 4.0), batch(1, 5.0)]]
    drawn = [(y.tolist(), ids.tolist()) for (_, y), ids in environment_batches(loaders)]
    assert drawn == [([1, 1, 3], [0, 0, 1]), ([2, 4], [0, 1])]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([batch(2), batch(0)], "environment 1 has no examples in this batch"),
        ([batch(2), (torch.zeros(2, 3), torch.zeros(1))], r"batches\[1\] hold \[1, 2\] examples"),
        ([batch(2), (torch.zeros(2, 3),)], r"batches\[1\] holds 1 tensors, batches\[0\] 2"),
        ([batch(2), torch.zeros(2)], r"batches\[1\] must be a tuple of tensors"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], r"batches\[0\] must be a tuple of tensors"),
        (
            [batch(2), (torch.zeros(2, 4), torch.zeros(2))],
            r"examples of batches\[1\] have shape \(4,\), .* \(3,\)",
        ),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        join_environments(batches)


def test_empty_loaders_are_named():
    with pytest.raises(ValueError, match="loaders is empty"):
        next(environment_batches([]))
    with pytest.raises(ValueError, match=r"loaders\[1\] gives no batch: environment 1 is empty"):
        next(environment_batches([[batch(1)], []]))
    with pytest.raises(
        ValueError, match="must be a tuple of tensors"
    ):  # one loader in place of one per environment
        next(environment_batches([batch(2), batch(2)]))


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([0, 0, 2, 2], 4, r"environments \[1, 3\] are missing from the batch"),
        ([0, 1], 3, "2 examples cannot hold 3 environments"),
        ([0, 1, 3], 3, r"ids must lie in \[0, 3\), got values from 0 to 3"),
        ([0, 1, -1], 3, r"ids must lie in \[0, 3\)"),
        ([0.0, 1.0], 2, "integers"),
        ([0, 1], 0, "num_environments must be at least 1"),
    ],
)
def test_missing_environments_are_named(ids, count, message):
    with pytest.raises(ValueError, match=message):
        require_environments(torch.tensor(ids), count)


def test_ids_that_are_no_tensor_are_named():
    with pytest.raises(ValueError, match="ids must be a tensor of integers.*got a list"):
        require_environments([0, 1], 2)


def test_each_environments_mean_counts_once():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    parts = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (1, 4, 2)]
    grads = []
    for x, y in parts:
        grads.append(torch.autograd.grad((model(x) - y).square().mean(), model.weight)[0])
    (x, y), ids = join_environments(parts)
    order = torch.randperm(len(ids))
    with htv.attach(model, htv.AndMask(1.0)) as handle:
        with environment_groups(handle, ids[order], 3):
            loss = (model(x[order]) - y[order]).square().mean()
        loss.backward()
        with pytest.raises(ValueError, match=r"environments \[1, 3\] are missing"):
            with environment_groups(handle, 2 * ids, 5):
                pass
    torch.testing.assert_close(model.weight.grad, htv.and_mask(torch.stack(grads), 1.0))


RULES = [
    htv.AndMask(0.5),
    htv.AndMask(0.5, rescale=True),
    htv.XorMask(0.5),
    htv.GeometricMean(0.5),
    htv.SandMask(0.5, 1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_mask_trains_as_its_stacked_function_says(rule):
    """Three steps of training by environments are those with the gradients of each environment
    stacked.
    """
    torch.manual_seed(1)
    attached = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    plain.load_state_dict(attached.state_dict())
    parts = [(torch.randn(n, 4).double(), torch.randn(n, 1).double()) for n in (3, 1, 2, 5)]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=0.01) for m in (attached, plain)
    ]
    handle = htv.attach(attached, rule)
    for _ in range(3):
        (x, y), ids = join_environments(parts)
        optimizers[0].zero_grad()
        with environment_groups(handle, ids, 4):
            loss = (attached(x) - y).square().mean()
        loss.backward()
        losses = [(plain(x) - y).square().mean() for x, y in parts]
        grads = [torch.autograd.grad(loss, list(plain.parameters())) for loss in losses]
        for parameter, stack in zip(plain.parameters(), zip(*grads, strict=True), strict=True):
            # contributions are a fourth of the environments' gradients: SAND's mask depends on that
            parameter.grad = 4 * apply_rule(torch.stack(stack) / 4, rule)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(attached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_sand_at_tau_one_warns_and_trains_nothing():
    with pytest.warns(UserWarning, match="at tau = 1"):
        rule = htv.SandMask(1.0, k=2.0)
    model = nn.Linear(3, 1, bias=False)
    with htv.attach(model, rule):
        model(torch.randn(5, 3)).sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros(1, 3))


def test_sand_masks_of_environments_are_the_papers_with_k_over_the_square_of_their_number():
    torch.manual_seed(0)
    model, tau, k = nn.Linear(4, 3).double(), 0.2, 0.7
    parts = [
        (torch.randn(n, 4).double() + 0.5, torch.randn(n, 3).double()) for n in (3, 1, 4, 2, 6)
    ]
    loss = lambda x, y: (model(x) - y).square().mean()
    grads = torch.stack([torch.autograd.grad(loss(x, y), model.weight)[0] for x, y in parts])
    mask = (k / grads.var(dim=0) * (grads.sign().mean(dim=0).abs() - tau)).tanh().clamp(min=0)
    expected = mask * grads.mean(dim=0) / (1e-10 + mask.mean())
    (x, y), ids = join_environments(parts)
    with htv.attach(model, htv.SandMask(tau, k / 5**2)) as handle:
        with environment_groups(handle, ids, 5):
            loss(x, y).backward()
    assert 0 < (expected == 0).sum() < expected.numel()
    torch.testing.assert_close(model.weight.grad, expected)
