"""Activations with parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from htv.engine.handlers.call import Call, handles, refuse_rows, signature
from htv.engine.protocols import ModeLike

_PRELU = signature("input, weight")


@handles(F.prelu, torch.prelu, modules={nn.PReLU: "elementwise"})
def _prelu(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "prelu", _PRELU, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    refuse_rows(call)
    x, weight = call.x, call["weight"]
    if weight.numel() > 1 or x.dim() > 1:
        shape = (-1,) + (1,) * max(0, x.dim() - 2) if weight.numel() > 1 else (1,) * x.dim()
        weight = mode.general(torch.Tensor.reshape, (weight, shape), {})
    positive = mode.general(torch.gt, (x, 0), {})
    return mode.general(torch.where, (positive, x, mode.general(torch.mul, (x, weight), {})), {})
