"""Linear and bilinear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from htv.autograd.derived import Projection
from htv.autograd.linear import bilinear, linear
from htv.engine.handlers.call import Call, behind, serves, signature, stands_alone
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, Derived
from htv.errors import UnsupportedError
from htv.groups import Place

_LINEAR = signature("input, weight, bias=None")
_BILINEAR = signature("input1, input2, weight, bias=None")


@serves(F.linear)
def _linear(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "linear", _LINEAR, args, kwargs, "input", "weight", "bias")
    if call.served and isinstance(call.place, Constant) and torch.is_grad_enabled():
        y = mode.general(func, args, kwargs)
        if isinstance(mode.mark(y), Derived) and all(stands_alone(mode, p) for p in call.parameters):
            mode.marks.put(y, Derived(call.served, y, Projection(call.x, bool(behind(mode, call["weight"])))))
        return y
    if call.applicable and call.x.dim() == 1 and mode.groups.num_units == 1:  # x.squeeze() of a batch of one
        row = mode.call(torch.Tensor.unsqueeze, (call.x, 0), {})
        y = mode.call(F.linear, (row, call["weight"], call["bias"]), {})
        return mode.call(torch.Tensor.squeeze, (y, 0), {})
    slots = call.enter(features=1) if call.applicable else None
    return NotImplemented if slots is None else call.done(linear(call.x, *slots, mode.voters(call.place)))


@serves(F.bilinear)
def _bilinear(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "bilinear", _BILINEAR, args, kwargs, "input1", "weight", "bias")
    right = call["input2"]
    if not call.served or not torch.is_grad_enabled():
        return NotImplemented
    place, other = mode.place(call.x), mode.place(right)
    if not isinstance(place, Place) or not isinstance(other, Place) or not place.same(other, mode.groups.num_units):
        raise UnsupportedError(
            f"bilinear with parameter {call.served[0].name!r}: both inputs must hold the batch in the same dim; "
            f"exclude={call.served[0].name!r} to give it a plain gradient"
        )
    slots = call.enter(features=1)
    return NotImplemented if slots is None else call.done(bilinear(call.x, right, *slots, call.voters))
