"""In which type votes travel: the smallest whose sums over ranks are exact."""

from __future__ import annotations

import torch

__all__ = ["vote_bytes", "vote_type"]

LARGEST_HALF = 2048  # up to which float16 holds every integer


def vote_type(count: int) -> torch.dtype:
    """Return the smallest type in which `count` votes may be summed over ranks, exactly."""
    if count <= 127:
        return torch.int8
    return torch.float16 if count <= LARGEST_HALF else torch.int32


def vote_bytes(count: int) -> int:
    """Return how many bytes a coordinate's votes take on their way, for `count` voters."""
    return vote_type(count).itemsize
