"""From every rank's sums and votes to the aggregated gradient, in flat buffers of many parameters.

A buffer holds parameters one after the other, each in its own `Field`. The sums of all ranks are
reduced by whoever trains (DistributedDataParallel, FSDP2); the votes beside them here, and the rule
is applied to both before anyone sees the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from htv.autograd.tally import Counts
from htv.distributed.rounds import Electorate
from htv.distributed.vote_types import vote_type
from htv.ops import functional, reference, statistics
from htv.ops.agreement import AgreementSums, sums_of_summary
from htv.ops.reference import Summary
from htv.rules import Mean, Rule, Statistic

__all__ = [
    "Field",
    "Votes",
    "apply_masks",
    "apply_rules",
    "by_votes_alone",
    "masks",
    "order_over_ranks",
    "part_of",
    "scattered",
]


@dataclass(frozen=True, eq=False)
class Field:
    """One parameter's place in a flat buffer.

    rule:    its own; None for a plain mean.
    offset:  where it begins.
    size:    how many elements of the buffer are its, padding included.
    valid:   how many of them are elements of the parameter.
    whole:   how many the whole parameter has, of which the buffer may hold a shard.
    """

    rule: Rule | None
    offset: int
    size: int
    valid: int
    whole: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return its part of a flat buffer."""
        return buffer[self.offset : self.offset + self.size]


@dataclass(eq=False)
class Votes:
    """What rules need beside the sums of one buffer, laid out as it: of one rank, then of all.

    votes:          (size of the buffer,) in `vote_type`, or None if no rule asks for them.
    squares, logs:  as in `Counts`, or None.
    """

    votes: Tensor | None = None
    squares: Tensor | None = None
    logs: Tensor | None = None

    @staticmethod
    def empty(like: Tensor, size: int, count: int, state: Collection[str]) -> Votes:
        """Return zeros for a buffer of `size` elements.

        like:   a tensor of the buffer's type and device.
        count:  E, of all ranks.
        state:  which fields of `Summary` the rules need, the same on all ranks.
        """
        found = Votes(like.new_zeros(size, dtype=vote_type(count)))
        if "spread" in state:
            found.squares = like.new_zeros(size, dtype=torch.float64)
        if "logs" in state:
            wide = torch.promote_types(like.dtype, torch.float32)
            found.logs = like.new_zeros(size, dtype=wide)
        return found

    def put(self, counts: Counts, place: Callable[[Tensor, Tensor], None]) -> None:
        """Enter what was counted of one parameter.

        place:  writes a tensor of the parameter's shape into its part of a buffer.
        """
        for name in ("votes", "squares", "logs"):
            value = getattr(counts, name)
            if value is not None:
                place(value, getattr(self, name))

    def map(self, function: Callable[[Tensor], Tensor]) -> Votes:
        """Return the same with every tensor replaced by what `function` makes of it."""
        found = (self.votes, self.squares, self.logs)
        return Votes(*(None if t is None else function(t) for t in found))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield what is summed over ranks."""
        return (t for t in (self.votes, self.squares, self.logs) if t is not None)


def apply_rules(
    buffer: Tensor,
    fields: Sequence[Field],
    votes: Votes,
    electorate: Electorate,
    sum_masks: Callable[[Tensor], Tensor] = lambda mask_sum: mask_sum,
) -> None:
    """Turn the sums of all ranks into aggregated gradients, in place.

    buffer:     the sums of all groups' contributions.
    votes:      of all ranks.
    sum_masks:  from the sum of a mask over a shard to that over the whole parameter.

    A sum that is NaN or infinite stays, whatever the votes: gradient scaling and clipping see it.
    """
    for rule, first, last in _runs(fields):
        if rule is None or type(rule) is Mean or not rule.streaming:
            continue
        statistic = statistics.resolve(rule, electorate.count)
        if by_votes_alone(rule):
            part = slice(first.offset, last.offset + last.size)
            kept = statistics.of(statistic.name).mask_of_votes(votes.votes[part], statistic)
            _keep(buffer[part], kept)
        else:
            _apply(first, buffer, votes, statistic, electorate, sum_masks)


def masks(votes: Tensor, fields: Sequence[Field], electorate: Electorate) -> Tensor:
    """Return what votes of all ranks keep: (size,) booleans, True where no field has a rule.

    votes:   (size,).
    fields:  with rules that are None or `by_votes_alone`.
    """
    found = torch.ones_like(votes, dtype=torch.bool)
    for rule, first, last in _runs(fields):
        if rule is not None:
            statistic = statistics.resolve(rule, electorate.count)
            part = slice(first.offset, last.offset + last.size)
            found[part] = statistics.of(statistic.name).mask_of_votes(votes[part], statistic)
    return found


def apply_masks(buffer: Tensor, fields: Sequence[Field], kept: Tensor) -> None:
    """Leave in `buffer` the sums of all ranks that `masks` keeps, as `apply_rules` does."""
    for rule, first, last in _runs(fields):
        if rule is not None:
            part = slice(first.offset, last.offset + last.size)
            _keep(buffer[part], kept[part])


def _keep(sums: Tensor, kept: Tensor) -> None:
    sums.masked_fill_(~kept & sums.isfinite(), 0)


def part_of(fields: Sequence[Field], begin: int, end: int) -> list[Field]:
    """Return the parts of fields that lie in a range of their buffer, placed in that range."""
    found = []
    for field in fields:
        first, last = max(field.offset, begin), min(field.offset + field.size, end)
        if first < last:
            size = last - first
            found.append(Field(field.rule, first - begin, size, size, field.whole))
    return found


def _runs(fields: Sequence[Field]) -> Iterator[tuple[Rule | None, Field, Field]]:
    """Yield (rule, first, last) of neighbours that one pass serves."""
    first = last = None
    for field in fields:
        together = (
            first is not None
            and field.rule is first.rule
            and field.offset == last.offset + last.size
            and field.rule is not None
            and field.rule.streaming
            and by_votes_alone(field.rule)
        )
        if together:
            last = field
            continue
        if first is not None:
            yield first.rule, first, last
        first = last = field
    if first is not None:
        yield first.rule, first, last


def by_votes_alone(rule: Rule) -> bool:
    """Tell whether a streaming rule keeps or drops a sum by the votes of its coordinate alone."""
    statistic = statistics.resolve(rule, 1 << 30)
    found = statistics.of(statistic.name)
    return found.mask_of_votes is not None and not found.state and not statistic.normalise


def _apply(
    field: Field,
    buffer: Tensor,
    votes: Votes,
    statistic: Statistic,
    electorate: Electorate,
    sum_masks: Callable[[Tensor], Tensor],
) -> None:
    """By the statistic's own definition, for one parameter."""
    summary = _summary(field, buffer, votes, statistic, electorate)
    value, mask_sum = reference.finish(summary, statistic)
    value = value * summary.count
    if statistic.normalise:
        mask_sum = sum_masks(mask_sum)
        value = value / (functional.MASK_OFFSET + mask_sum / field.whole).to(value.dtype)
    shown_sums = field.of(buffer)[: field.valid]
    infinite = shown_sums.isinf()
    shown_sums.copy_(torch.where(infinite, shown_sums, value.to(buffer.dtype)))


def _summary(
    field: Field, buffer: Tensor, votes: Votes, statistic: Statistic, electorate: Electorate
) -> Summary:
    """What is known of all ranks' contributions to one parameter, without padding."""
    sums = field.of(buffer)
    total = reference.cast(sums, reference.compute_dtype(sums.dtype))
    counted = field.of(votes.votes).to(total.dtype).masked_fill(total.isnan(), torch.nan)
    state, count = statistics.of(statistic.name).state, electorate.count
    spread = logs = None
    if "spread" in state:
        apart = field.of(votes.squares) - total.double().square() / count
        spread = apart.clamp_(min=0).to(total.dtype)
    if "logs" in state:
        logs = field.of(votes.logs).to(total.dtype)
    return Summary(count, total, counted, spread, logs).map(lambda t: t[: field.valid])


def agreement_sums(
    field: Field, buffer: Tensor, votes: Votes, electorate: Electorate, fraction: float
) -> AgreementSums:
    """What sums and votes of all ranks tell of one parameter, before its rule is applied: all but
    the squares of contributions.

    fraction:  what the sums were multiplied by.
    """
    rule = field.rule
    if rule is None or type(rule) is Mean or not rule.streaming:  # nobody sends votes
        sums = field.of(buffer)[: field.valid].double() / fraction
        return AgreementSums(math.nan, float(field.valid), sums.square().sum(), 0.0)
    statistic = statistics.resolve(rule, electorate.count)
    found = sums_of_summary(_summary(field, buffer, votes, statistic, electorate), statistic, 0.0)
    return replace(found, total_energy=found.total_energy / fraction**2)


def agreement_sums_of_ranks(
    sums: Tensor, field: Field, vote: str, fraction: float
) -> AgreementSums:
    """The same of what every rank has at the same coordinates.

    sums:      (ranks, size).
    vote:      "ranks", where each rank is one voter; else it is a bucket of voters, whose votes are
               not known.
    fraction:  what the sums were multiplied by.
    """
    values = sums[:, field.offset : field.offset + field.valid].double() / fraction
    votes: float | Tensor = math.nan
    if vote == "ranks":
        votes = values.sign().sum(dim=0).abs().nan_to_num(0).sum()
    return AgreementSums(votes, float(field.valid), values.sum(dim=0).square().sum(), 0.0)


def order_over_ranks(
    sums: Tensor,
    fields: Iterable[Field],
    electorate: Electorate,
    fraction: float,
    out: Tensor,
) -> None:
    """Aggregate sums of all ranks by order statistics, each sum that of one group.

    sums:      (ranks, size), what every rank has at the same coordinates, where only those of ranks
               with examples are looked at; of several buckets per rank, (buckets * ranks, size).
    fields:    of these coordinates, with order rules whose buckets they are.
    fraction:  what sums are multiplied by.
    out:       (size,), where the aggregates of these fields are written.
    """
    voters = [rank for rank, count in enumerate(electorate.counts) if count]
    values = sums[voters] if len(voters) < electorate.size else sums
    for field in fields:
        by_ranks = electorate.vote == "ranks"
        statistic = statistics.resolve(field.rule, len(voters)) if by_ranks else Statistic("median")
        part = slice(field.offset, field.offset + field.size)
        value, _ = functional.stacked(values[:, part], statistic)
        out[part] = (value * (len(values) * fraction)).to(out.dtype)


# Newer versions of torch have other names for these two.
reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_reduce(tensor: Tensor, group: ProcessGroup) -> torch.futures.Future:
    """Sum a tensor over ranks, in place; return what tells that it is done."""
    return dist.all_reduce(tensor, group=group, async_op=True).get_future()


def scattered(whole: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to sum a flat tensor over ranks, each rank a part of it.

    whole:  (ranks * size,).

    Returns what waits for the sums and returns (size,), this rank's part of them.
    """
    ranks = group.size()
    if group._get_backend(whole.device).name() == "gloo":
        # Its reduce-scatter is an all-reduce of which a part is kept: twice the bytes.
        received = torch.empty_like(whole)
        work = dist.all_to_all_single(received, whole, group=group, async_op=True)

        def summed() -> Tensor:
            work.wait()
            return received.view(ranks, -1).sum(0, dtype=whole.dtype)

        return summed
    own = whole.new_empty(len(whole) // ranks)
    work = reduce_scatter(own, whole, group=group, async_op=True)

    def reduced() -> Tensor:
        work.wait()
        return own

    return reduced
