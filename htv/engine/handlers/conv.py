"""Convolutions and transposed convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.conv import conv, conv_transpose
from htv.engine import expansion, probing
from htv.engine.handlers.call import Call, handles, signature
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Lost
from htv.groups import BatchLayout
from htv.ops.factors import ConvFactors

_CONV = signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
_CONV_TRANSPOSE = signature(
    "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"
)


@handles(
    F.conv1d,
    F.conv2d,
    F.conv3d,
    uses=dict.fromkeys(("conv1d", "conv2d", "conv3d"), ConvFactors),
    modules={nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"},
)
def _conv(mode: ModeLike, func, args, kwargs):
    call = Call(mode, func.__name__, _CONV, args, kwargs, "input", "weight", "bias")
    if isinstance(mode.mark(call["weight"]), BatchLayout):
        return _of_examples_weights(mode, func, call, len(call["weight"]) // call["groups"])
    arguments = _enter_images(call) if call.applicable else None
    if arguments is None:
        return NotImplemented
    a = call.arguments
    return call.done(
        conv(
            call.x,
            *arguments,
            a["stride"],
            a["padding"],
            a["dilation"],
            a["groups"],
            mode.rows[call.layout],
        )
    )


@handles(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    uses=dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ConvFactors),
    modules={
        nn.ConvTranspose1d: "conv_transpose1d",
        nn.ConvTranspose2d: "conv_transpose2d",
        nn.ConvTranspose3d: "conv_transpose3d",
    },
)
def _conv_transpose(mode: ModeLike, func, args, kwargs):
    call = Call(mode, func.__name__, _CONV_TRANSPOSE, args, kwargs, "input", "weight", "bias")
    if isinstance(mode.mark(call["weight"]), BatchLayout):
        return _of_examples_weights(mode, func, call, call["weight"].shape[1])
    arguments = _enter_images(call) if call.applicable else None
    if arguments is None:
        return NotImplemented
    options = (call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation"))
    return call.done(conv_transpose(call.x, *arguments, *options, mode.rows[call.layout]))


def _enter_images(call: Call) -> tuple[ParameterArgument, ...] | None:
    """The parameter arguments of a layer that takes (S, C, *space); one image without S is no
    batch.
    """
    if call.x.dim() < call.arguments["weight"].dim():
        return call.enter(features=call.x.dim())
    return call.enter(features=call.x.dim() - 1, rows=False)


def _of_examples_weights(mode: ModeLike, func, call: Call, channels: int):
    """A convolution whose weight has a part per example, and whose groups keep these apart: images
    (1, S * C, *space), as StyleGAN2 has them.

    channels: of the output, in one group.
    """
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    layout = mode.layout(weight)
    if layout.dim != 0 or x.dim() != weight.dim() or mode.groups.rows_vote:
        return NotImplemented
    if x.shape[1] % groups or len(weight) % groups or mode.groups.offsets is None:
        return NotImplemented
    of_groups = layout.index(mode.batch_size).reshape(groups, -1)
    if not bool((of_groups == of_groups[:, :1]).all()):
        return NotImplemented  # a group mixes examples
    of_groups = of_groups[:, 0].cpu()
    whose = lambda each: probing.named_layout(1, of_groups.repeat_interleave(each), mode.batch_size)
    given = whose(x.shape[1] // groups)
    mark = mode.layout(x, 1)
    if isinstance(mark, Lost) or (
        isinstance(mark, BatchLayout) and not mark.same(given, mode.batch_size)
    ):
        return NotImplemented
    arguments = {**call.arguments, "bias": None}
    y = expansion.with_copies(mode, func, (), arguments, [x], x.dim(), given)
    mode.marks.put(y, whose(channels))
    if bias is None:
        return y
    bias = mode.call(Tensor.reshape, (bias, (-1, *(1,) * (x.dim() - 2))), {})
    return mode.call(torch.add, (y, bias), {})
