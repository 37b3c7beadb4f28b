"""From factors to the aggregated gradient E * stat({c_e}), never holding the contributions of more
than a slice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops import (
    backend,
    blocks,
    dispatch,
    functional,
    limits,
    reference,
    registry,
    schema,
    sliced,
    sparse,
    statistics,
)
from htv.ops.factors import (
    ConvFactors,
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.ops.reference import Summary
from htv.rules import Mean, Rule, Statistic

__all__ = ["aggregate", "linear_grad", "summarise"]

TIED_WINDOW_BYTES = (
    128 << 20
)  # on a GPU, what the picked columns of a tied head's gradient may take


class _Resolved(NamedTuple):
    """A rule resolved for a number of groups; it holds the rule, so that its id stays its own."""

    rule: Rule
    statistic: Statistic
    numbers: tuple[int, int, float, float] | None  # as ops take it; None for a rule of one's own


MOST_RESOLVED = 256
_resolutions: dict[tuple[int, int], _Resolved] = {}  # by the rule's id and the number of groups


def _resolved(rule: Rule, count: int) -> _Resolved:
    """Resolve a rule, and keep that for the next time if it cannot come out otherwise then.

    What a class of the user's own makes of a number of groups may change between two steps.
    """
    statistic = statistics.resolve(rule, count)
    numbers = None if statistic.reduce is not None else schema.numbers(statistic)
    found = _Resolved(rule, statistic, numbers)
    if type(rule).__module__ == Rule.__module__:
        if len(_resolutions) >= MOST_RESOLVED:
            _resolutions.clear()
        _resolutions[id(rule), count] = found
    return found


def aggregate(parts: list[Factors], rule: Rule) -> Tensor:
    """E * stat of contributions that are the sums of the parts', group by group.

    parts: at least one, for the same parameter and the same groups; one per use of the parameter.
    Returns the parameter's shape, in the parts' compute dtype (for `Mean`, in the dtype of the
    factors).
    """
    first = parts[0]
    if len(parts) > 1:
        blocks.require_same_groups(parts)
    if 0 in first.shape:
        return torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    if type(rule) is Mean:
        return sum([part.total() for part in parts[1:]], first.total())
    resolved = _resolutions.get((id(rule), first.count)) or _resolved(rule, first.count)
    if len(parts) == 1:
        value, mask_sum = _one_use(first, *resolved[1:])
    else:
        value, mask_sum = by_blocks(parts, resolved.statistic)
    if resolved.statistic.normalise:
        return functional.normalise(value, mask_sum, resolved.statistic)
    return value


def aggregate_together(contributions: list[list[Factors]], rule: Rule) -> list[Tensor]:
    """`aggregate` of the parts of several parameters; those with one use each, of few kinds, in one
    call.
    """
    if type(rule) is Mean or not contributions[1:]:
        return [aggregate(parts, rule) for parts in contributions]
    first = contributions[0][0]
    count, dtype, device = first.count, first.dtype, first.device
    _, statistic, numbers = resolved = _resolutions.get((id(rule), count)) or _resolved(rule, count)
    if statistic.normalise or numbers is None:
        return [aggregate(parts, rule) for parts in contributions]
    operator = _together(first, statistic)
    found: list[Tensor | None] = [None] * len(contributions)
    stacks: dict[int, Tensor] = {}
    layers: dict[int, LinearFactors] = {}
    bounds = None  # the layers'
    for i, parts in enumerate(contributions):
        part = parts[0]
        kind, alike = type(part), part.count == count and part.dtype == dtype
        if parts[1:] or not alike or part.device != device or 0 in part.shape:
            found[i] = aggregate(parts, rule)
        elif kind is StackedFactors:
            values = part.values
            stacks[i] = values if values.ndim == 2 else values.reshape(count, -1)
        elif operator is None or kind is not LinearFactors:
            found[i] = aggregate(parts, rule)
        elif bounds is None or bounds is part.bounds:
            bounds, layers[i] = part.bounds, part
        else:
            found[i] = aggregate(parts, rule)
    if not stacks and not layers:
        return found
    if operator is None:
        value, _ = _one_use(StackedFactors(torch.cat([*stacks.values()], dim=1)), *resolved[1:])
        grads = torch.split_with_sizes_copy(value, [v.shape[1] for v in stacks.values()])
    else:
        grads = operator(
            [*stacks.values()],
            [part.x for part in layers.values()],
            [part.grad_output for part in layers.values()],
            bounds,
            *numbers,
        )
    for i, grad in zip((*stacks, *layers), grads, strict=True):  # tensors of their own
        shape = contributions[i][0].shape
        found[i] = grad if grad.ndim == len(shape) else grad.view(shape)
    return found


def _together(part: Factors, statistic: Statistic) -> Callable[..., list[Tensor]] | None:
    """Return what aggregates several parameters of factors like `part` in one call, or None."""
    key = "together", statistic.name, part.dtype, part.device, backend.setting()
    if key not in _ways:
        server = dispatch.server("together", part, statistic.name, part.device)
        way = None if server == "reference" else backend.operator("together", server)
        backend.keep(_ways, key, way, part.device)
        return way
    return _ways[key]


def summarise(
    parts: list[Factors], statistic: Statistic, log_offset: float = reference.LOG_OFFSET
) -> Summary:
    """What a streaming statistic needs to know of contributions, to be joined with those of other
    batches.

    log_offset:  as for `Summary.of`.
    """
    first = parts[0]
    blocks.require_same_groups(parts)
    if 0 in first.shape:
        nothing = torch.empty(first.count, *first.shape, dtype=first.dtype, device=first.device)
        return Summary.of(nothing, statistic.name)
    views = blocks.views(parts)
    if views is None:
        return _summary_of_block(parts, statistic, log_offset)
    zeros = first.placed(torch.zeros(first.inner.shape, dtype=first.dtype, device=first.device))
    whole = Summary.of(zeros.flatten()[:1].expand(first.count, 1), statistic.name, log_offset)
    whole = whole.map(lambda field: torch.empty_like(zeros).copy_(field.expand(zeros.shape)))
    for block in views:
        found = _summary_of_block([part.inner for part in block], statistic, log_offset)
        for field, shown in zip(whole.tensors, found.tensors, strict=True):
            block[0].shown(field).copy_(shown)
    return whole


def _summary_of_block(parts: list[Factors], statistic: Statistic, log_offset: float) -> Summary:
    if all(isinstance(part, EmbeddingFactors) for part in parts):
        whole = EmbeddingFactors.joined(parts)
        return sparse.summary_of_table(whole, statistic.name, log_offset)
    parts = blocks.joined(parts)
    found = None
    tied = _tied_pair(parts)
    if tied is not None:
        found = _tied_summary(*tied, statistic, log_offset)
    elif len(parts) == 1:
        found = _fused_summary(parts[0], statistic, log_offset)
    if found is not None:
        return found
    routes = [dispatch.route(part, statistic.name, part.device, "_summary") for part in parts]
    if any(route.style == "by group" for route in routes):
        return _summary_by_group(parts, statistic, log_offset)
    return sliced.summary(parts, statistic.name, log_offset)


_SIGN_SUM = Statistic("sign_sum")


def _fused_summary(part: Factors, statistic: Statistic, log_offset: float) -> Summary | None:
    """The summary of one use by kernels that never form contributions; None where none serve it."""
    name = statistic.name
    if isinstance(part, StackedFactors):
        return functional.summary(part.values, name, log_offset)
    serve = {LinearFactors: _fused_linear, ConvFactors: _fused_conv}.get(type(part))
    if serve is None:
        return None
    style, op, server = dispatch.route(part, name, part.device, "_summary")
    if style == "fused" and (op == "conv_summary" or serve is _fused_linear):
        numbers = schema.code(name), log_offset
        fields = serve(part, statistic, numbers, backend.operator(op, server))
        return Summary.of_fields(part.count, name, fields)
    # Of sum and votes, two passes are still less than slices.
    if statistics.of(name).state or dispatch.route(part, "sign_sum", part.device).style != "fused":
        return None
    votes, _ = _one_use(part, _SIGN_SUM, schema.numbers(_SIGN_SUM))
    return Summary(part.count, part.total().to(part.dtype), votes)


def _tied_summary(
    linear: LinearFactors, embedding: EmbeddingFactors, statistic: Statistic, log_offset: float
) -> Summary | None:
    """The layer's, but for the rows of the table that tokens touch."""
    whole = _fused_summary(linear, statistic, log_offset)
    if whole is None:
        return None
    touched, _ = sparse.touched_rows(embedding, statistic)
    for tokens in touched.split(_tied_step(linear)):
        if len(tokens):
            rows = [_outputs(linear, tokens), sparse.table_rows(embedding, tokens, statistic)]
            found = sliced.summary(rows, statistic.name, log_offset)
            for field, of_rows in zip(whole.tensors, found.tensors, strict=True):
                field[tokens] = of_rows
    return whole


def _summary_by_group(
    parts: list[Factors], statistic: Statistic, log_offset: float = reference.LOG_OFFSET
) -> Summary:
    """One group after another, so that no more than one contribution is held."""
    summaries = (
        Summary.of(
            sum((part.contribution(e) for part in parts[1:]), parts[0].contribution(e)).unsqueeze(
                0
            ),
            statistic.name,
            log_offset,
        )
        for e in range(parts[0].count)
    )
    return functools.reduce(Summary.__add__, summaries)


def by_blocks(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Views of the parameter that do not overlap (chunks, experts) are each aggregated alone."""
    views = blocks.views(parts)
    if views is None:
        return _one_block(parts, statistic)
    first = parts[0]
    value = first.placed(torch.zeros(first.inner.shape, dtype=first.dtype, device=first.device))
    mask_sum = torch.zeros((), dtype=torch.float64, device=first.device)
    covered = sum(math.prod(block[0].inner.shape) for block in views)
    if covered < value.numel():
        others, mask = sliced.of_zeros(first, statistic)
        value.copy_(others)
        mask_sum = mask * (value.numel() - covered)
    for block in views:
        block_value, block_mask = _one_block([part.inner for part in block], statistic)
        block[0].shown(value).copy_(block_value)
        mask_sum = mask_sum + block_mask
    return value, mask_sum


def _one_block(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    parts = blocks.joined(parts)
    if len(parts) == 1 and not isinstance(parts[0], ViewFactors):
        numbers = None if statistic.reduce is not None else schema.numbers(statistic)
        return _one_use(parts[0], statistic, numbers)
    if statistic.reduce is not None:
        return sliced.sliced(parts, statistic)
    tied = _tied_pair(parts)
    if tied is not None:
        linear, embedding = tied
        if dispatch.route(linear, statistic.name, linear.device).style == "fused":
            return _tied(linear, embedding, statistic)
    streams = statistics.of(statistic.name).streams
    if streams and any(isinstance(part, GroupwiseFactors) for part in parts):
        return _by_group(parts, statistic)
    return sliced.sliced(parts, statistic)


def _tied_pair(parts: list[Factors]) -> tuple[LinearFactors, EmbeddingFactors] | None:
    """The two uses of an embedding table that is also a linear layer's weight."""
    if len(parts) != 2 or {type(part) for part in parts} != {LinearFactors, EmbeddingFactors}:
        return None
    linear, embedding = sorted(parts, key=lambda part: isinstance(part, EmbeddingFactors))
    return linear, embedding


# -- one use: which way is decided once ------------------------------------------------------------

Numbers = tuple[int, int, float, float] | None
_ways = registry.kept_choices()


def _one_use(part: Factors, statistic: Statistic, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """E * stat of the contributions of one use, not yet normalised, and the sum of the mask.

    numbers: those of the statistic, as ops take them.
    """
    facts = part.facts() if part.sized else None
    key = type(part), statistic.name, part.dtype, part.device, facts, backend.setting()
    way = _ways.get(key)
    if way is None:
        way = _way(part, statistic)
        backend.keep(_ways, key, way, part.device)
    return way(part, statistic, numbers)


def _way(part: Factors, statistic: Statistic) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what computes `_one_use` of all parts that are alike."""
    if isinstance(part, ViewFactors):
        return _by_view
    if isinstance(part, EmbeddingFactors):
        return _table
    if statistic.reduce is not None:
        return _sliced
    if isinstance(part, StackedFactors):
        server = dispatch.server("stacked", part, statistic.name, part.device)
        if server == "reference":
            return _stacked_by_reference
        return functools.partial(_stacked, operator=backend.operator("stacked", server))
    style, op, server = dispatch.route(part, statistic.name, part.device)
    if style == "by group":
        return _alone_by_group
    if style != "fused":
        return _sliced
    if op == "conv":
        serve = _fused_conv
    elif isinstance(part, ConvFactors):
        serve = _conv_by_linear
    else:
        serve = _fused_linear
    return functools.partial(serve, operator=backend.operator(op, server))


def _by_view(part: ViewFactors, statistic: Statistic, numbers: Numbers):
    return by_blocks([part], statistic)


def _table(part: EmbeddingFactors, statistic: Statistic, numbers: Numbers):
    return sparse.table(part, statistic)


def _sliced(part: Factors, statistic: Statistic, numbers: Numbers):
    return sliced.sliced([part], statistic)


def _alone_by_group(part: Factors, statistic: Statistic, numbers: Numbers):
    return _by_group([part], statistic)


def _stacked_by_reference(part: StackedFactors, statistic: Statistic, numbers: Numbers):
    value, mask_sum = functional.stacked(reference.cast(part.values, part.dtype), statistic)
    return value.mul_(part.count), mask_sum


def _stacked(part: StackedFactors, statistic: Statistic, numbers: Numbers, operator: Callable):
    values = part.values
    if _transforms() is not None or forward_ad._current_level >= 0 or values.requires_grad:
        return _stacked_by_reference(part, statistic, numbers)
    if values.dtype != part.dtype:
        values = values.to(part.dtype)
    if values.dim() != 2 or not values.is_contiguous():
        values = values.reshape(part.count, -1).contiguous()
    with torch._C._AutoDispatchBelowAutograd():  # written in Python, and as slow as a small op
        value, mask_sum = operator(values, *numbers)
    value.mul_(part.count)
    return value if len(part.shape) == 1 else value.view(part.shape), mask_sum


_transforms = torch._C._functorch.peek_interpreter_stack  # of torch.func, under way


def _by_group(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    value, mask_sum = reference.finish(_summary_by_group(parts, statistic), statistic)
    return value * parts[0].count, mask_sum


def _fused_linear(part: LinearFactors, statistic: Statistic, numbers: Numbers, operator: Callable):
    return operator(part.x.contiguous(), part.grad_output.contiguous(), part.bounds, *numbers)


def _fused_conv(part: ConvFactors, statistic: Statistic, numbers: Numbers, operator: Callable):
    g = part.geometry
    sizes = part.kernel, g.stride, g.padding, g.dilation, g.groups
    return operator(_dense(part.x), _dense(part.grad_output), part.bounds, *sizes, *numbers)


def _conv_by_linear(part: ConvFactors, statistic: Statistic, numbers: Numbers, operator: Callable):
    """Block by block as linear layers of the windows that positions see."""
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=part.device)
    bounds = part.row_bounds
    for rows, columns, x, grad_output in part.as_linear():
        windows = x.contiguous(), grad_output.contiguous()
        block, block_mask = operator(*windows, bounds, *numbers)
        value[rows, columns] = part.from_linear(block)
        mask_sum += block_mask
    return value, mask_sum


def _dense(images: Tensor) -> Tensor:
    """Images (S, C, *space) with their channels in dim 1 or behind the others; copied if they are
    neither.
    """
    return (
        images
        if images.is_contiguous() or images.movedim(1, -1).is_contiguous()
        else images.contiguous()
    )


def _tied(
    linear: LinearFactors, embedding: EmbeddingFactors, statistic: Statistic
) -> tuple[Tensor, Tensor]:
    """An embedding table that is also a linear layer's weight: rows no token touches are the
    layer's alone.
    """
    touched, alone = sparse.touched_rows(embedding, statistic)
    value = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=linear.device)
    step = _tied_step(linear)
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


def _tied_step(linear: LinearFactors) -> int:
    """How many rows of a tied table to gather at a time."""
    window = limits.WINDOW_BYTES if linear.device.type == "cpu" else TIED_WINDOW_BYTES
    return max(64, window // max(1, len(linear.x) * linear.x.element_size()))


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
            raise TypeError(
                f"{name} must be a floating-point tensor, got "
                f"{getattr(tensor, 'dtype', type(tensor))}"
            )
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an htv rule such as htv.AndMask(0.4), got {rule!r}")
    if x.dim() < 2 or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            "x and grad_output must have shapes (N, *rest, I) and (N, *rest, O) with equal "
            f"leading dims, got {tuple(x.shape)} and {tuple(grad_output.shape)}"
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
        grouped_rows = GroupedRows(groups, BatchLayout(0))
        rows = grouped_rows.rows(grad_output.detach())
        factors = LinearFactors(grouped_rows.rows(x.detach()), rows, grouped_rows.bounds(rows))
        return aggregate([factors], rule).to(x.dtype)
