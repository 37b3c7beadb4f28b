"""Functions that torch composes of others which only move elements: taken apart, so that these are
followed, and served where parameters are among what they join.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.engine.handlers.call import handles
from htv.engine.protocols import ModeLike


def _tensors(args: tuple, kwargs: dict) -> list[Tensor] | None:
    """The tensors a function of several was given, one by one or in a list; None if by keyword."""
    if kwargs or not args:
        return None
    return list(args[0]) if isinstance(args[0], (tuple, list)) else list(args)


def _with_dims(tensor: Tensor, ndim: int) -> Tensor:
    """The tensor as torch.atleast_1d to atleast_3d show it."""
    if tensor.dim() >= ndim:
        return tensor
    if tensor.dim() == 0:
        return tensor.reshape((1,) * ndim)
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    return tensor.unsqueeze(-1) if ndim == 3 else tensor


@handles(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)
def _atleast(mode: ModeLike, func, args, kwargs):
    tensors = _tensors(args, kwargs)
    if tensors is None:
        return NotImplemented
    ndim = {torch.atleast_1d: 1, torch.atleast_2d: 2}.get(func, 3)
    with mode:
        shown = tuple(_with_dims(tensor, ndim) for tensor in tensors)
    return shown[0] if isinstance(args[0], Tensor) and len(args) == 1 else shown


# What each of them makes of its tensors, and the dim along which these are joined.
_JOINED = {
    torch.hstack: (1, 1), torch.vstack: (2, 0), torch.row_stack: (2, 0), torch.dstack: (3, 2),
}  # fmt: skip


@handles(*_JOINED, torch.column_stack)
def _joined(mode: ModeLike, func, args, kwargs):
    tensors = kwargs.get("tensors", args[0] if args else None)
    if not isinstance(tensors, (tuple, list)) or len(args) + len(kwargs) != 1 or not tensors:
        return NotImplemented
    with mode:
        if func is torch.column_stack:
            columns = [t.reshape(-1, 1) if t.dim() < 2 else t for t in tensors]
            return torch.cat(columns, 1)
        ndim, along = _JOINED[func]
        shown = [_with_dims(tensor, ndim) for tensor in tensors]
        return torch.cat(shown, min(along, shown[0].dim() - 1))


@handles(torch._C._nn.pad_sequence)
def _pad_sequence(mode: ModeLike, func, args, kwargs):
    """Each is padded by itself: as a rule one for every example."""
    given = (
        dict(zip(("sequences", "batch_first", "padding_value", "padding_side"), args, strict=False))
        | kwargs
    )
    sequences, batch_first = given["sequences"], given.get("batch_first", False)
    value, side = given.get("padding_value", 0.0), given.get("padding_side", "right")
    longest = max(len(t) for t in sequences)
    with mode:
        padded = []
        for t in sequences:
            missing = longest - len(t)
            ends = (missing, 0) if side == "left" else (0, missing)
            padded.append(F.pad(t, (0, 0) * (t.dim() - 1) + ends, value=value) if missing else t)
        return torch.stack(padded, 0 if batch_first else 1)
