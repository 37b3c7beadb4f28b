"""What the Triton kernels of `linear` must do, wherever they can run, without pytest."""

import math

import torch
from triton_table import DEVICE, assert_same

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import configs, linear
from support import budgets

SMALL = configs.Config(32, 32, 16, 2, num_warps=4, num_stages=2)
NAMES = ("mean", "and_mask", "xor_mask", "sign_sum")
ALL = [Statistic(name, 2) for name in NAMES] + [
    Statistic("geometric_mean", 2),
    Statistic("sand_mask", votes=1.0, k=0.5),
    Statistic("median"),
    Statistic("trimmed_mean", 1),
    Statistic("winsorized_mean", 1),
    Statistic("median_of_means", 2),
]
SHAPES = {  # rows per group, O, I
    "ragged": ([3, 1, 17, 40], 70, 130),
    "one row per group": ([1] * 5, 33, 17),
    "one group": ([50], 20, 64),
    "empty groups": ([0, 4, 0, 2, 0], 8, 9),
    "no rows": ([0, 0], 3, 4),
    "one coordinate": ([2, 3, 1], 1, 1),
    "whole blocks": ([16, 32, 16], 128, 64),
}


def make(sizes, O, I, dtype=torch.float32, integers=True, seed=0):
    """x (R, I), grad_output (R, O), offsets (E + 1,). Integers make every sum exact, and ties and
    zeros frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(sum(sizes), n, generator=generator).to(dtype) for n in (I, O))
    if integers:
        x, g = x.round(), g.round()
    return x.to(DEVICE), g.to(DEVICE), torch.tensor([0, *sizes]).cumsum(0)


def check(x, g, offsets, statistic, choice=None):
    found = linear.linear(x, g, offsets, statistic, choice)
    assert_same(
        found,
        reference.linear(x.double(), g.double(), offsets, statistic),
        statistic,
        scale=len(offsets),
    )
    return found[0]


def assert_nan_poisons_its_column(group, statistic, dtype):
    x, g, offsets = make([4, 5, 1, 6], 20, 20, dtype)
    x[offsets[group], 7] = math.nan
    for splits in (1, 2):
        if splits == 1 or not statistic.name.endswith("ed_mean"):
            value = check(x, g, offsets, statistic, (SMALL, splits))
            assert value[:, 7].isnan().all() and value.isnan().sum() == len(value)


def inf_is_an_ordinary_extreme(statistic):
    x, g, offsets = make([4, 5, 1, 6], 20, 20)
    g = g.sign() + (g == 0)  # no 0 * inf
    x[0, 3] = math.inf
    x[0, 4], x[5, 4] = math.inf, -math.inf  # may meet in the sum, though no contribution is NaN
    check(x, g, offsets, statistic)


def assert_rows_outside_the_groups_are_not_read(statistic):
    x, g, offsets = make([5, 3, 20, 4, 9, 7], 10, 12)
    x[:5], x[-7:], g[:5], g[-7:] = math.inf, math.nan, math.nan, math.inf
    assert check(x, g, offsets[1:-1], statistic).isfinite().all()


def assert_rounding_is_bounded(statistic, dtype):
    """Within what the factors' roundings may come to, wherever no sign is in doubt."""
    x, g, offsets = make([60, 3, 33, 100, 31], 40, 50, dtype, integers=False)
    exact, _ = reference.linear(x.double(), g.double(), offsets, statistic)
    budget, clear = budgets.linear_budget(x, g, offsets, statistic, torch.float32)
    assert clear.double().mean() > 0.9
    value, _ = linear.linear(x, g, offsets, statistic)
    assert ((value.double() - exact).abs() <= budget)[clear].all()
    assert torch.equal(value, linear.linear(x, g, offsets, statistic)[0])


def assert_ties_and_zeros_count():
    x = torch.tensor(
        [[1.0], [1.0], [1.0], [-1.0], [0.0]], device=DEVICE
    )  # signs 3 to 1, one zero: net 2
    g = torch.ones(5, 1, device=DEVICE)
    offsets = torch.arange(6)
    kept = [check(x, g, offsets, Statistic("and_mask", count)).item() for count in (1, 2, 3)]
    dropped = [check(x, g, offsets, Statistic("xor_mask", count)).item() for count in (1, 2, 3)]
    assert kept == [2, 2, 0] and dropped == [0, 0, 2]
    assert check(x, g, offsets, Statistic("sign_sum")).item() == 2


def assert_no_votes_needed_is_the_plain_gradient():
    x, g, offsets = make([5, 6, 7], 30, 40, integers=False)
    value, mask_sum = linear.linear(x, g, offsets, Statistic("and_mask", 0))
    for same in (Statistic("mean"), Statistic("winsorized_mean", 0), Statistic("trimmed_mean", 0)):
        assert torch.equal(value, linear.linear(x, g, offsets, same)[0])
    assert mask_sum == 30 * 40
    torch.testing.assert_close(value, g.T @ x, rtol=1e-5, atol=1e-5)
