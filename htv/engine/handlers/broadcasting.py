"""Tensors brought to one shape, as the parameters of a distribution are."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.engine import expansion
from htv.engine.handlers.call import Operands, behind, handles
from htv.engine.protocols import ModeLike
from htv.groups import BatchLayout


@handles(torch.broadcast_tensors)
def _broadcast_tensors(mode: ModeLike, func, args, kwargs):
    """What comes from parameters gets its copies per example beside what has the batch: then all
    that is computed of it is the examples', as the entropy of a Gaussian policy.
    """
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if not Operands(mode, *tensors).meet:
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    marks = [(t, mode.layout(t)) for t in tensors]
    layouts = [m.at(m.dim + len(shape) - t.dim()) for t, m in marks if isinstance(m, BatchLayout)]
    agree = bool(layouts) and all(m.same(layouts[0], mode.batch_size) for m in layouts)
    found = []
    for tensor in tensors:
        if agree and behind(mode, tensor) and not mode.groups.rows_vote:
            layout = next((m for m in layouts if not m.guess), layouts[0])
            where = [tensor], len(shape), layout
            found.append(expansion.with_copies(mode, Tensor.expand, (tensor, shape), {}, *where))
        else:
            found.append(mode.call(Tensor.expand, (tensor, shape), {}))
    return tuple(found)
