"""What a call's results are to the batch: the marks they get."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from htv.engine import graph_reading, probing, propagation, torch_ops
from htv.engine.checkpointing import in_first_run
from htv.engine.protocols import ModeLike
from htv.engine.provenance import (
    CONSTANT,
    LOST,
    PLAIN,
    FromParameters,
    Lost,
    Mark,
    OfBatch,
)
from htv.engine.torch_ops import Operation, plain_name, tensors_in
from htv.groups import BatchLayout

HERE = str(Path(__file__).resolve().parents[1]) + os.sep  # the package htv
TORCH = str(Path(torch.__file__).resolve().parent) + os.sep

# Calls whose result's mark follows from the shapes and marks of what they are given.
KEPT = torch_ops.BROADCASTING | torch_ops.EXPANDING | torch_ops.RESHAPING | torch_ops.PERMUTING
KEPT |= torch_ops.MULTIPLYING | torch_ops.ROWWISE | set(torch_ops.REDUCING)
KEPT |= set(torch_ops.TERMS) | set(torch_ops.DIAGONALS) | torch_ops.LOSSES
KEPT |= {"unsqueeze", "einsum", "scaled_dot_product_attention", "repeat", "tile", "renorm", "stft"}
# A second tensor would be an index, whose values matter.
KEPT_OF_ONE = set(torch_ops.ALONG) | {"getitem", "select"}


def mark_results(mode: ModeLike, func, args, kwargs, operands, result) -> None:
    """Mark what a call made, or wrote to in place."""
    name = plain_name(func)
    written = args[0] if args and torch_ops.writes(func) else kwargs.get("out")
    if (
        written is None
        and name in torch_ops.BROADCASTING
        and name not in torch_ops.BORROWING
        and isinstance(result, Tensor)
    ):
        layout = propagation.unmoved(operands, result, mode.batch_size)
        if layout is not None and mode.tracked(result) is None:
            return mode.marks.put(result, layout)
    outputs = tensors_in((result,), None) if written is None else tensors_in((written,), None)
    if not outputs:
        return
    if name in torch_ops.BORROWING and operands:
        operands = operands[:1]
    if getattr(func, graph_reading.ROWWISE, False):
        operation = Operation(name, func, args, kwargs, operands, outputs)
        batch_size = mode.batch_size
        follows = any(isinstance(m, OfBatch) for _, m in operands)
        if not follows:
            marks = [_mark_without_batch(mode, operation, output) for output in outputs]
        elif mode.groups.rows_vote:  # it may take tokens out of their order
            marks = [propagation.LOST] * len(outputs)
        else:
            marks = [graph_reading.rowwise(operands, output, batch_size) for output in outputs]
    elif any(isinstance(m, OfBatch) for _, m in operands) and name not in torch_ops.MAKING:
        operation = Operation(name, func, args, kwargs, operands, outputs)
        couples, rows = mode.session.shares_statistics, mode.groups.rows_vote
        marks = propagation.follow(
            operation, mode.batch_size, couples, rows, in_first_run(), mode.groups
        )
        if written is not None and name in torch_ops.RESHAPED_IN_PLACE:
            marks = [LOST] * len(outputs)
    else:
        operation = Operation(name, func, args, kwargs, operands, outputs)
        marks = [_mark_without_batch(mode, operation, output) for output in outputs]
    if any(isinstance(m, Lost) for m in marks):
        marks = _blamed(mode, operation, marks)
    for output, mark in zip(outputs, marks, strict=True):
        if mode.tracked(output) is None:
            mode.marks.put(output, mark)
        if written is not None:
            _mark_base(mode, output, mark)


def _blamed(mode: ModeLike, operation: Operation, marks: list[Mark]) -> list[Mark]:
    """Return marks of which the lost ones say who lost the batch: this call, or an earlier one
    behind it.
    """
    earlier = next((m for _, m in operation.operands if isinstance(m, Lost) and m.by), None)
    pairs = any(isinstance(m, Lost) and m.pairs for m in marks)
    blame = earlier or Lost(f"{operation.name!r}", place_in_code(), pairs)
    told = lambda m: replace(m, where=m.where or place_in_code()) if m.by else blame
    return [told(m) if isinstance(m, Lost) else m for m in marks]


def _mark_without_batch(mode: ModeLike, op: Operation, output: Tensor) -> Mark:
    derived = [(t, m) for t, m in op.operands if isinstance(m, FromParameters)]
    if not output.requires_grad:
        return CONSTANT
    if not derived:
        return PLAIN
    tensor, mark = derived[0]
    if (
        output is tensor and not torch_ops.in_place(op.func) and op.name != "setitem"
    ):  # x.to(...) of what is so already
        return mark
    if op.name in torch_ops.EXPANDING or _only_copies(op.name, op.args, op.kwargs):
        return FromParameters(mark.parameters, mark.source, mark.origin)
    if (
        op.name in torch_ops.PERMUTING
        and mark.source is not tensor
        and mark.source.dim() == tensor.dim()
    ):
        return FromParameters(
            mark.parameters, op.again({id(tensor): mark.source})
        )  # still an expanded tensor
    return FromParameters(tuple(dict.fromkeys(p for _, m in derived for p in m.parameters)), output)


def mark_again(mode: ModeLike, view: Tensor) -> Mark:
    """Tell what a tensor is after its memory was written to elsewhere: through another view, or
    by a call nobody saw.
    """
    base, mark, batch_size = view._base, mode.marks.get(view), mode.batch_size
    if getattr(type(view.grad_fn), "_forward_cls", None) is CheckpointFunction:
        return mark  # it was made where all operands have a say
    if base is None:
        return (
            mode.unseen(view)
            if isinstance(mark, BatchLayout) and view.grad_fn is not None
            else mark
        )
    known = mode.mark(base)
    if isinstance(known, BatchLayout):
        one = batch_size == 1 and view.dim() > 0
        return (
            propagation.all_of_one(view)
            if one
            else probing.view_after_writing(view, base, known, batch_size)
        )
    if isinstance(known, FromParameters) and view.requires_grad and not isinstance(mark, OfBatch):
        same = isinstance(mark, FromParameters) and mark.parameters == known.parameters
        return mark if same else FromParameters(known.parameters, view)
    return LOST if isinstance(known, Lost) else mark


def _mark_base(mode: ModeLike, view: Tensor, mark: Mark) -> None:
    """Mark the base of a view that was written to: that changes what it is made of."""
    base = view._base
    if base is None or mode.tracked(base) is not None:
        return
    known = mode.marks.get(base) or mode.mark(base)
    partly = view.numel() != base.numel() and view.shape[:-1] != base.shape[:-1]
    if isinstance(mark, OfBatch) and mode.groups.rows_vote and partly:
        mode.marks.put(base, Lost("a write to some rows", place_in_code()))  # to others' places
    elif isinstance(mark, OfBatch):
        mode.marks.put(base, probing.base_after_writing(base, known, view, mark, mode.batch_size))
    elif isinstance(mark, FromParameters) or not isinstance(
        known, (BatchLayout, Lost, FromParameters)
    ):
        mode.marks.put(
            base,
            FromParameters(mark.parameters, base) if isinstance(mark, FromParameters) else mark,
        )


def place_in_code() -> str:
    """Return the line of the model's code that is running: "file:line"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((HERE, TORCH, "<frozen")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@lru_cache(maxsize=4096)
def is_kept(func, of_one: bool) -> bool:
    """Tell whether the mark of a call's result follows from shapes and marks; `of_one`: of a call
    that takes one tensor at most.
    """
    name = plain_name(func)
    declared = getattr(func, graph_reading.ROWWISE, False)
    return not declared and (name in KEPT or (of_one and name in KEPT_OF_ONE))


def may_be_kept(mark: Mark | None) -> bool:
    """Tell whether a mark serves other batches of this size, too."""
    of_batch = type(mark) is BatchLayout and mark.examples is None
    return mark is CONSTANT or mark is PLAIN or of_batch


def _only_copies(name: str, args, kwargs) -> bool:
    """Tell whether a call to Tensor.repeat only copies along dims of size 1, as expand does."""
    if name != "repeat" or kwargs:
        return False
    sizes = args[1:] if isinstance(args[1], int) else tuple(args[1])
    shape = (1,) * (len(sizes) - args[0].dim()) + tuple(args[0].shape)
    return all(size == 1 or dim == 1 for size, dim in zip(sizes, shape, strict=True))
