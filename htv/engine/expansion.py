"""Calls that use served parameters row by row: every example gets a copy of its own.

The gradient of such copies is the stack of what the examples contribute. Every other use of a
parameter together with the batch is refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.expand import expand, expand_rows, per_example
from htv.engine import propagation, torch_ops
from htv.engine.protocols import ModeLike
from htv.engine.provenance import FromParameters, Lost, OfBatch, Plain
from htv.engine.torch_ops import plain_name, replace_tensors
from htv.groups import BatchLayout


def call_with_parameters(mode: ModeLike, func, args, kwargs, tensors, marks):
    name = plain_name(func)
    derived = [
        m
        for t, m in zip(tensors, marks, strict=True)
        if isinstance(m, FromParameters) and t.requires_grad
    ]
    parameters = tuple(dict.fromkeys(p for m in derived for p in m.parameters))
    if (
        not derived
        or not torch.is_grad_enabled()
        or name in torch_ops.QUERIES
        or name in torch_ops.COMPARING
    ):
        return func(*args, **kwargs)
    if name in torch_ops.BORROWING:
        return func(*args, **kwargs)
    if any(isinstance(m, OfBatch) for m in marks):
        replaced = _expanded(mode, func, name, args, kwargs, tensors, marks, parameters)
        return func(*args, **kwargs) if replaced is None else func(*replaced[0], **replaced[1])
    if any(isinstance(m, Plain) for m in marks):
        why = (
            "it is combined with something that keeps its plain gradient, an excluded "
            "parameter or an input that is not of the batch; exclude both or neither"
        )
        mode.refuse(name, parameters, why)
    return func(*args, **kwargs)


def _expanded(mode: ModeLike, func, name, args, kwargs, tensors, marks, parameters):
    """Return arguments with every parameter replaced by its copies per example, or None to run
    the call plainly.
    """
    into = tensors[0] if torch_ops.in_place(func) and isinstance(marks[0], FromParameters) else None
    own = into is not None and _is_its_own(mode, into)
    if into is not None and not (own and name in torch_ops.ELEMENTWISE):
        why = "it is written to in place (y = y * x leaves it as it is, where y *= x does not)"
        return mode.refuse(name, parameters, why)
    if name in torch_ops.ELEMENTWISE:
        ndim = max(t.dim() for t in tensors)
    elif name in torch_ops.CONCATENATING:
        ndim = tensors[0].dim()
    else:
        return mode.refuse(
            name,
            parameters,
            "htv does not know how to separate its contributions by group there",
        )
    layouts = [
        (t, m.at(m.dim + ndim - t.dim()))
        for t, m in zip(tensors, marks, strict=True)
        if isinstance(m, BatchLayout)
    ]
    losses = [
        m for t, m in zip(tensors, marks, strict=True) if isinstance(m, Lost) and t.requires_grad
    ]
    lost = not mode.session.shares_statistics and bool(losses)
    shapes = [tuple(t.shape) for t, m in zip(tensors, marks, strict=True) if isinstance(m, OfBatch)]
    batch_size = mode.batch_size
    if (
        not layouts
        or lost
        or not (batch_size == 1 or all(p.same(layouts[0][1], batch_size) for _, p in layouts))
    ):
        why = (
            f"of the other operands, of shapes {shapes}, it is not known which part belongs to "
            "which example: "
        )
        for mark in losses:
            mode.session.note_loss(mark)
        lost_at = next((m for m in (*losses, *marks) if isinstance(m, Lost)), None)
        blame = (
            f"{lost_at} lost that" if lost_at else "the batch was indexed, mixed or reduced away"
        )
        why = f"{why}{blame} (the batch is {mode.batch.source})"
        if losses and all(m.pairs for m in losses) and not mode.session.passes_plainly:
            # Only a loss of the similarities would reach the parameter, and the guard on it
            # then says why not.
            message = mode.refusal(name, parameters, why)
            for tracked in parameters:
                tracked.defer(message)
            return None
        return mode.refuse(name, parameters, why)
    beside, layout = layouts[0]
    if batch_size == 1 and not mode.groups.rows_vote:
        copies = {
            id(t): _of_one(mode, t, m, beside)
            for t, m in zip(tensors, marks, strict=True)
            if _tracked(t, m)
        }
        return _with_copies_in_place(into, copies, args, kwargs)
    if name in torch_ops.CONCATENATING and _along(args, kwargs) % ndim == layout.dim:
        return mode.refuse(name, parameters, "it is concatenated along the batch")
    copies = {}
    for tensor, mark in zip(tensors, marks, strict=True):
        if _tracked(tensor, mark):
            copies[id(tensor)] = found = _copies(mode, tensor, mark, ndim, beside, layout)
            if found is None:
                why = (
                    f"its shape {tuple(tensor.shape)} varies along dim {layout.dim}, the "
                    f"batch's, of {shapes}"
                )
                return mode.refuse(name, mark.parameters, why)
    if into is not None and copies[id(into)].shape != into.shape:
        why = f"its shape {tuple(into.shape)} has no room for the examples that are written into it"
        return mode.refuse(name, parameters, why)
    return _with_copies_in_place(into, copies, args, kwargs)


def _is_its_own(mode: ModeLike, tensor: Tensor) -> bool:
    """Tell whether a tensor has memory of its own, that of no parameter and no other tensor."""
    made = tensor.grad_fn is not None and mode.tracked(tensor) is None
    return made and not tensor._is_view() and not mode.groups.rows_vote


def _with_copies_in_place(into: Tensor | None, copies: dict[int, Tensor], args, kwargs):
    """Return the arguments with their `copies`, by identity. What is written `into` stays the
    tensor that it is, and is made of its copies from then on.
    """
    if into is not None:
        made = copies.pop(id(into))
        into.detach_().copy_(made)
    return replace_tensors(args, copies), replace_tensors(kwargs, copies)


def _copies(
    mode: ModeLike,
    tensor: Tensor,
    mark: FromParameters,
    ndim: int,
    beside: Tensor,
    layout: BatchLayout,
) -> Tensor | None:
    """Make a derived tensor's copies for every example, to stand in for it; None if it cannot
    be told apart by example.
    """
    for tracked in mark.parameters:
        tracked.note("elementwise")
    source, size = mark.source, layout.size(mode.batch_size)
    of_batch = ((1,) * (ndim - source.dim()) + tuple(source.shape))[layout.dim]
    if of_batch != 1:
        if source is not tensor or mode.tracked(source) or source.dim() != ndim or of_batch != size:
            return None
        derived = mode.derived(source, mark)
        return None if derived.is_view else per_example(derived, mode.rows[layout])
    # A scalar does not raise the type of what it meets: its copies must not either.
    dtype = torch.result_type(beside, tensor) if tensor.dim() == 0 else None
    argument = (
        mode.argument(source)
        if mode.tracked(source) is not None
        else mode.derived(source, mark).argument()
    )
    if mode.groups.rows_vote:
        return _row_copies(mode, argument, tensor, ndim, beside, layout, dtype)
    copies = expand(argument, ndim, size, mode.rows[layout], dtype)
    shape = [*(1,) * (ndim - tensor.dim()), *tensor.shape]
    shape[layout.dim] = size
    return copies.expand(shape)


def _of_one(mode: ModeLike, tensor: Tensor, mark: FromParameters, beside: Tensor) -> Tensor:
    """Return a derived tensor as the only example uses it."""
    for tracked in mark.parameters:
        tracked.note("elementwise")
    dtype = torch.result_type(beside, tensor) if tensor.dim() == 0 else None
    return expand(
        mode.argument(tensor), tensor.dim() + 1, 1, mode.rows[BatchLayout(0)], dtype
    ).squeeze(0)


def _row_copies(
    mode: ModeLike,
    argument: ParameterArgument,
    tensor,
    ndim: int,
    beside: Tensor,
    layout: BatchLayout,
    dtype,
) -> Tensor | None:
    """Copy along all dims of the other operand but the last, where rows vote."""
    source = argument.value
    features = source.shape[-1] if source.dim() else 1
    lead = beside.shape[: ndim - 1]
    if (
        source.numel() > features
        or beside.dim() != ndim
        or layout.dim >= len(lead)
        or tensor.shape != source.shape
    ):
        return None  # it may differ from token to token
    return expand_rows(argument, (*lead, features), mode.rows[layout], dtype)


def with_copies(
    mode: ModeLike, func, args, kwargs, tensors: list[Tensor], ndim: int, layout: BatchLayout
):
    """Make a call, `func(*args, **kwargs)`, with what comes from parameters among `tensors`
    replaced by its copies per example, which have them at `layout` in `ndim` dims.
    """
    copies = {}
    for tensor in tensors:
        mark = mode.mark(tensor)
        if isinstance(mark, FromParameters) and tensor.requires_grad:
            at = layout
            if mode.batch_size == 1 and not mode.groups.rows_vote:
                found = _of_one(mode, tensor, mark, tensor)
                found = found.reshape((1,) * (ndim - found.dim()) + tuple(found.shape))
                at = propagation.all_of_one(found)
            else:
                found = _copies(mode, tensor, mark, ndim, tensor, layout)
            if found is None:
                why = f"its shape {tuple(tensor.shape)} varies along the batch"
                mode.refuse(plain_name(func), mark.parameters, why)
                continue
            copies[id(tensor)] = found
            mode.marks.put(found, at)
    return mode.general(func, replace_tensors(args, copies), replace_tensors(kwargs, copies))


def copied_per_example(mode: ModeLike, x: Tensor | None) -> Tensor | None:
    """Return `x`, a layer's input; if it is a derived tensor expanded over the batch (learnt
    queries), its copies per example.
    """
    mark = mode.mark(x)
    if (
        not isinstance(mark, FromParameters)
        or mark.source is x
        or not x.requires_grad
        or not torch.is_grad_enabled()
    ):
        return x
    own, batch_size = (
        (1,) * (x.dim() - mark.source.dim()) + tuple(mark.source.shape),
        mode.batch_size,
    )
    dims = [d for d in range(x.dim()) if x.shape[d] == batch_size and own[d] == 1]
    input_layout = mode.groups.input_layout.dim
    if batch_size == 1 or mode.groups.rows_vote or not (input_layout in dims or len(dims) == 1):
        return x
    names = ", ".join(repr(s.name) for s in mark.parameters)
    guess = f"a tensor of shape {tuple(x.shape)} expanded from parameter {names}"
    layout = BatchLayout(input_layout if input_layout in dims else dims[0], guess=guess)
    copies = _copies(mode, x, mark, x.dim(), x, layout)
    mode.marks.put(copies, layout)
    return copies


def unexpanded(mode: ModeLike, w: Tensor, x: Tensor) -> Tensor:
    """Return `w`, a derived factor of a product with `x`, without leading dims along which it
    only repeats what `x` has.
    """
    source = mode.mark(w).source
    if source is not w:
        own = (1,) * (w.dim() - source.dim()) + tuple(source.shape)
        repeated = [d for d in range(w.dim() - 2) if own[d] == 1 != w.shape[d]]
        known = x.dim() >= w.dim() and all(
            x.shape[x.dim() - w.dim() + d] == w.shape[d] for d in repeated
        )
        w = source if known else w
    while w.dim() > 2 and w.shape[0] == 1 and x.dim() >= w.dim():
        w = w.squeeze(0)
    return w


def _tracked(tensor: Tensor, mark) -> bool:
    """Tell whether contributions to a tensor go to served parameters."""
    return isinstance(mark, FromParameters) and tensor.requires_grad


def _along(args, kwargs) -> int:
    """Return the dim tensors are concatenated along."""
    return kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
