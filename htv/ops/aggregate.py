"""From factors to the aggregated gradient E * stat({c_e}), never holding the contributions of more than a slice."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.groups import Groups, Place, Voters
from htv.ops import backend, factors, functional, reference, schema
from htv.ops.factors import (
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.ops.reference import STREAMING, Summary
from htv.rules import Mean, Rule, Statistic

__all__ = ["Agreement", "agreement", "aggregate", "linear_grad", "path", "summarise"]


def aggregate(parts: list[Factors], rule: Rule) -> Tensor:
    """E * stat of contributions that are the sums of the parts', group by group.

    parts: at least one, for the same parameter and the same groups; one per use of the parameter.
    Returns the parameter's shape, in the parts' compute dtype (for `Mean`, in the dtype of the factors).
    """
    first = parts[0]
    _require_same_voters(parts)
    if math.prod(first.shape) == 0:
        return torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    statistic = rule.statistic(first.count)
    if isinstance(rule, Mean):
        return sum(part.total() for part in parts[1:]) + first.total() if len(parts) > 1 else first.total()
    value, mask_sum = _by_blocks(parts, statistic)
    return functional.normalise(value, mask_sum, statistic)


def _require_same_voters(parts: list[Factors]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or part.count != first.count:
            raise ValueError(
                "the uses of one parameter must agree on its shape and on the number of groups: got "
                f"{first.shape} and {part.shape}, {first.count} and {part.count} groups (where every row votes by "
                "itself, a parameter used on different numbers of rows has no votes to add)"
            )


def summarise(parts: list[Factors], statistic: Statistic) -> Summary:
    """What a streaming statistic needs to know of contributions, to be joined with those of other batches."""
    first = parts[0]
    _require_same_voters(parts)
    if math.prod(first.shape) == 0 or statistic.name not in ("geometric_mean", "sand_mask"):
        total = sum(part.total().to(first.dtype) for part in parts)
        votes = _by_blocks(parts, Statistic("sign_sum"))[0] if total.numel() else total
        return Summary(first.count, total, votes)
    return _summary_by_group(parts, statistic)


def _summary_by_group(parts: list[Factors], statistic: Statistic) -> Summary:
    """One group after another, so that no more than one contribution is held."""
    summaries = (
        Summary.of(sum(part.one(e) for part in parts).unsqueeze(0), statistic.name) for e in range(parts[0].count)
    )
    return functools.reduce(Summary.__add__, summaries)


def path(kind: type[Factors], rule: Rule, device: torch.device) -> str:
    """How a parameter with one use of this kind is served: "plain sum", "stacked", "fused (...)" or "sliced (...)"."""
    if isinstance(rule, Mean):
        return "plain sum"
    name = rule.statistic(1 << 30).name  # which statistic does not depend on the number of groups
    if kind is LinearFactors and name in schema.FUSED_LINEAR:
        server = backend.choose("linear", name, device)
        if server != "reference":
            return f"fused ({server})"
    style = "stacked" if kind is StackedFactors else "sliced"
    return f"{style} ({backend.choose('stacked', name, device)})"


def _by_blocks(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Aggregate views of the parameter that do not overlap (chunks, experts) each by itself, as the tensors they are."""
    views: dict[tuple, list[Factors]] = {}
    for part in parts:
        views.setdefault(part.view if isinstance(part, ViewFactors) else None, []).append(part)
    if None in views or not _disjoint(list(views.values())):
        return _one_block(parts, statistic)
    first = parts[0]
    value = first.placed(torch.zeros(first.inner.shape, dtype=first.dtype, device=first.device))
    mask_sum, seen = 0.0, 0
    for block in views.values():
        block_value, block_mask = _one_block([part.inner for part in block], statistic)
        block[0].shown(value).copy_(block_value)
        mask_sum, seen = mask_sum + block_mask, seen + block_value.numel()
    return value, mask_sum + _mask_of_zeros(first, statistic) * (value.numel() - seen)


def _disjoint(blocks: list[list[ViewFactors]]) -> bool:
    """Whether no element of the parameter is shown by two views, nor by one view twice."""
    first = blocks[0][0]
    shown = first.placed(torch.zeros(first.inner.shape, dtype=torch.int32, device=first.device))
    for block in blocks:
        block[0].shown(shown).add_(1)
    return int(shown.sum()) == sum(math.prod(block[0].inner.shape) for block in blocks) and int(shown.max()) <= 1


def _mask_of_zeros(like: Factors, statistic: Statistic) -> Tensor:
    """The mask's value at a coordinate to which nobody contributes."""
    zeros = torch.zeros(like.count, 1, dtype=like.dtype, device=like.device)
    return functional.stacked(zeros, statistic)[1]


def _one_block(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    parts = _joined(parts)
    first = parts[0]
    if len(parts) == 1 and isinstance(first, LinearFactors):
        server = backend.choose("linear", statistic.name, first.device)
        if server != "reference":
            return _fused_linear(first, statistic, server)
    if all(isinstance(part, EmbeddingFactors) for part in parts):
        return _sparse_rows(parts, statistic)
    if statistic.name in STREAMING and any(isinstance(part, GroupwiseFactors) for part in parts):
        value, mask_sum = reference.finish(_summary_by_group(parts, statistic), statistic)
        return value * first.count, mask_sum
    return _sliced(parts, statistic)


def _joined(parts: list[Factors]) -> list[Factors]:
    """Several uses in linear layers (recurrence) as one use of more rows."""
    linear = [part for part in parts if isinstance(part, LinearFactors)]
    if len(linear) < 2 or len({part.x.dtype for part in linear}) > 1:
        return parts
    return [LinearFactors.joined(linear), *(part for part in parts if not isinstance(part, LinearFactors))]


def _fused_linear(part: LinearFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    x, grad_output = part.x.contiguous(), part.grad_output.contiguous()
    if server == "triton":
        from htv.triton_kernels.linear import linear

        return linear(x, grad_output, part.bounds, statistic.name, statistic.count)
    return torch.ops.htv.linear(x, grad_output, part.bounds, schema.code(statistic.name), statistic.count)


def _sliced(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The general path: contributions of one box of coordinates at a time, a few MB, then the stacked statistic."""
    first = parts[0]
    height, width = factors.two_dims(first.shape)
    value = torch.empty(height, width, *first.shape[2:], dtype=first.dtype, device=first.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=first.device)
    for rows, columns, contributions in _slices(parts):
        box, box_mask = functional.stacked(contributions, statistic)
        value[rows, columns] = box
        mask_sum += box_mask
    return value.mul_(first.count).reshape(first.shape), mask_sum


def _slices(parts: list[Factors]) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, contributions (E, r, c, *rest)) of near-square boxes that cover dims 0 and 1.

    All boxes share one scratch: what is yielded is overwritten by the next. (Fresh tensors instead would make glibc's
    heap grow without bound, for it rarely reuses aligned blocks.)
    """
    first = parts[0]
    count, rest = first.count, first.shape[2:]
    height, width = factors.two_dims(first.shape)
    itemsize = torch.finfo(first.dtype).bits // 8
    budget = max(1, max(part.scratch for part in parts) // (count * math.prod(rest) * itemsize))
    columns = min(width, max(math.isqrt(budget), budget // height, 1))
    rows = min(height, max(1, budget // columns))
    size = count * rows * columns * math.prod(rest)
    scratch = [torch.empty(size, dtype=first.dtype, device=first.device) for _ in range(min(2, len(parts)))]
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            box = slice(top, min(top + rows, height)), slice(left, min(left + columns, width))
            shape = (count, box[0].stop - box[0].start, box[1].stop - box[1].start, *rest)
            contributions, *other = (s[: math.prod(shape)].view(shape) for s in scratch)
            first.write(*box, contributions)
            for part in parts[1:]:
                part.write(*box, other[0])
                contributions += other[0]
            yield *box, contributions


def _sparse_rows(parts: list[EmbeddingFactors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Embedding tables: only rows that some group touched; every statistic of zeros alone is zero."""
    first = parts[0]
    touched = torch.cat([part.touched() for part in parts]).unique()
    value = torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    untouched = (first.shape[0] - len(touched)) * first.shape[1]
    mask_sum = _mask_of_zeros(first, statistic) * untouched
    if len(touched):
        rows, rows_mask = _sliced([part.compact(touched) for part in parts], statistic)
        value[touched] = rows
        mask_sum = mask_sum + rows_mask
    return value, mask_sum


@dataclass(frozen=True)
class Agreement:
    """What `handle.stats()` tells of one parameter's contributions in the last backward.

    kept_fraction:   share of coordinates the rule's mask keeps; 1.0 for rules without a mask.
    mean_agreement:  |sum_e sign(c_e)| / E, averaged over the coordinates.
    m_coherence:     ||sum_e c_e||^2 / sum_e ||c_e||^2: 1 for orthogonal groups of equal norm, E for identical ones,
                     NaN where every contribution is zero (Chatterjee & Zielinski 2020).

    All are NaN for a parameter without coordinates.
    """

    kept_fraction: float
    mean_agreement: float
    m_coherence: float


def agreement(parts: list[Factors], rule: Rule) -> Agreement:
    """One more sliced pass over the contributions: costs about as much as a sliced rule does."""
    first = parts[0]
    if math.prod(first.shape) == 0:
        return Agreement(math.nan, math.nan, math.nan)
    statistic = rule.statistic(first.count)
    masked = statistic.name in ("and_mask", "xor_mask", "geometric_mean", "sand_mask")
    agreeing = kept = total_energy = energy = 0.0
    for _, _, box in _slices(parts):
        contributions = box.flatten(1)
        votes = contributions.sign().sum(dim=0).abs()
        agreeing += votes.sum(dtype=torch.float64).item() / len(contributions)
        wide = contributions.double()
        energy += wide.square().sum().item()
        total_energy += wide.sum(dim=0).square().sum().item()
        kept += functional.stacked(contributions, statistic)[1].item() if masked else contributions.shape[1]
    coordinates = math.prod(first.shape)
    coherence = total_energy / energy if energy > 0 else math.nan
    return Agreement(kept / coordinates, agreeing / coordinates, coherence)


def linear_grad(
    x: Tensor,
    grad_output: Tensor,
    rule: Rule,
    groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The aggregated weight gradient of a linear layer, E * stat(contributions), from its factors.

    x:            (N, *rest, I), the layer's input.
    grad_output:  (N, *rest, O), the gradient of the loss with respect to its output; same leading dims and dtype.
    rule:         an `htv.Rule`.
    groups:       (N,) integer ids, rows with equal ids vote together; default: every index of dim 0 on its own.
    cu_seqlens:   (E + 1,) bounds of packed sequences along dim 0 instead of `groups`.

    Returns (O, I) in the dtype of x; no graph. Never forms the (E, O, I) contributions. Raises ValueError for shapes,
    groups or cu_seqlens that do not fit, TypeError for dtypes.
    """
    for name, tensor in (("x", x), ("grad_output", grad_output)):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an htv rule such as htv.AndMask(0.4), got {rule!r}")
    if x.dim() < 2 or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            "x and grad_output must have shapes (N, *rest, I) and (N, *rest, O) with equal leading dims, "
            f"got {tuple(x.shape)} and {tuple(grad_output.shape)}"
        )
    if x.dtype != grad_output.dtype or x.device != grad_output.device:
        raise TypeError(
            f"x and grad_output must share dtype and device, got {x.dtype} on {x.device} "
            f"and {grad_output.dtype} on {grad_output.device}"
        )
    if groups is not None and cu_seqlens is not None:
        raise ValueError("pass groups or cu_seqlens, not both")
    if groups is not None:
        groups = Groups.by_id(groups, len(x))
    elif cu_seqlens is not None:
        groups = Groups.packed(cu_seqlens, len(x))
    else:
        groups = Groups.each(len(x))
    with torch.no_grad():
        voters = Voters(groups, Place(0))
        rows = voters.rows(grad_output.detach())
        factors = LinearFactors(voters.rows(x.detach()), rows, voters.bounds(rows))
        return aggregate([factors], rule).to(x.dtype)
