"""What several ranks need to know of one parameter's contributions, beside their sum.

The sum travels in `.grad`, as it always does. What a rule needs beside it is counted here as
backwards bring it, over the micro-batches of a step, and taken when the ranks meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.autograd.accumulation import MANY, MicroBatches
from htv.groups import Groups
from htv.ops import aggregate, reference, statistics
from htv.ops.agreement import AgreementSums, squared_norms
from htv.ops.factors import Factors
from htv.ops.reference import Summary
from htv.rules import Mean, Rule

__all__ = ["Counts", "PlainSum", "Tally", "integer_type", "of_sums", "state_of"]


@dataclass(frozen=True)
class Counts:
    """What the groups of one rank have to say of one parameter, all of its shape.

    votes:   the sum of the signs of their contributions, integers; NaN counts 0, for the sum shows
             it.
    squares: the sum of their squares, float64, if the rule needs their spread.
    logs:    the sum of the logarithms of magnitudes, if the rule needs it.

    Squares and logarithms are of contributions as the final gradient has them.
    """

    votes: Tensor
    squares: Tensor | None = None
    logs: Tensor | None = None


def integer_type(most: int) -> torch.dtype:
    """Return the smallest integers that hold -most to most."""
    if most <= 127:
        return torch.int8
    return torch.int16 if most <= 32767 else torch.int32


def state_of(rule: Rule) -> frozenset[str]:
    """Return which fields of `Summary` a streaming rule needs, beside sum and votes."""
    return statistics.of(statistics.resolve(rule, MANY).name).state


class PlainSum:
    """Lets the plain sum of one parameter's contributions through to `.grad`.

    name:     of the parameter.
    batches:  the backward passes of this rank that vote together.
    held:     returns what `.grad` holds, or None.
    came:     whether contributions came that are not on their way to other ranks.
    stays:    whether `.grad` holds the sum of what came until the ranks meet.
    observes: whether to count for `Handle.stats`, too.
    """

    stays = observes = False

    def __init__(self, name: str, batches: MicroBatches, held: Callable[[], Tensor | None]):
        self.name, self.batches, self._held = name, batches, held
        self._tasks: set[int] = set()
        self._energy: float | Tensor = 0.0
        self.came = False

    def add(self, task: int, parts: list[Factors], groups: Groups) -> Tensor:
        """Take the contributions of the backward pass `task`; return their plain sum."""
        self.note(task, groups)
        self.observe(parts)
        return plain_sum(parts)

    def observe(self, parts: list[Factors]) -> None:
        """Count for `Handle.stats` what neither sums nor votes tell."""
        if self.observes:
            self._energy = self._energy + squared_norms(parts).sum()

    def agreement_sums(self) -> AgreementSums:
        """Return what this rank has of its own, beside sums and votes, since the ranks last met."""
        return AgreementSums(0.0, 0.0, 0.0, self._energy)

    def note(self, task: int, groups: Groups) -> None:
        """Note that `groups` vote in the backward pass `task`. Raises RuntimeError if they did, or
        if `.grad` holds something that their sum would be added to.
        """
        self.batches.note(task, groups)
        if task in self._tasks:
            raise RuntimeError(
                f"one backward {self.batches.where} brought contributions to parameter "
                f"{self.name!r} twice: call backward() once per forward"
            )
        held = self._held() if self.stays or not self._tasks else None
        if self._tasks:
            now = {task, torch._C._current_graph_task_id()}
            if self.stays and held is None and self.batches.unfinished <= now:
                raise RuntimeError(
                    f".grad of {self.name!r}, in which sums of earlier micro-batches waited for "
                    "the ranks to meet, is gone, while their votes are counted. Remedy: zero_grad()"
                    " before the forward of the micro-batch that begins anew, not between its "
                    "forward and its backward"
                )
        elif held is not None and bool((held != 0).any()):
            raise RuntimeError(
                f".grad of {self.name!r} holds the aggregate of an earlier step already, and a "
                "backward would add plain sums to it. Remedy: zero_grad() before the first "
                "backward of a step; for micro-batches, let the ranks meet in the last one only "
                "(DistributedDataParallel's no_sync(), FSDP2's set_requires_gradient_sync(False))"
            )
        self._tasks.add(task)
        self.came = True

    def sent(self) -> None:
        """Be told that what came is on its way to the other ranks."""
        self.came = False

    def clear(self) -> None:
        """Begin the next vote."""
        self.sent()
        self._tasks = set()
        self._energy = 0.0


class Tally(PlainSum):
    """Counts the votes of one parameter's groups since the ranks last met, and lets sums through.

    rule:      a streaming one.
    fraction:  what the ranks' reduction multiplies sums by: 1 / ranks where it averages.

    Takes a byte per coordinate for up to 127 groups of this rank; two for more; for SandMask twice
    the parameter's size, for GeometricMean once, beside that.
    """

    def __init__(
        self,
        name: str,
        batches: MicroBatches,
        held: Callable[[], Tensor | None],
        rule: Rule,
        fraction: float,
    ):
        super().__init__(name, batches, held)
        self.rule, self.fraction = rule, fraction
        self._log_offset = reference.LOG_OFFSET / fraction
        self._state = state_of(rule)
        self._votes: Tensor | None = None
        self._summary: Summary | None = None  # where the rule needs more than votes
        self._count = 0

    def add(self, task: int, parts: list[Factors], groups: Groups) -> Tensor:
        """Count the contributions of the backward pass `task`; return their plain sum."""
        self.note(task, groups)
        self.observe(parts)
        self._count += groups.count
        if type(self.rule) is Mean:
            return plain_sum(parts)
        statistic = statistics.resolve(self.rule, MANY)
        summary = aggregate.summarise(parts, statistic, self._log_offset)
        if self._state:
            known = self._summary
            self._summary = summary if known is None else known + summary
        else:
            self._count_votes(summary.votes)
        return summary.total

    def _count_votes(self, votes: Tensor) -> None:
        dtype = integer_type(self._count)
        counted = votes.nan_to_num(0).to(dtype)
        self._votes = counted if self._votes is None else self._votes.to(dtype) + counted

    def sent(self) -> None:
        super().sent()
        self._votes, self._summary, self._count = None, None, 0

    def counts(self, count: int, like: Tensor) -> Counts | None:
        """Return what was counted for `count` groups of this rank, those that did not reach the
        parameter contributing zeros; None if nothing was.

        like:  of the parameter's shape and device, in the type of sums.
        """
        votes, summary, counted = self._votes, self._summary, self._count
        if not self._state or not (count or counted):
            return None if votes is None else Counts(votes)
        if summary is None:
            zeros = torch.zeros_like(like)
            spread = zeros if "spread" in self._state else None
            logs = zeros if "logs" in self._state else None
            summary = Summary.of_zeros(
                count, Summary(0, zeros, zeros, spread, logs), self._log_offset
            )
        elif count > counted:
            summary = summary + Summary.of_zeros(count - counted, summary, self._log_offset)
        summary = summary.scaled(self.fraction)
        squares = summary.spread
        if squares is not None:
            squares = squares + summary.total.double().square() / summary.count
        votes = summary.votes.nan_to_num(0).to(integer_type(count))
        return Counts(votes, squares, summary.logs)


def of_sums(total: Tensor, rule: Rule, fraction: float) -> Counts:
    """Return what one rank has to say where it is one group, whose contribution is `total`.

    fraction:  as for `Tally`.
    """
    state = state_of(rule)
    scaled = total * fraction
    logs = (scaled.abs() + reference.LOG_OFFSET).log() if "logs" in state else None
    squares = scaled.double().square() if "spread" in state else None
    return Counts(total.sign().nan_to_num(0).to(torch.int8), squares, logs)


def plain_sum(parts: list[Factors]) -> Tensor:
    """Return the plain sum of contributions, the parts' together."""
    return sum([part.total() for part in parts[1:]], parts[0].total())
