"""Attention: torch's own multi-head attention taken apart, and the fused product with a learnt
bias, or among the rows of packed sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.engine import expansion
from htv.engine.handlers.call import Operands, Signature, handles, in_python
from htv.engine.protocols import ModeLike
from htv.engine.provenance import OfBatch
from htv.groups import BatchLayout

_in_python = in_python(F.multi_head_attention_forward)
_MULTI_HEAD = Signature.of(F.multi_head_attention_forward)


@handles(F.multi_head_attention_forward, modules={nn.MultiheadAttention: "linear"})
def _multi_head_attention(mode: ModeLike, func, args, kwargs):
    bound = _MULTI_HEAD.bind(args, kwargs)
    tensors = (bound[name] for name in ("query", "key", "value"))
    if not any(isinstance(mode.mark(t), OfBatch) for t in tensors):
        return NotImplemented
    with mode:
        return _in_python(*args, **kwargs)


_ATTENTION = ("query", "key", "value", "attn_mask")


@handles(F.scaled_dot_product_attention)
def _dot_product_attention(mode: ModeLike, func, args, kwargs):
    """Operands derived from parameters (relative positions, learnt queries) get their copies per
    example.
    """
    arguments = {
        **dict(zip(_ATTENTION, args, strict=False)),
        **{k: v for k, v in kwargs.items() if k in _ATTENTION},
    }
    tensors = [t for t in arguments.values() if t is not None]
    layout = _packed_rows(mode, arguments)
    if layout is not None:
        result = func(*args, **kwargs)
        mode.marks.put(result, layout)
        return result
    if not Operands(mode, *tensors).meet:
        return NotImplemented
    ndim = max(t.dim() for t in tensors)
    layout = next(
        (
            m.at(m.dim + ndim - t.dim())
            for t in tensors
            if isinstance(m := mode.mark(t), BatchLayout)
        ),
        None,
    )
    if layout is None or layout.dim >= ndim - 2:
        return NotImplemented
    return expansion.with_copies(mode, func, args, kwargs, tensors, ndim, layout)


def _packed_rows(mode: ModeLike, arguments: dict[str, Tensor | None]) -> BatchLayout | None:
    """Return where the rows of packed sequences are in queries, keys and values, if the mask lets
    no row see another sequence's: then every row of the result is its sequence's, too.
    """
    mask = arguments.get("attn_mask")
    traced = mode.groups.offsets is None or torch.compiler.is_compiling()  # who votes comes later
    if traced or mode.batch_size == 1 or mode.groups.rows_vote:
        return None
    if mask is None and mode.groups.count > 1 or mask is not None and mask.requires_grad:
        return None
    operands = [arguments.get(name) for name in ("query", "key", "value")]
    if not all(isinstance(t, Tensor) for t in operands):
        return None
    layouts = [mode.mark(t) for t in operands]
    if not all(
        isinstance(m, BatchLayout) and m.dim == t.dim() - 2
        for m, t in zip(layouts, operands, strict=True)
    ):
        return None
    query, key, value = layouts
    if not key.same(value, mode.batch_size):
        return None
    alone = mode.groups.count == 1  # there is no other to be kept from
    return query if alone or _keeps_apart(mode, mask, query, key) else None


def _keeps_apart(mode: ModeLike, mask: Tensor, query: BatchLayout, key: BatchLayout) -> bool:
    """Tell whether a mask is shut between rows of different groups. A model has one for all its
    layers: the last answer is kept.
    """
    state = (mask.data_ptr(), mask.shape, mask.stride(), mask._version, query, key)
    known = mode.__dict__.get("apart")
    if known is not None and known[0] == state:
        return known[1]
    with torch._C.DisableTorchFunction():
        members = mode.groups.members()
        rows, columns = (members[at.index(mode.batch_size).cpu()] for at in (query, key))
        other = (rows[:, None] != columns).to(mask.device)
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        fits = mask.shape[-2:] == other.shape
        apart = fits and not bool((seen & other).any())
    mode.__dict__["apart"] = state, apart, mask  # held, so that its memory is no other mask's
    return apart
