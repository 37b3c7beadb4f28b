"""Kernels read nothing beyond their inputs: the page that follows them, or comes before, cannot be
read.
"""

import ctypes
import math
import mmap

import pytest
import torch

from htv.ops import reference, schema
from htv.rules import Statistic
from support.rank_one_cases import DTYPES

PROT_NONE = 0


@pytest.fixture
def guarded():
    """A function that copies a tensor to where the page after it, or before it, is off limits."""
    libc, held = ctypes.CDLL(None, use_errno=True), []

    def copy(tensor: torch.Tensor, after: bool) -> torch.Tensor:
        size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
        pages = math.ceil(size / page) + 1
        memory = mmap.mmap(-1, pages * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        start = (pages - 1) * page - size if after else page
        placed = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=start
        ).view(tensor.shape)
        placed.copy_(tensor)
        wall = address + (pages - 1) * page if after else address
        assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), PROT_NONE) == 0
        held.append((memory, placed))
        return placed

    return copy


@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked(emulated, guarded, dtype, after):
    for groups, width in ((3, 33), (5, 64), (12, 7), (20, 36), (40, 18), (64, 5), (70, 41)):
        grads = torch.randn(groups, width, generator=torch.Generator().manual_seed(groups)).to(
            dtype
        )
        placed = guarded(grads, after)
        for statistic in (
            Statistic("and_mask", 2),
            Statistic("median"),
            Statistic("median_of_means", 3),
        ):
            value, _ = emulated.stacked(placed, *schema.numbers(statistic))
            torch.testing.assert_close(value, reference.stacked(grads, statistic)[0])


@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(emulated, guarded, dtype, after):
    for rows, out, width in ((5, 3, 2), (40, 33, 7), (70, 3, 130)):
        generator = torch.Generator().manual_seed(rows)
        x, g = (torch.randn(rows, n, generator=generator).to(dtype) for n in (width, out))
        x_placed, g_placed, offsets = guarded(x, after), guarded(g, after), torch.arange(rows + 1)
        for statistic in (Statistic("sign_sum"), Statistic("median")):
            value, _ = emulated.linear(x_placed, g_placed, offsets, *schema.numbers(statistic))
            torch.testing.assert_close(value, reference.linear(x, g, offsets, statistic)[0])
