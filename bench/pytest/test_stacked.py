"""Stacked statistics over (E, 1M) float32, beside torch's own median, mean and sort."""

import pytest
import torch

import htv
from htv.ops.functional import apply_rule

COORDINATES = 1 << 20
RULES = [htv.Mean(), htv.AndMask(0.4), htv.GeometricMean(0.4), htv.Median(), htv.WinsorizedMean(1)]


@pytest.fixture(params=[3, 8, 32], ids="E={}".format)
def grads(request):
    torch.manual_seed(0)
    return torch.randn(request.param, COORDINATES)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_htv(benchmark, grads, rule):
    benchmark(apply_rule, grads, rule)


@pytest.mark.parametrize(
    "function", [torch.mean, torch.median, torch.sort], ids=lambda f: f"torch.{f.__name__}"
)
def test_torch(benchmark, grads, function):
    benchmark(function, grads, dim=0)
