"""htv.linear_grad beside the plain weight gradient, a matrix product of the same factors."""

import pytest
import torch

import htv

SHAPES = {  # groups, rows per group, inputs, outputs
    "mlp": (256, 1, 1024, 1024),
    "transformer": (16, 128, 256, 1024),
    "ragged": (16, None, 256, 256),
}
RULES = [htv.Mean(), htv.AndMask(0.4), htv.SignSum(), htv.Median(), htv.WinsorizedMean(1)]


@pytest.fixture(params=SHAPES)
def factors(request):
    torch.manual_seed(0)
    groups, rows, inputs, outputs = SHAPES[request.param]
    lengths = torch.randint(1, 100, (groups,)) if rows is None else torch.full((groups,), rows)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.randn(int(bounds[-1]), inputs), torch.randn(int(bounds[-1]), outputs), bounds


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_htv(benchmark, factors, rule):
    x, grad_output, bounds = factors
    benchmark(htv.linear_grad, x, grad_output, rule, cu_seqlens=bounds)


def test_plain_product(benchmark, factors):
    x, grad_output, _ = factors
    benchmark(lambda: grad_output.t() @ x)
