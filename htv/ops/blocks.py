"""The uses of one parameter, sorted into blocks that are aggregated each by itself, and joined where they are alike."""

from __future__ import annotations

import math

import torch

from htv.ops.factors import EmbeddingFactors, Factors, LinearFactors, ViewFactors


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
    return list(found.values()) if _disjoint(list(found.values())) else None


def _disjoint(blocks: list[list[ViewFactors]]) -> bool:
    """Whether no element of the parameter is shown by two views, nor by one view twice."""
    first = blocks[0][0]
    shown = first.placed(torch.zeros(first.inner.shape, dtype=torch.int32, device=first.device))
    for block in blocks:
        block[0].shown(shown).add_(1)
    return int(shown.sum()) == sum(math.prod(block[0].inner.shape) for block in blocks) and int(shown.max()) <= 1


def joined(parts: list[Factors]) -> list[Factors]:
    """Several uses in linear layers (recurrence) as one use of more rows, several lookups as one of more ids."""
    for kind in (LinearFactors, EmbeddingFactors):
        alike = [part for part in parts if isinstance(part, kind)]
        if len(alike) > 1 and len({part.grad_output.dtype for part in alike}) == 1:
            parts = [kind.joined(alike), *(part for part in parts if not isinstance(part, kind))]
    return parts


def require_same_voters(parts: list[Factors]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or part.count != first.count:
            raise ValueError(
                "the uses of one parameter must agree on its shape and on the number of groups: got "
                f"{first.shape} and {part.shape}, {first.count} and {part.count} groups (where every row votes by "
                "itself, a parameter used on different numbers of rows has no votes to add)"
            )
