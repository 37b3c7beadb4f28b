"""Linear layers: y = x W^T + b with aggregated gradients of W and b."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.groups import Groups
from htv.ops.factors import LinearFactors, StackedFactors
from htv.ops.reference import compute_dtype


def linear(x: Tensor, weight: Slot, bias: Slot, groups: Groups) -> Tensor:
    """F.linear. x: (*lead, *rest, I), weight: (O, I) -> (*lead, *rest, O)."""
    return _Linear.apply(x, weight.value, bias.value, weight.token, bias.token, weight, bias, groups)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_token, bias_token, weight_slot, bias_slot, groups):
        ctx.slots, ctx.groups = (weight_slot, bias_slot), groups
        needs_x = weight_slot.ledger is not None or ctx.needs_input_grad[1]
        ctx.save_for_backward(MARKER, x if needs_x else None, weight if ctx.needs_input_grad[0] else None)
        ctx.x_dtype = x.dtype
        y = F.linear(x, weight, bias)
        # With a bias and more than two dims it is a view, which autograd would not let anyone change in place.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx, grad):
        _, x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        groups, needs = ctx.groups, ctx.needs_input_grad
        with full_precision(grad.device):
            grad_weight = weight_slot.grad(lambda: LinearFactors(x.to(grad.dtype), grad, groups), needs[1])
            grad_bias = bias_slot.grad(lambda: StackedFactors(_row_sums(grad, groups), groups), needs[2])
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.x_dtype) if needs[0] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _row_sums(grad: Tensor, groups: Groups) -> Tensor:
    """(*lead, *rest, O) -> (E, O), summed over each group's rows in float32 or wider."""
    units = groups.units(grad)
    rows = units.flatten(1, -2).sum(dim=1, dtype=compute_dtype(grad.dtype)) if units.dim() > 2 else units
    return groups.sum_units(rows.reshape(*groups.lead, grad.shape[-1]))
