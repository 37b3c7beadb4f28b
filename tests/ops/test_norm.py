"""What normalisations' backward needs: the C++ ops against their definitions in float64, and those
against autograd.
"""

import pytest
import torch

from htv.ops import backend, reference
from htv.ops.norm import group_norm_backward, norm_sums
from support import budgets

SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (2, 16, 64),
    (4, 33, 17),
    (1, 40, 1030),
    (2, 1, 2048),
    (5, 0, 3),
    (0, 4, 8),
    (2, 3, 0),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
cpp = pytest.mark.skipif(
    backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
)


def operands(shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    wide = reference.compute_dtype(dtype)
    x, grad = torch.randn(shape).mul(3).add(1).to(dtype), torch.randn(shape).to(dtype)
    return grad, x, torch.randn(shape[:2], dtype=wide), torch.rand(shape[:2], dtype=wide).add(0.5)


def exact(tensors):
    return reference.norm_sums(*(t.double() for t in tensors))


@cpp
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "icelake", "zen4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, level, monkeypatch):
    monkeypatch.setenv("HTV_CPU_CAPABILITY", level)
    grad, x, mean, rstd = tensors = operands(shape, dtype)
    moments = mean.unsqueeze(2), rstd.unsqueeze(2)
    grad, x, mean, rstd = (t.double().abs() for t in (grad, x, *moments))
    sizes = (grad * (x + mean) * rstd).sum(dim=1), grad.sum(dim=1)  # of what is summed
    found = torch.ops.htv.norm_sums(*tensors)
    for got, true, size in zip(found, exact(tensors), sizes, strict=True):
        assert got.dtype == reference.compute_dtype(dtype) and got.shape == true.shape
        allowed = torch.finfo(got.dtype).eps * budgets.growth(shape[1]) * size
        assert ((got.double() - true).abs() <= allowed).all()


@cpp
def test_not_numbers_stay_where_they_are():
    grad, x, mean, rstd = operands((3, 20, 37))
    grad[1, 3, 5], x[2, 4, 6], grad[0, 0, 0], x[0, 1, 36] = (
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    for got, true in zip(
        torch.ops.htv.norm_sums(grad, x, mean, rstd), exact((grad, x, mean, rstd)), strict=True
    ):
        torch.testing.assert_close(got.double(), true, equal_nan=True, rtol=1e-5, atol=1e-4)
    assert torch.ops.htv.norm_sums(grad, x, mean, rstd)[0].isnan().sum() == 2


@cpp
def test_zeros_give_exact_zeros():
    grad, x, mean, rstd = operands((3, 20, 37))
    for sums in torch.ops.htv.norm_sums(grad * -0.0, x, mean, rstd):
        assert (sums == 0).all()


@cpp
def test_results_do_not_depend_on_threads():
    tensors, threads = operands((7, 300, 513)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.htv.norm_sums(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_the_definition_serves_in_pieces(monkeypatch):
    tensors = operands((9, 50, 64))
    monkeypatch.setattr("htv.ops.limits.SCRATCH_BYTES", 2 * 50 * 64 * 4)
    with backend.use_backend("reference"):
        got = norm_sums(*tensors)
    for a, b in zip(got, reference.norm_sums(*tensors), strict=True):
        torch.testing.assert_close(a, b)


@cpp
def test_operands_that_do_not_fit():
    grad, x, mean, rstd = operands((2, 3, 4))
    for bad in (
        (grad[0], x[0], mean, rstd),
        (grad.double(), x, mean, rstd),
        (grad.transpose(1, 2), x, mean, rstd),
        (grad[:1], x, mean, rstd),
        (grad, x, mean.double(), rstd),
        (grad, x, mean, rstd[:, :2]),
        (grad, x, mean.flatten(), rstd),
    ):
        with pytest.raises(RuntimeError, match="htv::norm_sums"):
            torch.ops.htv.norm_sums(*bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype):
    torch.library.opcheck(torch.ops.htv.norm_sums.default, operands((3, 5, 7), dtype))


GROUP_SHAPES = [  # (samples, channels, *space), groups
    ((3, 8, 5, 7), 4),
    ((2, 6, 16), 1),
    ((2, 6, 33), 6),
    ((4, 32, 2, 2), 2),
    ((2, 12, 1), 3),
    ((1, 4, 3, 2, 3), 2),
    ((0, 4, 3), 2),
    ((2, 4, 0), 2),
    ((2, 12), 2),
]


def group_norm_operands(shape, groups, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    x, grad = torch.randn(shape).mul(3).add(1).to(dtype), torch.randn(shape).to(dtype)
    wide = x.to(reference.compute_dtype(dtype)).flatten(1).unflatten(1, (groups, -1))
    mean, rstd = (
        wide.mean(dim=2),
        (wide.square().mean(dim=2) - wide.mean(dim=2).square() + 1e-5).rsqrt(),
    )
    return grad, x, torch.randn(shape[1], dtype=wide.dtype), mean, rstd


def exact_group_norm(grad, x, weight, mean, rstd, needs_x=True):
    return reference.group_norm_backward(
        *(t.double() for t in (grad, x, weight, mean, rstd)), needs_x
    )


@pytest.mark.parametrize("shape, groups", GROUP_SHAPES[:6], ids=str)
def test_the_definition_is_autograds_of_every_sample(shape, groups):
    grad, x, weight, mean, rstd = (
        t.double() for t in group_norm_operands(shape, groups, torch.float64)
    )
    grad_x, *affine = exact_group_norm(grad, x, weight, mean, rstd)
    for s in range(shape[0]):
        leaves = [
            t.clone().requires_grad_() for t in (x[s : s + 1], weight, torch.zeros_like(weight))
        ]
        y = torch.nn.functional.group_norm(leaves[0], groups, *leaves[1:], eps=1e-5)
        for got, true in zip(
            (grad_x[s], *(a[s] for a in affine)),
            torch.autograd.grad(y, leaves, grad[s : s + 1]),
            strict=True,
        ):
            torch.testing.assert_close(got, true.reshape(got.shape))


@cpp
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "icelake", "zen4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", GROUP_SHAPES, ids=str)
def test_group_norm_kernel(shape, groups, dtype, level, monkeypatch):
    monkeypatch.setenv("HTV_CPU_CAPABILITY", level)
    operands = group_norm_operands(shape, groups, dtype)
    true = exact_group_norm(*operands)
    for got, want in zip(torch.ops.htv.group_norm_backward(*operands, True), true, strict=True):
        assert got.dtype == reference.compute_dtype(dtype) and got.shape == want.shape
        if got.numel():
            torch.testing.assert_close(
                got.double(), want, rtol=1e-5, atol=2e-6 * want.abs().max().item()
            )
    without = torch.ops.htv.group_norm_backward(*operands, False)
    assert without[0].shape == (0, *operands[1].shape[1:])
    for got, want in zip(without[1:], true[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_whoever_serves_a_group_norm(memory_format, affine, dtype):
    shape, groups = (3, 8, 5, 7), 4
    grad, x, weight, mean, rstd = group_norm_operands(shape, groups, dtype)
    grad, x = grad.to(memory_format=memory_format), x.to(memory_format=memory_format)
    true = exact_group_norm(grad, x, weight if affine else torch.ones_like(weight), mean, rstd)
    rtol = 1e-4 if dtype.itemsize > 2 else 2e-2
    given = (grad, x, weight.to(dtype) if affine else None, mean.to(dtype), rstd.to(dtype))
    for name in ("auto", "reference"):
        with backend.use_backend(name):
            got = group_norm_backward(*given, True)
            assert got[0].dtype == dtype and got[0].shape == x.shape
            for a, b in zip(got, true, strict=True):
                torch.testing.assert_close(
                    a.double(), b.reshape(a.shape), rtol=rtol, atol=rtol * b.abs().max().item()
                )
            assert group_norm_backward(*given, False)[0] is None


@cpp
@pytest.mark.parametrize("space", [3, 40])
def test_group_norm_keeps_what_is_no_number_in_its_group(space):
    grad, x, weight, mean, rstd = group_norm_operands((3, 8, space), 4)
    grad[1, 3, 1], x[2, 4, 2] = torch.nan, torch.inf
    grad_x, scale, shift = torch.ops.htv.group_norm_backward(grad, x, weight, mean, rstd, True)
    for got, true in zip(
        (grad_x, scale, shift), exact_group_norm(grad, x, weight, mean, rstd), strict=True
    ):
        torch.testing.assert_close(got.double(), true, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert (
        not grad_x[1, 2:4].isfinite().any()
        and grad_x.isfinite().flatten(1).sum() == (3 * 8 - 4) * space
    )


@cpp
def test_group_norm_does_not_depend_on_threads():
    operands, threads = group_norm_operands((9, 64, 200), 8), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.htv.group_norm_backward(*operands, True))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@cpp
def test_group_norm_operands_that_do_not_fit():
    grad, x, weight, mean, rstd = group_norm_operands((2, 6, 4), 3)
    for bad in (
        (grad[0, 0], x[0, 0], weight, mean, rstd),
        (grad[..., :2], x, weight, mean, rstd),
        (grad.double(), x, weight, mean, rstd),
        (grad[:1], x, weight, mean, rstd),
        (grad, x, weight[:5], mean, rstd),
        (grad, x, weight.double(), mean, rstd),
        (grad, x, weight, mean[:, :2], rstd),
        (grad, x, weight, mean[:1], rstd[:1]),
        (grad, x, weight, mean[:, :0], rstd[:, :0]),
        (
            grad,
            x,
            weight,
            mean.repeat(1, 2)[:, :4].contiguous(),
            rstd.repeat(1, 2)[:, :4].contiguous(),
        ),
    ):
        with pytest.raises(RuntimeError, match="htv::group_norm_backward"):
            torch.ops.htv.group_norm_backward(*bad, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs_x", [True, False])
def test_group_norm_contract(dtype, needs_x):
    operands = group_norm_operands((3, 8, 7), 4, dtype)
    torch.library.opcheck(torch.ops.htv.group_norm_backward.default, (*operands, needs_x))
