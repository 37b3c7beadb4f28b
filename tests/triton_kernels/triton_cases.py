"""For the `check_*.py`: `triton_table.py`, and which types are slow to look at."""

import pytest
import torch
from triton_table import DEVICE, assert_same, statistics

from htv.triton_kernels import device

__all__ = ["DEVICE", "DTYPES", "HALF_SLOW", "assert_same", "slow", "statistics"]


def slow(value):
    """A value of a parameter, for `make test-all` alone."""
    return pytest.param(value, marks=pytest.mark.slow)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_SLOW = [torch.float32, torch.bfloat16, slow(torch.float16)]
assert {torch.float32, torch.bfloat16, torch.float16} == set(device.DTYPES)
