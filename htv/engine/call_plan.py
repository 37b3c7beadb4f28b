"""Who votes in a forward, kept for those that are called alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from htv.engine.inputs import Batch
from htv.engine.mode import RowsByLayout
from htv.engine.protocols import ForwardLike
from htv.engine.provenance import interned
from htv.groups import BatchLayout, Groups


@dataclass(frozen=True)
class CallPlan:
    """Keeps who votes in a forward that gets such arguments.

    members:    (argument, its name, place, sure) of those that hold examples; see `Batch`.
    constants:  the other arguments that are tensors.
    """

    groups: Groups
    input_layout: BatchLayout
    source: str
    members: tuple[tuple[int, str, BatchLayout, bool], ...]
    constants: tuple[int, ...]
    rows: RowsByLayout

    @staticmethod
    def for_call(groups: Groups, batch: Batch, args: tuple) -> CallPlan:
        numbers = {id(value): i for i, value in enumerate(args)}
        members = tuple(
            (numbers[id(t)], name, interned(p), sure) for name, t, p, sure in batch.members
        )
        constants = tuple(numbers[id(t)] for t in batch.constants)
        rows = RowsByLayout(groups)
        return CallPlan(groups, batch.input_layout, batch.source, members, constants, rows)

    def of(self, args: tuple) -> Batch:
        """Return the batch of a call with such arguments."""
        batch = Batch(self.groups.batch_size, self.input_layout, source=self.source)
        for number, name, layout, sure in self.members:
            batch.members.append((name, args[number], layout, sure))
        for number in self.constants:
            batch.constants.append(args[number])
        return batch


def shapes_of(forward: ForwardLike, args: tuple) -> tuple | None:
    """Return all that decides who votes in a call of plain tensors; None for other calls.

    Tensors with a graph may come from earlier forwards, a backward runs parts of one again.
    """
    if torch._C._current_graph_task_id() != -1:
        return None
    key: list[object] = [forward]
    tensors = set()
    for value in args:
        if type(value) is Tensor and not value.is_nested and value.layout is torch.strided:
            if value.grad_fn is not None:
                return None
            key.append(value.shape)
            if id(value) in tensors:
                return None
            tensors.add(id(value))
        elif value is None or type(value) in (int, float, bool, str):
            key.append(value)
        else:
            return None
    return tuple(key)
