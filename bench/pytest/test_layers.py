"""Forward and backward of one attached layer, beside the plain one."""

import pytest
import torch
from torch import nn

import htv

LAYERS = {  # module, input
    "conv 3x3": (lambda: nn.Conv2d(64, 128, 3, padding=1), lambda: torch.randn(16, 64, 28, 28)),
    "conv 3x3, few positions": (
        lambda: nn.Conv2d(256, 256, 3, padding=1),
        lambda: torch.randn(32, 256, 4, 4),
    ),
    "conv 1x1": (lambda: nn.Conv2d(128, 256, 1), lambda: torch.randn(16, 128, 28, 28)),
    "depthwise 7x7": (
        lambda: nn.Conv2d(192, 192, 7, padding=3, groups=192),
        lambda: torch.randn(16, 192, 14, 14),
    ),
    "embedding": (lambda: nn.Embedding(5000, 256), lambda: torch.randint(0, 5000, (16, 256))),
    "layer norm": (lambda: nn.LayerNorm(512), lambda: torch.randn(16, 256, 512)),
}
RULES = [None, htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule) if rule else "plain")
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark, layer, rule):
    torch.manual_seed(0)
    make, batch = LAYERS[layer]
    module, x = make(), batch()
    if rule is not None:
        htv.attach(module, rule)
    grad_output = torch.randn_like(module(x))

    def step():
        module.zero_grad(set_to_none=True)
        module(x).backward(grad_output)

    benchmark(step)
    assert all(p.grad is not None for p in module.parameters())
