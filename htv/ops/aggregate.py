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
    BilinearFactors,
    ConvFactors,
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.ops.reference import STREAMING, Summary
from htv.rules import Mean, Rule, Statistic

FEW = 0.25  # contributions per activation up to which those of a convolution are sliced rather than fused
MANY_POSITIONS = 512  # rows per group from which on groups of a convolution are gone through one by one
CONV_OUTPUTS = 32  # output channels per group of a convolution from which on each group is worth a fused call

__all__ = ["Agreement", "agreement", "aggregate", "extra_work", "linear_grad", "path", "summarise"]


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
    if all(isinstance(part, EmbeddingFactors) for part in parts):
        return _sparse_summary(EmbeddingFactors.joined(parts), statistic.name)
    if math.prod(first.shape) == 0 or statistic.name not in ("geometric_mean", "sand_mask"):
        total = sum(part.total().to(first.dtype) for part in parts)
        votes = _by_blocks(parts, Statistic("sign_sum"))[0] if total.numel() else total
        return Summary(first.count, total, votes)
    return _summary_by_group(parts, statistic)


def _summary_by_group(parts: list[Factors], statistic: Statistic) -> Summary:
    """One group after another, so that no more than one contribution is held."""
    summaries = (
        Summary.of(sum((part.one(e) for part in parts[1:]), parts[0].one(e)).unsqueeze(0), statistic.name)
        for e in range(parts[0].count)
    )
    return functools.reduce(Summary.__add__, summaries)


def path(kind: type[Factors] | Factors, rule: Rule, device: torch.device) -> str:
    """How a parameter with one use of this kind is served, and by which backend where one is chosen.

    kind: factors, or their class, which stands for sizes that are not extreme (of a convolution: not depthwise).
    Returns "plain sum", "stacked (...)", "fused (...)", "sliced (...)", "sparse", "sparse, sliced (...)" or "by group".
    """
    if isinstance(rule, Mean):
        return "plain sum"
    name = rule.statistic(1 << 30).name  # which statistic does not depend on the number of groups
    style = _style(kind, name, device)
    if style == "fused":
        return f"fused ({backend.choose('linear', name, device)})"
    if style == "by group":
        return style
    if style == "sparse" and name in STREAMING:
        return style
    return f"{'sparse, sliced' if style == 'sparse' else style} ({backend.choose('stacked', name, device)})"


def _style(part: type[Factors] | Factors, name: str, device: torch.device) -> str:
    """How the contributions of one use are gone through for a statistic of this name.

    "fused", "sparse" (pairs of token and group), "stacked", "sliced" (boxes of coordinates) or "by group" (one whole
    contribution at a time).
    """
    if isinstance(part, ViewFactors):
        return _style(part.inner, name, device)
    kind = part if isinstance(part, type) else type(part)
    if issubclass(kind, StackedFactors):
        return "stacked"
    if issubclass(kind, EmbeddingFactors):
        return "sparse"
    if issubclass(kind, GroupwiseFactors):
        return "by group" if name in STREAMING else "sliced"
    fuses = name in schema.FUSED_LINEAR and backend.choose("linear", name, device) != "reference"
    if issubclass(kind, LinearFactors):
        return "fused" if fuses else "sliced"
    if not issubclass(kind, ConvFactors) or name not in STREAMING:
        return "sliced"
    if not isinstance(part, ConvFactors):
        return "fused" if fuses else "sliced"
    # Measured: contributions that fit one slice are cheapest as they are, those of many positions whole.
    size = part.count * math.prod(part.shape)
    one_slice = size * torch.finfo(part.dtype).bits // 8 <= factors.SCRATCH_BYTES
    few = part.folds_well and one_slice and size <= FEW * (part.x.numel() + part.grad_output.numel())
    if few or (part.geometry.groups > 1 and part.outputs < CONV_OUTPUTS):
        return "sliced"
    if not part.fits_linear or int(part.row_bounds[-1]) >= MANY_POSITIONS * part.count:
        return "by group"
    return "fused" if fuses else "sliced"


def extra_work(part: Factors, rule: Rule) -> float:
    """Arithmetic of aggregating one use's contributions, in units of its plain weight gradient's: an estimate.

    With E groups, R rows (of a convolution: positions of all samples) and n operations per contribution, the plain
    gradient being 2 R per coordinate:

        plain sum  0
        fused      E / 2R, a comparison and a count at once; 1 where every row votes: a product of signs. Convolutions
                   copy each window once per block of output channels: + 1 / 2O
        sliced     E (1 + n) / 2R (bilinear: 3R): written, then n = log2(E) comparisons by order rules, n = 4 by others
        by group   E (1 + n) / 2R of a convolution; a gradient pulled back for each group otherwise: E
        sparse     P n / R with P pairs of token and group; order rules E (1 + n) T / R for the T tokens that matter
        stacked    n, in units of summing the stored contributions
    """
    if isinstance(rule, Mean):
        return 0.0
    if isinstance(part, ViewFactors):
        return extra_work(part.inner, rule)
    statistic, groups = rule.statistic(part.count), part.count
    operations = 4.0 if statistic.name in STREAMING else math.log2(max(2, groups))
    style = _style(part, statistic.name, part.device)
    if style == "stacked":
        return operations
    if isinstance(part, EmbeddingFactors):
        rows, sizes = max(1, len(part.ids)), part.pairs.tokens.unique_consecutive(return_counts=True)[1]
        if statistic.name in STREAMING:
            return operations * len(part.pairs.tokens) / rows
        return groups * (1 + operations) * int((sizes > _outvoted(statistic, groups)).sum()) / rows
    if isinstance(part, GroupwiseFactors):
        return float(groups)
    flops = {BilinearFactors: 3, ConvFactors: 2, LinearFactors: 2}.get(type(part), 2)
    rows = max(1, int((part.row_bounds if isinstance(part, ConvFactors) else part.bounds)[-1]))
    if style != "fused":
        return groups * (1 + operations) / (flops * rows)
    copies = 1 / (2 * part.outputs) if isinstance(part, ConvFactors) else 0.0
    return copies + (1.0 if groups >= rows else groups / (2 * rows))


def plan(parts: list[Factors], rule: Rule) -> tuple[str, float | None]:
    """How the recorded uses of one parameter would be served (see `path`), and the `extra_work`.

    None for what is stacked: its work is that of small vectors beside a layer's activations.
    """
    paths, work, coordinates = [], 0.0, 0
    for block in map(_joined, _blocks(parts)):
        mixed = len({type(part) for part in block}) > 1
        found = path(Factors if mixed else block[0], rule, block[0].device)
        paths.append(f"summed per group, then {found}" if mixed else found)
        for part in block:
            if not isinstance(part, StackedFactors):
                work += extra_work(part, rule) * math.prod(part.shape)
                coordinates += math.prod(part.shape)
    return ", ".join(dict.fromkeys(paths)), work / coordinates if coordinates else None


def _by_blocks(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Views of the parameter that do not overlap (chunks, experts) are each aggregated by itself."""
    views = _views(parts)
    if views is None:
        return _one_block(parts, statistic)
    first = parts[0]
    value = first.placed(torch.zeros(first.inner.shape, dtype=first.dtype, device=first.device))
    mask_sum, seen = torch.zeros((), dtype=torch.float64, device=first.device), 0
    for block in views:
        block_value, block_mask = _one_block([part.inner for part in block], statistic)
        block[0].shown(value).copy_(block_value)
        mask_sum, seen = mask_sum + block_mask, seen + block_value.numel()
    return value, mask_sum + _mask_of_zeros(first, statistic) * (value.numel() - seen)


def _blocks(parts: list[Factors]) -> list[list[Factors]]:
    """The factors of each block of the parameter that is aggregated by itself."""
    views = _views(parts)
    return [parts] if views is None else [[part.inner for part in block] for block in views]


def _views(parts: list[Factors]) -> list[list[ViewFactors]] | None:
    """Parts by the view they are of, or None unless all are of views that do not overlap."""
    views: dict[tuple, list[ViewFactors]] = {}
    for part in parts:
        if not isinstance(part, ViewFactors):
            return None
        views.setdefault(part.view, []).append(part)
    return list(views.values()) if _disjoint(list(views.values())) else None


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
    if len(parts) == 1:
        if isinstance(first, EmbeddingFactors):
            return (_sparse_streaming if statistic.name in STREAMING else _sparse_order)(first, statistic)
        style = _style(first, statistic.name, first.device)
        if style == "fused":
            fused = _fused_conv if isinstance(first, ConvFactors) else _fused_linear
            return fused(first, statistic, backend.choose("linear", statistic.name, first.device))
        if style == "by group":
            return _by_group(parts, statistic)
    tied = len(parts) == 2 and {type(part) for part in parts} == {LinearFactors, EmbeddingFactors}
    if tied and _style(LinearFactors, statistic.name, first.device) == "fused":
        return _tied(*sorted(parts, key=lambda part: isinstance(part, EmbeddingFactors)), statistic)
    if statistic.name in STREAMING and any(isinstance(part, GroupwiseFactors) for part in parts):
        return _by_group(parts, statistic)
    return _sliced(parts, statistic)


def _joined(parts: list[Factors]) -> list[Factors]:
    """Several uses in linear layers (recurrence) as one use of more rows, several lookups as one of more ids."""
    for kind in (LinearFactors, EmbeddingFactors):
        alike = [part for part in parts if isinstance(part, kind)]
        if len(alike) > 1 and len({part.grad_output.dtype for part in alike}) == 1:
            parts = [kind.joined(alike), *(part for part in parts if not isinstance(part, kind))]
    return parts


def _by_group(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    value, mask_sum = reference.finish(_summary_by_group(parts, statistic), statistic)
    return value * parts[0].count, mask_sum


def _fused_linear(part: LinearFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    return _fused(part.x, part.grad_output, part.bounds, statistic, server)


def _fused(x: Tensor, grad_output: Tensor, bounds: Tensor, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    x, grad_output = x.contiguous(), grad_output.contiguous()
    if server == "triton":
        from htv.triton_kernels.linear import linear

        return linear(x, grad_output, bounds, statistic.name, statistic.count)
    return torch.ops.htv.linear(x, grad_output, bounds, schema.code(statistic.name), statistic.count)


def _fused_conv(part: ConvFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    """Block by block as linear layers of the windows that the output's positions see."""
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=part.device)
    bounds = part.row_bounds
    for rows, columns, x, grad_output in part.as_linear():
        block, block_mask = _fused(x, grad_output, bounds, statistic, server)
        value[rows, columns] = part.from_linear(block)
        mask_sum += block_mask
    return value, mask_sum


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


def _sparse_streaming(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Embedding tables: pairs of token and group, and everything else counted as the zeros it is."""
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    mask_sum = _mask_of_zeros(part, statistic)
    untouched = part.shape[0]
    total_mask = torch.zeros_like(mask_sum)
    for tokens, summary in _token_summaries(part, statistic.name):
        rows, rows_mask = reference.finish(summary, statistic)
        value[tokens] = rows * part.count
        total_mask += rows_mask
        untouched -= len(tokens)
    return value, total_mask + mask_sum * (untouched * part.shape[1])


def _sparse_summary(part: EmbeddingFactors, name: str) -> Summary:
    """Of the whole table."""
    whole = _zeros(part.count, part, name).map(lambda t: t.expand(part.shape).clone())
    for tokens, summary in _token_summaries(part, name):
        for table, rows in zip(_tensors(whole), _tensors(summary), strict=True):
            table[tokens] = rows
    return whole


def _tensors(summary: Summary) -> list[Tensor]:
    tensors: list[Tensor] = []
    summary.map(tensors.append)
    return tensors


def _token_summaries(part: EmbeddingFactors, name: str) -> Iterator[tuple[Tensor, Summary]]:
    """Tokens (t,) and the summary (t, D) of their contributions, those that equally many groups have together."""
    pairs = part.pairs
    tokens, sizes = pairs.tokens.unique_consecutive(return_counts=True)
    first = sizes.cumsum(0) - sizes
    bits = torch.finfo(part.dtype).bits
    for size in sizes.unique().tolist():
        step = max(1, factors.SCRATCH_BYTES * 8 // (size * max(1, part.shape[1]) * bits))
        for which in (sizes == size).nonzero().flatten().split(step):
            at = first[which] + torch.arange(size, device=part.device)[:, None]
            summary = Summary.of(pairs.values[at], name)
            yield tokens[which], summary if size == part.count else summary + _zeros(part.count - size, part, name)


def _zeros(count: int, like: Factors, name: str) -> Summary:
    """Of contributions that are zero, for one coordinate."""
    return Summary.of(torch.zeros(count, 1, dtype=like.dtype, device=like.device), name)


def _sparse_order(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Embedding tables: rows of tokens that enough groups have are ranked, all others are zero."""
    pairs = part.pairs
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    tokens, sizes = pairs.tokens.unique_consecutive(return_counts=True)
    mask_sum = torch.zeros((), dtype=torch.float64, device=part.device)
    matter = tokens[sizes > _outvoted(statistic, part.count)]
    if len(matter):
        value[matter], mask_sum = _sliced([part.compact(matter)], statistic)
    nan = pairs.values.isnan()
    value.index_put_((pairs.tokens[nan.nonzero()[:, 0]], nan.nonzero()[:, 1]), value.new_tensor(torch.nan))
    return value, mask_sum


def _outvoted(statistic: Statistic, count: int) -> int:
    """How many of E values may be other than zero without the order statistic being so."""
    if statistic.name == "median":
        return (count - 1) // 2
    if statistic.name == "median_of_means":
        return (statistic.count - 1) // 2
    return statistic.count  # values cut or clipped per side


def _tied(linear: LinearFactors, embedding: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """An embedding table that is also a linear layer's weight: rows no token touches are the layer's alone."""
    touched = embedding.pairs.tokens.unique_consecutive()
    value = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=linear.device)
    alone = torch.ones(linear.shape[0], dtype=torch.bool, device=linear.device)
    alone[touched] = False
    step = max(64, factors.WINDOW_BYTES // max(1, len(linear.x) * linear.x.element_size()))
    for tokens in (*touched.split(step), *alone.nonzero().flatten().split(step)):
        if len(tokens):
            rows = [LinearFactors(linear.x, linear.grad_output.index_select(1, tokens), linear.bounds)]
            if not alone[tokens[0]]:
                rows.append(embedding.compact(tokens))
            value[tokens], rows_mask = (_one_block if len(rows) == 1 else _sliced)(rows, statistic)
            mask_sum += rows_mask
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
    """`Agreement` of contributions that are the sums of the parts'.

    Votes, sum and norms each come from where they are cheapest, as long as no block of the parameter has uses of
    several kinds; else one sliced pass gives all.
    """
    first = parts[0]
    _require_same_voters(parts)
    if math.prod(first.shape) == 0:
        return Agreement(math.nan, math.nan, math.nan)
    statistic = rule.statistic(first.count)
    blocks = [_joined(block) for block in _blocks(parts)]
    tally = _tally_apart if all(len(block) == 1 for block in blocks) else _tally_sliced
    agreeing, kept, total_energy, energy = tally(parts, blocks, statistic)
    coordinates = math.prod(first.shape)
    coherence = total_energy / energy if energy > 0 else math.nan
    return Agreement(kept / coordinates, agreeing / (first.count * coordinates), coherence)


_MASKED = ("and_mask", "xor_mask", "geometric_mean", "sand_mask")


def _tally_apart(
    parts: list[Factors], blocks: list[list[Factors]], statistic: Statistic
) -> tuple[float, float, float, float]:
    """Sums over coordinates: |votes|, mask, squared sum of contributions, squared contributions."""
    votes = _by_blocks(parts, Statistic("sign_sum"))[0].abs()
    if statistic.name == "sand_mask":
        kept = _by_blocks(parts, statistic)[1].item()
    elif statistic.name == "xor_mask":
        kept = (votes < statistic.count).sum().item()
    else:
        kept = (votes >= statistic.count).sum().item() if statistic.name in _MASKED else votes.numel()
    agreeing = votes.nan_to_num_(0).sum(dtype=torch.float64).item()  # a NaN agrees with nothing
    del votes
    total_energy = sum(block[0].total().double().square().sum().item() for block in blocks)
    energy = sum(block[0].squared_norms().sum().item() for block in blocks)
    return agreeing, kept, total_energy, energy


def _tally_sliced(
    parts: list[Factors], blocks: list[list[Factors]], statistic: Statistic
) -> tuple[float, float, float, float]:
    """The same from one pass over the contributions."""
    agreeing = kept = total_energy = energy = 0.0
    for _, _, box in _slices(_joined(parts)):
        contributions = box.flatten(1)
        votes = functional.stacked(contributions, Statistic("sign_sum"))[0] * len(contributions)
        agreeing += votes.abs().nan_to_num(0).sum(dtype=torch.float64).item()
        wide = contributions.double()
        energy += wide.square().sum().item()
        total_energy += wide.sum(dim=0).square().sum().item()
        masked = statistic.name in _MASKED
        kept += functional.stacked(contributions, statistic)[1].item() if masked else contributions.shape[1]
    return agreeing, kept, total_energy, energy


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
