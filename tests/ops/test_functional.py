"""The public stacked functions, whatever backend serves them, against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import htv
from htv.ops import backend, functional, schema, statistics
from htv.rules import Statistic
from support.oracles import IDENTITIES, RULES, away_from_ties, by_name, stat

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["auto", "reference"]
NAMES = sorted(statistics.names())


def apply(grads, rule):
    return functional.apply_rule(grads, rule)


@pytest.fixture(params=BACKENDS, autouse=True)
def served_by(request):
    with backend.use_backend(request.param):
        yield


def test_public_functions_are_the_rules():
    grads = torch.randn(9, 4, 3)
    pairs = [
        (htv.and_mask(grads, 0.3), htv.AndMask(0.3)),
        (htv.and_mask(grads, 0.3, rescale=True), htv.AndMask(0.3, rescale=True)),
        (htv.xor_mask(grads, 0.3), htv.XorMask(0.3)),
        (htv.geometric_mean(grads, 0.3), htv.GeometricMean(0.3)),
        (htv.sand_mask(grads, 0.3, 2.0), htv.SandMask(0.3, 2.0)),
        (htv.median(grads), htv.Median()),
        (htv.median(grads, interpolation="lower"), htv.Median("lower")),
        (htv.median_of_means(grads, 3), htv.MedianOfMeans(3)),
        (htv.trimmed_mean(grads, 2), htv.TrimmedMean(2)),
        (htv.winsorized_mean(grads, 0.25), htv.WinsorizedMean(0.25)),
    ]
    for value, rule in pairs:
        assert value.shape == (4, 3) and torch.equal(value, apply(grads, rule)), rule
    agreement = np.abs(np.sign(grads.numpy()).sum(0)) / 9
    np.testing.assert_allclose(htv.sign_agreement(grads), agreement, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES, **by_name)
@given(
    groups=st.integers(3, 12),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_equals_the_definition(rule, groups, shape, seed):
    values = np.random.default_rng(seed).normal(size=(groups, *shape))
    found = apply(torch.from_numpy(values), rule)
    assert found.shape == tuple(shape)
    if values.size:
        np.testing.assert_allclose(found.numpy(), stat(rule, values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_every_dtype_is_as_exact_as_its_type(rule, dtype):
    """Inputs rounded to the type, so that only computation and result are left to round."""
    values = torch.randn(
        11, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    found = apply(values, rule)
    assert found.dtype == dtype
    expected = stat(rule, values.double().numpy())
    np.testing.assert_allclose(
        found.double().numpy(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_odd_and_invariant_to_the_order_of_groups(rule):
    values = torch.randn(10, 64, dtype=torch.float64)
    result = apply(values, rule)
    if rule in (htv.Median("lower"), htv.Median("higher")):  # mirror images of one another
        other = htv.Median("higher" if rule.interpolation == "lower" else "lower")
        torch.testing.assert_close(apply(-values, rule), -apply(values, other))
    else:
        torch.testing.assert_close(apply(-values, rule), -result, rtol=1e-12, atol=0)
    if not isinstance(rule, htv.MedianOfMeans):  # its buckets are made by position
        torch.testing.assert_close(
            apply(values[torch.randperm(10)], rule), result, rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize(
    "rule", [r for r in RULES if not isinstance(r, (htv.SandMask, htv.SignSum))], **by_name
)
def test_positively_homogeneous(rule):
    values = away_from_ties(
        10, 64, dtype=torch.float64
    )  # none so small that the geometric mean's 1e-10 shows
    torch.testing.assert_close(apply(8 * values, rule), 8 * apply(values, rule), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rule", IDENTITIES, **by_name)
def test_identity_anchors(rule):
    values = torch.randn(7, 50, dtype=torch.float64)
    torch.testing.assert_close(apply(values, rule), values.mean(0), rtol=1e-13, atol=1e-15)


def test_exact_ties_are_kept_and_zeros_dilute():
    votes = torch.tensor([[1.0] * 35 + [-1.0] * 15]).t()  # |35 - 15| = 20 = .4 * 50
    assert htv.and_mask(votes, 0.4).item() == pytest.approx(0.4)
    assert htv.xor_mask(votes, 0.4).item() == 0
    votes[0] = 0.0  # 19 < 20
    assert htv.and_mask(votes, 0.4).item() == 0
    assert htv.sign_agreement(votes).item() == pytest.approx(19 / 50)
    assert htv.sand_mask(torch.ones(5, 1) * 2, 1.0, 1.0).item() == pytest.approx(
        0, abs=1e-6
    )  # 0 / 0, as defined


def test_all_masked_is_zero_not_nan():
    grads = torch.tensor([[1.0], [-1.0]])
    for value in (
        htv.and_mask(grads, 0.5),
        htv.and_mask(grads, 0.5, rescale=True),
        htv.geometric_mean(grads, 0.5),
    ):
        assert value.item() == 0


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_nan_shows_and_stays_in_its_coordinate(rule):
    values = torch.randn(8, 40, dtype=torch.float64)
    poisoned = values.clone()
    poisoned[3, 17] = torch.nan
    found = apply(poisoned, rule)
    assert found[17].isnan() and found.isnan().sum() == 1


def test_inf_is_an_ordinary_extreme_value():
    grads = torch.tensor(
        [[torch.inf, 1.0], [2.0, -torch.inf], [3.0, 3.0], [-1.0, 4.0], [4.0, -1.0]]
    )
    assert htv.median(grads).tolist() == [3.0, 1.0]
    assert htv.trimmed_mean(grads, 1).tolist() == [3.0, 1.0]
    assert htv.winsorized_mean(grads, 1)[0].item() == pytest.approx((2 + 2 + 3 + 4 + 4) / 5)
    assert htv.and_mask(grads, 0.9).tolist() == [0.0, 0.0]  # masked, not NaN
    assert htv.and_mask(torch.full((3, 1), torch.inf), 1.0).item() == torch.inf


def test_midpoint_neither_overflows_nor_underflows():
    huge, tiny = torch.tensor([[3e38], [3e38]]), torch.tensor([[1e-45], [1e-45]])
    assert htv.median(huge).item() == huge[0].item() and htv.median(tiny).item() == tiny[0].item()


def test_medians_are_elements():
    values = torch.randn(8, 100).sort(dim=0).values[torch.randperm(8)]
    ranked = values.sort(dim=0).values
    assert torch.equal(htv.median(values, "lower"), ranked[3]) and torch.equal(
        htv.median(values, "higher"), ranked[4]
    )


def test_strides_do_not_matter():
    values = torch.randn(6, 5, 4).transpose(0, 2)
    assert not values.is_contiguous()
    for rule in RULES:
        assert torch.equal(apply(values, rule), apply(values.contiguous(), rule))


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, htv.SignSum)], **by_name)
def test_differentiable(rule):
    values = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    curved = lambda g: apply(g.pow(3), rule).square()  # no term of a second derivative is 0
    for function in (lambda g: apply(g, rule), curved):
        checks = {"check_forward_ad": True, "check_batched_grad": True}
        assert torch.autograd.gradcheck(function, values, **checks)
        assert torch.autograd.gradgradcheck(function, values)


def op_of(rule, groups):
    """The op below the public functions, (E, P) -> (P,)."""
    numbers = schema.numbers(rule.statistic(groups))
    return lambda g: torch.ops.htv.stacked(g, *numbers)[0]


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("public", [True, False], ids=["public", "op"])
def test_derivatives_of_every_kind_agree(public, rule):
    """Also where contributions tie or are 0."""
    function = (lambda g: apply(g, rule)) if public else op_of(rule, 7)
    normal = torch.randn(7, 6, dtype=torch.float64)
    for values in (normal, normal.round()):
        leaf, along = values.clone().requires_grad_(), torch.randn_like(values)
        curved = lambda g: function(g.pow(3) + g).square().sum()
        slope = torch.autograd.grad(curved(leaf), leaf, create_graph=True)[0]
        second = torch.zeros_like(leaf)
        if slope.requires_grad:
            second = torch.autograd.grad(slope, leaf, along)[0]
        torch.testing.assert_close(torch.func.grad(curved)(values), slope)
        along_it = lambda f, at=values, way=along: torch.func.jvp(f, (at,), (way,))[1]
        torch.testing.assert_close(along_it(curved), (slope * along).sum())
        torch.testing.assert_close(along_it(torch.func.grad(curved)), second)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(values, along)
            tangent = torch.autograd.forward_ad.unpack_dual(curved(dual)).tangent
        torch.testing.assert_close(tangent, (slope * along).sum())
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(curved)(values), slope)


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_mapped(rule):
    values = torch.randn(4, 7, 6, dtype=torch.float64)
    expected = torch.stack([apply(v, rule) for v in values])
    torch.testing.assert_close(torch.func.vmap(lambda g: apply(g, rule))(values), expected)
    slope = torch.func.grad(lambda g: apply(g, rule).square().sum())
    slopes = torch.stack([slope(v) for v in values])
    torch.testing.assert_close(torch.func.vmap(slope)(values), slopes)


def test_nan_made_by_infinities_surfaces():
    """No rank and no mask hides that inf - inf has no value."""
    inf = torch.inf
    grads = torch.tensor([[1.0, 1], [2, 2], [inf, inf], [-inf, 4], [3, 5], [4, 6]])
    found = htv.median_of_means(grads, 3)
    assert found[0].isnan() and not found[1].isnan()
    assert htv.sand_mask(grads, 0.1, 1.0).isnan().all()  # a variance of infinities
    assert htv.geometric_mean(grads, 0.0)[0].isnan()
    assert htv.and_mask(grads, 0.0)[0].isnan() and htv.and_mask(grads, 0.9)[0] == 0
    assert htv.trimmed_mean(grads, 0)[0].isnan() and htv.winsorized_mean(grads, 0)[0].isnan()
    middle = torch.tensor([[-inf], [-inf], [inf], [inf]])
    assert htv.median(middle).isnan() and htv.winsorized_mean(middle, 1).isnan()
    finite = htv.sand_mask(torch.tensor([[1.0, inf], [2.0, inf], [3.0, 1.0]]), 0.1, 1.0)
    assert finite[0].isfinite() and finite[1].isnan()  # stays in its coordinate


def test_sign_agreement_has_zero_derivative():
    values = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(htv.sign_agreement(values).sum(), values, allow_unused=True)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    statistic = Statistic(name, count=2 if name != "median" else 0, votes=1.5, k=0.5)
    values = torch.randn(6, 20).to(dtype)
    arguments = (schema.code(statistic.name), statistic.count, statistic.votes, statistic.k)
    torch.library.opcheck(torch.ops.htv.stacked.default, (values, *arguments))


def test_compiles_without_graph_breaks():
    values = torch.randn(5, 7, requires_grad=True)
    compiled = torch.compile(
        lambda g: htv.winsorized_mean(g, 1).square().sum(), backend="aot_eager", fullgraph=True
    )
    plain = htv.winsorized_mean(values, 1).square().sum()
    torch.testing.assert_close(compiled(values), plain)
    (found,) = torch.autograd.grad(compiled(values), values)
    torch.testing.assert_close(found, torch.autograd.grad(plain, values)[0])


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (torch.ones(3, 2, dtype=torch.long), TypeError, "floating point"),
        (torch.ones(3, 2, dtype=torch.cfloat), TypeError, "floating point"),
        (torch.ones(0, 2), ValueError, "E = 0"),
        (torch.tensor(1.0), ValueError, "dim 0"),
        ([[1.0]], TypeError, "tensor"),
    ],
)
def test_bad_grads(grads, error, message):
    for function in (htv.median, htv.sign_agreement, lambda g: htv.and_mask(g, 0.5)):
        with pytest.raises(error, match=message):
            function(grads)


def test_bad_counts():
    with pytest.raises(ValueError, match="trim=2"):
        htv.trimmed_mean(torch.randn(4, 2), 2)
    with pytest.raises(ValueError, match="tau"):
        htv.and_mask(torch.randn(4, 2), 1.5)
    with pytest.raises(ValueError, match="needs at least 5 groups"):
        htv.median_of_means(torch.randn(4, 2), 5)
