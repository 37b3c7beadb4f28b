"""What every tensor of a model's forward is to the batch: its mark, kept by identity."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.autograd.from_parameters import Origin
from htv.engine.protocols import ParameterLike
from htv.engine.usual import PLAIN_TYPES, put_usual
from htv.groups import BatchLayout


@dataclass(frozen=True)
class Constant:
    """Marks what was computed without the batch and without a gradient: buffers, torch.arange, an
    input broadcast over the batch.
    """


@dataclass(frozen=True)
class Plain:
    """Marks what was computed without the batch, from something that keeps its plain gradient: an
    excluded parameter, an input.
    """


@dataclass(frozen=True, eq=False)
class FromParameters:
    """Marks what was computed from served parameters (and constants) alone, by a plain autograd
    graph.

    parameters:  these parameters.
    source:      what it broadcasts: the tensor itself, or the one it is an `expand` of.
    origin:      how the source was made from its parameters, where its contributions can be told
                 without going back through its graph (`htv.autograd.from_parameters`).
    """

    parameters: tuple[ParameterLike, ...]
    source: Tensor
    origin: Origin | None = None


@dataclass(frozen=True)
class Lost:
    """Marks what was computed from the batch, where it is not known any more which part of it
    belongs to which example.

    by:     the call that lost it, "" where that is not known.
    where:  its place in the model's code, "file:line".
    pairs:  whether it compares all examples with all (similarities): of use to a loss, if to
            anything.
    """

    by: str = ""
    where: str = ""
    pairs: bool = False

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        return f"{self.by or 'an operation htv does not know, or one that mixes examples,'}{where}"


Mark = Constant | Plain | FromParameters | BatchLayout | Lost
OfBatch = BatchLayout | Lost
CONSTANT, PLAIN, LOST = Constant(), Plain(), Lost()


class Marks:
    """Keeps the marks of live tensors, by identity, and does not hold them alive. Looks into
    `earlier` marks for those it lacks.

    table:  identity -> (weak reference, mark, how often the tensor had been written to or None
            where torch does not tell, whether it had a gradient). Read and written for the usual
            case by `htv.engine.usual`.
    """

    def __init__(self, earlier: Marks | None = None) -> None:
        self.table: dict[int, tuple[weakref.ref, Mark, int | None, bool]] = {}
        self._earlier = earlier

    def get(self, tensor: Tensor) -> Mark | None:
        entry = self.table.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return None if self._earlier is None else self._earlier.get(tensor)

    def put(self, tensor: Tensor, mark: Mark) -> None:
        if type(mark) is BatchLayout and mark.examples is None and not mark.is_the_one:
            mark = interned(mark)
        if not put_usual(self.table, tensor, mark):
            self.table[id(tensor)] = (weakref.ref(tensor), mark, *_state(tensor))

    def nodes(self) -> Iterator[tuple[object, int, Mark]]:
        """Yield the autograd nodes of the marked tensors that are alive, as (node, output,
        mark).
        """
        for reference, mark, version, graded in list(self.table.values()):
            tensor = reference()
            if (
                graded
                and tensor is not None
                and tensor.grad_fn is not None
                and _state(tensor)[0] == version
            ):
                yield tensor.grad_fn, tensor.output_nr, mark
        if self._earlier is not None:
            yield from self._earlier.nodes()

    def current(self, tensor: Tensor, again: Callable[[Tensor], Mark]) -> Mark | None:
        """Do what `get` does; return what `again(tensor)` says for a `tensor` that was written to
        since, or got a graph, by a call nobody saw or through its base or another view.
        """
        entry = self.table.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None if self._earlier is None else self._earlier.get(tensor)
        version, graded = _state(tensor)
        if entry[2] != version or graded > entry[3]:
            with torch._C.DisableTorchFunction():
                self.put(tensor, again(tensor))
            return self.get(tensor)
        return entry[1]


def _state(tensor: Tensor) -> tuple[int | None, bool]:
    """Tell how often a tensor's memory was written to, where torch tells, and whether it has a
    graph or wants a gradient.
    """
    if (
        torch._C._len_torch_function_stack()
    ):  # a mode is on, and would take this for a call of the forward
        with torch._C.DisableTorchFunction():
            return _version(tensor), tensor.requires_grad
    if type(tensor) in PLAIN_TYPES and not tensor.is_inference():
        return tensor._version, tensor.requires_grad
    return _version(tensor), tensor.requires_grad


def _version(tensor: Tensor) -> int | None:
    told = type(tensor) in PLAIN_TYPES or tensor._is_view()
    return tensor._version if told and not tensor.is_inference() else None


_layouts: dict[tuple, BatchLayout] = {}
MOST_LAYOUTS = 4096


def interned(mark: Mark) -> Mark:
    """Return the one object that stands for all places equal to `mark`, if it has no numbers of its
    own; any other mark as it is.

    What was found for a call with such marks once holds for every later one, so it can be looked
    up.
    """
    if type(mark) is not BatchLayout or mark.examples is not None or mark.is_the_one:
        return mark
    key = (mark.dim, mark.outer, mark.times, mark.guess)
    found = _layouts.get(key)
    if found is None:
        if len(_layouts) >= MOST_LAYOUTS:
            _layouts.clear()
        found = _layouts[key] = mark
        object.__setattr__(mark, "is_the_one", True)
    return found
