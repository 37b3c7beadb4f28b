"""What a tensor inside a model's forward is to the batch, as far as parameters need to know.

Nothing is recorded for the common tensor, whose leading dims are the batch's. The others carry one of four marks.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from htv.attach import Served


@dataclass(frozen=True)
class Constant:
    """Computed without the batch and without a gradient: buffers, torch.arange, an input broadcast over the batch."""


@dataclass(frozen=True)
class Plain:
    """Computed without the batch, from parameters that keep their plain gradient (excluded ones)."""


@dataclass(frozen=True, eq=False)
class Derived:
    """Computed from served parameters (and constants) alone, by a plain autograd graph.

    source: what it broadcasts: the tensor itself, or the one it is an `expand` of.
    ids:    integers, where the source is an embedding of them in the one parameter and nothing more.
    """

    parameters: tuple[Served, ...]
    source: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Moved:
    """A tensor of the batch whose batch dim is no longer dim 0 but `dim`, or nowhere to be told if None."""

    dim: int | None


Mark = Constant | Plain | Derived | Moved


class Marks:
    """Marks of live tensors, by identity; holds no tensor alive."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[weakref.ref, Mark]] = {}

    def get(self, tensor: Tensor) -> Mark | None:
        entry = self._marks.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: Tensor, mark: Mark) -> None:
        self._marks[id(tensor)] = (weakref.ref(tensor), mark)


PERMUTING = {
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint",
}  # fmt: skip
REDUCING = {"sum", "mean", "amax", "amin", "max", "min", "median", "std", "var", "norm", "prod", "logsumexp"}

FOLLOWED = PERMUTING | {"unsqueeze", "select", "unbind", "__getitem__"}  # REDUCING may or may not keep its dims


def batch_dim_after(name: str, func, tensor: Tensor, dim: int, args: tuple, kwargs: dict) -> int | None:
    """Where the batch dim `dim` of `tensor` is after ``func(tensor, *args, **kwargs)``; None if it is gone.

    Knows the operations that move, insert or remove dims; the caller judges all others by their output's shape.
    """
    if name in PERMUTING:
        # Dims of distinct sizes show where each of them goes.
        probe = torch.empty(tuple(range(2, 2 + tensor.dim())), device="meta")
        return list(func(probe, *args, **kwargs).shape).index(dim + 2)
    if name == "unsqueeze":
        inserted = _dim_argument(args, kwargs, None, tensor.dim() + 1)
        return dim + 1 if inserted is not None and inserted <= dim else dim
    if name in ("select", "unbind"):
        return _without(dim, _dim_argument(args, kwargs, 0 if name == "unbind" else None, tensor.dim()))
    if name == "__getitem__":
        return _after_indexing(dim, args[0])
    if name in REDUCING:
        reduced = kwargs.get("dim", args[0] if args else None)
        dims = (reduced,) if isinstance(reduced, int) else tuple(reduced or range(tensor.dim()))
        if any(isinstance(d, int) and d % tensor.dim() == dim for d in dims):
            return None
    return dim


def _dim_argument(args: tuple, kwargs: dict, default: int | None, ndim: int) -> int | None:
    value = kwargs.get("dim", args[0] if args else default)
    return value % ndim if isinstance(value, int) else None


def _without(dim: int, removed: int | None) -> int | None:
    if removed is None or removed == dim:
        return None
    return dim - 1 if removed < dim else dim


def _after_indexing(dim: int, index) -> int | None:
    """Follow dim through basic indexing; indexing it by anything but a full slice loses it."""
    position = 0  # in the result
    old = 0  # in the indexed tensor
    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            position += 1
        elif item is Ellipsis:
            return position + dim - old if dim >= old else None
        elif isinstance(item, slice):
            if old == dim:
                return position if item == slice(None) else None
            old, position = old + 1, position + 1
        elif isinstance(item, int):
            if old == dim:
                return None
            old += 1
        else:
            return None if dim == old or position < 1 else dim
    return position + dim - old
