"""htv.linear_grad against contributions formed one group at a time in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import htv
from htv.ops import backend, limits
from support.oracles import RULES, away_from_ties, by_name, linear_contributions, stat


@pytest.fixture(params=["auto", "reference"], autouse=True)
def served_by(request):
    with backend.use_backend(request.param):
        yield


def expected(rule, x, grad_output, ids):
    contributions = linear_contributions(x, grad_output, ids)
    return len(contributions) * stat(rule, contributions)


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("rest", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_each_index_of_dim_0_votes(rule, rest):
    x, grad_output = (
        away_from_ties(9, *rest, 7, dtype=torch.float64),
        away_from_ties(9, *rest, 4, dtype=torch.float64),
    )
    found = htv.linear_grad(x, grad_output, rule)
    np.testing.assert_allclose(
        found, expected(rule, x, grad_output, range(9)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_ids_unsorted_and_unequal(rule):
    ids = torch.tensor([7, -2, 7, 7, 3, 3, -2, 9, 9, 9, 0, 7])
    x, grad_output = (
        torch.randn(12, 4, 6, dtype=torch.float64),
        torch.randn(12, 4, 5, dtype=torch.float64),
    )
    found = htv.linear_grad(x, grad_output, rule, groups=ids)
    np.testing.assert_allclose(found, expected(rule, x, grad_output, ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_packed_sequences(rule):
    bounds = [0, 3, 3, 4, 11, 13]
    ids = np.repeat(np.arange(5), np.diff(bounds))
    x, grad_output = (
        torch.randn(13, 6, dtype=torch.float64),
        torch.randn(13, 5, dtype=torch.float64),
    )
    found = htv.linear_grad(
        x, grad_output, rule, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )
    np.testing.assert_allclose(found, expected(rule, x, grad_output, ids), rtol=1e-9, atol=1e-9)


@given(
    shape=st.tuples(st.integers(3, 9), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    scratch=st.sampled_from([1, 64, 1000, 1 << 22]),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_in_any_slices(shape, scratch, rule):
    """The result does not depend on how the sliced path cuts the coordinates."""
    groups, rows, outputs, inputs = shape
    x, grad_output = away_from_ties(groups, rows, inputs), away_from_ties(groups, rows, outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SCRATCH_BYTES", scratch)
        found = htv.linear_grad(x, grad_output, rule)
    reference = expected(rule, x, grad_output, range(groups))
    if not isinstance(
        rule, (htv.SandMask, htv.GeometricMean)
    ):  # float32: their exponentials amplify rounding
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-4)
    assert found.shape == (outputs, inputs)


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(rule, dtype):
    """Odd multiples of 1/8 and their products are exact in every type here, so only the result is
    rounded.
    """
    x, grad_output = away_from_ties(8, 3, 33, dtype=dtype), away_from_ties(8, 3, 17, dtype=dtype)
    found = htv.linear_grad(x, grad_output, rule)
    assert found.dtype == dtype
    reference = expected(rule, x, grad_output, range(8))
    np.testing.assert_allclose(
        found.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=1e-5
    )


def test_exact_sign_ties():
    """50 groups of which 35 push up and 15 down, and a column nobody pushes."""
    x = torch.ones(50, 2)
    x[:, 1] = 0
    grad_output = torch.tensor([1.0] * 35 + [-1.0] * 15).reshape(50, 1)
    assert htv.linear_grad(x, grad_output, htv.AndMask(0.4)).tolist() == [[20.0, 0.0]]
    assert htv.linear_grad(x, grad_output, htv.XorMask(0.4)).tolist() == [[0.0, 0.0]]
    assert htv.linear_grad(x, grad_output, htv.AndMask(0.41)).tolist() == [[0.0, 0.0]]
    assert htv.linear_grad(x, grad_output, htv.SignSum()).tolist() == [[20.0, 0.0]]


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_nan_shows_in_its_rows_and_columns_only(rule):
    x, grad_output = torch.randn(8, 3, 6), torch.randn(8, 3, 5)
    x[2, 1, 4] = torch.nan
    grad_output[5, 0, 3] = torch.nan
    nan = htv.linear_grad(x, grad_output, rule).isnan()
    assert nan[:, 4].all() and nan[3].all() and nan.sum() == 5 + 6 - 1


def test_zero_times_infinity_is_nan():
    x, grad_output = torch.tensor([[0.0], [1.0]]), torch.tensor([[torch.inf], [1.0]])
    for rule in (htv.Mean(), htv.AndMask(1.0), htv.Median(), htv.SignSum()):
        assert htv.linear_grad(x, grad_output, rule).isnan().all()


def test_mean_is_the_plain_gradient():
    x, grad_output = torch.randn(6, 4, 7), torch.randn(6, 4, 5)
    torch.testing.assert_close(
        htv.linear_grad(x, grad_output, htv.Mean()), torch.einsum("nto,nti->oi", grad_output, x)
    )


def test_splitting_groups_into_more_rows_changes_nothing():
    x, grad_output = (
        torch.randn(6, 8, 5, dtype=torch.float64),
        torch.randn(6, 8, 4, dtype=torch.float64),
    )
    ids = torch.arange(6).repeat_interleave(4)
    for rule in RULES:
        whole = htv.linear_grad(x, grad_output, rule)
        split = htv.linear_grad(
            x.reshape(24, 2, 5), grad_output.reshape(24, 2, 4), rule, groups=ids
        )
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)


def test_strides_and_graphs_do_not_matter():
    x = torch.randn(9, 7)[:, ::2].requires_grad_()
    grad_output = torch.randn(5, 9).t()
    for rule in RULES:
        found = htv.linear_grad(x, grad_output, rule)
        assert not found.requires_grad
        assert torch.equal(
            found, htv.linear_grad(x.detach().contiguous(), grad_output.contiguous(), rule)
        )


def test_sizes_of_zero():
    for inputs, outputs in itertools.product([0, 3], repeat=2):
        found = htv.linear_grad(torch.randn(4, inputs), torch.randn(4, outputs), htv.AndMask(0.5))
        assert found.shape == (outputs, inputs)


def test_one_group_is_the_plain_sum():
    x, grad_output = torch.randn(1, 4, 3), torch.randn(1, 4, 2)
    for rule in (htv.AndMask(1.0), htv.Median(), htv.TrimmedMean(0), htv.MedianOfMeans(1)):
        torch.testing.assert_close(htv.linear_grad(x, grad_output, rule), grad_output[0].t() @ x[0])


@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.Median(), htv.GeometricMean(0.4)], **by_name
)
def test_contributions_are_never_formed(rule):
    """256 groups of 256 x 256 outputs would take 64 MiB; the largest tensor made is the result
    or the scratch.
    """
    x, grad_output = torch.randn(256, 256), torch.randn(256, 256)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch():
        htv.linear_grad(x, grad_output, rule)
    assert (
        largest <= 8 * limits.SCRATCH_BYTES
    )  # sorting by the reference keeps int64 indices beside the values


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 3, dtype=torch.long)}, TypeError, "x must be a floating-point"),
        ({"grad_output": None}, TypeError, "grad_output must be"),
        ({"rule": "median"}, TypeError, "rule must be"),
        ({"x": torch.randn(5, 3)}, ValueError, "equal leading dims"),
        ({"x": torch.randn(3)}, ValueError, "equal leading dims"),
        ({"x": torch.randn(4, 3, dtype=torch.float64)}, TypeError, "share dtype"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, ValueError, "groups has 3 ids"),
        ({"groups": torch.zeros(4)}, ValueError, "integer"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "falls"),
        (
            {"groups": torch.zeros(4, dtype=torch.long), "cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            "not both",
        ),
        ({"x": torch.randn(0, 3), "grad_output": torch.randn(0, 2)}, ValueError, "empty"),
        ({"rule": htv.TrimmedMean(2)}, ValueError, "use at most 1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "x": torch.randn(4, 3),
        "grad_output": torch.randn(4, 2),
        "rule": htv.Median(),
    } | change
    with pytest.raises(error, match=message):
        htv.linear_grad(**arguments)
