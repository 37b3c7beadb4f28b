"""Layer and group normalisation with aggregated gradients of scale and shift.

Both are y = x_hat * weight + bias with statistics inside one example, so the contribution of a
group is the sum over its positions of grad * x_hat and of grad: one vector per group, no more than
the activations themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.groups import GroupedRows
from htv.ops.factors import StackedFactors
from htv.ops.norm import group_norm_backward, norm_sums
from htv.ops.reference import compute_dtype


def layer_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: ParameterArgument,
    bias: ParameterArgument,
    eps: float,
    grouped_rows: GroupedRows,
) -> Tensor:
    """F.layer_norm. x: (*rest, *shape) with the batch in one of rest; weight and bias: shape."""
    tokens = *weight.tokens, *bias.tokens
    return _LayerNorm.apply(
        x, weight.value, bias.value, weight, bias, shape, eps, grouped_rows, *tokens
    )


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: ParameterArgument,
    bias: ParameterArgument,
    eps: float,
    grouped_rows: GroupedRows,
) -> Tensor:
    """F.group_norm. x: (S, C, *space); weight and bias: (C,)."""
    tokens = *weight.tokens, *bias.tokens
    return _GroupNorm.apply(
        x, weight.value, bias.value, weight, bias, num_groups, eps, grouped_rows, *tokens
    )


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, weight_argument, bias_argument, shape, eps, grouped_rows, *tokens
    ):
        ctx.arguments, ctx.shape, ctx.grouped_rows = (
            (weight_argument, bias_argument),
            shape,
            grouped_rows,
        )
        ctx.unused = (None,) * (5 + len(tokens))
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(MARKER, x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def gradients(ctx, grad):
        _, x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, grouped_rows = ctx.shape, ctx.grouped_rows
        sums = _sums_along_batch(grad, x, mean, rstd, len(shape), grouped_rows)
        grads = _affine_grads(
            ctx,
            sums,
            lambda grouped_rows, sums: StackedFactors(_by_group(sums, shape, grouped_rows)),
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, shape, mean, rstd, weight, bias, [True, False, False]
            )
        return grad_x, *grads, *ctx.unused


def _sums_along_batch(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, features: int, grouped_rows: GroupedRows
) -> tuple[Tensor, Tensor]:
    """(S, D) for scale and shift, along the batch's dim: sums over the rows there; (S, *rest, D)
    where every row votes.

    grad and x: (*rest, *shape) with a shape of so many features; mean and rstd: (*rest, 1, ...).
    """
    dtype, lead = compute_dtype(x.dtype), x.ndim - features
    if grouped_rows.dim:
        grad, x, mean, rstd = (t.movedim(grouped_rows.dim, 0) for t in (grad, x, mean, rstd))
    if mean.dtype != dtype:
        mean, rstd = mean.to(dtype), rstd.to(dtype)
    apart = x.shape[: lead if grouped_rows.rows_vote else 1]
    rows = math.prod(apart), math.prod(x.shape[len(apart) : lead])
    values = *rows, math.prod(x.shape[lead:])
    scale, shift = norm_sums(
        grad.reshape(values).contiguous(),
        x.reshape(values).contiguous(),
        mean.reshape(rows).contiguous(),
        rstd.reshape(rows).contiguous(),
    )
    if grouped_rows.rows_vote:
        return scale.unflatten(0, apart), shift.unflatten(0, apart)
    return scale, shift


def _by_group(sums: Tensor, shape: tuple[int, ...], grouped_rows: GroupedRows) -> Tensor:
    """(E, *shape) from what `_sums_along_batch` returns."""
    found = (
        grouped_rows.sums(sums.movedim(0, grouped_rows.dim))
        if grouped_rows.rows_vote
        else grouped_rows.along(sums, dim=0)
    )
    return found.reshape(found.shape[0], *shape)


def _group_norm_format(x: Tensor) -> torch.memory_format:
    """What F.group_norm computes and returns: the input's memory format on the CPU, contiguous
    elsewhere.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    if x.device.type == "cpu":
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, weight_argument, bias_argument, num_groups, eps, grouped_rows, *tokens
    ):
        ctx.arguments, ctx.grouped_rows = (weight_argument, bias_argument), grouped_rows
        ctx.unused = (None,) * (5 + len(tokens))
        n, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        x = x.contiguous(memory_format=_group_norm_format(x))
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, channels, space, num_groups, eps
        )
        ctx.save_for_backward(MARKER, x, weight, mean, rstd)
        return y

    @staticmethod
    def gradients(ctx, grad):
        _, x, weight, mean, rstd = ctx.saved_tensors
        grad_x, *sums = group_norm_backward(grad, x, weight, mean, rstd, ctx.needs_input_grad[0])
        grads = _affine_grads(
            ctx, sums, lambda grouped_rows, sums: StackedFactors(grouped_rows.along(sums))
        )
        return grad_x, *grads, *ctx.unused


def _affine_grads(
    ctx, sums: Sequence[Tensor], make: Callable[..., StackedFactors]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of scale and shift, or None where they are recorded. sums: for both; make:
    their factors.
    """
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    (weight, bias), (scale, shift) = ctx.arguments, sums
    return (
        weight.grad(needs_weight, make, ctx.grouped_rows, scale),
        bias.grad(needs_bias, make, ctx.grouped_rows, shift),
    )
