"""What all trainers have in common: a handle whose votes end where the trainer's steps do."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import nn

import htv
from htv.attach import RuleChoice

__all__ = ["TrainerVotes", "measurements"]

DATA_PARALLEL = "DistributedDataParallel"


class TrainerVotes:
    """Has all micro-batches and ranks of a trainer's step vote together.

    wrapped:      what the trainer calls: the model, or DistributedDataParallel around it, or a
                  model sharded by FSDP2.
    model:        the model itself.
    rule:         as for `htv.attach`.
    accumulates:  whether a step has several backwards.
    vote, hook:   as for `htv.distributed.ddp`.
    attach:       further arguments of `htv.attach`.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        model: nn.Module,
        rule: RuleChoice,
        accumulates: bool,
        vote: str = "examples",
        hook: Any = None,
        attach: dict[str, Any] | None = None,
    ):
        while type(wrapped).__name__ == "OptimizedModule":  # what torch.compile returns
            wrapped = wrapped._orig_mod
        kind = _kind(wrapped, model)
        self.handle = htv.attach(model, rule, **{"allow_single": "warn", **(attach or {})})
        self._block = contextlib.ExitStack()
        try:
            if kind == DATA_PARALLEL:
                htv.distributed.ddp(wrapped, self.handle, hook=hook, vote=vote)
            elif kind == "FSDPModule":
                htv.distributed.fsdp(model, self.handle, vote=vote)
            elif accumulates:
                self._block.enter_context(self.handle.accumulate())
        except BaseException:
            self.handle.detach()
            raise
        # Whether votes end by `finish`, or by every backward.
        self.gathers = accumulates or kind is not None

    def finish(self) -> None:
        """End the vote of a step: after its last backward, before gradients are clipped."""
        if self.gathers:
            self.handle.finish()

    def require_finished(self) -> None:
        """Raise RuntimeError where the optimizer is to step, but contributions still wait for
        `finish`.
        """
        if not self.gathers:
            return
        before = [p.grad for p in self.handle.model.parameters()]
        self.finish()
        after = [p.grad for p in self.handle.model.parameters()]
        if any(one is not other for one, other in zip(before, after, strict=True)):
            raise RuntimeError(
                "the optimizer was to step, but the last backward did not go by the trainer, so "
                "the vote had not ended and gradients may have been clipped before they were "
                "there. Remedy: accelerator.backward(loss) in the place of loss.backward(), or "
                "handle.finish() after the last backward of a step, before clipping"
            )

    def close(self) -> None:
        """Leave the model as it was; what waits for a vote is dropped."""
        self.handle.detach()
        self._block.close()


def measurements(handle: htv.Handle, prefix: str = "htv") -> dict[str, float]:
    """Return what `Handle.stats` tells, as the flat numbers that loggers take.

    handle:  of ``htv.attach(..., stats=True)``.
    prefix:  what their names begin with.

    For each parameter the share of coordinates its rule keeps, the mean agreement of signs, the
    m-coherence and the gradient noise scale (`htv.Agreement`), of the last vote that ended: over
    all its micro-batches, and over all ranks where they vote together. The mean agreement is left
    out where ranks exchange no votes, under `Mean` and `MedianOfMeans` with buckets of ranks.

    >>> from htv.integrations.accelerate import measurements
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with htv.attach(model, htv.AndMask(1.0), stats=True) as handle:
    ...     model(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).sum().backward()
    ...     measurements(handle)["htv/weight/kept_fraction"]
    0.5
    """
    found = {}
    for name, agreement in handle.stats().items():
        fields = ["kept_fraction", "mean_agreement", "m_coherence", "noise_scale"]
        if math.isnan(agreement.mean_agreement):
            fields.remove("mean_agreement")
        found |= {f"{prefix}/{name}/{field}": getattr(agreement, field) for field in fields}
    return found


def _kind(wrapped: nn.Module, model: nn.Module) -> str | None:
    """Name what brings the gradients of ranks together; None where nothing does."""
    kinds = {c.__name__ for m in wrapped.modules() for c in type(m).__mro__}
    outer = {c.__name__ for c in type(wrapped).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise htv.UnsupportedError(
            "the trainer shards the model by FullyShardedDataParallel (FSDP1), whose flat "
            "parameters hide which gradient is whose. Remedy: FSDP2 (fsdp_version=2 of "
            "Accelerate, ModelParallelStrategy of Lightning), or DistributedDataParallel"
        )
    if DATA_PARALLEL in outer:
        return DATA_PARALLEL
    if "FSDPModule" in kinds:
        return "FSDPModule"
    if wrapped is not model:
        raise htv.UnsupportedError(
            f"the trainer wraps the model in {type(wrapped).__name__}, and htv does not know how "
            "that brings gradients together. Remedy: one process per device (torchrun), so that "
            "DistributedDataParallel is used, or FSDP2"
        )
    return None
