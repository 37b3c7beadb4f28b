"""What every tensor of a model's forward is to the batch: its mark, kept by identity."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from htv.groups import Place

if TYPE_CHECKING:
    from htv.autograd.derived import Origin
    from htv.served import Served


@dataclass(frozen=True)
class Constant:
    """Computed without the batch and without a gradient: buffers, torch.arange, an input broadcast over the batch."""


@dataclass(frozen=True)
class Plain:
    """Computed without the batch, from something that keeps its plain gradient: an excluded parameter, an input."""


@dataclass(frozen=True, eq=False)
class Derived:
    """Computed from served parameters (and constants) alone, by a plain autograd graph.

    source:  what it broadcasts: the tensor itself, or the one it is an `expand` of.
    origin:  how the source was made from its parameters, where its contributions can be told without going back through
             its graph (`htv.autograd.derived`).
    """

    parameters: tuple[Served, ...]
    source: Tensor
    origin: Origin | None = None


@dataclass(frozen=True)
class Lost:
    """Computed from the batch, but it is not known any more which part of it belongs to which unit."""


Mark = Constant | Plain | Derived | Place | Lost
OfBatch = Place | Lost
CONSTANT, PLAIN, LOST = Constant(), Plain(), Lost()


class Marks:
    """Marks of live tensors, by identity; does not hold them alive. Looks into `earlier` marks for those it lacks."""

    def __init__(self, earlier: Marks | None = None) -> None:
        self._marks: dict[int, tuple[weakref.ref, Mark, int | None]] = {}
        self._earlier = earlier

    def get(self, tensor: Tensor) -> Mark | None:
        entry = self._marks.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return None if self._earlier is None else self._earlier.get(tensor)

    def put(self, tensor: Tensor, mark: Mark) -> None:
        self._marks[id(tensor)] = (weakref.ref(tensor), mark, _version(tensor))

    def current(self, tensor: Tensor, again: Callable[[Tensor], Mark]) -> Mark | None:
        """`get`; of a view whose memory was written to since, through its base or another view, what `again` says."""
        entry = self._marks.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None if self._earlier is None else self._earlier.get(tensor)
        if entry[2] is not None and entry[2] != _version(tensor):
            with torch._C.DisableTorchFunction():
                self.put(tensor, again(tensor))
            return self.get(tensor)
        return entry[1]


def _version(tensor: Tensor) -> int | None:
    """How often the memory of a view was written to; None for what is no view."""
    with torch._C.DisableTorchFunction():  # a mode may be on, and would take this for a call of the forward
        return tensor._version if tensor._is_view() and not tensor.is_inference() else None
