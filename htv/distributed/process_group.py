"""One vote of all ranks of a process group that nothing else brings together: what
`htv.attach(..., process_group=...)` does at the end of `accumulate()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from htv.autograd.tally import PlainSum, state_of
from htv.distributed import bucket_means, reduction
from htv.distributed.bucket_means import RankedField
from htv.distributed.factor_exchange import FactorExchange
from htv.distributed.mask_exchange import MaskedBuckets
from htv.distributed.rank_votes import RankVotes
from htv.distributed.reduction import Field, Votes
from htv.engine.parameter import TrackedParameter
from htv.engine.session import Session
from htv.groups import Groups
from htv.ops.factors import Factors

__all__ = ["ProcessGroupVotes"]

BUCKET = 1 << 23  # values of parameters that ranks bring together at once


class KeptSums:
    """Gathers one parameter's contributions, sums and votes, until `accumulate()` ends.

    inner:   what counts the votes.
    starts:  called before the first contributions are taken; raises to refuse them.
    total:   the sums, or None before any came.
    """

    def __init__(self, inner: PlainSum, starts: Callable[[], None]):
        self.inner, self._starts = inner, starts
        self.total: Tensor | None = None

    def add(self, task: int, parts: list[Factors], groups: Groups) -> None:
        """Take the contributions of the backward pass `task`."""
        if self.total is None:
            self._starts()
        total = self.inner.add(task, parts, groups)
        self.total = total if self.total is None else self.total + total


class ProcessGroupVotes(RankVotes):
    """Brings the ranks of a process group together where `accumulate()` ends."""

    gathers = True

    def __init__(self, session: Session, group: ProcessGroup):
        super().__init__(session, group, "examples", 1 / group.size(), "inside accumulate()")
        self._kept: dict[TrackedParameter, KeptSums] = {}

    def begin(self) -> None:
        self.agreements = self._new_agreements()
        self._kept = {
            t: KeptSums(self.gathering_of(t), t.refuse_stale) for t in self.session.tracked()
        }
        for tracked, kept in self._kept.items():
            tracked.gathering = kept

    def end(self) -> None:
        for tracked in self.session.tracked():
            tracked.gathering = None
        self._kept = {}
        self.rounds.drop()

    def held_by(self, tracked: TrackedParameter):
        return lambda: None  # sums are kept here

    def require_covered(self, module: nn.Module) -> None:
        """Any forward inside accumulate() will do."""

    def waiting(self) -> bool:
        """Tell whether any rank gathered something since the last vote. All ranks ask."""
        most = torch.tensor(len(self.rounds.batches))
        dist.all_reduce(most, group=self.rounds.channel)
        return bool(most)

    def results(self) -> list[tuple[TrackedParameter, Tensor | None]]:
        """Bring the ranks together; return the aggregated gradients, None for parameters that no
        rank reached, and begin the next vote. Averages the gradients of other parameters.
        """
        electorate = self.rounds.called()
        reached = self._reached()
        found: list[tuple[TrackedParameter, Tensor | None]] = []
        for bucket in _buckets([t for t, seen in zip(self._kept, reached, strict=True) if seen]):
            found += self._bucket(bucket, electorate)
        found += [(t, None) for t, seen in zip(self._kept, reached, strict=True) if not seen]
        for parameter in self.session.unserved_parameters():
            grad = parameter.grad
            if grad is None:
                grad = parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(grad.mul_(self.fraction), group=self.rounds.group)
        own = self.own_agreements(torch.device("cpu"))
        if own is not None:
            dist.all_reduce(own, group=self.rounds.channel)
        self.tell(own)
        self.rounds.end()
        self.begin()
        return found

    def counted(self, tracked: TrackedParameter) -> PlainSum:
        return self._kept[tracked].inner

    def _reached(self) -> list[bool]:
        """Which parameters got contributions on any rank."""
        mine = torch.tensor([kept.total is not None for kept in self._kept.values()]).long()
        dist.all_reduce(mine, group=self.rounds.channel)
        return (mine > 0).tolist()

    def _bucket(self, bucket: Sequence[TrackedParameter], electorate) -> list:
        """Aggregate some parameters of one type and device together."""
        first = bucket[0].parameter
        dtype = torch.float32 if first.element_size() < 4 else first.dtype
        size = sum(t.parameter.numel() for t in bucket)
        buffer = first.new_zeros(size, dtype=dtype)
        fields, members, offset = [], [], 0
        for tracked in bucket:
            count = tracked.parameter.numel()
            place = offset, count, count, count
            fields.append(Field(self.rule_of_votes(tracked), *place))
            kept = self._kept[tracked]
            if kept.total is not None:
                fields[-1].of(buffer).copy_(kept.total.reshape(-1))
            rule = self.rule_of_ranks(tracked)
            if rule is not None:
                field = Field(rule, *place)
                members.append(RankedField(tracked, field, kept.inner, _writer(field)))
            offset += count
        votes = self._votes(bucket, fields, buffer, electorate)
        group = self.rounds.group
        ranked = None
        if members:
            done, ranked = bucket_means.rank_whole(
                buffer, members, self.rounds, self.fraction, agreements=None
            )
            done.wait()
        buffer.mul_(self.fraction)
        if not members and self.masks_suffice(fields):
            masks = MaskedBuckets(group)
            masked = masks.add(
                votes.votes, fields, electorate, lambda: reduction.all_reduce(buffer, group)
            )
            masks.tell()
            masked.wait()
        else:
            dist.all_reduce(buffer, group=group)
            for tensor in votes:
                dist.all_reduce(tensor, group=group)
            if self.agreements is not None:
                self._observe(bucket, fields, buffer, votes)
            reduction.apply_rules(buffer, fields, votes, electorate)
        for member in members:
            member.field.of(buffer).copy_(member.field.of(ranked))
        return [
            (t, f.of(buffer).view(t.parameter.shape).clone())
            for t, f in zip(bucket, fields, strict=True)
        ]

    def _observe(
        self, bucket: Sequence[TrackedParameter], fields: Sequence[Field], buffer: Tensor, votes
    ) -> None:
        """Note what sums and votes of all ranks tell, for `Handle.stats`."""
        electorate = self.rounds.called()
        for tracked, field in zip(bucket, fields, strict=True):
            self.agreements.meet(tracked)
            if not isinstance(self.counted(tracked), FactorExchange):
                found = reduction.agreement_sums(field, buffer, votes, electorate, self.fraction)
                self.agreements.add_whole(tracked, found)

    def _votes(self, bucket, fields: Sequence[Field], buffer: Tensor, electorate) -> Votes:
        """What this rank has to say of a bucket."""
        rules = [field.rule for field in fields if field.rule is not None]
        if not rules:
            return Votes()
        state = {name for rule in rules for name in state_of(rule)}
        votes = Votes.empty(buffer, len(buffer), electorate.count, state)
        own = electorate.counts[self.rounds.rank]
        for tracked, field in zip(bucket, fields, strict=True):
            if field.rule is None:
                continue
            like = field.of(buffer).view(tracked.parameter.shape)
            counts = self._kept[tracked].inner.counts(own, like)
            if counts is not None:
                votes.put(counts, _writer(field))
        return votes


def _writer(field: Field) -> Callable[[Tensor, Tensor], None]:
    """What writes a tensor of the parameter's shape into its place in a buffer."""
    return lambda value, into: field.of(into).copy_(value.reshape(-1))


def _buckets(tracked: Sequence[TrackedParameter]) -> Iterator[list[TrackedParameter]]:
    """Split parameters, in their order, into neighbours of one type and device."""
    bucket: list[TrackedParameter] = []
    for one in tracked:
        p = one.parameter
        if bucket:
            first = bucket[0].parameter
            size = sum(t.parameter.numel() for t in bucket) + p.numel()
            if (p.dtype, p.device) != (first.dtype, first.device) or size > BUCKET:
                yield bucket
                bucket = []
        bucket.append(one)
    if bucket:
        yield bucket
