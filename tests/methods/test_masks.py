"""What pure noise leaves of the AND-mask: formulas, and the mask itself on Gaussian gradients."""

import math

import pytest
import torch

import htv
from htv.methods import masked_noise, masked_noise_bound, mean_noise, survival_probability

CASES = [(2, 0.5), (3, 1.0), (4, 0.5), (5, 0.6), (8, 0.25), (10, 0.4), (16, 1.0), (25, 0.2)]


def test_by_hand():
    assert survival_probability(3, 1.0) == 2 / 8
    assert survival_probability(4, 0.5) == (1 + 4 + 4 + 1) / 16
    assert survival_probability(5, 0.6) == (1 + 5 + 5 + 1) / 32
    assert survival_probability(7, 0.0) == survival_probability(6, 0.0) == 1.0
    assert survival_probability(50, 0.4) == pytest.approx(
        2 * sum(math.comb(50, k) for k in range(35, 51)) / 2**50
    )
    assert mean_noise(4, 10, sigma=2.0) == 10.0
    # one group: nothing is masked;  two that must agree: half of them, with E (|a| + |b|)^2 / 4
    assert masked_noise(1, 7, 1.0) == pytest.approx(7)
    assert masked_noise(2, 1, 1.0) == pytest.approx(0.5 * (2 + 4 / math.pi) / 4)


@pytest.mark.parametrize(("groups", "tau"), CASES)
def test_the_mask_leaves_of_gaussian_noise_what_the_formulas_say(groups, tau):
    coordinates, sigma = 200_000, 1.5
    grads = sigma * torch.randn(
        groups, coordinates, generator=torch.Generator().manual_seed(groups)
    )
    mean, masked = grads.mean(dim=0), htv.and_mask(grads, tau)
    survival = survival_probability(groups, tau)
    kept = (masked != 0).double()
    deviation = math.sqrt(survival * (1 - survival) / coordinates)
    assert kept.mean().item() == pytest.approx(survival, abs=5 * deviation + 1e-12)
    for values, expected in (
        (mean, mean_noise(groups, coordinates, sigma)),
        (masked, masked_noise(groups, coordinates, tau, sigma)),
    ):
        squares = values.double().square()
        spread = squares.std().item() * math.sqrt(coordinates)
        assert squares.sum().item() == pytest.approx(expected, abs=5 * spread)


def test_the_bound_holds_everywhere():
    for groups in range(1, 70):
        for votes in range(groups + 1):
            tau = votes / groups
            exact = masked_noise(groups, 3, tau, 0.5)
            assert exact <= masked_noise_bound(groups, 3, tau, 0.5) * (1 + 1e-12)
            assert exact <= mean_noise(groups, 3, 0.5) * (1 + 1e-12)
            if votes == 0:
                assert exact == pytest.approx(mean_noise(groups, 3, 0.5))


def test_the_bound_is_the_papers():
    assert masked_noise_bound(4, 2, 0.5, 3.0) == 9 * 2 * (4 - 3) * 4 / 8
    assert masked_noise_bound(10, 1, 0.4) == (10 - 7) * math.comb(10, 7) / 2**9


def test_wrong_arguments_are_named():
    for call, message in (
        (lambda: survival_probability(0, 0.5), "at least 1 group"),
        (lambda: survival_probability(4, 1.5), r"tau must lie in \[0, 1\]"),
        (lambda: mean_noise(0, 3), "at least 1 group"),
        (lambda: masked_noise(4, -1, 0.5), "coordinates must be >= 0"),
        (lambda: masked_noise_bound(4, 1, 0.5, sigma=-1.0), "sigma must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="num_groups must be an integer"):
        survival_probability(2.5, 0.5)


def test_many_groups_do_not_overflow():
    exact, bound = masked_noise(3000, 1, 0.1, 1.5), masked_noise_bound(3000, 1, 0.1, 1.5)
    assert 0 < exact < bound < 1
