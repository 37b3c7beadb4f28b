"""The search for inconsistency against the exact answer for quadratic losses, and means of
Hessians.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from htv.methods import (
    arithmetic_mean_hessian,
    environment_losses,
    geometric_mean_hessian,
    inconsistency,
    inconsistency_bound,
    quadratic_inconsistency,
)


def quadratic(hessian, centre=0.0, offset=0.0):
    if hessian.dim() == 1:
        return lambda theta: (hessian * (theta - centre) ** 2).sum() / 2 + offset
    return lambda theta: (theta - centre) @ hessian @ (theta - centre) / 2 + offset


def random_spd(count, size, seed=0, floor=0.1):
    root = torch.randn(
        count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.mT + floor * torch.eye(size)


DIAGONALS = [
    ([1.0, 2.0], [1.0, 2.0]),
    ([1.0, 2.0], [4.0, 1.0]),
    ([0.2, 3.0, 1.0], [5.0, 3.0, 0.5]),
    ([2.0], [0.1]),
]


@pytest.mark.parametrize(
    ("a", "b"), [*DIAGONALS[:2], *(pytest.param(*d, marks=pytest.mark.slow) for d in DIAGONALS[2:])]
)
def test_the_search_finds_the_exact_value_of_diagonal_quadratics(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    theta = torch.arange(1.0, len(a) + 1, dtype=torch.float64)
    exact = quadratic_inconsistency(a, b, 0.05)
    assert exact == pytest.approx(0.05 * max((a / b).max().item(), (b / a).max().item()))
    found = inconsistency([quadratic(a, theta, 0.3), quadratic(b, theta, 0.3)], theta, 0.05)
    assert found.value == pytest.approx(exact, rel=2e-3) and found.value <= exact * (1 + 1e-9)
    losses = [quadratic(a, theta, 0.3), quadratic(b, theta, 0.3)]
    assert abs(losses[found.within](found.theta) - 0.3) <= 0.05 * (1 + 1e-9)
    assert abs(losses[found.of](found.theta) - 0.3).item() == pytest.approx(found.value)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_and_of_full_ones(size):
    a, b = random_spd(2, size, seed=size)
    exact = quadratic_inconsistency(a, b, 0.1)
    ratios = scipy.linalg.eigvalsh(a.numpy(), b.numpy())
    assert exact == pytest.approx(0.1 * max(ratios.max(), 1 / ratios.min()))
    found = inconsistency(
        [quadratic(a), quadratic(b)], torch.zeros(size, dtype=torch.float64), 0.1, steps=100
    )
    assert 0.97 * exact <= found.value <= exact * (1 + 1e-9)


def test_equal_losses_give_eps_and_a_flat_direction_no_bound():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    theta = torch.zeros(2, dtype=torch.float64)
    assert inconsistency([quadratic(a), quadratic(a)], theta, 0.1).value == pytest.approx(
        0.1, rel=1e-4
    )
    flat = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert (
        quadratic_inconsistency(flat, a, 0.1) == math.inf == quadratic_inconsistency(a, flat, 0.1)
    )
    assert quadratic_inconsistency(flat, flat, 0.1) == 0.1  # flat in both: nothing departs
    near, far = (
        inconsistency([quadratic(a), quadratic(flat)], theta, 0.1, radius=r).value
        for r in (2.0, 20.0)
    )
    assert 1.5 < near <= 2.1 < 10 < far <= 200.1


def test_the_region_is_connected():
    """A second valley as deep as the first, behind a wall higher than eps: no walker may jump
    there.
    """
    double_well = lambda t: (t[0] ** 2 - 1) ** 2  # minima at -1 and 1, the wall is 1
    telltale = lambda t: 100 * torch.relu(-t[0])  # 0 on this side
    theta = torch.tensor([1.0], dtype=torch.float64)
    low = inconsistency([double_well, telltale], theta, 0.5, seed=1)
    # within telltale's own region t >= -.005, double_well reaches 1 at t = 0, and departs without
    # limit for large t
    walk = inconsistency([double_well], theta, 0.5)
    assert walk.value == pytest.approx(0.5, rel=1e-3)
    assert low.of == 0 and low.within == 1
    only = [double_well, lambda t: torch.clamp(telltale(t), max=50.0) + double_well(t)]
    assert inconsistency(only, theta, 0.5).value == pytest.approx(
        0.5, rel=1e-3
    )  # 50 is behind the wall
    assert inconsistency(only, theta, 1.5).value > 40


def test_the_search_is_seeded_and_leaves_torchs_generator_alone():
    a, b = random_spd(2, 3)
    theta = torch.zeros(3, dtype=torch.float64)
    state = torch.get_rng_state()
    one, two, three = (
        inconsistency([quadratic(a), quadratic(b)], theta, 0.1, steps=6, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert one.value == two.value and torch.equal(one.theta, two.theta) and one.value != three.value


def test_losses_of_a_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    data = [(torch.randn(5, 2), torch.randn(5, 1)) for _ in range(2)]
    losses, theta = environment_losses(model, nn.functional.mse_loss, data)
    assert (
        theta.shape == (sum(p.numel() for p in model.parameters()),)
        and theta.dtype == torch.float64
    )
    for loss, (x, y) in zip(losses, data, strict=True):
        torch.testing.assert_close(loss(theta), nn.functional.mse_loss(model(x), y))
    before = [p.clone() for p in model.parameters()]
    found = inconsistency(losses, theta, 0.01, steps=4, walkers=8)
    assert found.value > 0.01
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_means_of_hessians():
    a, b = random_spd(2, 4)
    torch.testing.assert_close(arithmetic_mean_hessian(torch.stack([a, b])), (a + b) / 2)
    root, inverse = (
        torch.from_numpy(scipy.linalg.fractional_matrix_power(a.numpy(), p)) for p in (0.5, -0.5)
    )
    closed = root @ torch.from_numpy(scipy.linalg.sqrtm((inverse @ b @ inverse).numpy())) @ root
    torch.testing.assert_close(geometric_mean_hessian(torch.stack([a, b])), closed)
    diagonals = torch.tensor([[1.0, 4.0, 0.0], [9.0, 4.0, 2.0]])
    wanted = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(geometric_mean_hessian(diagonals), wanted)
    positive = diagonals[:, :2]
    full = geometric_mean_hessian(torch.stack([torch.diag(d) for d in positive]))
    torch.testing.assert_close(full, torch.diag(wanted[:2]))


@pytest.mark.parametrize("floor", [0.1, 1e-4])
def test_the_karcher_mean_of_several(floor):
    hessians = random_spd(5, 3, seed=4, floor=floor)
    mean = geometric_mean_hessian(hessians)
    inverse = scipy.linalg.fractional_matrix_power(mean.numpy(), -0.5)
    logs = sum(scipy.linalg.logm(inverse @ h.numpy() @ inverse) for h in hessians)
    np.testing.assert_allclose(logs, 0, atol=1e-8)
    change = torch.randn(3, 3, dtype=torch.float64)  # it moves along with a change of coordinates
    torch.testing.assert_close(
        geometric_mean_hessian(change.mT @ hessians @ change),
        change.mT @ mean @ change,
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        torch.linalg.slogdet(mean)[1], torch.linalg.slogdet(hessians)[1].mean()
    )


def test_the_bound_holds_and_half_of_it_would_not():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b = (torch.rand(2, 3, generator=generator, dtype=torch.float64) + 1e-3).log()
        a, b = (3 * a).exp(), (3 * b).exp()
        assert quadratic_inconsistency(a, b, 0.1) <= inconsistency_bound(a, b, 0.1)
    a, b = random_spd(2, 3)
    assert quadratic_inconsistency(a, b, 0.1) <= inconsistency_bound(a, b, 0.1)
    diagonal = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 2.0])
    full = [torch.diag(d) for d in diagonal]
    assert inconsistency_bound(*diagonal, 0.1) == pytest.approx(inconsistency_bound(*full, 0.1))
    one, ten = torch.tensor([1.0]), torch.tensor([10.0])
    assert inconsistency_bound(one, one, 0.1) == pytest.approx(0.4)
    assert inconsistency_bound(one, ten, 0.1) / 2 < quadratic_inconsistency(one, ten, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, f: inconsistency([], t, 0.1), "losses is empty"),
        (lambda t, f: inconsistency([f], t, 0.0), "eps must be above 0"),
        (lambda t, f: inconsistency([f], t[None], 0.1), r"theta must be \(P,\)"),
        (lambda t, f: inconsistency([f], t, 0.1, walkers=0), "walkers must be at least 1"),
        (
            lambda t, f: inconsistency([f, lambda t: t.sum() / 0], t, 0.1),
            r"losses\[1\] is not finite at theta",
        ),
        (lambda t, f: inconsistency([f, lambda t: t], t, 0.1), r"losses\[1\] must return a scalar"),
        (lambda t, f: inconsistency([f], t, 0.1, radius=-1.0), "radius must be above 0"),
        (lambda t, f: quadratic_inconsistency(t, t, -0.1), "eps must be above 0"),
        (lambda t, f: inconsistency_bound(t, t, float("nan")), "eps must be above 0"),
        (lambda t, f: inconsistency_bound(t, t[:2], 0.1), "differ in shape"),
        (
            lambda t, f: quadratic_inconsistency(t, t + float("inf"), 0.1),
            "hessian_b must be finite",
        ),
        (
            lambda t, f: quadratic_inconsistency(t - 1, t, 0.1),
            "hessian_a must have no negative entry",
        ),
        (lambda t, f: quadratic_inconsistency(t, torch.eye(3), 0.1), "differ in shape"),
        (
            lambda t, f: quadratic_inconsistency(t, torch.zeros(2, 3), 0.1),
            r"hessian_b must be \(P,\) or \(P, P\)",
        ),
        (
            lambda t, f: geometric_mean_hessian(torch.tensor([[[0.0, 1], [0, 0]]])),
            r"hessians\[0\] must be symmetric",
        ),
        (
            lambda t, f: geometric_mean_hessian(torch.zeros(2, 2, 2)),
            r"hessians\[0\] must be positive definite",
        ),
        (lambda t, f: arithmetic_mean_hessian(torch.ones(3)), r"hessians must be \(E, P\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, dtype=torch.float64), lambda t: (t * t).sum())


def test_an_iteration_that_does_not_converge_says_so():
    with pytest.raises(RuntimeError, match="did not converge to 1e-12 in 1 steps"):
        geometric_mean_hessian(random_spd(3, 3), max_steps=1)
    turned = torch.linalg.qr(random_spd(1, 3)[0])[0]
    steep = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="too ill-conditioned"):
        geometric_mean_hessian(
            torch.stack([torch.diag(steep), turned @ torch.diag(steep.flip(0)) @ turned.mT])
        )
