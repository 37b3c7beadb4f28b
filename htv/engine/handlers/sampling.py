"""Images sampled at places that are learnt, or of a learnt image: spatial transformers."""

from __future__ import annotations

import torch.nn.functional as F

from htv.engine import expansion
from htv.engine.handlers.call import Operands, Signature, handles
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Lost
from htv.groups import BatchLayout

_AFFINE_GRID = Signature.of(F.affine_grid)
_GRID_SAMPLE = Signature.of(F.grid_sample)


@handles(F.affine_grid)
def _affine_grid(mode: ModeLike, func, args, kwargs):
    """A grid for every example's transformation."""
    theta = _AFFINE_GRID.bind(args, kwargs)["theta"]
    layout = mode.layout(theta)
    if not isinstance(layout, BatchLayout) or layout.dim != 0:
        return NotImplemented
    grid = func(*args, **kwargs)
    mode.marks.put(grid, layout)
    return grid


@handles(F.grid_sample)
def _grid_sample(mode: ModeLike, func, args, kwargs):
    """Images, or grids, that come from parameters get their copies per example."""
    bound = _GRID_SAMPLE.bind(args, kwargs)
    operands = [bound["input"], bound["grid"]]
    marks = [mode.layout(t) for t in operands]
    layouts = [m for m in marks if isinstance(m, BatchLayout)]
    known = bool(layouts) and not any(isinstance(m, Lost) for m in marks)
    if not known or any(m.dim or not m.same(layouts[0], mode.batch_size) for m in layouts):
        return NotImplemented
    layout = next((m for m in layouts if not m.guess), layouts[0])
    if Operands(mode, *operands).meet:
        sampled = expansion.with_copies(mode, func, (), bound, operands, operands[0].dim(), layout)
    else:
        sampled = func(*args, **kwargs)
    mode.marks.put(sampled, layout)
    return sampled
