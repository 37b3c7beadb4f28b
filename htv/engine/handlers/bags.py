"""Bags of embeddings: one in every row of ids, and those given by offsets into one list of ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.engine import probing
from htv.engine.handlers.call import Call, Signature, behind, handles
from htv.engine.handlers.embedding import refuse_options
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, Lost
from htv.groups import BatchLayout

_EMBEDDING_BAG = Signature.of(F.embedding_bag)


def _batch_argument(module: nn.EmbeddingBag) -> str | None:
    """A bag is an example; with `include_last_offset` there is one offset more than bags."""
    return None if module.include_last_offset else "offsets"


@handles(
    F.embedding_bag,
    modules={nn.EmbeddingBag: "embedding"},
    batch={nn.EmbeddingBag: _batch_argument},
)
def _embedding_bag(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "embedding_bag", _EMBEDDING_BAG, args, kwargs, "input", "weight")
    refuse_options(call, "max_norm", "scale_grad_by_freq", "sparse")
    if call.x.dim() == 1 and isinstance(call["offsets"], Tensor):
        return _by_offsets(mode, func, args, kwargs, call)
    if not call.applicable:
        return NotImplemented
    if call.x.dim() != 2:
        return func(*args, **kwargs)  # which torch refuses
    if call["per_sample_weights"] is not None and call["mode"] != "sum":
        raise ValueError(f"per_sample_weights are for mode='sum' alone, got mode={call['mode']!r}")
    with mode:
        return _bagged(
            call.x, *(call[n] for n in ("weight", "mode", "per_sample_weights", "padding_idx"))
        )


def _bagged(
    ids: Tensor,
    weight: Tensor,
    reduction: str,
    sample_weights: Tensor | None,
    padding_idx: int | None,
):
    rows = F.embedding(ids, weight, padding_idx)  # (N, L, D)
    if sample_weights is not None:
        rows = rows * sample_weights.unsqueeze(-1)
    if padding_idx is None:
        if reduction == "sum":
            return rows.sum(1)
        if reduction == "mean":
            return rows.mean(1)
        return rows.max(1).values
    kept = (ids != padding_idx % len(weight)).unsqueeze(-1)
    if reduction == "max":
        highest = torch.where(kept, rows, -torch.inf).max(1).values
        return torch.where(kept.any(1), highest, 0)
    total = torch.where(kept, rows, 0).sum(1)
    return total if reduction == "sum" else total / kept.sum(1).clamp(min=1)


# -- bags by offsets -------------------------------------------------------------------------------


@dataclass
class _Bags:
    """Whose the bags are.

    bounds:  (B + 1,) int64 on the CPU; bag b holds ids bounds[b]:bounds[b + 1].
    layout:  where the examples are among the bags.
    ids:     the example of every id, (bounds[-1],) int64 on the CPU.
    """

    bounds: Tensor
    layout: BatchLayout
    ids: Tensor


def _by_offsets(mode: ModeLike, func, args, kwargs, call: Call):
    """Rows of the table are looked up for the ids' examples, then summed bag by bag as torch does
    it: the rows are the table there.
    """
    sample_weights = call["per_sample_weights"]
    served = torch.is_grad_enabled() and bool(call.tracked or behind(mode, sample_weights))
    bags = _whose(mode, call)
    if isinstance(bags, str):
        if served:
            names = ", ".join(repr(s.name) for s in call.tracked) or "per_sample_weights"
            mode.session.unsupported(
                f"embedding_bag with parameter {names}: {bags}, or exclude={names}", call.tracked
            )
            return func(*args, **kwargs)
        bags = None
    if bags is None:
        return NotImplemented
    if not served:
        return call.done(func(*args, **kwargs), bags.layout)
    if sample_weights is not None and call["mode"] != "sum":
        return func(*args, **kwargs)  # which torch refuses
    ids, bounds = call.x[: int(bags.bounds[-1])], bags.bounds
    of_ids, places = bags.ids, None
    if call["padding_idx"] is not None:  # as if these ids were not there
        places = (ids != call["padding_idx"] % len(call["weight"])).nonzero().flatten()
        ids, kept = ids[places], places.cpu()
        bounds, of_ids = torch.searchsorted(kept, bounds), of_ids[kept]
    layout = probing.named_layout(0, of_ids, mode.batch_size)
    ids = ids.view_as(ids)  # not the user's tensor, which keeps its own mark
    mode.marks.put(ids, layout)
    rows = mode.call(F.embedding, (ids, call["weight"]), {})
    if sample_weights is not None:
        rows = _weighted(mode, call, rows, sample_weights, places)
    every, starts = (t.to(ids.device) for t in (torch.arange(len(ids)), bounds[:-1]))
    return call.done(F.embedding_bag(every, rows, starts, mode=call["mode"]), bags.layout)


def _whose(mode: ModeLike, call: Call) -> _Bags | str | None:
    """Whose the bags of a call are; why that cannot be told, with a remedy; None if they are
    nobody's.
    """
    ids, offsets = call.x, call["offsets"]
    of_ids, of_offsets = call.layout, mode.layout(offsets)
    if isinstance(of_ids, Lost) or isinstance(of_offsets, Lost):
        lost = of_ids if isinstance(of_ids, Lost) else of_offsets
        mode.session.note_loss(lost)
        return (
            f"it is not known any more which of its ids belong to which example: {lost} lost "
            "that. Remedy: keep the ids of examples apart"
        )
    if not isinstance(of_ids, BatchLayout) and not isinstance(of_offsets, BatchLayout):
        own = any(ids is t or offsets is t for t in mode.session.constants())
        count = len(offsets) - bool(call["include_last_offset"])
        if own or count != mode.batch_size or mode.batch_size == 1:
            return None  # the same for every example
    if mode.groups.rows_vote:
        return (
            "bags given by offsets have no rows that could vote by themselves, as tokens() asks. "
            "Remedy: let examples vote"
        )
    if mode.groups.offsets is None or torch.compiler.is_compiling():
        return (
            "which example a bag given by offsets belongs to is not known while torch.compile "
            "traces. Remedy: call the model without torch.compile, or pass ids of shape (N, L), "
            "padded with padding_idx"
        )
    bounds = offsets.cpu().long()
    if not call["include_last_offset"]:
        bounds = torch.cat([bounds, bounds.new_tensor([len(ids)])])
    if (
        len(bounds) < 2
        or bounds[0] != 0
        or bounds[-1] > len(ids)
        or bool((bounds.diff() < 0).any())
    ):
        raise ValueError(
            f"offsets must rise from 0 to at most the number of ids, {len(ids)}; got {offsets}"
        )
    if isinstance(of_ids, BatchLayout) and _decides(of_ids, of_offsets):
        return _by_ids(mode, of_ids.index(mode.batch_size).cpu(), bounds)
    layout = of_offsets
    if not isinstance(layout, BatchLayout):
        shape = len(bounds) - 1, call["weight"].shape[1]
        layout = BatchLayout(0, guess=f"the result of an embedding_bag, of shape {shape},")
    if layout.size(mode.batch_size) != len(bounds) - 1:
        return (
            f"its {len(bounds) - 1} bags have {len(offsets)} offsets, which were taken for the "
            f"batch: {mode.batch.source}. Remedy: `with handle.packed(offsets):` around the "
            "forward, whose batch are the ids then"
        )
    of_bags = layout.index(mode.batch_size).cpu()
    return _Bags(bounds, layout, of_bags.repeat_interleave(bounds.diff()))


def _decides(of_ids: BatchLayout, of_offsets: object) -> bool:
    """Whether the ids say whose the bags are, not the offsets: what only has the batch's size says
    less, and of two such the offsets are believed.
    """
    return not isinstance(of_offsets, BatchLayout) or (bool(of_offsets.guess) and not of_ids.guess)


def _by_ids(mode: ModeLike, of_ids: Tensor, bounds: Tensor) -> _Bags | str:
    """Whose the bags are where the example of every id is known."""
    remedy = (
        "Remedy: attach(..., batch='offsets') where every bag is an example, or `with "
        "handle.packed(bounds):` around the forward, where bounds are the offsets and behind them "
        "the number of ids"
    )
    of_ids, sizes = of_ids[: bounds[-1]], bounds.diff()
    if mode.batch_size == 1:
        of_bags = of_ids.new_zeros(len(sizes))
    else:
        empty = (sizes == 0).nonzero().flatten().tolist()
        if empty:
            return (
                f"bag {empty[0]} is empty, and the examples are ids: it is no example's. {remedy}"
            )
        of_bags = of_ids[bounds[:-1]]
    members = mode.groups.members()
    apart = members[of_ids] != members[of_bags].repeat_interleave(sizes)
    if bool(apart.any()):
        bag = int(torch.searchsorted(bounds, apart.nonzero()[0], right=True)) - 1
        return (
            f"bag {bag} holds ids of several examples that vote apart (the batch is "
            f"{mode.batch.source}). {remedy}"
        )
    return _Bags(bounds, probing.named_layout(0, of_bags, mode.batch_size), of_ids)


def _weighted(
    mode: ModeLike, call: Call, rows: Tensor, sample_weights: Tensor, places: Tensor | None
) -> Tensor:
    """Rows (R, D) of a table times the weights of their ids, of which those at `places` count."""
    if places is None:
        places = slice(len(rows))
    elif isinstance(mode.mark(sample_weights), Constant):
        places = places.to(sample_weights.device)
    weights = mode.call(Tensor.__getitem__, (sample_weights, places), {})
    weights = mode.call(Tensor.unsqueeze, (weights, -1), {})
    weighted = mode.call(torch.mul, (rows, weights), {})
    if not isinstance(mode.mark(weighted), BatchLayout):
        mode.refuse(
            "embedding_bag",
            call.tracked,
            "its per_sample_weights are not known to belong to the examples that its ids belong to",
        )
    return weighted
