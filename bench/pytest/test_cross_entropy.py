"""Forward and backward of the cross-entropy of shifted logits, beside torch's of the stored sum."""

import pytest
import torch
import torch.nn.functional as F

from htv.ops.cross_entropy import shifted_cross_entropy


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[(256, 10), (2048, 32000)], ids="{0[0]}x{0[1]}".format)
def operands(request, dtype):
    torch.manual_seed(0)
    rows, classes = request.param
    logits, shift = (torch.randn(rows, classes, dtype=dtype) for _ in range(2))
    return logits.requires_grad_(), torch.randint(0, classes, (rows,)), shift


def fused(logits, targets, shift):
    return shifted_cross_entropy(logits, targets, shift, temperature=0.5)


def stored(logits, targets, shift):
    return F.cross_entropy(logits + shift / 0.5, targets)


@pytest.mark.parametrize("function", [fused, stored], ids=["htv", "torch"])
def test_step(benchmark, operands, function):
    benchmark(lambda: torch.autograd.grad(function(*operands), operands[0]))
