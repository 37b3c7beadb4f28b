"""Embedding tables, and rows of a parameter picked by ids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.embedding import embedding
from htv.autograd.from_parameters import Lookup
from htv.engine.handlers.call import Call, Signature, behind, handles, stands_alone
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, FromParameters, Lost
from htv.errors import UnsupportedError
from htv.ops.factors import EmbeddingFactors

_EMBEDDING = Signature.of(F.embedding)


@handles(F.embedding, uses={"embedding": EmbeddingFactors}, modules={nn.Embedding: "embedding"})
def _embedding(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "embedding", _EMBEDDING, args, kwargs, "input", "weight")
    ids, padding_idx = call.x, call["padding_idx"]
    refuse_options(call, "max_norm", "scale_grad_by_freq", "sparse")
    if call.tracked and isinstance(mode.mark(ids), Constant) and padding_idx is None:
        return _embedding_of_constants(mode, func, args, kwargs, call)
    arguments = call.enter() if call.applicable else None
    if arguments is None:
        return NotImplemented
    if padding_idx is not None:
        rows = len(call["weight"])
        if not -rows <= padding_idx < rows:
            raise ValueError(
                f"padding_idx must be within the {rows} rows of the table, got {padding_idx}"
            )
        padding_idx %= rows
    return call.done(embedding(ids, *arguments, padding_idx, mode.rows[call.layout]))


def refuse_options(call: Call, *options: str) -> None:
    """Refuse those of the `options` of a served table that are on."""
    for option in options if call.tracked else ():
        if call[option]:
            name = call.tracked[0].name
            raise UnsupportedError(
                f"{call.kind} with parameter {name!r}: {option}={call[option]!r} has no per-group "
                f"meaning; turn it off or exclude={name!r}"
            )


def _embedding_of_constants(mode: ModeLike, func, args, kwargs, call: Call):
    """The same ids for every example (positions): derived from the table alone, by ids that keep
    its factors small.
    """
    ids = call.x
    if (
        ids.dim() > 1 and len(ids) > 1 and ids.stride(0) == 0
    ):  # expanded over the batch: look them up once
        first = ids[:1]
        mode.marks.put(first, mode.mark(ids))
        replaced = [first if value is ids else value for value in args]
        once = _embedding(
            mode, func, replaced, {k: first if v is ids else v for k, v in kwargs.items()}
        )
        # With memory of its own, as torch's: a model may write to it.
        return mode.general(torch.Tensor.repeat, (once, len(ids), *(1,) * ids.dim()), {})
    rows = mode.general(func, args, kwargs)
    if isinstance(mode.mark(rows), FromParameters) and stands_alone(mode, call["weight"]):
        mode.marks.put(rows, FromParameters(call.tracked, rows, Lookup(ids)))
    return rows


@handles(Tensor.__getitem__, torch.index_select, Tensor.index_select)
def _picked(mode: ModeLike, func, args, kwargs):
    """Rows of a parameter picked by ids are an embedding."""
    table = args[0]
    owners = behind(mode, table)
    if not owners or not torch.is_grad_enabled() or kwargs:
        return NotImplemented
    if len(args) == 2:
        ids = args[1]
    elif args[1] == 0 and args[2].dim() == 1:
        ids = args[2]
    else:
        return NotImplemented
    if isinstance(ids, tuple) and len(ids) == 1:
        (ids,) = ids
    if not isinstance(ids, Tensor) or ids.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    if ids.dim() == 0:  # which expert, say: one slice for all
        return (
            mode.general(func, (table, int(ids)), {})
            if func is Tensor.__getitem__
            else NotImplemented
        )
    if isinstance(mode.mark(ids), Lost):  # whose ids they are shows where the rows are used
        return _rows_of_table(mode, func, args, table, ids)
    with mode:
        flat = table if table.dim() == 2 else table.reshape(len(table), math.prod(table.shape[1:]))
        if (
            func is Tensor.__getitem__
        ):  # counts from the end, too; what is out of range is left for F.embedding to refuse
            ids = torch.where(ids < 0, ids + len(table), ids)
        return F.embedding(ids, flat).reshape(*ids.shape, *table.shape[1:])


def _rows_of_table(mode: ModeLike, func, args, table: Tensor, ids: Tensor) -> Tensor:
    rows = func(*args)
    lookup = (
        Lookup(ids % len(table)) if table.dim() == 2 and mode.tracked(table) is not None else None
    )
    mode.marks.put(rows, FromParameters(behind(mode, table), rows, lookup))
    return rows
