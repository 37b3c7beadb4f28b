"""Convolutions of one to three spatial dims, and transposed ones, with aggregated gradients of
weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.autograd.linear import ABSENT, plain_bias, plainly
from htv.groups import GroupedRows
from htv.ops.factors import ConvFactors, ConvGeometry, StackedFactors
from htv.ops.reference import cast, compute_dtype


def conv(
    x: Tensor,
    weight: ParameterArgument,
    bias: ParameterArgument,
    stride,
    padding,
    dilation,
    conv_groups: int,
    grouped_rows: GroupedRows,
) -> Tensor:
    """F.conv{1,2,3}d. x: (S, C, *space), weight: (O, C / conv_groups, *kernel) -> (S, O,
    *out_space).
    """
    kernel = weight.value.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if any(step != 1 for step in ([stride] if isinstance(stride, int) else stride)):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        x, padding = _pad_same(x, kernel, dilation), 0
    geometry = ConvGeometry.of(stride, padding, dilation, conv_groups, len(kernel))
    return _Conv.apply(
        x,
        weight.value,
        bias.value,
        weight,
        bias,
        geometry,
        grouped_rows,
        *weight.tokens,
        *bias.tokens,
    )


def conv_transpose(
    x: Tensor,
    weight: ParameterArgument,
    bias: ParameterArgument,
    stride,
    padding,
    output_padding,
    conv_groups: int,
    dilation,
    grouped_rows: GroupedRows,
) -> Tensor:
    """F.conv_transpose{1,2,3}d. x: (S, C, *space), weight: (C, O / conv_groups, *kernel) -> (S, O,
    *out_space).
    """
    geometry = ConvGeometry.of(stride, padding, dilation, conv_groups, weight.value.dim() - 2)
    tokens = *weight.tokens, *bias.tokens
    return _ConvTranspose.apply(
        x, weight.value, bias.value, weight, bias, output_padding, geometry, grouped_rows, *tokens
    )


def _pad_same(x: Tensor, kernel: tuple[int, ...], dilation) -> Tensor:
    """Zero padding that keeps the spatial size at stride 1; the odd one goes to the end, as in
    PyTorch.
    """
    dilations = [dilation] * len(kernel) if isinstance(dilation, int) else list(dilation)
    extra = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return F.pad(x, [amount for e in reversed(extra) for amount in (e // 2, e - e // 2)])


class _Conv(Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, weight_argument, bias_argument, geometry, grouped_rows, *tokens
    ):
        ctx.arguments, ctx.geometry, ctx.grouped_rows = (
            (weight_argument, bias_argument),
            geometry,
            grouped_rows,
        )
        ctx.unused = (None,) * (4 + len(tokens))
        ctx.save_for_backward(MARKER, x, weight if ctx.needs_input_grad[0] else None)
        ctx.kernel = tuple(weight.shape[2:])
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return function(
            x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )

    @staticmethod
    def gradients(ctx, grad):
        kernel, geometry = ctx.kernel, ctx.geometry
        make = lambda grouped_rows, x, grad: ConvFactors(x, grad, kernel, geometry, grouped_rows)
        return _gradients(ctx, grad, make, _grad_input)

    @staticmethod
    def differentiable(ctx, grad):
        """The gradient of x is the transposed convolution of grad."""
        g = ctx.geometry

        def grad_input(x: Tensor, weight: ParameterArgument) -> Tensor:
            sizes = zip(x.shape[2:], grad.shape[2:], ctx.kernel, strict=True)
            steps = zip(g.stride, g.padding, g.dilation, strict=True)
            rest = [  # rows at the end that no window reaches
                size - ((out - 1) * stride - 2 * padding + dilation * (taps - 1) + 1)
                for (size, out, taps), (stride, padding, dilation) in zip(sizes, steps, strict=True)
            ]
            steps = g.stride, g.padding, rest, g.groups, g.dilation
            return conv_transpose(grad, weight, ABSENT, *steps, ctx.grouped_rows)

        return _differentiable(ctx, grad, grad_input, transposed=False)


def _gradients(
    ctx, grad: Tensor, make: Callable[..., ConvFactors], grad_input: Callable[..., Tensor]
):
    """What either convolution's backward returns. make: weight factors from x and grad; grad_input:
    from all three.
    """
    _, x, weight = ctx.saved_tensors
    x = x if x.grad_fn is None else x.detach()  # factors that are kept would keep its graph
    weight_argument, bias_argument = ctx.arguments
    geometry, grouped_rows, needs = ctx.geometry, ctx.grouped_rows, ctx.needs_input_grad
    x_like, grad_x = cast(x, grad.dtype), None
    if needs[
        0
    ]:  # first: the node that comes next then finds the interpreter in the processor's caches
        grad_x = cast(grad_input(grad, x_like, cast(weight, grad.dtype), geometry), x.dtype)
    grad_weight = weight_argument.grad(needs[1], make, grouped_rows, x_like, grad)
    grad_bias = bias_argument.grad(needs[2], _bias_factors, grouped_rows, grad)
    return grad_x, grad_weight, grad_bias, *ctx.unused


def _differentiable(ctx, grad: Tensor, grad_input: Callable[..., Tensor], transposed: bool):
    """The same with a graph. grad_input: from x and the weight's argument."""
    _, x, weight = ctx.saved_tensors
    weight_argument, bias_argument = ctx.arguments
    geometry, grad_x, grad_weight = ctx.geometry, None, None
    if ctx.needs_input_grad[0]:
        argument = weight_argument.computed(cast(weight, grad.dtype), lambda factors: factors)
        grad_x = cast(grad_input(x, argument), x.dtype)
    if plainly(ctx, 1, weight_argument):
        like = grad.new_empty(weight_argument.value.shape)  # only its shape counts
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, cast(x, grad.dtype), like, None, geometry.stride, geometry.padding,
            geometry.dilation, transposed, [0] * len(geometry.stride), geometry.groups,
            [False, True, False],
        )  # fmt: skip
    return grad_x, grad_weight, plain_bias(ctx, 2, bias_argument, grad, 1), *ctx.unused


def _bias_factors(grouped_rows: GroupedRows, grad: Tensor) -> StackedFactors:
    """Contributions (E, O) from the gradient (S, O, *out_space), summed in float32 or wider."""
    return StackedFactors(
        grouped_rows.sums(grad.flatten(2).sum(dim=2, dtype=compute_dtype(grad.dtype)))
    )


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    grad_x, _, _ = torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
        False, [0] * len(geometry.stride), geometry.groups, [True, False, False],
    )  # fmt: skip
    return grad_x


class _ConvTranspose(Function):
    """The weight's gradient is that of the convolution from the output's gradient to the input."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        weight_argument,
        bias_argument,
        output_padding,
        geometry,
        grouped_rows,
        *tokens,
    ):
        ctx.arguments, ctx.geometry, ctx.grouped_rows = (
            (weight_argument, bias_argument),
            geometry,
            grouped_rows,
        )
        ctx.unused = (None,) * (5 + len(tokens))
        ctx.save_for_backward(MARKER, x, weight if ctx.needs_input_grad[0] else None)
        ctx.kernel = tuple(weight.shape[2:])
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        g = geometry
        return function(x, weight, bias, g.stride, g.padding, output_padding, g.groups, g.dilation)

    @staticmethod
    def gradients(ctx, grad):
        kernel, geometry = ctx.kernel, ctx.geometry
        make = lambda grouped_rows, x, grad: ConvFactors(grad, x, kernel, geometry, grouped_rows)
        return _gradients(ctx, grad, make, _grad_input_transposed)

    @staticmethod
    def differentiable(ctx, grad):
        """The gradient of x is the convolution of grad."""
        g = ctx.geometry

        def grad_input(_: Tensor, weight: ParameterArgument) -> Tensor:
            steps = g.stride, g.padding, g.dilation, g.groups
            return conv(grad, weight, ABSENT, *steps, ctx.grouped_rows)

        return _differentiable(ctx, grad, grad_input, transposed=True)


def _grad_input_transposed(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[grad.dim() - 3]
    return function(
        grad, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
