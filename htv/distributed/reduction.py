"""From every rank's sums and votes to the aggregated gradient, in flat buffers of many parameters.

A buffer holds parameters one after the other, each in its own `Field`. The sums of all ranks are
reduced by whoever trains (DistributedDataParallel, FSDP2); the votes beside them here, and the rule
is applied to both before anyone sees the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
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

__all__ = ["Field", "Votes", "apply_rules", "order_over_ranks"]


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
        mask_of_votes = statistics.of(statistic.name).mask_of_votes
        needs_more = statistics.of(statistic.name).state
        if mask_of_votes is not None and not needs_more and not statistic.normalise:
            part = slice(first.offset, last.offset + last.size)
            kept = mask_of_votes(votes.votes[part], statistic)
            sums = buffer[part]
            sums.masked_fill_(~kept & sums.isfinite(), 0)
        else:
            _apply(first, buffer, votes, statistic, electorate, sum_masks)


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
            and _by_votes_alone(field.rule)
        )
        if together:
            last = field
            continue
        if first is not None:
            yield first.rule, first, last
        first = last = field
    if first is not None:
        yield first.rule, first, last


def _by_votes_alone(rule: Rule) -> bool:
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
    sums: Tensor, fields: Sequence[Field], electorate: Electorate, fraction: float
) -> Tensor:
    """Aggregate ranks' sums by order statistics, each rank one group.

    sums:      (ranks, size), what every rank has at the same coordinates; only those of ranks with
               examples are looked at.
    fields:    of these coordinates, with order rules.
    fraction:  what sums are multiplied by.

    Returns (size,).
    """
    voters = [rank for rank, count in enumerate(electorate.counts) if count]
    values = sums[voters] if len(voters) < len(sums) else sums
    found = torch.zeros_like(sums[0])
    for field in fields:
        part = slice(field.offset, field.offset + field.size)
        statistic = rank_statistic(field.rule, electorate, len(voters))
        value, _ = functional.stacked(values[:, part], statistic)
        found[part] = (value * (len(voters) * fraction)).to(found.dtype)
    return found


def rank_statistic(rule: Rule, electorate: Electorate, voters: int) -> Statistic:
    """Return the statistic of ranks' sums that is the rule's.

    Raises RuntimeError where ranks are the buckets of a median of means and differ in size.
    """
    if electorate.vote == "ranks":
        return statistics.resolve(rule, voters)
    if len(set(electorate.counts)) > 1:
        raise RuntimeError(
            f"{rule} takes each rank for a bucket, which needs equally many groups on all ranks, "
            f"but they have {', '.join(map(str, electorate.counts))}. Remedy: drop_last=True in "
            "the DataLoader, or vote='ranks'"
        )
    return Statistic("median")


# Newer versions of torch have other names for these two.
reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_reduce(tensor: Tensor, group: ProcessGroup) -> torch.futures.Future:
    """Sum a tensor over ranks, in place; return what tells that it is done."""
    return dist.all_reduce(tensor, group=group, async_op=True).get_future()
