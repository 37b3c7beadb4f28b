"""Time of a step: by CUDA events on a GPU, by the wall elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch

from htv.tools.timing import Step, milliseconds

L2 = 256 << 20  # bytes: more than any GPU's
HEAD_START = 1_000_000  # cycles, half a millisecond, in which launches get ahead of the device


def clock(device: str, alone: bool = False) -> Callable[[Step], float]:
    """Milliseconds of one call.

    alone: of its work on the device alone, with a cold L2 cache and its launches made beforehand;
    else of the call as a training loop makes it, launches included.
    """
    if device == "cpu":
        return lambda step: milliseconds(step, lambda: None)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache = torch.empty(L2, dtype=torch.int8, device=device) if alone else None

    def timed(step: Step) -> float:
        torch.cuda.synchronize()
        if alone:
            cache.zero_()
            torch.cuda._sleep(HEAD_START)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return timed


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
