"""Linear and bilinear layers with aggregated gradients of weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.ledger import MARKER, Function, Slot
from htv.groups import Voters
from htv.ops.factors import BilinearFactors, LinearFactors, StackedFactors
from htv.ops.reference import cast, compute_dtype


def linear(x: Tensor, weight: Slot, bias: Slot, voters: Voters) -> Tensor:
    """F.linear. x: (*rest, I) with the batch in one of rest, weight: (O, I) -> (*rest, O)."""
    return _Linear.apply(x, weight.value, bias.value, weight, bias, voters, *weight.tokens, *bias.tokens)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_slot, bias_slot, voters, *tokens):
        ctx.slots, ctx.voters, ctx.unused = (weight_slot, bias_slot), voters, (None,) * (3 + len(tokens))
        needs_x = weight_slot.sinks is not None or ctx.needs_input_grad[1]
        ctx.save_for_backward(MARKER, x if needs_x else None, weight if ctx.needs_input_grad[0] else None)
        ctx.x_dtype = x.dtype
        y = F.linear(x, weight, bias)
        # With a bias and more than two dims it is a view, which autograd would not let anyone change in place.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def gradients(ctx, grad):
        _, x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        voters, needs = ctx.voters, ctx.needs_input_grad

        def weight_factors(voters: Voters, x: Tensor, grad: Tensor) -> LinearFactors:
            rows, bounds = voters.grad_rows(grad)
            x = x if x.dtype == grad.dtype else x.to(grad.dtype)
            return LinearFactors(voters.rows(x), rows, bounds)

        grad_x = cast(grad @ cast(weight, grad.dtype), ctx.x_dtype) if needs[0] else None
        grad_weight = weight_slot.grad(needs[1], weight_factors, voters, x, grad)
        grad_bias = bias_slot.grad(needs[2], bias_factors, voters, grad)
        return grad_x, grad_weight, grad_bias, *ctx.unused


def bias_factors(voters: Voters, grad: Tensor) -> StackedFactors:
    """Of a bias along the last dim, from the gradient (*rest, O): (E, O), summed in float32 or wider."""
    return StackedFactors(voters.sums(grad, dtype=compute_dtype(grad.dtype)))


def bilinear(left: Tensor, right: Tensor, weight: Slot, bias: Slot, voters: Voters) -> Tensor:
    """F.bilinear. left: (*rest, I), right: (*rest, J), weight: (O, I, J) -> (*rest, O)."""
    return _Bilinear.apply(left, right, weight.value, bias.value, weight, bias, voters, *weight.tokens, *bias.tokens)


class _Bilinear(Function):
    @staticmethod
    def forward(ctx, left, right, weight, bias, weight_slot, bias_slot, voters, *tokens):
        ctx.slots, ctx.voters, ctx.unused = (weight_slot, bias_slot), voters, (None,) * (3 + len(tokens))
        ctx.save_for_backward(MARKER, left, right, weight)
        return F.bilinear(left, right, weight, bias)

    @staticmethod
    def gradients(ctx, grad):
        _, left, right, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        voters, needs = ctx.voters, ctx.needs_input_grad

        def weight_factors(voters: Voters, left: Tensor, right: Tensor, grad: Tensor) -> BilinearFactors:
            rows, bounds = voters.grad_rows(grad)
            return BilinearFactors(voters.rows(left.to(grad.dtype)), voters.rows(right.to(grad.dtype)), rows, bounds)

        grad_weight = weight_slot.grad(needs[2], weight_factors, voters, left, right, grad)
        grad_bias = bias_slot.grad(needs[3], bias_factors, voters, grad)
        mixed = "...o,oij,...j->...i", "...o,oij,...i->...j"
        others = right, left
        grad_left, grad_right = (
            torch.einsum(equation, grad, weight.to(grad.dtype), other.to(grad.dtype)).to(x.dtype) if needed else None
            for equation, other, x, needed in zip(mixed, others, (left, right), needs[:2], strict=True)
        )
        return grad_left, grad_right, grad_weight, grad_bias, *ctx.unused
