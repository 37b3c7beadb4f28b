"""Tensors brought to one shape, as the parameters of a distribution are."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.engine import expansion
from htv.engine.handlers.call import behind, handles
from htv.engine.protocols import ModeLike
from htv.engine.provenance import OfBatch
from htv.groups import BatchLayout


@handles(torch.broadcast_tensors)
def _broadcast_tensors(mode: ModeLike, func, args, kwargs):
    """Each is expanded by itself. What comes from parameters gets its copies per example beside
    what has the batch: then all that is computed of it is the examples', as the entropy of a
    Gaussian policy.
    """
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    marks = [mode.layout(t) for t in tensors]
    if not any(isinstance(m, OfBatch) for m in marks):
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    layouts = [
        m.at(m.dim + len(shape) - t.dim())
        for t, m in zip(tensors, marks, strict=True)
        if isinstance(m, BatchLayout)
    ]
    agree = bool(layouts) and all(m.same(layouts[0], mode.batch_size) for m in layouts)
    copies = agree and torch.is_grad_enabled() and not mode.groups.rows_vote
    found = []
    for tensor in tensors:
        if copies and behind(mode, tensor):
            layout = next((m for m in layouts if not m.guess), layouts[0])
            where = [tensor], len(shape), layout
            found.append(expansion.with_copies(mode, Tensor.expand, (tensor, shape), {}, *where))
        else:
            found.append(mode.call(Tensor.expand, (tensor, shape), {}))
    return tuple(found)
