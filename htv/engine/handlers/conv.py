"""Convolutions and transposed convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.conv import conv, conv_transpose
from htv.engine.handlers.call import Call, handles, signature
from htv.engine.protocols import ModeLike
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
