"""From factors to the aggregated gradient E * stat({c_e}), never holding the contributions of more than a slice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.groups import Groups
from htv.ops import backend, factors, functional, reference, schema
from htv.ops.factors import EmbeddingFactors, Factors, LinearFactors, StackedFactors
from htv.rules import Mean, Rule, Statistic

__all__ = ["Agreement", "agreement", "aggregate", "linear_grad", "path"]


def aggregate(parts: list[Factors], rule: Rule) -> Tensor:
    """E * stat of contributions that are the sums of the parts', group by group.

    parts: at least one, for the same parameter and the same groups; one per use of the parameter.
    Returns the parameter's shape, in the parts' compute dtype (for `Mean`, in the dtype of the factors).
    """
    first = parts[0]
    if any(part.shape != first.shape or part.groups.count != first.groups.count for part in parts):
        raise ValueError("factors of one parameter must agree on its shape and on the number of groups")
    if math.prod(first.shape) == 0:
        return torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    statistic = rule.statistic(first.groups.count)
    if isinstance(rule, Mean):
        return sum(part.total() for part in parts[1:]) + first.total() if len(parts) > 1 else first.total()
    value, mask_sum = _fused_or_sliced(parts, statistic)
    return functional.normalise(value, mask_sum, statistic)


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


def _fused_or_sliced(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    first = parts[0]
    if len(parts) == 1 and isinstance(first, LinearFactors):
        server = backend.choose("linear", statistic.name, first.device)
        if server != "reference":
            return _fused_linear(first, statistic, server)
    if all(isinstance(part, EmbeddingFactors) for part in parts):
        return _sparse_rows(parts, statistic)
    return _sliced(parts, statistic)


def _fused_linear(part: LinearFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    x, grad_output = part.x.contiguous(), part.grad_output.contiguous()
    if server == "triton":
        from htv.triton_kernels.linear import linear

        return linear(x, grad_output, part.offsets, statistic.name, statistic.count)
    return torch.ops.htv.linear(x, grad_output, part.offsets, schema.code(statistic.name), statistic.count)


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
    return value.mul_(first.groups.count).reshape(first.shape), mask_sum


def _slices(parts: list[Factors]) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, contributions (E, r, c, *rest)) of near-square boxes that cover dims 0 and 1.

    All boxes share one scratch: what is yielded is overwritten by the next. (Fresh tensors instead would make glibc's
    heap grow without bound, for it rarely reuses aligned blocks.)
    """
    first = parts[0]
    count, rest = first.groups.count, first.shape[2:]
    height, width = factors.two_dims(first.shape)
    itemsize = torch.finfo(first.dtype).bits // 8
    budget = max(1, factors.SCRATCH_BYTES // (count * math.prod(rest) * itemsize))
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
    zeros = torch.zeros(first.groups.count, 1, dtype=first.dtype, device=first.device)
    untouched = (first.shape[0] - len(touched)) * first.shape[1]
    mask_sum = functional.stacked(zeros, statistic)[1] * untouched
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
    statistic = rule.statistic(first.groups.count)
    masked = statistic.name in ("and_mask", "xor_mask", "geometric_mean", "sand_mask")
    agreeing = kept = total_energy = energy = 0.0
    for _, _, box in _slices(parts):
        contributions = box.flatten(1)
        votes = reference.sign_sum(contributions).abs()
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
        voters = Groups.by_id(groups, len(x))
    elif cu_seqlens is not None:
        voters = Groups.packed(cu_seqlens, (len(x),))
    else:
        voters = Groups.each(len(x))
    with torch.no_grad():
        return aggregate([LinearFactors(x.detach(), grad_output.detach(), voters)], rule).to(x.dtype)
