"""Attention: torch's own multi-head attention taken apart, and the fused product with a learnt
bias.
"""

from __future__ import annotations

import types

import torch.nn.functional as F
from torch import nn

from htv.engine import expansion
from htv.engine.handlers.call import Operands, Signature, handles
from htv.engine.protocols import ModeLike
from htv.engine.provenance import OfBatch
from htv.groups import BatchLayout

# torch's own code, but for the question whether somebody intercepts it: then its projections can be
# served one by one.
_in_python = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_in_python",
    F.multi_head_attention_forward.__defaults__,
)


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
