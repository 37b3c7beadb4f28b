"""What the Triton kernels of `stacked` must do, wherever they can run, without pytest."""

import math

import torch
from triton_table import DEVICE, assert_same, statistics

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import stacked


def make(groups, coordinates, dtype=torch.float32, seed=0):
    """Integers: ties and zeros are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(groups, coordinates, generator=generator) * 2).round().to(dtype).to(DEVICE)


def check(grads, statistic):
    assert_same(
        stacked.stacked(grads, statistic), reference.stacked(grads.double(), statistic), statistic
    )


def extreme_values_hold(groups):
    grads = make(groups, 64)
    grads[0, 0] = math.nan
    grads[0, 1] = math.inf
    grads[0, 2], grads[1, 2] = math.inf, -math.inf
    grads[:3, 3], grads[3, 3] = math.inf, -math.inf
    grads[:, 4], grads[:, 5], grads[0, 6] = math.inf, -0.0, 3e38
    grads[1, 7], grads[:, 8] = 1e-42, torch.linspace(-1e-40, 1e-40, groups)
    for statistic in statistics(groups):
        check(grads, statistic)


def every_statistic_holds(groups, dtype):
    grads = make(groups, 131, dtype)
    for statistic in [*statistics(groups), Statistic("sign_agreement")]:
        check(grads, statistic)
