"""TemporalAndMaskAdam against its equations in NumPy, and as an optimizer among torch's."""

import copy
import warnings

import numpy as np
import pytest
import torch

from htv.methods import TemporalAndMaskAdam

HYPER = dict(lr=0.02, betas=(0.6, 0.9, 0.7), eps=1e-6, tau=0.45, weight_decay=0.05)


def by_hand(theta, grads, lr, betas, eps, tau, weight_decay, maximize=False):
    theta = theta.astype(np.float64)
    m = v = a = np.zeros_like(theta)
    for g in grads:
        g = -g if maximize else g
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        a = betas[2] * a + (1 - betas[2]) * np.sign(g)
        theta = theta - lr * (m * (np.abs(a) >= tau)) / (np.sqrt(v) + eps)
        theta = theta - lr * weight_decay * theta
    return theta


def steps(optimizer, parameters, grads):
    for row in grads:
        for parameter, grad in zip(parameters, row, strict=True):
            parameter.grad = None if grad is None else torch.tensor(grad, dtype=parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "change",
    [{}, {"tau": 0.0}, {"maximize": True}, {"betas": (0.0, 0.0, 0.0)}, {"weight_decay": 0}],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_papers_equations(change, dtype):
    random = np.random.default_rng(0)
    starts = [random.standard_normal(shape) for shape in ((7, 5), (3,), (), (0, 4))]
    grads = [[random.standard_normal(s.shape) + 0.3 for s in starts] for _ in range(30)]
    grads[4][0][:3] = 0  # a zero dilutes agreement
    parameters = [torch.tensor(s, dtype=dtype, requires_grad=True) for s in starts]
    hyper = {**HYPER, **change}
    steps(TemporalAndMaskAdam(parameters, **hyper), parameters, grads)
    for index, parameter in enumerate(parameters):
        wanted = by_hand(starts[index], [row[index] for row in grads], **hyper)
        tolerance = (
            {"rtol": 1e-10, "atol": 1e-12}
            if dtype == torch.float64
            else {"rtol": 1e-3, "atol": 1e-4}
        )
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, **tolerance)


def test_only_lasting_agreement_moves_a_weight():
    parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = TemporalAndMaskAdam(
        [parameter], lr=0.01, betas=(0.9, 0.99, 0.5), tau=0.75, weight_decay=0
    )
    agreeing = [np.array([1.0, 5.0 * (-1) ** t, 0.0]) for t in range(4)]
    steps(optimizer, [parameter], [[agreeing[0]]])
    assert torch.equal(parameter, torch.ones(3, dtype=torch.float64))  # |a| is .5 so far
    steps(optimizer, [parameter], [[agreeing[1]]])
    assert parameter[0] < 1 and torch.equal(
        parameter[1:], torch.ones(2, dtype=torch.float64)
    )  # a tie at .75 is kept
    steps(optimizer, [parameter], [[g] for g in agreeing[2:]])
    assert torch.equal(parameter[1:], torch.ones(2, dtype=torch.float64))
    assert optimizer.kept_fraction() == pytest.approx(1 / 3)


def test_masked_weights_shrink():
    parameter = torch.full((2,), 2.0, requires_grad=True)
    optimizer = TemporalAndMaskAdam([parameter], lr=0.1, tau=0.9, weight_decay=0.5)
    steps(optimizer, [parameter], [[np.array([0.0, 0.0])]] * 3)
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 2.0 * 0.95**3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("betas", "tau", "grads"),
    [
        ((0.9, 0.999, 0.8), 0.4, [10.0] + 4000 * [0.0078125]),
        ((0.9, 0.999, 0.99), 0.9, 2000 * [1.0]),
    ],
    ids=["a large gradient fades", "agreement reaches tau"],
)
def test_half_precision_follows_the_equations(betas, tau, grads, dtype):
    """Steps of less than a unit in the last place add up, and averages do not stick."""
    hyper = HYPER | {"lr": 0.01, "betas": betas, "eps": 1e-8, "tau": tau, "weight_decay": 1e-4}
    parameter = torch.full((2,), 3.0, dtype=dtype, requires_grad=True)
    optimizer = TemporalAndMaskAdam([parameter], **hyper)
    steps(optimizer, [parameter], [[np.array([g, -g])] for g in grads])
    assert all(kept.dtype == torch.float32 for kept in optimizer.state[parameter].values())
    wanted = by_hand(np.full(2, 3.0), [np.array([g, -g]) for g in grads], **hyper)
    assert np.abs(wanted - 3.0).min() > 2
    np.testing.assert_allclose(parameter.detach().double(), wanted, rtol=torch.finfo(dtype).eps)
    rounding = optimizer.state[parameter]["rounding"]
    np.testing.assert_allclose(parameter.detach().double() + rounding, wanted, rtol=1e-3)


def test_half_precision_that_overflows_stays_infinite():
    parameter = torch.full((1,), 65000.0, dtype=torch.float16, requires_grad=True)
    optimizer = TemporalAndMaskAdam([parameter], lr=1e4, tau=0.0, weight_decay=0)
    steps(optimizer, [parameter], [[-np.ones(1)]] * 3)
    assert parameter.item() == float("inf")


def test_nan_is_not_hidden_by_the_mask():
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = TemporalAndMaskAdam([parameter], tau=0.9)
    steps(optimizer, [parameter], [[np.array([np.nan, 1.0])]])
    assert parameter[0].isnan() and parameter[1] == 0


def test_a_parameter_without_gradient_is_left_alone():
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = TemporalAndMaskAdam(parameters, tau=0.0)
    steps(optimizer, parameters, [[None, np.ones(2)]] * 2)
    assert torch.equal(parameters[0], torch.ones(2)) and parameters[0] not in optimizer.state
    assert (parameters[1] < 1).all()


def test_groups_have_their_own_hyperparameters():
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = TemporalAndMaskAdam(
        [{"params": parameters[:1], "tau": 0.9}], lr=0.1, tau=0.0, weight_decay=0
    )
    optimizer.add_param_group({"params": parameters[1]})
    steps(optimizer, parameters, [[np.ones(2)] * 2])
    assert torch.equal(parameters[0], torch.ones(2)) and (parameters[1] < 1).all()


def test_lr_may_be_a_tensor():
    random = np.random.default_rng(1)
    grads = [[random.standard_normal(4)] for _ in range(8)]
    ends = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        parameter = torch.ones(4, dtype=torch.float64, requires_grad=True)
        steps(TemporalAndMaskAdam([parameter], **{**HYPER, "lr": lr}), [parameter], grads)
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends)


def test_closure_and_schedule():
    parameter = torch.ones(3, requires_grad=True)
    optimizer = TemporalAndMaskAdam([parameter], lr=0.1, tau=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert (
        losses[0] == 3
        and losses[2] < losses[1]
        and optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_run(tmp_path, dtype):
    random = np.random.default_rng(2)
    grads = [[random.standard_normal((3, 2)), random.standard_normal(4)] for _ in range(12)]
    start = lambda: [t.to(dtype).requires_grad_() for t in (torch.ones(3, 2), torch.zeros(4))]
    whole, parts = start(), start()
    straight = TemporalAndMaskAdam(whole, **HYPER)
    steps(straight, whole, grads)
    first = TemporalAndMaskAdam(parts, **HYPER)
    steps(first, parts, grads[:5])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = TemporalAndMaskAdam(parts)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert second.param_groups[0]["tau"] == HYPER["tau"]
    steps(second, parts, grads[5:])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
        for name, kept in straight.state[one].items():
            assert kept.dtype == torch.float32 and torch.equal(kept, second.state[other][name]), (
                name
            )
    third = copy.deepcopy(second)
    assert third.kept_fraction() == second.kept_fraction()


def test_state_that_was_kept_in_half_precision_is_taken_up():
    parameter = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    first, second = TemporalAndMaskAdam([parameter], **HYPER), TemporalAndMaskAdam([parameter])
    steps(first, [parameter], [[np.ones(2)]])
    saved = first.state_dict()
    del saved["state"][0]["rounding"]
    saved["state"][0] = {name: kept.bfloat16() for name, kept in saved["state"][0].items()}
    second.load_state_dict(saved)
    steps(second, [parameter], [[np.ones(2)]])
    assert all(kept.dtype == torch.float32 for kept in second.state[parameter].values())


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizers_state_is_refused(other):
    parameter = torch.ones(2, requires_grad=True)
    saved = other([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    saved.step()
    optimizer = TemporalAndMaskAdam([parameter])
    with pytest.raises(
        ValueError, match="state_dict is of another optimizer than TemporalAndMaskAdam.*tau"
    ):
        optimizer.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [(2, 1)],
            r"'exp_avg' of shape \(2, 1\) for parameter 0, whose shape is \(2, 3\): it is of "
            r"another model",
        ),
        ([(2, 3), (2,)], r"groups of \[2\] parameters, this optimizer has groups of \[1\]"),
    ],
)
def test_another_models_state_is_refused(shapes, message):
    parts = [torch.ones(shape, requires_grad=True) for shape in shapes]
    saved = TemporalAndMaskAdam(parts)
    steps(saved, parts, [[np.ones(shape) for shape in shapes]])
    optimizer = TemporalAndMaskAdam([torch.ones(2, 3, requires_grad=True)])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="state_dict is not an optimizer's"):
        optimizer.load_state_dict(torch.nn.Linear(2, 3).state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": torch.ones(1)}, ValueError, "lr must be a number or a tensor without dims"),
        ({"betas": (0.9, 0.99)}, ValueError, r"betas must be \(beta1, beta2, beta3\)"),
        ({"betas": (0.9, 1.0, 0.5)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 0.9, "x")}, TypeError, r"betas\[2\] must be a number"),
        ({"eps": -1e-8}, ValueError, "eps must be >= 0"),
        ({"tau": 1.5}, ValueError, r"tau must be in \[0, 1\], got 1.5"),
        ({"tau": True}, TypeError, "tau must be a number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
        ({"maximize": 1}, TypeError, "maximize must be True or False"),
    ],
)
def test_wrong_hyperparameters_are_named(wrong, error, message):
    parameter = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        TemporalAndMaskAdam([parameter], **wrong)
    optimizer = TemporalAndMaskAdam([torch.ones(1, requires_grad=True)])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter], **wrong})
    assert len(optimizer.param_groups) == 1


def test_tau_of_one_warns():
    with pytest.warns(UserWarning, match="tau = 1"):
        TemporalAndMaskAdam([torch.ones(2, requires_grad=True)], tau=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemporalAndMaskAdam([torch.ones(2, requires_grad=True)], tau=1.0, betas=(0.9, 0.9, 0.0))


def test_complex_and_sparse_are_refused():
    with pytest.raises(TypeError, match="real floating point.*complex64"):
        TemporalAndMaskAdam([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        TemporalAndMaskAdam(table.parameters()).step()


def test_it_keeps_what_environments_share():
    """One environment at a time, at random: the shared feature is learnt, the environments' own
    ones are not.
    """
    from htv.data import linear_environments

    x, y = linear_environments()
    weights = {}
    for tau in (0.0, 0.5):
        weight = torch.nn.Parameter(torch.zeros(5))
        optimizer = TemporalAndMaskAdam(
            [weight], lr=0.01, betas=(0.5, 0.999, 0.8), tau=tau, weight_decay=0.05
        )
        order = torch.randint(4, (3000,), generator=torch.Generator().manual_seed(0))
        for e in order.tolist():
            optimizer.zero_grad()
            ((x[e] @ weight - y[e, 0]) ** 2 / 2).backward()
            optimizer.step()
        weights[tau] = weight.detach()
    assert weights[0.0][:4].min() > 0.1  # Adam learns both kinds
    assert weights[0.5][4] > 2 and weights[0.5][:4].abs().max() < weights[0.0][:4].min()
