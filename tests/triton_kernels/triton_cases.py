"""For the `check_*.py`: `triton_table.py`, and which types are slow to look at."""

import pytest
import torch
from triton_table import DEVICE, assert_same, statistics

from htv.triton_kernels import device

__all__ = ["DEVICE", "DTYPES", "assert_same", "statistics"]

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
assert {torch.float32, torch.bfloat16, torch.float16} == set(device.DTYPES)
