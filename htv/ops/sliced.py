"""The general path: contributions of any factors, one box of coordinates at a time, in bounded
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from htv.ops import factors, functional, open_rules
from htv.ops.factors import Factors
from htv.ops.reference import Summary
from htv.rules import Statistic


def sliced(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The general path: contributions of one box of coordinates at a time, a few MB, then the
    stacked statistic.
    """
    first = parts[0]
    height, width = factors.two_dims(first.shape)
    value = torch.empty(height, width, *first.shape[2:], dtype=first.dtype, device=first.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=first.device)
    for rows, columns, contributions in slices(parts):
        if statistic.reduce is None:
            box, box_mask = functional.stacked(contributions, statistic)
            mask_sum += box_mask
        else:
            box = _reduced_box(contributions, len(first.shape), statistic)
        value[rows, columns] = box
    return value.mul_(first.count).reshape(first.shape), mask_sum


def summary(parts: list[Factors], name: str, log_offset: float) -> Summary:
    """The same of the summary for the streaming statistic of this name.

    log_offset:  as for `Summary.of`.
    """
    first, whole = parts[0], None
    height, width = factors.two_dims(first.shape)
    for rows, columns, contributions in slices(parts):
        box = functional.summary(contributions, name, log_offset)
        if whole is None:
            whole = box.map(lambda field: field.new_empty(height, width, *first.shape[2:]))
        for field, part in zip(whole.tensors, box.tensors, strict=True):
            field[rows, columns] = part
    return whole.map(lambda field: field.reshape(first.shape))


def _reduced_box(contributions: Tensor, dims: int, statistic: Statistic) -> Tensor:
    """By the user's own rule, who sees boxes of as many dims as the parameter has.

    contributions: (E, r, c, *rest) -> (r, c, *rest)
    """
    box = contributions.shape[1:]
    seen = contributions.view(len(contributions), *box[:dims])
    return open_rules.reduced(seen, statistic).reshape(box)


def slices(parts: list[Factors]) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, contributions (E, r, c, *rest)) of near-square boxes that cover dims 0 and 1.

    All boxes share one scratch: what is yielded is overwritten by the next. (Fresh tensors instead
    would make glibc's heap grow without bound, for it rarely reuses aligned blocks.)
    """
    first = parts[0]
    count, rest = first.count, first.shape[2:]
    coordinates, boxes = _boxes(first, max(part.scratch for part in parts))
    size = count * coordinates
    scratch = [
        torch.empty(size, dtype=first.dtype, device=first.device) for _ in range(min(2, len(parts)))
    ]
    for box in boxes:
        shape = (count, box[0].stop - box[0].start, box[1].stop - box[1].start, *rest)
        contributions, *other = (s[: math.prod(shape)].view(shape) for s in scratch)
        first.fill_block(*box, contributions)
        for part in parts[1:]:
            part.fill_block(*box, other[0])
            contributions += other[0]
        yield *box, contributions


def _boxes(like: Factors, scratch: int) -> tuple[int, Iterator[tuple[slice, slice]]]:
    """Return the coordinates of the largest box, and (rows, columns) of each.

    The contributions to one take at most `scratch` bytes, unless those to one element of dims 0 and
    1 take more.
    """
    rest, (height, width) = math.prod(like.shape[2:]), factors.two_dims(like.shape)
    itemsize = torch.finfo(like.dtype).bits // 8
    budget = max(1, scratch // (like.count * rest * itemsize))
    columns = min(width, max(math.isqrt(budget), budget // height, 1))
    rows = min(height, max(1, budget // columns))

    def boxes() -> Iterator[tuple[slice, slice]]:
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))

    return rows * columns * rest, boxes()


def of_zeros(like: Factors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Return E * stat where nobody contributes, (*shape), and the mask at each such coordinate, ().

    like: factors with as many groups to a parameter of that shape.
    """
    if statistic.reduce is not None:
        return _reduced_zeros(like, statistic), open_rules.no_mask(like.device)
    zeros = torch.zeros(like.count, 1, dtype=like.dtype, device=like.device)
    value, mask = functional.stacked(zeros, statistic)
    return value.mul_(like.count).expand(like.shape).clone(), mask


def _reduced_zeros(like: Factors, statistic: Statistic) -> Tensor:
    """By the user's own rule: one box of zeros where it gives one value for all coordinates of it.

    Where they differ (it draws random numbers, say) every box is reduced.
    """
    height, width = factors.two_dims(like.shape)
    value = torch.empty(height, width, *like.shape[2:], dtype=like.dtype, device=like.device)
    coordinates, boxes = _boxes(like, like.scratch)
    zeros = torch.empty(like.count * coordinates, dtype=like.dtype, device=like.device)
    for number, (rows, columns) in enumerate(boxes):
        layout = value[rows, columns]
        contributions = zeros[: like.count * layout.numel()].view(like.count, *layout.shape)
        layout.copy_(_reduced_box(contributions.zero_(), len(like.shape), statistic))
        if number == 0 and open_rules.is_one_value(layout):
            value.fill_(layout.flatten()[0].clone())
            break
    return value.mul_(like.count).reshape(like.shape)
