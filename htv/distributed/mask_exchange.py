"""Masks over ranks where votes alone decide them: each rank counts a part of a flat buffer, decides
it, and tells the others one bit per coordinate. Summing the votes on every rank would send twice as
many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.futures import Future

from htv.distributed import reduction
from htv.distributed.reduction import Field
from htv.distributed.rounds import Electorate

__all__ = ["MaskExchange", "MaskedBuckets", "pack_bits", "unpack_bits"]

# Eight bytes that are 0 or 1, read as one integer, times this: the highest byte has a bit of each.
_INTO_BITS = 0x0102040810204080
_EIGHT_COPIES = 0x0101010101010101
_OWN_BIT = 0x8040201008040201 - (1 << 64)  # of eight copies of a byte, bit j of byte j


def pack_bits(mask: Tensor) -> Tensor:
    """Return (size / 8,) bytes with the bits of a (size,) mask; `size` is a multiple of 8."""
    eights = mask.view(torch.int64)
    return (eights * _INTO_BITS >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """Return the (8 * bytes,) mask that `pack_bits` made `bits` of."""
    eights = (bits.to(torch.int64) * _EIGHT_COPIES).bitwise_and_(_OWN_BIT)
    return eights.view(torch.uint8) != 0


class MaskExchange:
    """Decides the masks of one flat buffer on all ranks of a process group together.

    votes:       (size,) of this rank, in `vote_type`. Their sum over ranks is on its way at once.
    fields:      of the buffer; `reduction.by_votes_alone` of each that has a rule.
    electorate:  of all ranks.
    """

    def __init__(
        self, votes: Tensor, fields: Sequence[Field], electorate: Electorate, group: ProcessGroup
    ):
        self._size, self._fields, self._electorate = len(votes), fields, electorate
        ranks, self._rank = group.size(), group.rank()
        # Bytes of bits per rank; views of eight of them at once are cheaper on all devices.
        self.bytes = -(-self._size // (8 * ranks))
        padded = votes.new_zeros(8 * self.bytes * ranks)
        padded[: self._size] = votes
        self._counted = reduction.scattered(padded, group)

    def bits(self) -> Tensor:
        """Wait for all ranks' votes over this rank's part; return (bytes,), the masks there."""
        begin = self._rank * 8 * self.bytes
        mine = reduction.part_of(self._fields, begin, begin + 8 * self.bytes)
        votes, self._counted = self._counted(), None
        return pack_bits(reduction.masks(votes, mine, self._electorate))

    def apply(self, buffer: Tensor, everyone: Tensor) -> None:
        """Leave in `buffer` the sums that the masks keep; see `reduction.apply_rules`.

        everyone:  (ranks, bytes), what `bits` returned on each.
        """
        kept = unpack_bits(everyone.reshape(-1))[: self._size]
        reduction.apply_masks(buffer, self._fields, kept)


class MaskedBuckets:
    """Decides the masks of one backward's buckets as their votes come, and tells them all at its
    end: ranks must begin collectives in one order, and what follows a future runs in any.
    """

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._waiting: list[tuple[MaskExchange, Future, Future]] = []

    def clear(self) -> None:
        """Forget what a backward that failed has left."""
        self._waiting = []

    def add(
        self,
        votes: Tensor,
        fields: Sequence[Field],
        electorate: Electorate,
        sums: Callable[[], Future],
    ) -> Future:
        """Have one bucket's votes counted; return what will hold its masked sums.

        votes, fields, electorate:  see `MaskExchange`.
        sums:                       begins the reduction of the bucket's sums.
        """
        exchange = MaskExchange(votes, fields, electorate, self._group)
        devices = [votes.device] if votes.is_cuda else None
        masked: Future = Future(devices=devices)
        self._waiting.append((exchange, sums(), masked))
        return masked

    def tell(self) -> None:
        """Tell the masks of all buckets that were added."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        mine = torch.cat([exchange.bits() for exchange, _, _ in waiting])
        everyone = mine.new_empty(self._group.size() * len(mine))
        work = reduction.all_gather(everyone, mine, group=self._group, async_op=True)
        told, parts = work.get_future(), everyone.view(self._group.size(), -1)
        begin = 0
        for exchange, sums, masked in waiting:
            part = parts[:, begin : begin + exchange.bytes]
            begin += exchange.bytes
            both = torch.futures.collect_all([told, sums])
            both.then(partial(_finish, masked, exchange, part))


def _finish(masked: Future, exchange: MaskExchange, part: Tensor, both: Future) -> None:
    """Give a bucket its masked sums, or the error that kept them away."""
    try:
        told, sums = both.value()
        told.value()
        value = sums.value()
        buffer = value[0] if isinstance(value, (list, tuple)) else value
        exchange.apply(buffer, part)
    except Exception as error:  # whoever waits for `masked` is told
        masked.set_exception(error)
    else:
        masked.set_result(buffer)
