"""Order rules over sums of ranks: one per rank, or several of a median of means.

A median of k means over the examples of W ranks needs no single contribution where k is a multiple
of W: no bucket then has groups of two ranks. Each rank sums its own k / W buckets and sends, of
every sum, each rank its part of the coordinates; that rank ranks them over all k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from htv.autograd.accumulation import MicroBatches
from htv.autograd.tally import PlainSum, plain_sum
from htv.distributed import reduction
from htv.distributed.agreements import SharedAgreements
from htv.distributed.reduction import Field
from htv.distributed.rounds import Rounds, buckets_per_rank, require_buckets
from htv.engine.parameter import TrackedParameter
from htv.groups import Groups
from htv.ops.factors import Factors

__all__ = ["BucketMeans", "RankedField", "rank_part", "rank_whole"]


class BucketMeans(PlainSum):
    """Sums one parameter's contributions bucket by bucket, and lets their plain sum through.

    buckets:  how many of a median of means are this rank's.

    The groups of one backward are cut as one process cuts them; of several backwards each is a
    bucket. Takes the parameter's size for each bucket until the ranks meet.
    """

    def __init__(
        self, name: str, batches: MicroBatches, held: Callable[[], Tensor | None], buckets: int
    ):
        super().__init__(name, batches, held)
        self.buckets = buckets
        self._sums: list[Tensor] = []
        self._sizes: list[int] = []  # groups of each bucket, where one backward was cut

    def add(self, task: int, parts: list[Factors], groups: Groups) -> Tensor:
        """Sum the contributions of the backward pass `task`; return their plain sum."""
        self.note(task, groups)
        self.observe(parts)
        if len(self.batches) == 1 and groups.count >= self.buckets:
            return self._cut(parts, groups.count)
        self._join()
        self._sums.append(plain_sum(parts))
        return self._sums[-1].clone()  # what is returned may become .grad, which others change

    def _cut(self, parts: list[Factors], count: int) -> Tensor:
        """Keep the sums of a backward's buckets; return the sum of all its `count` groups."""
        start = 0
        for bucket in range(self.buckets):  # as torch.tensor_split cuts
            stop = start + count // self.buckets + (bucket < count % self.buckets)
            totals = [part.total_of(slice(start, stop)) for part in parts]
            self._sums.append(sum(totals[1:], totals[0]))
            self._sizes.append(stop - start)
            start = stop
        return torch.stack(self._sums).sum(dim=0)

    def _join(self) -> None:
        """Make one bucket of a backward that was cut: it was not the only one."""
        if self._sizes:
            self._sums, self._sizes = [torch.stack(self._sums).sum(dim=0)], []

    def taken(self, passes: int) -> list[Tensor]:
        """Return the sums of buckets that are not zero, and keep them no more.

        passes:  how many backwards this rank had since the ranks last met.

        Buckets of more groups than others weigh as much: their sums are scaled.
        """
        if passes > 1:
            self._join()
        sums, sizes = self._sums, self._sizes
        self._sums, self._sizes = [], []
        if len(set(sizes)) <= 1:
            return sums
        mean = sum(sizes) / len(sizes)
        return [value * (mean / size) for value, size in zip(sums, sizes, strict=True)]

    def sent(self) -> None:
        super().sent()
        self._sums, self._sizes = [], []


@dataclass(frozen=True, eq=False)
class RankedField:
    """One parameter under an order rule of ranks' sums, in a flat buffer of several.

    tracked:    it.
    field:      its place there, or in a rank's part of it, with the rule.
    gathering:  what gathered its contributions on this rank.
    write:      writes a tensor of the parameter's shape into its place in such a buffer.
    """

    tracked: TrackedParameter
    field: Field
    gathering: PlainSum
    write: Callable[[Tensor, Tensor], None]


def rank_whole(
    buffer: Tensor,
    members: Sequence[RankedField],
    rounds: Rounds,
    fraction: float,
    agreements: SharedAgreements | None,
) -> tuple[torch.futures.Future, Tensor]:
    """Aggregate by order rules: each rank a part of the buffer, then all together.

    buffer:      this rank's sums.
    members:     of what it holds, with their places in it.
    fraction:    what sums are multiplied by.
    agreements:  of the round, where `Handle.stats` was asked for.

    Returns what tells that it is done, and the aggregates laid out as the buffer, at its start.
    """
    part = -(-buffer.numel() // rounds.size)
    padded = buffer.new_zeros(rounds.size * part)
    padded[: buffer.numel()] = buffer
    begin = rounds.rank * part

    def own(field: Field) -> list[Field]:
        return reduction.part_of([field], begin, begin + part)

    found = _exchanged(padded, members, own, rounds, rounds.group, fraction, agreements)
    work = reduction.all_gather(padded, found, group=rounds.group, async_op=True)
    return work.get_future(), padded


def rank_part(
    buffer: Tensor,
    members: Sequence[RankedField],
    rounds: Rounds,
    group: ProcessGroup,
    fraction: float,
    agreements: SharedAgreements | None,
) -> Tensor:
    """Aggregate by order rules what is this rank's part of a buffer.

    buffer:      this rank's sums, every rank's part behind the other's.
    members:     of what it holds, with their places in a part.
    group:       the ranks in the order of the parts.
    fraction:    what sums are multiplied by.
    agreements:  of the round, where `Handle.stats` was asked for.
    """
    return _exchanged(buffer, members, lambda field: [field], rounds, group, fraction, agreements)


def _exchanged(
    buffer: Tensor,
    members: Sequence[RankedField],
    own: Callable[[Field], list[Field]],
    rounds: Rounds,
    group: ProcessGroup,
    fraction: float,
    agreements: SharedAgreements | None,
) -> Tensor:
    """`rank_part`; `own` says where a field is in this rank's part."""
    electorate = rounds.called()
    by_buckets: dict[int, list[RankedField]] = {}
    for member in members:
        require_buckets(member.field.rule, electorate)
        buckets = buckets_per_rank(member.field.rule, electorate)
        by_buckets.setdefault(buckets, []).append(member)
    ranks, passes = rounds.size, electorate.passes[rounds.rank]
    size = buffer.numel() // ranks
    found = buffer.new_zeros(size)
    for buckets, alike in sorted(by_buckets.items()):
        received = buffer.new_empty(buckets * ranks, size)
        rows = [buffer] if buckets == 1 else _laid_out(buffer, alike, buckets, passes)
        for row, into in zip(rows, received.split(ranks), strict=True):
            dist.all_to_all_single(into.view(-1), row, group=group)
        fields = [field for member in alike for field in own(member.field)]
        reduction.order_over_ranks(received, fields, electorate, fraction, out=found)
        if agreements is None:
            continue
        for member in alike:
            for part in own(member.field):
                seen = reduction.agreement_sums_of_ranks(received, part, rounds.vote, 1.0)
                agreements.add(member.tracked, seen)
    return found


def _laid_out(
    like: Tensor, members: Sequence[RankedField], buckets: int, passes: int
) -> Iterator[Tensor]:
    """The first bucket's sums of all members as a flat buffer, the second's, and so on; each
    overwrites the one before.
    """
    sums = [(member, member.gathering.taken(passes)) for member in members]
    row = torch.empty_like(like)
    for _ in range(buckets):
        row.zero_()
        for member, kept in sums:
            if kept:
                member.write(kept.pop(0), row)
        yield row
