"""Masks over ranks, each rank a part, told by bits."""

import numpy as np
import pytest
import torch

from htv.distributed import mask_exchange
from support.mask_jobs import exchanged, failing


@pytest.mark.parametrize("size", [8, 64, 8 * 1001])
def test_bits_are_packed(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    bits = mask_exchange.pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert (bits.numpy() == np.packbits(mask.numpy(), bitorder="little")).all()
    assert torch.equal(mask_exchange.unpack_bits(bits), mask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.int32])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 30, 3), (100, 3, 501, 64)])
def test_equal_to_all_votes_on_all_ranks(ranks, sizes, dtype):
    for found, expected in ranks.run(exchanged, 3, sizes, dtype):
        for mine, whole in zip(found, expected, strict=True):
            assert torch.equal(mine.nan_to_num(9), whole.nan_to_num(9))
            assert mine.isnan().any()
            assert (mine == 0).any() or len(mine) == 3


def test_who_waits_is_told_of_an_error(ranks):
    for error in ranks.run(failing, 2):
        assert "no sums" in error
