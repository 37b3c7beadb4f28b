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
from htv.autograd.expand import expand, expand_rows
from htv.autograd.linear import plainly
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
    x = x.contiguous(memory_format=_group_norm_format(x))
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
        ctx.unused, ctx.eps = (None,) * (5 + len(tokens)), eps
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

    @staticmethod
    def differentiable(ctx, grad):
        _, x, weight, *_ = ctx.saved_tensors
        argument, rows, lead = ctx.arguments[0], ctx.grouped_rows, x.dim() - len(ctx.shape)
        if argument.is_served and rows.rows_vote:
            shape = *x.shape[:lead], *ctx.shape
            weight = expand_rows(argument, shape, rows, features=len(ctx.shape))
        elif argument.is_served:
            weight = expand(argument, x.dim(), x.shape[rows.dim], rows)
        along = tuple(range(lead, x.dim()))
        grad_x, x_hat = _standardised_backward(grad, x, weight, ctx.eps, x.shape, along)
        return grad_x, *_plain_affine(ctx, grad, x_hat, tuple(range(lead))), *ctx.unused


def _standardised_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    shape: Sequence[int],
    along: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The gradient of x and x_hat of a normalisation, by operations that autograd differentiates
    any number of times: torch's own takes mean and rstd for constants the second time.

    weight:  broadcasts against x, or None.
    shape:   of x, in which its statistics are along the dims `along`.
    """
    dtype = compute_dtype(x.dtype)
    scaled = grad.to(dtype) if weight is None else grad.to(dtype) * weight.to(dtype)
    scaled, values = scaled.reshape(shape), x.to(dtype).reshape(shape)
    centred = values - values.mean(along, keepdim=True)
    rstd = (centred.square().mean(along, keepdim=True) + eps).rsqrt()
    x_hat = centred * rstd
    shared = x_hat * (scaled * x_hat).mean(along, keepdim=True)
    grad_x = rstd * (scaled - scaled.mean(along, keepdim=True) - shared)
    return grad_x.reshape(x.shape).to(x.dtype), x_hat.reshape(x.shape)


def _plain_affine(
    ctx, grad: Tensor, x_hat: Tensor, along: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The plain gradients of scale and shift, sums along some dims, with a graph; None where they
    are served or not wanted.
    """
    weight, bias = ctx.arguments
    grad = grad.to(x_hat.dtype)
    return (
        (grad * x_hat).sum(along).to(weight.value.dtype) if plainly(ctx, 1, weight) else None,
        grad.sum(along).to(bias.value.dtype) if plainly(ctx, 2, bias) else None,
    )


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
        ctx.unused, ctx.eps, ctx.num_groups = (None,) * (5 + len(tokens)), eps, num_groups
        n, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
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

    @staticmethod
    def differentiable(ctx, grad):
        _, x, weight, *_ = ctx.saved_tensors
        argument, rows = ctx.arguments[0], ctx.grouped_rows
        if argument.is_served:
            weight = expand(argument, 2, x.shape[0], rows)  # (S, C)
        if weight is not None:
            weight = weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
        shape = x.shape[0], ctx.num_groups, -1
        grad_x, x_hat = _standardised_backward(grad, x, weight, ctx.eps, shape, (2,))
        along = (0, *range(2, x.dim()))
        return grad_x, *_plain_affine(ctx, grad, x_hat, along), *ctx.unused


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
