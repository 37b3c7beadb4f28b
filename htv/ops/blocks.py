"""The uses of one parameter, sorted into blocks that are aggregated each by itself, and joined
where they are alike.
"""

from __future__ import annotations

import functools
import math

import torch

from htv.ops.factors import EmbeddingFactors, Factors, LinearFactors, View, ViewFactors


def blocks(parts: list[Factors]) -> list[list[Factors]]:
    """The factors of each block of the parameter that is aggregated by itself."""
    found = views(parts)
    return [parts] if found is None else [[part.inner for part in block] for block in found]


def views(parts: list[Factors]) -> list[list[ViewFactors]] | None:
    """Parts by the view they are of, or None unless all are of views that do not overlap."""
    found: dict[tuple, list[ViewFactors]] = {}
    for part in parts:
        if not isinstance(part, ViewFactors):
            return None
        found.setdefault(part.view, []).append(part)
    first = parts[0]
    return list(found.values()) if _disjoint(first.shape, first.strides, tuple(found)) else None


@functools.lru_cache(maxsize=256)
def _disjoint(shape: tuple[int, ...], strides: tuple[int, ...], views: tuple[View, ...]) -> bool:
    """Whether no element of a dense parameter is shown by two views, nor by one view twice. Asked
    of the host.
    """
    times = torch.zeros(math.prod(shape), dtype=torch.uint8).as_strided(shape, strides)
    shown = 0
    for view in views:
        times.as_strided(*view).fill_(1)
        shown += math.prod(view[0])
    return int(times.count_nonzero()) == shown


def joined(parts: list[Factors]) -> list[Factors]:
    """Several uses in linear layers (recurrence) as one use of more rows, several lookups as one of
    more ids.
    """
    if len(parts) == 1:
        return parts
    for kind in (LinearFactors, EmbeddingFactors):
        alike = [part for part in parts if isinstance(part, kind)]
        if len(alike) > 1 and len({part.grad_output.dtype for part in alike}) == 1:
            parts = [kind.joined(alike), *(part for part in parts if not isinstance(part, kind))]
    return parts


def require_same_groups(parts: list[Factors]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or part.count != first.count:
            raise ValueError(
                "the uses of one parameter must agree on its shape and on the number of groups: "
                f"got {first.shape} and {part.shape}, {first.count} and {part.count} groups "
                "(where every row votes by itself, a parameter used on different numbers of rows "
                "has no votes to add)"
            )
