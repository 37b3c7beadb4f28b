"""One vote over several micro-batches: streaming rules add up what they need to know, and are
applied once at the end.

The groups of all micro-batches of a block stand beside each other, as those of one large batch
would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops import aggregate, functional, reference, statistics
from htv.ops.agreement import AgreementSums, squared_norms, sums_of_summary
from htv.ops.factors import Factors
from htv.ops.reference import Summary
from htv.rules import MedianOfMeans, Rule, Statistic

MANY = (
    1 << 30
)  # groups: what a statistic needs to know of contributions does not depend on how many there are


def refuse_unless_streaming(rule: Rule, name: str) -> None:
    """Raise for rules that need the contributions of all micro-batches at once."""
    if rule.is_open:
        raise ValueError(
            f"{type(rule).__name__}, the rule of parameter {name!r}, is one of your own: its "
            "reduce() needs all contributions at once and cannot be accumulated over "
            f"micro-batches. Remedy: one batch, exclude={name!r}, or MedianOfMeans(k) or a mask, "
            "which accumulate"
        )
    if not rule.streaming and not isinstance(rule, MedianOfMeans):
        raise ValueError(
            f"{rule}, the rule of parameter {name!r}, needs all contributions at once and cannot "
            "be accumulated over micro-batches. Remedy: MedianOfMeans(k) with k micro-batches in "
            "the block, each of which is a bucket"
        )


class MicroBatches:
    """The backward passes of one vote and who voted in them.

    where:       what the passes are inside of, for messages.
    ended:       called at the end of each pass.
    refuses_nested: whether passes inside another (reentrant checkpoints) are refused.
    latest:      the last pass that was noted.
    unfinished:  those that have not come to their end, and those that run inside them (reentrant
                 activation checkpointing).
    count:       E, the number of groups of all of them.
    """

    def __init__(
        self, where: str = "accumulate()", ended: Callable[[], None] = lambda: None
    ) -> None:
        self.where, self.ended, self.latest = where, ended, -1
        self.refuses_nested = False
        self._groups: dict[int, Groups] = {}
        self.unfinished: set[int] = set()
        self._followed: set[int] = set()

    @property
    def count(self) -> int:
        return sum(groups.count for groups in self._groups.values())

    @property
    def even(self) -> bool:
        """Tell whether they have equally many groups."""
        return len({groups.count for groups in self._groups.values()}) <= 1

    @property
    def examples(self) -> int:
        """Return how many examples all of them have."""
        return sum(groups.batch_size for groups in self._groups.values())

    @property
    def named(self) -> bool:
        """Tell whether groups have ids that the caller gave."""
        return any(groups.named for groups in self._groups.values())

    @property
    def keys(self) -> list[int]:
        """Return the ids that the caller gave."""
        found = [groups.keys.tolist() for groups in self._groups.values() if groups.named]
        return [key for keys in found for key in keys]

    @property
    def weighted(self) -> bool:
        """Tell whether groups count alike, whatever their size."""
        return any(groups.weights is not None for groups in self._groups.values())

    def clear(self) -> None:
        """Begin the next vote."""
        self._groups, self.unfinished, self._followed = {}, set(), set()

    def __len__(self) -> int:
        return len(self._groups)

    def note(self, task: int, groups: Groups) -> None:
        """A backward pass brings contributions of these groups.

        task:  the outermost one that is under way.
        """
        if self.refuses_nested and torch._C._current_graph_task_id() not in (task, -1):
            raise UnsupportedError(
                f"a reentrant activation checkpoint {self.where}: when a unit's contributions are "
                "complete cannot be told. Remedy: torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )
        self._follow(task)
        if task in self._groups:
            if not self._groups[task].same_groups(groups):
                raise RuntimeError(
                    f"one backward inside {self.where} joins two forwards with different groups"
                )
            return
        if groups.rows_vote:
            raise ValueError(
                f"{self.where} cannot be joined with tokens(): let examples vote, or call it "
                "without"
            )
        for other in self._groups.values():
            if groups.named and other.named and bool(torch.isin(groups.keys, other.keys).any()):
                raise ValueError(
                    f"a group id occurs in two micro-batches of one {self.where} block: the rows "
                    "of a group must be in one micro-batch, for its vote to be counted once. Give "
                    "the groups of every micro-batch ids of their own"
                )
            if (
                groups.weights is not None
                and groups.batch_size * other.count != other.batch_size * groups.count
            ):
                raise ValueError(
                    f"weight='equal' inside {self.where} needs the same number of examples per "
                    f"group in every micro-batch on average, got {other.batch_size}/{other.count} "
                    f"and {groups.batch_size}/{groups.count}"
                )
        self._groups[task] = groups
        self.latest = task

    def _follow(self, task: int) -> None:
        current = torch._C._current_graph_task_id()
        if current in self._followed:
            return
        self._followed.add(current)
        self.unfinished.add(current)
        # The engine calls back only where the pass comes to its end.
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: self._end(current, current == task)
        )

    def _end(self, current: int, outermost: bool) -> None:
        self.unfinished.discard(current)
        if outermost:
            self.ended()

    def require_complete(self) -> None:
        """Refuse what a failed backward left behind: some parameters' contributions would be in,
        others' not.
        """
        if self.unfinished:
            raise RuntimeError(
                f"a backward inside {self.where} failed part-way, so some parameters have its "
                "micro-batch's contributions and others do not: nothing was added to .grad. "
                "Remedy: begin the block again, with all its micro-batches"
            )


class Gathering(Protocol):
    """What becomes of contributions to one parameter that are not aggregated in the backward pass
    that brings them.
    """

    def add(self, task: int, parts: list[Factors], groups: Groups) -> Tensor | None:
        """Take the contributions of the backward pass `task`; return what goes into `.grad` now,
        or None for nothing.
        """


class Accumulation:
    """What is known so far of one parameter's contributions in a block.

    Takes the parameter's size once for the sum and once for each further field of `Summary` the
    rule needs; k times for MedianOfMeans(k), and twice more if it observes.
    """

    def __init__(
        self,
        rule: Rule,
        batches: MicroBatches,
        starts: Callable[[], None] = lambda: None,
        fraction: float = 1.0,
        observes: bool = False,
    ):
        """starts: called before the first contributions are taken; raises to refuse them.
        fraction: what contributions are multiplied by.
        observes: whether to know how far they agree.
        """
        self.rule, self.batches, self._starts, self._observes = rule, batches, starts, observes
        self._fraction, self._log_offset = fraction, reference.LOG_OFFSET / fraction
        self._summary: Summary | None = None
        self._means: list[Tensor] = []
        self._tasks: set[int] = set()
        self._energy: float | Tensor = 0.0  # the squares of contributions

    def add(self, task: int, parts: list[Factors], groups: Groups) -> None:
        """The contributions of one backward pass."""
        self.batches.note(task, groups)
        if not self._tasks:
            self._starts()
        if task in self._tasks:
            raise RuntimeError(
                "one backward inside accumulate() brought contributions to a parameter twice: "
                "call backward() once per forward"
            )
        self._tasks.add(task)
        if self._observes:
            self._energy = self._energy + squared_norms(parts).sum()
        statistic = statistics.resolve(self.rule, MANY)
        if isinstance(self.rule, MedianOfMeans):
            self._means.append(sum(part.total().to(part.dtype) for part in parts) / groups.count)
            if not self._observes:
                return
            statistic = Statistic("mean")  # of votes and sums
        summary = aggregate.summarise(parts, statistic, self._log_offset)
        self._summary = summary if self._summary is None else self._summary + summary

    def result(self) -> Tensor | None:
        """The aggregated gradient of all micro-batches, or None if the parameter was in none of
        them.
        """
        if self._means:
            return self._median_of_means()
        summary = self._whole()
        if summary is None:
            return None
        statistic = statistics.resolve(self.rule, summary.count)
        value, mask_sum = reference.finish(summary, statistic)
        return functional.normalise(value * summary.count, mask_sum, statistic)

    def agreement_sums(self) -> AgreementSums | None:
        """How far the contributions of all micro-batches agree; None where none came, or nobody
        observes.
        """
        summary = self._whole()
        if summary is None or not self._observes:
            return None
        statistic = statistics.resolve(self.rule, summary.count)
        return sums_of_summary(summary, statistic, self._energy * self._fraction**2)

    def _whole(self) -> Summary | None:
        """What is known of all groups' contributions; None if nothing is."""
        summary = self._summary
        if summary is None:
            return None
        missing = self.batches.count - summary.count  # of batches that did not reach the parameter
        if missing:
            summary = summary + Summary.of_zeros(missing, summary, self._log_offset)
        return summary.scaled(self._fraction)

    def _median_of_means(self) -> Tensor:
        batches, buckets = len(self.batches), self.rule.k
        if batches != buckets or self.batches.count % buckets:
            raise RuntimeError(
                f"{self.rule} over an accumulate() block needs {buckets} micro-batches, its "
                f"buckets, with equally many groups, but the block had {batches} with "
                f"{self.batches.count} groups in all"
            )
        means = [*self._means, *[torch.zeros_like(self._means[0])] * (buckets - len(self._means))]
        value, _ = functional.stacked(torch.stack(means), Statistic("median"))
        return value * (self.batches.count * self._fraction)
