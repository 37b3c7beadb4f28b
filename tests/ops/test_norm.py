"""The sums of a normalisation's samples: the C++ op against its definition in float64."""

import pytest
import torch

from htv.ops import backend, reference
from htv.ops.norm import norm_sums

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 16, 64), (4, 33, 17), (1, 40, 1030), (2, 1, 2048), (5, 0, 3), (0, 4, 8), (2, 3, 0)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
cpp = pytest.mark.skipif(backend.NOT_BUILT is not None, reason="htv was built without compiled kernels")


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
    tensors = operands(shape, dtype)
    for got, by_torch, true in zip(
        torch.ops.htv.norm_sums(*tensors), reference.norm_sums(*tensors), exact(tensors), strict=True
    ):
        assert got.dtype == by_torch.dtype == reference.compute_dtype(dtype) and got.shape == true.shape
        if got.numel():
            allowed = 2 * (by_torch.double() - true).abs().max() + 4 * torch.finfo(got.dtype).eps * true.abs().max()
            assert (got.double() - true).abs().max() <= allowed


@cpp
def test_not_numbers_stay_where_they_are():
    grad, x, mean, rstd = operands((3, 20, 37))
    grad[1, 3, 5], x[2, 4, 6], grad[0, 0, 0], x[0, 1, 36] = torch.nan, torch.nan, torch.inf, -torch.inf
    for got, true in zip(torch.ops.htv.norm_sums(grad, x, mean, rstd), exact((grad, x, mean, rstd)), strict=True):
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
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_definition_serves_in_pieces(monkeypatch):
    tensors = operands((9, 50, 64))
    monkeypatch.setattr("htv.ops.norm.SCRATCH_BYTES", 2 * 50 * 64 * 4)
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
