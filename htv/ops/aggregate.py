"""From factors to the aggregated gradient E * stat({c_e}), never holding the contributions of more than a slice."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from htv.groups import Groups, Place, Voters
from htv.ops import backend, blocks, functional, limits, paths, reference, schema, sliced, sparse
from htv.ops.factors import ConvFactors, EmbeddingFactors, Factors, GroupwiseFactors, LinearFactors, StackedFactors
from htv.ops.reference import STREAMING, Summary
from htv.rules import Mean, Rule, Statistic

__all__ = ["aggregate", "linear_grad", "summarise"]

TIED_WINDOW_BYTES = 128 << 20  # on a GPU, what the picked columns of a tied head's gradient may take


def aggregate(parts: list[Factors], rule: Rule) -> Tensor:
    """E * stat of contributions that are the sums of the parts', group by group.

    parts: at least one, for the same parameter and the same groups; one per use of the parameter.
    Returns the parameter's shape, in the parts' compute dtype (for `Mean`, in the dtype of the factors).
    """
    first = parts[0]
    blocks.require_same_voters(parts)
    if 0 in first.shape:
        return torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    if isinstance(rule, Mean):
        return sum(part.total() for part in parts[1:]) + first.total() if len(parts) > 1 else first.total()
    statistic = _resolved(rule, first.count)
    value, mask_sum = by_blocks(parts, statistic)
    return functional.normalise(value, mask_sum, statistic)


def aggregate_together(contributions: list[list[Factors]], rule: Rule) -> list[Tensor]:
    """`aggregate` of the parts of several parameters; those with one stack of contributions each in one call."""
    firsts = [parts[0] for parts in contributions]
    statistic = None if isinstance(rule, Mean) else _resolved(rule, firsts[0].count)
    kinds = {(type(first), first.count, first.dtype, first.device) for first in firsts}
    alone = all(
        len(parts) == 1 and parts[0].values.numel() for parts in contributions if type(parts[0]) is StackedFactors
    )
    if statistic is None or statistic.normalise or len(kinds) > 1 or type(firsts[0]) is not StackedFactors or not alone:
        return [aggregate(parts, rule) for parts in contributions]
    count, dtype = firsts[0].count, firsts[0].dtype
    stacks = torch.cat([first.values.reshape(count, -1) for first in firsts], dim=1).to(dtype)
    value, _ = functional.stacked(stacks, statistic)
    grads = torch._foreach_mul(value.split([math.prod(first.shape) for first in firsts]), count)  # tensors of their own
    return [
        grad if len(first.shape) == 1 else grad.view(first.shape) for grad, first in zip(grads, firsts, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _resolved(rule: Rule, count: int) -> Statistic:
    return rule.statistic(count)


def summarise(parts: list[Factors], statistic: Statistic) -> Summary:
    """What a streaming statistic needs to know of contributions, to be joined with those of other batches."""
    first = parts[0]
    blocks.require_same_voters(parts)
    if all(isinstance(part, EmbeddingFactors) for part in parts):
        return sparse.summary_of_table(EmbeddingFactors.joined(parts), statistic.name)
    if math.prod(first.shape) == 0 or statistic.name not in ("geometric_mean", "sand_mask"):
        total = sum(part.total().to(first.dtype) for part in parts)
        votes = by_blocks(parts, Statistic("sign_sum"))[0] if total.numel() else total
        return Summary(first.count, total, votes)
    return _summary_by_group(parts, statistic)


def _summary_by_group(parts: list[Factors], statistic: Statistic) -> Summary:
    """One group after another, so that no more than one contribution is held."""
    summaries = (
        Summary.of(sum((part.one(e) for part in parts[1:]), parts[0].one(e)).unsqueeze(0), statistic.name)
        for e in range(parts[0].count)
    )
    return functools.reduce(Summary.__add__, summaries)


def by_blocks(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Views of the parameter that do not overlap (chunks, experts) are each aggregated by itself."""
    views = blocks.views(parts)
    if views is None:
        return _one_block(parts, statistic)
    first = parts[0]
    value = first.placed(torch.zeros(first.inner.shape, dtype=first.dtype, device=first.device))
    mask_sum, seen = torch.zeros((), dtype=torch.float64, device=first.device), 0
    for block in views:
        block_value, block_mask = _one_block([part.inner for part in block], statistic)
        block[0].shown(value).copy_(block_value)
        mask_sum, seen = mask_sum + block_mask, seen + block_value.numel()
    return value, mask_sum + sliced.mask_of_zeros(first, statistic) * (value.numel() - seen)


def _one_block(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    parts = blocks.joined(parts)
    first = parts[0]
    if len(parts) == 1:
        if isinstance(first, StackedFactors):
            value, mask_sum = functional.stacked(reference.cast(first.values, first.dtype), statistic)
            return value.mul_(first.count), mask_sum
        if isinstance(first, EmbeddingFactors):
            return sparse.table(first, statistic)
        style, op, server = paths.route(first, statistic.name, first.device)
        if style == "fused":
            if op == "conv":
                return _fused_conv(first, statistic, server)
            serve = _conv_by_linear if isinstance(first, ConvFactors) else _fused_linear
            return serve(first, statistic, server)
        if style == "by group":
            return _by_group(parts, statistic)
    tied = len(parts) == 2 and {type(part) for part in parts} == {LinearFactors, EmbeddingFactors}
    if tied:
        linear, embedding = sorted(parts, key=lambda part: isinstance(part, EmbeddingFactors))
        if paths.route(linear, statistic.name, linear.device).style == "fused":
            return _tied(linear, embedding, statistic)
    if statistic.name in STREAMING and any(isinstance(part, GroupwiseFactors) for part in parts):
        return _by_group(parts, statistic)
    return sliced.sliced(parts, statistic)


def _by_group(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    value, mask_sum = reference.finish(_summary_by_group(parts, statistic), statistic)
    return value * parts[0].count, mask_sum


def _fused_linear(part: LinearFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    return _fused(part.x, part.grad_output, part.bounds, statistic, server)


def _fused(x: Tensor, grad_output: Tensor, bounds: Tensor, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    x, grad_output = x.contiguous(), grad_output.contiguous()
    return backend.operator("linear", server)(x, grad_output, bounds, *schema.numbers(statistic))


def _fused_conv(part: ConvFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    g = part.geometry
    sizes = part.kernel, g.stride, g.padding, g.dilation, g.groups
    factors = _dense(part.x), _dense(part.grad_output), part.bounds
    return backend.operator("conv", server)(*factors, *sizes, *schema.numbers(statistic))


def _conv_by_linear(part: ConvFactors, statistic: Statistic, server: str) -> tuple[Tensor, Tensor]:
    """Block by block as linear layers of the windows that positions see."""
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=part.device)
    bounds = part.row_bounds
    for rows, columns, x, grad_output in part.as_linear():
        block, block_mask = _fused(x, grad_output, bounds, statistic, server)
        value[rows, columns] = part.from_linear(block)
        mask_sum += block_mask
    return value, mask_sum


def _dense(images: Tensor) -> Tensor:
    """Images (S, C, *space) with their channels in dim 1 or behind the others; copied if they are neither."""
    return images if images.is_contiguous() or images.movedim(1, -1).is_contiguous() else images.contiguous()


def _tied(linear: LinearFactors, embedding: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """An embedding table that is also a linear layer's weight: rows no token touches are the layer's alone."""
    touched, alone = sparse.touched_rows(embedding, statistic)
    value = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=linear.device)
    window = limits.WINDOW_BYTES if linear.device.type == "cpu" else TIED_WINDOW_BYTES
    step = max(64, window // max(1, len(linear.x) * linear.x.element_size()))
    for tokens in alone.split(step):
        if len(tokens):
            value[tokens], rows_mask = _one_block([_outputs(linear, tokens)], statistic)
            mask_sum += rows_mask
    for tokens in touched.split(step):
        if len(tokens):
            rows = [_outputs(linear, tokens), sparse.table_rows(embedding, tokens, statistic)]
            value[tokens], rows_mask = sliced.sliced(rows, statistic)
            mask_sum += rows_mask
    return value, mask_sum


def _outputs(linear: LinearFactors, outputs: Tensor) -> LinearFactors:
    """Some rows of the weight."""
    return LinearFactors(linear.x, linear.grad_output.index_select(1, outputs), linear.bounds)


def linear_grad(
    x: Tensor,
    grad_output: Tensor,
    rule: Rule,
    groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Aggregate the weight gradient of a linear layer, E * stat(contributions), from its factors.

    The (E, O, I) contributions are never formed.

    x:            (N, *rest, I), the layer's input.
    grad_output:  (N, *rest, O), the gradient of the loss with respect to its output; same leading
                  dims and dtype.
    rule:         an `htv.Rule`.
    groups:       (N,) integer ids, rows with equal ids vote together; default: every index of dim 0
                  on its own.
    cu_seqlens:   (E + 1,) bounds of packed sequences along dim 0 instead of `groups`.

    Returns (O, I) in the dtype of x; no graph. Raises ValueError for shapes, groups or cu_seqlens
    that do not fit, TypeError for dtypes.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> grad_output = torch.tensor([[1.0], [-1.0]])
    >>> [htv.linear_grad(x, grad_output, rule) for rule in (htv.Mean(), htv.AndMask(1.0))]
    [tensor([[ 0., -2.]]), tensor([[0., 0.]])]
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
