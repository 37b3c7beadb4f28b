"""Layer and group normalisation with aggregated gradients of scale and shift.

Both are y = x_hat * weight + bias with statistics inside one example, so the contribution of a group is the sum over
its positions of grad * x_hat and of grad: one vector per group, no more than the activations themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.groups import Groups
from htv.ops.factors import SCRATCH_BYTES, StackedFactors
from htv.ops.reference import compute_dtype


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Slot, bias: Slot, eps: float, groups: Groups) -> Tensor:
    """F.layer_norm. x: (*lead, *rest, *shape); weight and bias: shape."""
    return _LayerNorm.apply(x, weight.value, bias.value, weight.token, bias.token, weight, bias, shape, eps, groups)


def group_norm(x: Tensor, num_groups: int, weight: Slot, bias: Slot, eps: float, groups: Groups) -> Tensor:
    """F.group_norm. x: (N, C, *space); weight and bias: (C,)."""
    return _GroupNorm.apply(
        x, weight.value, bias.value, weight.token, bias.token, weight, bias, num_groups, eps, groups
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_token, bias_token, weight_slot, bias_slot, shape, eps, groups):
        ctx.slots, ctx.shape, ctx.groups = (weight_slot, bias_slot), shape, groups
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(MARKER, x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        _, x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, groups = ctx.shape, ctx.groups

        def per_unit(t: Tensor) -> Tensor:
            """(*lead, *rest, *shape) -> (N, R, prod(shape)), and for mean and rstd (N, R, 1)."""
            features = math.prod(t.shape[t.dim() - len(shape) :])
            return t.reshape(groups.num_units, -1, features)

        with full_precision(grad.device):
            normalised = _Normalised(per_unit(x), per_unit(mean), per_unit(rstd), per_unit(grad), dim=1)
            grads = _affine_grads(ctx, normalised, shape)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                    grad, x, shape, mean, rstd, weight, bias, [True, False, False]
                )
        return grad_x, *grads, None, None, None, None, None, None, None


def _group_norm_format(x: Tensor) -> torch.memory_format:
    """What F.group_norm computes and returns: the input's memory format on the CPU, contiguous elsewhere."""
    if x.device.type == "cpu":
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_token, bias_token, weight_slot, bias_slot, num_groups, eps, groups):
        ctx.slots, ctx.num_groups, ctx.groups = (weight_slot, bias_slot), num_groups, groups
        n, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        x = x.contiguous(memory_format=_group_norm_format(x))
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, space, num_groups, eps)
        ctx.save_for_backward(MARKER, x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        _, x, weight, mean, rstd = ctx.saved_tensors
        n, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        per_channel = channels // ctx.num_groups
        x, grad = x.contiguous(), grad.contiguous()  # torch 2.13 crashes on channels_last without all three gradients
        with full_precision(grad.device):
            mean_c, rstd_c = (t.repeat_interleave(per_channel, dim=1).unsqueeze(2) for t in (mean, rstd))
            x_flat, grad_flat = x.reshape(n, channels, space), grad.reshape(n, channels, space)
            normalised = _Normalised(x_flat, mean_c, rstd_c, grad_flat, dim=2)
            grads = _affine_grads(ctx, normalised, (channels,))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, _, _ = torch.ops.aten.native_group_norm_backward(
                    grad, x, mean, rstd, weight, n, channels, space, ctx.num_groups, [True, False, False]
                )
        return grad_x, *grads, None, None, None, None, None, None, None


class _Normalised:
    """x and its statistics, with the output gradient; sums over `dim` a few units at a time, so temporaries stay small.

    All of x and grad: (N, a, b); mean and rstd broadcast against them.
    """

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, grad: Tensor, dim: int):
        self.tensors, self.dim, self.dtype = (x, mean, rstd, grad), dim, compute_dtype(x.dtype)
        self.chunk = max(1, SCRATCH_BYTES // max(1, x[0].numel() * 4))

    def sums(self, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(N, features): the sum over positions of combine(grad, x_hat)."""
        pieces = []
        for x, mean, rstd, grad in zip(*(t.split(self.chunk) for t in self.tensors), strict=True):
            x_hat = (x.to(self.dtype) - mean.to(self.dtype)) * rstd.to(self.dtype)
            pieces.append(combine(grad.to(self.dtype), x_hat).sum(dim=self.dim))
        return torch.cat(pieces)


def _affine_grads(ctx, normalised: _Normalised, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    weight_slot, bias_slot = ctx.slots
    groups = ctx.groups

    def stack(combine) -> StackedFactors:
        return StackedFactors(groups.sum_units(normalised.sums(combine).reshape(*groups.lead, *shape)), groups)

    grad_weight = weight_slot.grad(lambda: stack(lambda grad, x_hat: grad * x_hat), ctx.needs_input_grad[1])
    grad_bias = bias_slot.grad(lambda: stack(lambda grad, x_hat: grad), ctx.needs_input_grad[2])
    return grad_weight, grad_bias
