"""What the Triton kernels of `stacked` must do. Not collected by its name: see
`test_interpreted.py`.
"""

import math

import pytest
import torch
from stacked_table import check, every_statistic_holds, extreme_values_hold, make
from triton_cases import DTYPES, slow, statistics

from htv.rules import Statistic
from htv.triton_kernels import stacked

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf


# Interpreting the network of 33 values takes as long as all the others.
@pytest.mark.parametrize("dtype", [torch.float32, *map(slow, DTYPES[1:])], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 5, 16, slow(33)])
def test_every_statistic(groups, dtype):
    every_statistic_holds(groups, dtype)


def test_half_precision():
    every_statistic_holds(5, torch.bfloat16)


@pytest.mark.parametrize("groups", [4, slow(7)])
def test_more_values_than_are_sorted(groups, monkeypatch):
    monkeypatch.setattr(stacked, "MOST_SORTED", 2)
    grads = make(groups, 70)
    grads[3, 1], grads[1, 2], grads[2, 2], grads[:, 3], grads[:, 4] = (
        math.nan,
        math.inf,
        -math.inf,
        -0.0,
        1e-42,
    )
    for statistic in statistics(groups):
        if statistic.name in stacked.ORDER:
            check(grads, statistic)


@pytest.mark.parametrize("groups", [4, 5, 20])
def test_extreme_values(groups):
    extreme_values_hold(groups)


def test_a_network_sorts():
    """By the 0-1 principle, exhaustively where that is possible."""
    for size in range(1, 13):
        values = torch.tensor([[n >> bit & 1 for bit in range(size)] for n in range(2**size)])
        for i, j in stacked.network(size):
            values[:, [i, j]] = torch.stack(
                [values[:, [i, j]].amin(1), values[:, [i, j]].amax(1)], dim=1
            )
        assert (values.diff(dim=1) >= 0).all()
    for size in (17, 31, 48, 64):
        values = torch.rand(500, size)
        for i, j in stacked.network(size):
            values[:, [i, j]] = torch.stack(
                [values[:, [i, j]].amin(1), values[:, [i, j]].amax(1)], dim=1
            )
        assert (values.diff(dim=1) >= 0).all()


def test_errors_name_what_is_wrong():
    with pytest.raises(TypeError, match="float64"):
        stacked.stacked(make(3, 4).double(), Statistic("mean"))
    with pytest.raises(ValueError, match=r"\(E, P\), contiguous"):
        stacked.stacked(make(3, 4).T, Statistic("mean"))
    with pytest.raises(ValueError, match="meta"):
        stacked.stacked(make(3, 4).to("meta"), Statistic("mean"))
    value, mask_sum = stacked.stacked(make(3, 0), Statistic("median"))
    assert value.shape == (0,) and mask_sum == 0
