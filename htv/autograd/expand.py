"""Parameters used elementwise (positions, class tokens, scales, gates): expanded so that every unit sees its own copy.

The gradient of the expanded tensor then is the stack of contributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htv.autograd.derived import DerivedTensor
from htv.autograd.ledger import MARKER, Function, Slot
from htv.groups import Voters
from htv.ops.factors import StackedFactors
from htv.ops.reference import compute_dtype


def expand(slot: Slot, ndim: int, size: int, voters: Voters, dtype: torch.dtype | None = None) -> Tensor:
    """Copies of a tensor for every index of the batch's dim, broadcastable against tensors of `ndim` dims.

    Its dims are aligned to the right of the ndim dims; the one at the batch's must have size 1, or be missing.
    size:   of the batch's dim, that of `voters`.
    dtype:  of the copies, if not the tensor's own. (One of no dims does not decide the type of a result, copies would.)
    """
    shape = [*(1,) * (ndim - slot.value.dim()), *slot.value.shape]
    shape[voters.dim] = size
    return _Expand.apply(slot.value, slot, tuple(shape), voters, dtype, *slot.tokens)


def expand_rows(slot: Slot, shape: tuple[int, ...], voters: Voters, dtype: torch.dtype | None = None) -> Tensor:
    """Where rows vote by themselves: copies for every row, the dims of `shape` before the tensor's own."""
    return _Expand.apply(slot.value, slot, shape, voters, dtype, *slot.tokens)


class _Expand(Function):
    @staticmethod
    def forward(ctx, source, slot, shape, voters, dtype, *tokens):
        ctx.slot, ctx.voters, ctx.unused = slot, voters, (None,) * (5 + len(tokens))
        ctx.save_for_backward(MARKER)
        source = source if dtype is None else source.to(dtype)
        return source.reshape((1,) * (len(shape) - source.dim()) + tuple(source.shape)).expand(shape)

    @staticmethod
    def gradients(ctx, grad):
        slot, shape = ctx.slot, tuple(ctx.slot.value.shape)
        make = lambda voters, grad: StackedFactors(_contributions(grad, shape, voters))
        slot.record(make, ctx.voters, grad.to(slot.value.dtype))
        return ctx.unused


def _contributions(grad: Tensor, shape: tuple[int, ...], voters: Voters) -> Tensor:
    """(E, *shape) to a tensor of that shape, from the gradient of its copies."""
    if voters.rows_vote:
        rows = voters.rows(grad)
        return rows.reshape(len(rows), *shape)
    summed = voters.along(grad.to(compute_dtype(grad.dtype)))
    return summed.reshape(len(summed), *shape)


def per_unit(derived: DerivedTensor, voters: Voters) -> Tensor:
    """A derived tensor of which every unit has a part of its own, whose gradient is recorded as that unit's."""
    return _PerUnit.apply(derived.source.detach(), derived, voters, *(sink.token for sink in derived.sinks))


class _PerUnit(Function):
    @staticmethod
    def forward(ctx, source, derived, voters, *tokens):
        ctx.derived, ctx.voters, ctx.unused = derived, voters, (None,) * (3 + len(tokens))
        ctx.save_for_backward(MARKER)
        return source.view_as(source)

    @staticmethod
    def gradients(ctx, grad):
        ctx.derived.record_by_unit(grad, ctx.voters)
        return ctx.unused
