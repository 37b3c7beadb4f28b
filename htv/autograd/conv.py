"""Convolutions of one to three spatial dims with aggregated gradients of weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.groups import Groups
from htv.ops.factors import ConvFactors, ConvGeometry, StackedFactors
from htv.ops.reference import compute_dtype


def conv(x: Tensor, weight: Slot, bias: Slot, stride, padding, dilation, conv_groups: int, groups: Groups) -> Tensor:
    """F.conv{1,2,3}d. x: (N, C, *space), weight: (O, C / conv_groups, *kernel) -> (N, O, *out_space)."""
    kernel = weight.value.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        x, padding = _pad_same(x, kernel, dilation), 0
    geometry = ConvGeometry(stride, padding, dilation, conv_groups, len(kernel))
    return _Conv.apply(x, weight.value, bias.value, weight.token, bias.token, weight, bias, geometry, groups)


def _pad_same(x: Tensor, kernel: tuple[int, ...], dilation) -> Tensor:
    """Zero padding that keeps the spatial size at stride 1; the odd one goes to the end, as in PyTorch."""
    dilations = [dilation] * len(kernel) if isinstance(dilation, int) else list(dilation)
    extra = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return F.pad(x, [amount for e in reversed(extra) for amount in (e // 2, e - e // 2)])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_token, bias_token, weight_slot, bias_slot, geometry, groups):
        ctx.slots, ctx.geometry, ctx.groups = (weight_slot, bias_slot), geometry, groups
        ctx.save_for_backward(MARKER, x, weight if ctx.needs_input_grad[0] else None)
        ctx.kernel = tuple(weight.shape[2:])
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return function(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    @staticmethod
    def backward(ctx, grad):
        _, x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        geometry, groups, needs = ctx.geometry, ctx.groups, ctx.needs_input_grad
        with full_precision(grad.device):
            x_like = x.to(grad.dtype)
            grad_weight = weight_slot.grad(lambda: ConvFactors(x_like, grad, ctx.kernel, geometry, groups), needs[1])
            grad_bias = bias_slot.grad(lambda: StackedFactors(_position_sums(grad, groups), groups), needs[2])
            grad_x = _grad_input(grad, x_like, weight.to(grad.dtype), geometry).to(x.dtype) if needs[0] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def _position_sums(grad: Tensor, groups: Groups) -> Tensor:
    """(N, O, *out_space) -> (E, O), in float32 or wider."""
    return groups.sum_units(grad.flatten(2).sum(dim=2, dtype=compute_dtype(grad.dtype)))


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    grad_x, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
        False, [0] * len(geometry.stride), geometry.groups, [True, False, False],
    )  # fmt: skip
    return grad_x
