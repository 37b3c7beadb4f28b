"""The general path: contributions of any factors, one box of coordinates at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from htv.ops import factors, functional
from htv.ops.factors import Factors
from htv.rules import Statistic


def sliced(parts: list[Factors], statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The general path: contributions of one box of coordinates at a time, a few MB, then the stacked statistic."""
    first = parts[0]
    height, width = factors.two_dims(first.shape)
    value = torch.empty(height, width, *first.shape[2:], dtype=first.dtype, device=first.device)
    mask_sum = torch.zeros((), dtype=torch.float64, device=first.device)
    for rows, columns, contributions in slices(parts):
        box, box_mask = functional.stacked(contributions, statistic)
        value[rows, columns] = box
        mask_sum += box_mask
    return value.mul_(first.count).reshape(first.shape), mask_sum


def slices(parts: list[Factors]) -> Iterator[tuple[slice, slice, Tensor]]:
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


def mask_of_zeros(like: Factors, statistic: Statistic) -> Tensor:
    """The mask's value at a coordinate to which nobody contributes."""
    zeros = torch.zeros(like.count, 1, dtype=like.dtype, device=like.device)
    return functional.stacked(zeros, statistic)[1]
