"""Where the batch goes in operations that move elements about: run on the examples' numbers to see.

What cuts, permutes, picks or writes elements is run again on a tensor that holds, in the place of
every value, the number of the example it belongs to. Where the numbers end up is where the batch
is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from htv.engine.provenance import LOST, Lost, Mark, OfBatch
from htv.engine.torch_ops import JOINING, Operation
from htv.groups import BatchLayout, Groups


def _numbered(
    tensor: Tensor, mark: BatchLayout, batch_size: int, kin: Tensor | None = None
) -> Tensor:
    """Return the example of every element of a tensor, in its shape, or its group where `kin` tells
    them; takes no memory.
    """
    index = mark.index(batch_size)
    index = (index if kin is None else kin[index.cpu()]).to(tensor.device)
    return index.reshape(-1, *(1,) * (tensor.dim() - mark.dim - 1)).expand(tensor.shape)


def probed(op: Operation, index: int, batch_size: int) -> OfBatch:
    """Find the batch in output `index` of `op` by running it on the examples' numbers, 0 to
    `batch_size` - 1, instead of the values: the batch is along the dim they vary along.
    """
    moved = op.operands if op.name in JOINING else op.operands[:1]
    if (
        not all(isinstance(m, BatchLayout) for _, m in moved)
        or op.func is torch.nn.functional.unfold
    ):
        return LOST  # values that are no example's, as padding
    numbers = {id(t): _numbered(t, m, batch_size) for t, m in moved}
    if op.name == "as_strided":  # it counts in memory, of which only the tensor's own has numbers
        if op.argument(2, "storage_offset") is not None:
            return LOST
        numbers = {id(t): _laid_out_as(t, numbers[id(t)]) for t, _ in moved}
    try:
        result = op.again(numbers)
    except RuntimeError:  # it wants to see them as one row, or more than is there
        if op.name == "as_strided":
            return LOST
        result = op.again({key: t.contiguous() for key, t in numbers.items()})
    result = result if isinstance(result, Tensor) else result[index]
    same_kind = op.outputs[index].is_floating_point() == moved[0][0].is_floating_point()
    return _read_off(result, batch_size) if same_kind else LOST


def _laid_out_as(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Return `numbers` with the strides of `tensor`; what lies between its elements is nobody's."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = numbers.new_full((max(extent, 0),), -1)
    laid = memory.as_strided(tensor.shape, tensor.stride())
    return laid.copy_(numbers) if numbers.numel() else laid


def after_padding(op: Operation, batch_size: int) -> OfBatch:
    """Find the batch, of `batch_size` examples, after `op`, a torch._pad_packed_sequence(data,
    batch_sizes, batch_first, padding, length): the padding is nobody's.
    """
    data, mark = op.operands[0]
    if not isinstance(mark, BatchLayout):
        return LOST
    padded, _ = op.func(_numbered(data, mark, batch_size), *op.args[1:3], -1, *op.args[4:])
    return _read_off(padded, batch_size)


def named_layout(dim: int, found: Tensor, batch_size: int) -> BatchLayout:
    """Return the place of these examples along a dim, as a pattern if they follow one."""
    outer, rest = divmod(len(found), batch_size)
    if not rest:
        every = torch.arange(batch_size, device=found.device)
        for layout, pattern in (
            (BatchLayout(dim, times=outer), every.repeat_interleave(outer)),
            (BatchLayout(dim, outer=outer), every.repeat(outer)),
        ):
            if torch.equal(found, pattern):
                return layout
    return BatchLayout(dim, examples=found)


def _read_off(numbers: Tensor, batch_size: int) -> OfBatch:
    """Return the place at which the elements have these numbers; negative ones are nobody's."""
    for dim in range(numbers.dim()):
        if numbers.numel() == 0:
            if numbers.shape[dim] == 0:
                return BatchLayout(dim, examples=numbers.new_zeros(0))
            continue
        along = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
        found = along.amax(dim=1)
        if bool(((along == found[:, None]) | (along < 0)).all()) and bool((found >= 0).all()):
            return named_layout(dim, found, batch_size)
    return LOST


def after_writing(op: Operation, batch_size: int, groups: Groups | None = None) -> OfBatch:
    """Find the batch, of `batch_size` examples, after `op`, target[index] = value or its relatives:
    the target stays the batch's if every element written is of its example, or of its group where
    `groups` says who votes together.

    A target that is no batch's yet (zeros) becomes what its first batch value says, if that fits
    one of its dims. Where several examples vote together, its rows may be groups as well: whose
    they are, the values written to them say.
    """
    read, target, value, *part = WRITING[op.name](op)
    marks = {id(t): m for t, m in op.operands}
    mark, value_mark = marks.get(id(target)), marks.get(id(value))
    if target.shape != op.outputs[0].shape:
        return LOST  # it is broadcast
    if not isinstance(value_mark, OfBatch):
        return mark if isinstance(mark, OfBatch) else LOST
    if isinstance(mark, Lost) or isinstance(value_mark, Lost):
        return LOST if value.requires_grad or not isinstance(mark, BatchLayout) else mark
    kin = None if groups is None else groups.kin
    known = isinstance(mark, BatchLayout)
    consistent = []
    for layout in [mark] if known else _candidates(target, value, value_mark, batch_size):
        written = read(_numbered(target, layout, batch_size, kin))
        numbers = _numbered(value, value_mark, batch_size, kin)
        for cut in part:
            numbers = cut(numbers)
        if numbers.dim() > written.dim():
            return LOST
        if all(
            a in (b, 1)
            for a, b in zip(reversed(numbers.shape), reversed(written.shape), strict=False)
        ):
            apart = written != numbers
            if not bool(apart.any()):
                consistent.append(layout)
            elif known and kin is not None:
                met = (t.expand(written.shape)[apart][0] for t in (written, numbers))
                return brings_together(op, groups, *map(int, met))
    if known or kin is None:
        return _the_only(consistent, empty=value.numel() == 0)
    return _after_pooling(op, consistent, groups)


def brings_together(op: Operation, groups: Groups, one: int, other: int) -> Lost:
    """Return the mark of what `op` makes of rows of two groups, by their numbers."""
    names = " and ".join(groups.called(g) for g in sorted((one, other)))
    return Lost(
        f"{op.name!r}, which brings rows of groups {names} together (an edge joins them, say; give "
        "both the same id if they may vote as one),"
    )


def _after_pooling(op: Operation, consistent: list[BatchLayout], groups: Groups) -> OfBatch:
    """Do what `after_writing` does for a target that is no batch's yet, where several examples
    vote together.

    consistent: the places at which its rows would be examples; what was written does not say
                otherwise.
    """
    read, target, value, *part = WRITING[op.name](op)
    mark = next(m for t, m in op.operands if t is value)
    size, kin = groups.batch_size, groups.kin
    dim = mark.dim + target.dim() - value.dim()
    if not 0 <= dim < target.dim():
        return _the_only(consistent, empty=value.numel() == 0)
    if groups.count == 1:  # whatever is written is its own
        return named_layout(dim, groups.firsts.expand(target.shape[dim]), size)
    lowest, highest = _owners(read, target, value, part, mark, dim, groups)
    mixed = (lowest < highest).nonzero().flatten().tolist()
    if mixed and consistent:  # along another dim
        return _the_only(consistent, empty=False)
    if mixed:
        return brings_together(op, groups, int(lowest[mixed[0]]), int(highest[mixed[0]]))
    written = highest >= 0
    unknown = LOST
    tables = [highest]
    if not bool(written.all()):
        tables = _numberings(written, highest, groups)
        row = written.logical_not().nonzero().flatten().tolist()[0]
        unknown = Lost(
            f"{op.name!r}, after which row {row} of the result is no group's, for nothing was "
            "written to it (groups without rows vote in `handle.groups(ids, count=...)`),"
        )
        if any(bool((t < 0).any()) for t in tables):
            return unknown
    places = [*consistent, *(named_layout(dim, groups.firsts[t], size) for t in tables)]
    if not bool(written.any()) and places == consistent:
        return _the_only(consistent, empty=True)
    if places and all(places[0].same(p, size, kin) for p in places[1:]):
        return places[0]
    if len(places) > 1 and unknown.by:
        return Lost(
            f"{op.name!r}, whose result may have a row for each example or for each group, as its "
            f"size is right for both and nothing was written to row {row} (use another batch),"
        )
    return unknown


def _owners(
    read, target: Tensor, value: Tensor, part, mark: BatchLayout, dim: int, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest number of the groups of which something is written to each
    index of a target's `dim`, on the CPU; where nothing is, the highest is -1.

    read, target, value, part:  of `WRITING`.
    mark:                       that of `value`.
    """
    count = target.shape[dim]
    rows = _numbered(target, BatchLayout(dim, examples=torch.arange(count)), count)
    at = read(rows).reshape(-1).cpu()
    of = _numbered(value, mark, groups.batch_size, groups.kin)
    for cut in part:
        of = cut(of)
    of = of.expand(read(rows).shape).reshape(-1).cpu()
    lowest = torch.full((count,), groups.count).scatter_reduce(0, at, of, "amin")
    return lowest, torch.full((count,), -1).scatter_reduce(0, at, of, "amax")


def _numberings(written: Tensor, owner: Tensor, groups: Groups) -> list[Tensor]:
    """List the ways in which rows may stand for groups that agree with what was `written` to some
    of them by each row's `owner`; as the group of each row, -1 for none.

    Either row i is that of the group called i, or each group has as many rows, in their order; of
    several, the first is written to then, as where rows are padded.
    """
    size, count = len(written), groups.count
    named = torch.arange(count) if groups.keys is None else groups.keys
    inside = (named >= 0) & (named < size)
    by_name = torch.full((size,), -1)
    by_name[named[inside]] = inside.nonzero().flatten()
    tables, (times, rest) = [by_name] if bool(written.any()) else [], divmod(size, count)
    if times and not rest and (times == 1 or bool(written[::times].all())):
        tables.append(torch.arange(count).repeat_interleave(times))
    return [t for t in tables if torch.equal(t[written], owner[written])]


def _the_only(layouts: list[BatchLayout], empty: bool) -> OfBatch:
    """Return the place of a target that fits what was written; where several do, only nothing
    written yet leaves it open.
    """
    if not layouts or (len(layouts) > 1 and not empty):
        return LOST
    return (
        replace(layouts[0], guess="a tensor nothing was written to yet")
        if len(layouts) > 1
        else layouts[0]
    )


def base_after_writing(
    base: Tensor, known: Mark | None, view: Tensor, mark: OfBatch, batch_size: int
) -> OfBatch:
    """Return the mark of `base` after something of the batch was written to a view of it.

    known:       the mark that `base` had.
    view, mark:  the view, and what was written to it.
    batch_size:  how many examples there are.
    """
    if isinstance(mark, Lost) or isinstance(known, Lost):
        return LOST
    consistent = []
    for layout in (
        [known] if isinstance(known, BatchLayout) else _candidates(base, view, mark, batch_size)
    ):
        seen = _numbers_seen(view, base, layout, batch_size)
        if seen is None:
            return LOST
        if bool((seen == _numbered(view, mark, batch_size)).all()):
            consistent.append(layout)
    return _the_only(consistent, empty=view.numel() == 0)


def view_after_writing(view: Tensor, base: Tensor, mark: BatchLayout, batch_size: int) -> OfBatch:
    """Return the mark of `view` whose `base` is now the batch's, at `mark`."""
    seen = _numbers_seen(view, base, mark, batch_size)
    return LOST if seen is None else _read_off(seen, batch_size)


def _numbers_seen(
    view: Tensor, base: Tensor, layout: BatchLayout, batch_size: int
) -> Tensor | None:
    """Return whose each element of a view of `base` is; None where its memory does not tell."""
    if base.is_complex() and not view.is_complex():  # each has two elements of the view's size
        if base.is_conj():
            return None
        memory = torch.view_as_real(base)
        of_base = _numbered(base, layout, batch_size).unsqueeze(-1)
    else:
        memory, of_base = base, _numbered(base, layout, batch_size)
    if view.element_size() != memory.element_size():
        return None
    numbers = torch.empty_like(memory, dtype=torch.int64).copy_(of_base)
    if numbers.stride() != memory.stride():
        return None
    offset = view.storage_offset() - memory.storage_offset()
    return numbers.as_strided(view.shape, view.stride(), offset)


def _candidates(
    target: Tensor, value: Tensor, mark: BatchLayout, batch_size: int
) -> list[BatchLayout]:
    """List places a target of zeros may have: as the value counts from the end first, then any dim
    the batch fits.
    """
    aligned = mark.dim + target.dim() - value.dim()
    fitting = [
        BatchLayout(d, times=target.shape[d] // batch_size)
        for d in range(target.dim())
        if target.shape[d] and not target.shape[d] % batch_size
    ]
    return sorted(fitting, key=lambda p: p.dim != aligned)


def _setitem(op: Operation):
    target, index, value = op.args[:3]
    return lambda numbers: numbers[index], target, value


def _indexed(op: Operation):
    target, dim, index, value = (
        op.args[0],
        *(op.argument(i, n) for i, n in enumerate(("dim", "index", "source"))),
    )
    return lambda numbers: numbers.index_select(dim, index), target, value


def _scattered(op: Operation):
    target, dim, index, value = (
        op.args[0],
        *(op.argument(i, n) for i, n in enumerate(("dim", "index", "src"))),
    )
    part = lambda numbers: numbers[tuple(slice(size) for size in index.shape)]
    return lambda numbers: numbers.gather(dim, index), target, value, part


def _slice_scattered(op: Operation):
    target, value = op.args[0], op.argument(0, "src")
    read = {"select_scatter": torch.select, "slice_scatter": torch.ops.aten.slice.Tensor}.get(
        op.name, torch.diagonal
    )
    where = op.args[2:], {key: v for key, v in op.kwargs.items() if key != "src"}
    return lambda numbers: read(numbers, *where[0], **where[1]), target, value


def _put_flat(op: Operation):
    target, index, value = op.args[0], op.argument(0, "index"), op.argument(1, "source")
    return lambda numbers: numbers.take(index), target, value


def _put(op: Operation):
    target, indices, value = op.args[0], op.argument(0, "indices"), op.argument(1, "values")
    return lambda numbers: numbers[tuple(indices)], target, value


def _masked(op: Operation):
    target, mask, value = op.args[0], op.argument(0, "mask"), op.argument(1, "source")
    part = lambda numbers: numbers.reshape(-1)[: int(mask.expand(target.shape).sum())]
    return lambda numbers: numbers[mask.expand(target.shape)], target, value, part


# Operations that write values of one tensor into another, by how to read what they write: what
# reads it in the target, the target, the values and, where not all of them are written, which are.
WRITING = {
    "setitem": _setitem, "index_add": _indexed, "index_copy": _indexed, "scatter": _scattered,
    "scatter_add": _scattered, "scatter_reduce": _scattered, "index_put": _put,
    "index_reduce": _indexed, "select_scatter": _slice_scattered, "slice_scatter": _slice_scattered,
    "diagonal_scatter": _slice_scattered, "put": _put_flat,
    "masked_scatter": _masked,
}  # fmt: skip
