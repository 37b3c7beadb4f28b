"""Linear and bilinear layers with aggregated gradients of weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.groups import GroupedRows
from htv.ops.factors import BilinearFactors, LinearFactors, StackedFactors
from htv.ops.reference import compute_dtype

ABSENT = ParameterArgument(None)


def linear(
    x: Tensor, weight: ParameterArgument, bias: ParameterArgument, grouped_rows: GroupedRows
) -> Tensor:
    """F.linear. x: (*rest, I) with the batch in one of rest, weight: (O, I) -> (*rest, O)."""
    return _Linear.apply(
        x, weight.value, bias.value, weight, bias, grouped_rows, *weight.tokens, *bias.tokens
    )


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_argument, bias_argument, grouped_rows, *tokens):
        ctx.arguments, ctx.grouped_rows, ctx.unused = (
            (weight_argument, bias_argument),
            grouped_rows,
            (None,) * (3 + len(tokens)),
        )
        needs_x = weight_argument.recorders is not None or ctx.needs_input_grad[1]
        ctx.save_for_backward(
            MARKER, x if needs_x else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.x_dtype = x.dtype
        y = F.linear(x, weight, bias)
        # With a bias and more than two dims it is a view, which autograd would not let anyone
        # change in place.
        return y if y._base is None else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def gradients(ctx, grad):
        _, x, weight = ctx.saved_tensors
        # Without its graph: factors that are kept would keep that, and it the node that keeps them.
        x = x if x is None or x.grad_fn is None else x.detach()
        weight_argument, bias_argument = ctx.arguments
        grouped_rows, needs = ctx.grouped_rows, ctx.needs_input_grad

        grad_x = None
        if needs[0]:
            grad_x = grad @ (weight if weight.dtype == grad.dtype else weight.to(grad.dtype))
            grad_x = grad_x if grad_x.dtype == ctx.x_dtype else grad_x.to(ctx.x_dtype)
        grad_weight = weight_argument.grad(needs[1], linear_factors, grouped_rows, x, grad)
        grad_bias = bias_argument.grad(needs[2], bias_factors, grouped_rows, grad)
        return grad_x, grad_weight, grad_bias, *ctx.unused

    @staticmethod
    def differentiable(ctx, grad):
        """The gradient of x is a linear layer of grad, with the transposed weight."""
        _, x, weight = ctx.saved_tensors
        weight_argument, bias_argument = ctx.arguments
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = weight_argument.computed(
                weight.to(grad.dtype).t(), LinearFactors.transposed
            )
            grad_x = linear(grad, transposed, ABSENT, ctx.grouped_rows).to(ctx.x_dtype)
        if plainly(ctx, 1, weight_argument):
            grad_weight = grad.flatten(0, -2).t() @ x.to(grad.dtype).flatten(0, -2)
        return grad_x, grad_weight, plain_bias(ctx, 2, bias_argument, grad, -1), *ctx.unused


def plainly(ctx, number: int, argument: ParameterArgument) -> bool:
    """Whether a Function's argument of that number wants a gradient that is no vote."""
    return ctx.needs_input_grad[number] and not argument.is_served


def plain_bias(
    ctx, number: int, argument: ParameterArgument, grad: Tensor, dim: int
) -> Tensor | None:
    """The plain gradient of a bias along a dim of the output, with a graph; None if it wants
    none.
    """
    if not plainly(ctx, number, argument):
        return None
    return grad.movedim(dim, -1).flatten(0, -2).sum(dim=0)


def linear_factors(grouped_rows: GroupedRows, x: Tensor, grad: Tensor) -> LinearFactors:
    """Of a weight (O, I), from the input (*rest, I) and the output's gradient (*rest, O)."""
    rows, bounds = grouped_rows.grad_rows(grad)
    x = x if x.dtype == grad.dtype else x.to(grad.dtype)
    return LinearFactors(grouped_rows.rows(x), rows, bounds)


def bias_factors(grouped_rows: GroupedRows, grad: Tensor) -> StackedFactors:
    """Of a bias along the last dim, from the gradient (*rest, O): (E, O), summed in float32 or
    wider.
    """
    return StackedFactors(grouped_rows.sums(grad, dtype=compute_dtype(grad.dtype)))


def bilinear(
    left: Tensor,
    right: Tensor,
    weight: ParameterArgument,
    bias: ParameterArgument,
    grouped_rows: GroupedRows,
) -> Tensor:
    """F.bilinear. left: (*rest, I), right: (*rest, J), weight: (O, I, J) -> (*rest, O)."""
    return _Bilinear.apply(
        left,
        right,
        weight.value,
        bias.value,
        weight,
        bias,
        grouped_rows,
        *weight.tokens,
        *bias.tokens,
    )


class _Bilinear(Function):
    @staticmethod
    def forward(
        ctx, left, right, weight, bias, weight_argument, bias_argument, grouped_rows, *tokens
    ):
        ctx.arguments, ctx.grouped_rows, ctx.unused = (
            (weight_argument, bias_argument),
            grouped_rows,
            (None,) * (3 + len(tokens)),
        )
        ctx.save_for_backward(MARKER, left, right, weight)
        return F.bilinear(left, right, weight, bias)

    @staticmethod
    def gradients(ctx, grad):
        _, left, right, weight = ctx.saved_tensors
        left, right = left.detach(), right.detach()
        weight_argument, bias_argument = ctx.arguments
        grouped_rows, needs = ctx.grouped_rows, ctx.needs_input_grad

        def weight_factors(
            grouped_rows: GroupedRows, left: Tensor, right: Tensor, grad: Tensor
        ) -> BilinearFactors:
            rows, bounds = grouped_rows.grad_rows(grad)
            return BilinearFactors(
                grouped_rows.rows(left.to(grad.dtype)),
                grouped_rows.rows(right.to(grad.dtype)),
                rows,
                bounds,
            )

        grad_weight = weight_argument.grad(
            needs[2], weight_factors, grouped_rows, left, right, grad
        )
        grad_bias = bias_argument.grad(needs[3], bias_factors, grouped_rows, grad)
        mixed = "...o,oij,...j->...i", "...o,oij,...i->...j"
        others = right, left
        grad_left, grad_right = (
            torch.einsum(equation, grad, weight.to(grad.dtype), other.to(grad.dtype)).to(x.dtype)
            if needed
            else None
            for equation, other, x, needed in zip(
                mixed, others, (left, right), needs[:2], strict=True
            )
        )
        return grad_left, grad_right, grad_weight, grad_bias, *ctx.unused

    @staticmethod
    def differentiable(ctx, grad):
        """The gradient of either input is a bilinear layer of grad and the other one, with the
        weight's dims exchanged.
        """
        _, left, right, weight = ctx.saved_tensors
        weight_argument, bias_argument = ctx.arguments
        grad_left = grad_right = grad_weight = None
        inputs = left.to(grad.dtype), right.to(grad.dtype)
        weight = weight.to(grad.dtype)
        if ctx.needs_input_grad[0]:
            swapped = weight_argument.computed(weight.transpose(0, 1), BilinearFactors.left_first)
            grad_left = bilinear(grad, inputs[1], swapped, ABSENT, ctx.grouped_rows).to(left.dtype)
        if ctx.needs_input_grad[1]:
            swapped = weight_argument.computed(weight.transpose(0, 2), BilinearFactors.right_first)
            found = bilinear(inputs[0], grad, swapped, ABSENT, ctx.grouped_rows)
            grad_right = found.to(right.dtype)
        if plainly(ctx, 2, weight_argument):
            grad_weight = torch.einsum("...o,...i,...j->oij", grad, *inputs)
        grad_bias = plain_bias(ctx, 3, bias_argument, grad, -1)
        return grad_left, grad_right, grad_weight, grad_bias, *ctx.unused
