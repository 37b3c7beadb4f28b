"""Parameters used elementwise (positions, class tokens, scales, gates): expanded so that every
example sees its own copy.

The gradient of the expanded tensor then is the stack of contributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.autograd.from_parameters import TensorFromParameters
from htv.groups import GroupedRows
from htv.ops.factors import StackedFactors
from htv.ops.reference import compute_dtype


def expand(
    argument: ParameterArgument,
    ndim: int,
    size: int,
    grouped_rows: GroupedRows,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copies of a tensor for every index of the batch's dim, broadcastable against tensors of
    `ndim` dims.

    Its dims are aligned to the right of the ndim dims; the one at the batch's must have size 1, or
    be missing.
    size:   of the batch's dim, that of `grouped_rows`.
    dtype:  of the copies, if not the tensor's own. (One of no dims does not decide the type of a
            result, copies would.)
    """
    shape = [*(1,) * (ndim - argument.value.dim()), *argument.value.shape]
    shape[grouped_rows.dim] = size
    return _Expand.apply(
        argument.value, argument, tuple(shape), grouped_rows, dtype, 1, *argument.tokens
    )


def expand_rows(
    argument: ParameterArgument,
    shape: tuple[int, ...],
    grouped_rows: GroupedRows,
    dtype: torch.dtype | None = None,
    features: int = 1,
) -> Tensor:
    """Where rows vote by themselves: copies for every row, along the dims of `shape` before the
    tensor's own, the last `features` of them.
    """
    return _Expand.apply(
        argument.value, argument, shape, grouped_rows, dtype, features, *argument.tokens
    )


class _Expand(Function):
    @staticmethod
    def forward(ctx, source, argument, shape, grouped_rows, dtype, features, *tokens):
        ctx.argument, ctx.grouped_rows, ctx.features, ctx.unused = (
            argument,
            grouped_rows,
            features,
            (None,) * (6 + len(tokens)),
        )
        ctx.save_for_backward(MARKER)
        source = source if dtype is None else source.to(dtype)
        return source.reshape((1,) * (len(shape) - source.dim()) + tuple(source.shape)).expand(
            shape
        )

    @staticmethod
    def gradients(ctx, grad):
        argument, features = ctx.argument, ctx.features
        shape = tuple(argument.value.shape)
        make = lambda grouped_rows, grad: StackedFactors(
            _contributions(grad, shape, grouped_rows, features)
        )
        argument.record(make, ctx.grouped_rows, grad.to(argument.value.dtype))
        return ctx.unused


def _contributions(
    grad: Tensor, shape: tuple[int, ...], grouped_rows: GroupedRows, features: int
) -> Tensor:
    """(E, *shape) to a tensor of that shape, from the gradient of its copies; where rows vote, they
    have so many dims of `features`.
    """
    if grouped_rows.rows_vote:
        rows = grouped_rows.rows(grad, features)
        return rows.reshape(len(rows), *shape)
    summed = grouped_rows.along(grad.to(compute_dtype(grad.dtype)))
    return summed.reshape(len(summed), *shape)


def per_example(derived: TensorFromParameters, grouped_rows: GroupedRows) -> Tensor:
    """A derived tensor of which every example has a part of its own, whose gradient is recorded as
    that example's.
    """
    return _PerExample.apply(
        derived.source.detach(),
        derived,
        grouped_rows,
        *(recorder.token for recorder in derived.recorders),
    )


class _PerExample(Function):
    @staticmethod
    def forward(ctx, source, derived, grouped_rows, *tokens):
        ctx.derived, ctx.grouped_rows, ctx.unused = (
            derived,
            grouped_rows,
            (None,) * (3 + len(tokens)),
        )
        ctx.save_for_backward(MARKER)
        return source.view_as(source)

    @staticmethod
    def gradients(ctx, grad):
        ctx.derived.record_by_example(grad, ctx.grouped_rows)
        return ctx.unused
