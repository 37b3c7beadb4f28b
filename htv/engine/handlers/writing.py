"""Parameters written into the batch: a learnt vector at some tokens, a class token in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.engine import expansion
from htv.engine.handlers.call import behind, handles
from htv.engine.protocols import ModeLike
from htv.groups import BatchLayout


@handles(Tensor.__setitem__)
def _setitem(mode: ModeLike, func, args, kwargs):
    """What is written gets a copy for every example whose elements it takes the place of."""
    target, index, value = args
    if (
        not isinstance(value, Tensor)
        or not torch.is_grad_enabled()
        or mode.groups.rows_vote
        or not behind(mode, value)
        or not isinstance(mode.mark(target), BatchLayout)
    ):
        return NotImplemented
    replaced = mode.call(Tensor.__getitem__, (mode.call(Tensor.detach, (target,), {}), index), {})
    layout = mode.layout(replaced)
    if not isinstance(layout, BatchLayout) or value.dim() > replaced.dim():
        return NotImplemented
    return expansion.with_copies(mode, func, args, kwargs, [value], replaced.dim(), layout)
