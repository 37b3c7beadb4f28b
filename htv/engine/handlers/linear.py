"""Linear and bilinear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from htv.autograd.from_parameters import Projection
from htv.autograd.linear import bilinear, linear
from htv.engine.handlers.call import Call, behind, handles, signature, stands_alone
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, FromParameters
from htv.errors import UnsupportedError
from htv.groups import BatchLayout
from htv.ops.factors import BilinearFactors, LinearFactors

_LINEAR = signature("input, weight, bias=None")
_BILINEAR = signature("input1, input2, weight, bias=None")


@handles(F.linear, uses={"linear": LinearFactors}, modules={nn.Linear: "linear"})
def _linear(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "linear", _LINEAR, args, kwargs, "input", "weight", "bias")
    if call.tracked and type(call.layout) is Constant and torch.is_grad_enabled():
        y = mode.general(func, args, kwargs)
        if isinstance(mode.mark(y), FromParameters) and all(
            stands_alone(mode, p) for p in call.parameters
        ):
            mode.marks.put(
                y,
                FromParameters(
                    call.tracked, y, Projection(call.x, bool(behind(mode, call["weight"])))
                ),
            )
        return y
    if (
        call.applicable and call.x.ndim == 1 and mode.groups.batch_size == 1
    ):  # x.squeeze() of a batch of one
        row = mode.call(torch.Tensor.unsqueeze, (call.x, 0), {})
        y = mode.call(F.linear, (row, call["weight"], call["bias"]), {})
        return mode.call(torch.Tensor.squeeze, (y, 0), {})
    arguments = call.enter(features=1) if call.applicable else None
    return (
        NotImplemented
        if arguments is None
        else call.done(linear(call.x, *arguments, mode.rows[call.layout]))
    )


@handles(F.bilinear, uses={"bilinear": BilinearFactors}, modules={nn.Bilinear: "bilinear"})
def _bilinear(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "bilinear", _BILINEAR, args, kwargs, "input1", "weight", "bias")
    right = call["input2"]
    if not call.tracked or not torch.is_grad_enabled():
        return NotImplemented
    layout, other = mode.layout(call.x), mode.layout(right)
    if (
        not isinstance(layout, BatchLayout)
        or not isinstance(other, BatchLayout)
        or not layout.same(other, mode.groups.batch_size)
    ):
        raise UnsupportedError(
            f"bilinear with parameter {call.tracked[0].name!r}: both inputs must hold the batch "
            f"in the same dim; exclude={call.tracked[0].name!r} to give it a plain gradient"
        )
    arguments = call.enter(features=1)
    return (
        NotImplemented
        if arguments is None
        else call.done(bilinear(call.x, right, *arguments, mode.rows[call.layout]))
    )
