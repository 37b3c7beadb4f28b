"""Which values of a parameter `make test` takes; the others are for `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

import htv

# One of each kind: no vote, a hard and a soft mask, one value in the order and a mean of several.
RULES = (
    htv.Mean(),
    htv.AndMask(0.4),
    htv.SandMask(0.3, k=0.5),
    htv.Median(),
    htv.WinsorizedMean(1),
)
# What ranks send: votes alone, with the sum of a mask, with squares, with logarithms.
STREAMING_RULES = (
    htv.AndMask(0.4),
    htv.AndMask(0.4, rescale=True),
    htv.SandMask(0.3, k=0.5),
    htv.GeometricMean(0.2),
)


def quick(values: Iterable[Any], keep: Collection[Any] | Callable[[Any], bool]) -> list:
    """Return `values` for pytest.mark.parametrize: those that are not in `keep`, or for which it is
    false, are marked slow.
    """
    kept = keep if callable(keep) else lambda value: value in keep
    return [v if kept(v) else pytest.param(v, marks=pytest.mark.slow) for v in values]


def quick_pairs(rows: Iterable[tuple], keep: Collection[tuple]) -> list:
    """Return `rows`, values of several parameters, as `quick` does. Keep every value once."""
    return [r if r in keep else pytest.param(*r, marks=pytest.mark.slow) for r in rows]
