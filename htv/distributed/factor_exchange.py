"""Exact order statistics over the examples of all ranks, by exchanging factors.

A median needs every contribution. Where the rows of all ranks are few, what a layer recorded (its
inputs and output gradients) is smaller than what it stands for: every rank gets all rows, ranks its
share of the parameter's coordinates over all examples and leaves zeros elsewhere, and the reduction
of sums that follows puts the shares together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from htv.autograd.tally import PlainSum
from htv.distributed.rounds import Rounds
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops import aggregate
from htv.ops.agreement import AgreementSums, agreement_sums
from htv.ops.factors import (
    ConvFactors,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.rules import Rule

__all__ = ["FactorExchange"]

MOST_TIMES = 4  # the parameter's size: above, factors of all ranks are no bargain
ALWAYS = 1 << 16  # values that are sent whatever the parameter's size
NOTHING = AgreementSums(0.0, 0.0, 0.0, 0.0)


class FactorExchange(PlainSum):
    """Ranks one parameter's contributions over the examples of all ranks.

    rounds:           of the ranks.
    rule:             an order rule.
    require_meeting:  raises where the backward under way does not bring sums together.
    """

    def __init__(
        self,
        name: str,
        rounds: Rounds,
        held: Callable[[], Tensor | None],
        rule: Rule,
        require_meeting: Callable[[], None],
    ):
        super().__init__(name, rounds.batches, held)
        self.rounds, self.rule, self._require_meeting = rounds, rule, require_meeting
        self._sums = NOTHING  # of this rank's share of coordinates

    def add(self, task: int, parts: list[Factors], groups: Groups) -> Tensor:
        """Return this rank's share of the aggregate over all ranks, zeros elsewhere.

        The average of all ranks' is the aggregate of contributions to the averaged loss.
        """
        self._require_meeting()
        self.note(task, groups)
        self.require_one_backward()
        self.rounds.called()
        self._require_few(parts)
        everyone = [self._exchanged(part) for part in parts]
        own = self._own_rows(everyone)
        if own is None:
            if self.observes and self.rounds.rank == 0:  # all ranks have the same
                self._sums = agreement_sums(everyone, self.rule)
            return self._own_part(aggregate.aggregate(everyone, self.rule))
        if self.observes:
            self._sums = agreement_sums([own], self.rule)
        rows = aggregate.aggregate([own], self.rule)
        begin, end = self._range(everyone[0].shape[0])
        whole = rows.new_zeros(everyone[0].shape)
        whole[begin:end] = rows
        return whole

    def agreement_sums(self) -> AgreementSums:
        """Return what is known of all ranks' contributions to this rank's share of coordinates."""
        return self._sums

    def clear(self) -> None:
        super().clear()
        self._sums = NOTHING

    def require_one_backward(self) -> None:
        """Raise where the vote has several backwards: what was exchanged is of one."""
        count = len(self.batches)
        if count > 1:
            raise UnsupportedError(
                f"{self.rule}, the rule of parameter {self.name!r}, needs all contributions at "
                f"once, and this vote {self.batches.where} has {count} backwards. Remedy: one "
                f"backward per vote, or MedianOfMeans({self.rounds.size}) or a mask, which "
                "accumulate"
            )

    def _require_few(self, parts: list[Factors]) -> None:
        """Raise where what would be sent is much larger than the parameter, on all ranks alike."""
        mine = [self.name, [_kind(part) for part in parts], _values(parts)]
        told: list = [None] * self.rounds.size
        dist.all_gather_object(told, mine, group=self.rounds.channel)
        for rank, (name, kinds, _) in enumerate(told):
            if [name, kinds] != mine[:2]:
                raise RuntimeError(
                    f"ranks are at different parameters: rank {self.rounds.rank} brings "
                    f"{self.name!r} ({', '.join(mine[1])}), rank {rank} {name!r} "
                    f"({', '.join(kinds)}). Order rules over the examples of all ranks need the "
                    "same layers to run on each"
                )
        unknown = [kind for kind in mine[1] if kind not in _SENT]
        if unknown:
            raise UnsupportedError(
                f"{self.rule} over the examples of {self.rounds.size} ranks cannot be computed for "
                f"parameter {self.name!r}: what its use records ({', '.join(unknown)}) is not "
                f"exchanged. Remedy: MedianOfMeans({self.rounds.size}), vote='ranks', or "
                f"exclude={self.name!r}"
            )
        # Of vectors, each group sends one: little beside the rows of the layer that has them.
        sent, size = sum(values for _, _, values in told), math.prod(parts[0].shape)
        if len(parts[0].shape) > 1 and sent > max(MOST_TIMES * size, ALWAYS):
            raise UnsupportedError(
                f"{self.rule} over the examples of {self.rounds.size} ranks would send {sent:,} "
                f"values to each rank for parameter {self.name!r}, which has {size:,}: more than "
                f"{MOST_TIMES} times as many. Remedy: MedianOfMeans({self.rounds.size}), which "
                f"sends one mean per rank, MedianOfMeans({2 * self.rounds.size}) with two of each, "
                "vote='ranks', or fewer rows per step"
            )

    def _exchanged(self, part: Factors) -> Factors:
        """The factors of all ranks, one rank's groups after the other's."""
        if isinstance(part, ViewFactors):
            whole = copy.copy(part)
            whole.inner = self._exchanged(part.inner)
            whole.count = whole.inner.count
            return whole
        if isinstance(part, StackedFactors):
            return StackedFactors(self._gathered(part.values))
        if isinstance(part, LinearFactors):
            x, grad_output = self._gathered(part.x), self._gathered(part.grad_output)
            return LinearFactors(x, grad_output, self._bounds(part.bounds))
        if isinstance(part, ConvFactors):
            whole = copy.copy(part)
            whole.x, whole.grad_output = self._gathered(part.x), self._gathered(part.grad_output)
            whole.bounds = self._bounds(part.bounds)
            whole.count = len(whole.bounds) - 1
            return whole
        counts = self.rounds.called().counts
        whole = object.__new__(EmbeddingFactors)
        begin = sum(counts[: self.rounds.rank])
        whole._init(
            self._gathered(part.ids),
            self._gathered(part.group_index + begin),
            self._gathered(part.grad_output),
            part.shape[0],
            sum(counts),
        )
        whole.padded = True  # on another rank, perhaps
        return whole

    def _bounds(self, bounds: Tensor) -> Tensor:
        """(E + 1,) bounds of the rows of all ranks' groups."""
        sizes: list = [None] * self.rounds.size
        dist.all_gather_object(sizes, bounds.diff().tolist(), group=self.rounds.channel)
        flat = torch.tensor([size for own in sizes for size in own], dtype=bounds.dtype)
        return torch.cat([flat.new_zeros(1), flat.cumsum(0)])

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, which may have different numbers of them."""
        rows: list = [None] * self.rounds.size
        dist.all_gather_object(rows, len(tensor), group=self.rounds.channel)
        longest = max(rows)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(found, padded, group=self.rounds.group)
        return torch.cat([part[:count] for part, count in zip(found, rows, strict=True)])

    def _own_rows(self, parts: list[Factors]) -> LinearFactors | None:
        """This rank's rows of a matrix, where one use of a linear layer records it alone: no rank
        does more than its share. None for other parameters, which every rank aggregates whole.
        """
        part = parts[0]
        if parts[1:] or not isinstance(part, LinearFactors) or part.shape[0] < self.rounds.size:
            return None
        begin, end = self._range(part.shape[0])
        return LinearFactors(part.x, part.grad_output[:, begin:end].contiguous(), part.bounds)

    def _own_part(self, whole: Tensor) -> Tensor:
        """An aggregate that every rank has whole, with zeros where another rank's share is."""
        begin, end = self._range(whole.numel())
        flat = torch.zeros_like(whole.reshape(-1))
        flat[begin:end] = whole.reshape(-1)[begin:end]
        return flat.view(whole.shape)

    def _range(self, size: int) -> tuple[int, int]:
        rank, ranks = self.rounds.rank, self.rounds.size
        return size * rank // ranks, size * (rank + 1) // ranks


_SENT = {"linear", "stacked", "convolution", "embedding", "view of linear", "view of stacked"}
_NAMES = {
    LinearFactors: "linear",
    StackedFactors: "stacked",
    ConvFactors: "convolution",
    EmbeddingFactors: "embedding",
}


def _kind(part: Factors) -> str:
    if type(part) is ViewFactors:
        return f"view of {_kind(part.inner)}"
    return _NAMES.get(type(part), type(part).__name__)


def _values(parts: list[Factors]) -> int:
    """How many values a rank sends."""
    total = 0
    for part in parts:
        inner = part.inner if isinstance(part, ViewFactors) else part
        for name in ("x", "grad_output", "values"):
            tensor = vars(inner).get(name)
            total += 0 if tensor is None else tensor.numel()
    return total
