"""Whole attached models on the device against one group at a time there, by `htv.check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import htv
from device_suite import Skipped
from htv.bench.models import whole_models
from htv.ops import backend

RULES = (htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1), htv.SandMask(0.3, k=0.5))


def models(dry: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in whole_models() if not dry else ("mlp",):
        for rule in RULES if not dry else RULES[:2]:
            named = ("triton", "cuda")[: 2 - dry] if rule in RULES[:2] else ()
            for server in ("auto", *named):
                yield (
                    f"{name}: {rule}, by {server}",
                    lambda n=name, r=rule, s=server: handles(n, r, s, dry),
                )


def handles(name: str, rule: htv.Rule, server: str, dry: bool) -> None:
    """In float32, to twice the rounding of plain backwards; in float64 where that is served."""
    model, batch = whole_models()[name]()
    device = "cpu" if dry else "cuda"
    if server != "auto":
        reason = backend.why_not(server, backend.Problem("stacked", "median", torch.device(device)))
        if reason is not None:
            raise Skipped(reason)
    with htv.use_backend(server):
        for dtype in (torch.float32, torch.float64) if server == "auto" else (torch.float32,):
            htv.check(model.to(device), (batch.to(device),), rule, dtype=dtype)
