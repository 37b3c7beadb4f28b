"""What must hold on a GPU, as functions: for `pytest tests/device`, and for `bench/gpu.sh` on
machines without pytest.

ops.py        every kernel against its definition
launches.py   CUDA graphs, torch.compile, streams, hidden synchronisation, several devices, large
              tensors
steps.py      whole attached models against one group at a time

Without a GPU, `dry`, the same functions run a small selection: the CUDA kernels by the emulator of
tests/cuda, those of Triton by its interpreter (TRITON_INTERPRET=1 must be set before).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


class Skipped(Exception):
    """A case that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    """One thing that must hold: `run` returns, or raises what is wrong. name: PART/what."""

    name: str
    run: Callable[[], None]


PARTS = {  # name: module and generator of its cases
    "cuda-stacked": ("ops", "cuda_stacked"),
    "cuda-linear": ("ops", "cuda_linear"),
    "triton-stacked": ("ops", "triton_stacked"),
    "triton-linear": ("ops", "triton_linear"),
    "triton-conv": ("ops", "triton_conv"),
    "triton-embedding": ("ops", "triton_embedding"),
    "captured": ("launches", "captured"),
    "compiled": ("launches", "compiled"),
    "streams": ("launches", "streams"),
    "waiting": ("launches", "waiting"),
    "devices": ("launches", "devices"),
    "large": ("launches", "large"),
    "models": ("steps", "models"),
}


def cases(part: str, dry: bool) -> Iterator[Case]:
    """The cases of one part. Raises ImportError where what it needs is not installed."""
    module, generator = PARTS[part]
    for what, run in getattr(importlib.import_module(f"device_suite.{module}"), generator)(dry):
        yield Case(f"{part}/{what}", run)
