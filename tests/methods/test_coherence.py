"""m-coherence and its identities, the percentiles of winsorized gradient descent, the
generalisation bound.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import htv
from htv.methods import M3, Coherence, generalisation_bound, measure_coherence, winsorized


def winsorized_by_numpy(grads: np.ndarray, c: float) -> np.ndarray:
    low, high = np.percentile(grads, [c, 100 - c], axis=0, method="nearest")
    return np.clip(grads, low, high).mean(0)


def stat(rule: htv.Rule, grads: np.ndarray) -> np.ndarray:
    """The rule's value by the path a training step takes: one row per group of a linear layer,
    divided by E.
    """
    x = torch.from_numpy(grads).double()
    return (
        htv.linear_grad(x, torch.ones(len(x), 1, dtype=torch.float64), rule)[0] / len(x)
    ).numpy()


@settings(deadline=None, max_examples=150)
@given(
    e=st.integers(1, 130),
    c=st.sampled_from([0, 0.5, 1, 2, 4, 8, 12.5, 25, 33, 40, 49]),
    seed=st.integers(0, 99),
)
def test_percentiles_are_numpys_nearest(e, c, seed):
    rank = c * (e - 1) / 100
    if e % 2 == 0 and rank % 1 == 0.5:
        return  # there NumPy clips one side by one value more
    grads = np.random.default_rng(seed).normal(size=(e, 3))
    np.testing.assert_allclose(
        stat(winsorized(c), grads), winsorized_by_numpy(grads, c), atol=1e-12
    )


def test_percentiles_as_the_paper_has_them():
    hundred, thirty_two = (np.random.default_rng(0).normal(size=(e, 4)) for e in (100, 32))
    for c in (1, 2, 4, 8):
        ranked = np.sort(hundred, axis=0)
        clipped = np.clip(hundred, ranked[c], ranked[-1 - c]).mean(
            0
        )  # the (c + 1)-th smallest and largest
        np.testing.assert_allclose(stat(winsorized(c), hundred), clipped, atol=1e-12)
    np.testing.assert_allclose(stat(winsorized(1), thirty_two), thirty_two.mean(0), atol=1e-12)
    assert not np.allclose(stat(winsorized(2), thirty_two), thirty_two.mean(0), atol=1e-6)


def test_the_ends_are_mean_and_median():
    assert winsorized(0) == htv.Mean() and winsorized(0.0) == htv.Mean()
    for e in (1, 2, 7, 8):
        grads = np.random.default_rng(e).normal(size=(e, 5))
        np.testing.assert_allclose(
            stat(winsorized(50), grads), np.median(grads, axis=0), atol=1e-12
        )


def test_halves_stay_odd():
    grads = np.random.default_rng(0).normal(size=(26, 5))  # 2 % of 25 is half a rank
    np.testing.assert_allclose(stat(winsorized(2), -grads), -stat(winsorized(2), grads), atol=1e-15)


@pytest.mark.parametrize("c", [-1, 50.5, float("nan"), 100])
def test_percentiles_out_of_range_are_refused(c):
    with pytest.raises(ValueError, match=r"percentile must lie in \[0, 50\]"):
        winsorized(c)


@pytest.mark.parametrize("c", [True, "2", None])
def test_percentiles_that_are_no_numbers_are_refused(c):
    with pytest.raises(TypeError, match="percentile must be a number"):
        winsorized(c)


def test_m3_is_the_median_of_the_means_of_thirds():
    grads = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(
        stat(M3, grads), np.median(grads.reshape(3, 3, 4).mean(1), axis=0), atol=1e-12
    )
    active = np.zeros((9, 1))
    active[4:6] = 5.0  # a coordinate active in only one of three groups
    assert stat(M3, active) == 0


# -- identities of m-coherence ---------------------------------------------------------------------


def drawn(m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64) + 0.3


def test_alpha_is_the_ratio_of_expected_inner_products():
    grads = drawn(12, 5)
    products = grads @ grads.t()
    assert Coherence.of(grads).alpha == pytest.approx(
        (products.mean() / products.diagonal().mean()).item()
    )
    assert Coherence.of(grads).m_coherence == pytest.approx(12 * Coherence.of(grads).alpha)


def test_anchors():
    eye = torch.eye(7, dtype=torch.float64)
    assert Coherence.of(3 * eye).m_coherence == pytest.approx(1)
    assert Coherence.of(drawn(1, 4).expand(9, 4)).m_coherence == pytest.approx(9)
    opposed = torch.cat([eye, -0.9 * eye])
    assert Coherence.of(opposed).m_coherence < 1
    zero = Coherence.of(torch.zeros(3, 2))
    assert math.isnan(zero.alpha) and math.isnan(zero.m_coherence)


@pytest.mark.parametrize("k", [-2.0, 1e-3, 100.0])
def test_scale_does_not_matter(k):
    assert Coherence.of(k * drawn(8, 5)).alpha == pytest.approx(Coherence.of(drawn(8, 5)).alpha)


@pytest.mark.parametrize("k", [2, 3])
def test_means_of_minibatches(k):
    grads = drawn(6, 4)
    tuples = torch.cartesian_prod(*[torch.arange(6)] * k)  # every draw of k with replacement, once
    assert Coherence.of(grads[tuples].mean(1)).alpha == pytest.approx(
        Coherence.of(grads).of_minibatches(k)
    )
    assert Coherence.of(grads).of_minibatches(1) == pytest.approx(Coherence.of(grads).alpha)


def test_a_share_of_zeros_scales_alpha():
    grads = drawn(6, 4)
    padded = torch.cat([grads, torch.zeros(9, 4, dtype=torch.float64)])
    assert Coherence.of(padded).alpha == pytest.approx(6 / 15 * Coherence.of(grads).alpha)
    assert Coherence.of(padded).m_coherence == pytest.approx(Coherence.of(grads).m_coherence)


def test_blocks_of_coordinates_are_averaged_by_energy():
    one, two = Coherence.of(drawn(6, 4)), Coherence.of(5 * drawn(6, 3, seed=1))
    whole = Coherence.of(torch.cat([drawn(6, 4), 5 * drawn(6, 3, seed=1)], dim=1))
    assert (one + two).alpha == pytest.approx(whole.alpha)
    weighted = (one.energy * one.alpha + two.energy * two.alpha) / (one.energy + two.energy)
    assert whole.alpha == pytest.approx(weighted)
    with pytest.raises(ValueError, match="same examples"):
        one + Coherence.of(drawn(5, 3))


# -- measured on models ----------------------------------------------------------------------------


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5),
    ).double()  # fmt: skip


class Tied(nn.Module):
    """An embedding that is the output layer too: uses of several kinds meet in one parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.double()

    def forward(self, ids):
        return F.linear(torch.tanh(self.mix(self.table(ids).mean(1))), self.table.weight)


def task(kind: str, count: int = 23):
    generator = torch.Generator().manual_seed(3)
    if kind == "convnet":
        x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
        return convnet(), x, torch.randint(0, 5, (count,), generator=generator)
    ids = torch.randint(0, 11, (count, 4), generator=generator)
    return Tied(), ids, torch.randint(0, 11, (count,), generator=generator)


def measured(model, x, y, batch_size):
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    losses = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return measure_coherence(model, batches, losses)


def one_by_one(model, x, y) -> dict[str, torch.Tensor]:
    grads = [
        torch.autograd.grad(
            F.cross_entropy(model(x[e : e + 1]), y[e : e + 1]), list(model.parameters())
        )
        for e in range(len(x))
    ]
    return {
        name: torch.stack([g[i] for g in grads])
        for i, (name, _) in enumerate(model.named_parameters())
    }


@pytest.mark.parametrize("kind", ["convnet", "tied"])
@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_a_data_set_streams(kind, batch_size):
    model, x, y = task(kind)
    found = measured(model, x, y, batch_size)
    expected = {name: Coherence.of(grads) for name, grads in one_by_one(model, x, y).items()}
    assert found.parameters.keys() == expected.keys()
    for name, coherence in expected.items():
        assert found.parameters[name].count == 23
        assert found.parameters[name].m_coherence == pytest.approx(
            coherence.m_coherence, rel=1e-8
        ), name
        assert found.parameters[name].energy == pytest.approx(coherence.energy, rel=1e-8), name
    whole = Coherence.of(torch.cat([g.flatten(1) for g in one_by_one(model, x, y).values()], dim=1))
    assert found.total.alpha == pytest.approx(whole.alpha, rel=1e-8)
    assert 0 < found.total.alpha < 1


def test_layers_join_weight_and_bias():
    model, x, y = task("convnet")
    found = measured(model, x, y, 8)
    assert list(found.layers) == ["0", "1", "4", "7"]
    assert found.layers["7"] == found.parameters["7.weight"] + found.parameters["7.bias"]


def test_measuring_leaves_the_model_as_it_was():
    model, x, y = task("convnet")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    measured(model, x, y, 8)
    assert "forward" not in vars(model) and all(
        bool((p.grad == 1).all()) for p in model.parameters()
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        measured(model, x, y, 8)  # gradients are turned on where they are needed


def test_frozen_and_excluded_parameters_are_left_out():
    model, x, y = task("convnet")
    model[0].weight.requires_grad_(False)
    batches = [(x, y)]
    losses = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    found = measure_coherence(model, batches, losses, exclude="7")
    assert list(found.parameters) == ["0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]
    with pytest.raises(ValueError, match="no parameter to measure"):
        measure_coherence(model, batches, losses, exclude="*")


def test_what_is_no_loss_per_example_is_refused():
    model, x, y = task("convnet")
    with pytest.raises(ValueError, match=r'got shape \(\): pass reduction="none"'):
        measure_coherence(model, [(x, y)], lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(ValueError, match="returned 2 losses, but parameter .* saw 23 examples"):
        measure_coherence(
            model,
            [(x, y)],
            lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")[:2],
        )
    with pytest.raises(ValueError, match="batches is empty"):
        measure_coherence(model, [], lambda batch: None)
    with pytest.raises(ValueError, match="losses did not run `model`"):
        losses = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        measure_coherence(copy.deepcopy(model), [(x, y)], losses)
    assert "forward" not in vars(model)


def test_attached_models_are_measured_as_copies():
    model, x, y = task("convnet")
    expected = measured(model, x, y, 8).total
    with htv.attach(model, htv.Median()):
        with pytest.raises(RuntimeError, match="attached already"):
            measured(model, x, y, 8)
        assert measured(copy.deepcopy(model), x, y, 8).total == expected


# -- the bound -------------------------------------------------------------------------------------


def test_the_bound_is_the_formula():
    alphas, etas, lipschitz, smoothness, m = [0.9, 0.2, 0.5], [0.1, 0.2, 0.05], 1.5, 2.0, 50
    expected = 0.0
    for t in range(3):
        growth = math.prod(1 + etas[k] * smoothness for k in range(t + 1, 3))
        expected += growth * etas[t] * math.sqrt(2 * (1 - alphas[t]))
    found = generalisation_bound(alphas, etas, lipschitz, smoothness, m)
    assert found == pytest.approx(lipschitz**2 / m * expected)
    assert generalisation_bound([1.0, 1.0], [0.1, 0.1], 1.0, 1.0, 5) == 0
    assert generalisation_bound([], [], 1.0, 1.0, 5) == 0
    assert generalisation_bound([0.0] * 2000, [1.0] * 2000, 1.0, 9.0, 5) == math.inf
    assert generalisation_bound([1.0] * 2000, [1.0] * 2000, 1.0, 9.0, 5) == 0
    assert generalisation_bound([0.0, *[1.0] * 2000], [0.0, *[1.0] * 2000], 1.0, 9.0, 5) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": [30.0, 0.1]}, r"alphas must lie in \[0, 1\]"),
        ({"alphas": [0.1]}, "one length"),
        ({"learning_rates": [0.1, -0.1]}, "learning_rates"),
        ({"learning_rates": [0.1, math.inf]}, "learning_rates"),
        ({"smoothness": -1.0}, "smoothness"),
        ({"lipschitz": float("nan")}, "lipschitz"),
        ({"examples": 0}, "examples"),
    ],
)
def test_the_bound_refuses_what_it_is_not_defined_for(change, message):
    good = dict(
        alphas=[0.1, 0.1], learning_rates=[0.1, 0.1], lipschitz=1.0, smoothness=1.0, examples=5
    )
    with pytest.raises(ValueError, match=message):
        generalisation_bound(**{**good, **change})
