"""Hugging Face Accelerate: one vote over the micro-batches of `accelerator.accumulate()` and over
all processes.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from htv.attach import RuleChoice
from htv.errors import require
from htv.integrations.voting import TrainerVotes, measurements

__all__ = ["measurements", "prepare"]


def prepare(
    accelerator: Any,
    model: Any,
    *others: Any,
    rule: RuleChoice,
    vote: str = "examples",
    hook: Any = None,
    **attach: Any,
) -> tuple:
    """Prepare objects as `accelerator.prepare` does, and let the examples of every step vote.

    accelerator:  an `accelerate.Accelerator`.
    model:        not prepared yet.
    others:       what else to prepare: the optimizer, and data loaders, schedulers.
    rule:         as for `htv.attach`.
    vote, hook:   as for `htv.distributed.ddp`, where there are several processes.
    attach:       further arguments of `htv.attach`.

    Returns (handle, model, *others), all but the handle prepared. Call `accelerator.backward` and
    `accelerator.accumulate` as always: the vote ends with the backward in which
    `accelerator.sync_gradients` is true, before `clip_grad_norm_`. With one process and
    gradient_accumulation_steps=1 every backward is a vote.

    Raises ValueError without an optimizer, UnsupportedError for a model that Accelerate wraps in
    anything but DistributedDataParallel or FSDP2, and what `htv.attach` raises.

    >>> accelerator = Accelerator(gradient_accumulation_steps=4)  # doctest: +SKIP
    >>> handle, model, optimizer, loader = htv.integrations.accelerate.prepare(
    ...     accelerator, model, optimizer, loader, rule=htv.AndMask(0.4)
    ... )  # doctest: +SKIP
    """
    require("htv.integrations.accelerate", "trainers", "accelerate")
    prepared = accelerator.prepare(model, *others)
    prepared = prepared if others else (prepared,)
    optimizers = [p for p in prepared if hasattr(p, "step_was_skipped")]
    if not optimizers:
        raise ValueError(
            "prepare needs the optimizer, too: its step must not come before a vote has ended. "
            "Remedy: prepare(accelerator, model, optimizer, ..., rule=...)"
        )
    several = accelerator.gradient_accumulation_steps > 1
    votes = AcceleratorVotes(
        accelerator, prepared[0], optimizers, rule, several, vote, hook, attach
    )
    return (votes.handle, *prepared)


class AcceleratorVotes(TrainerVotes):
    """Ends a vote with the backward in which an Accelerator synchronises gradients.

    accelerator:  whose `backward` is used.
    wrapped:      the model as Accelerate prepared it.
    optimizers:   as Accelerate prepared them.
    rule, accumulates, vote, hook, attach:  as for `TrainerVotes`.
    """

    def __init__(
        self,
        accelerator: Any,
        wrapped: Any,
        optimizers: list,
        rule: RuleChoice,
        accumulates: bool,
        vote: str = "examples",
        hook: Any = None,
        attach: dict[str, Any] | None = None,
    ):
        model = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        super().__init__(wrapped, model, rule, accumulates, vote, hook, attach)
        self.accelerator = accelerator
        plain = self._backward = accelerator.backward

        @wraps(plain)
        def backward(loss: Any, **kwargs: Any) -> None:
            plain(loss, **kwargs)
            if accelerator.sync_gradients and self.handle.attached:
                self.finish()

        accelerator.backward = backward
        self._hooks = [
            optimizer.optimizer.register_step_pre_hook(lambda *_: self._before_step())
            for optimizer in optimizers
        ]

    def _before_step(self) -> None:
        if self.handle.attached:
            self.require_finished()

    def close(self) -> None:
        """Leave model and accelerator as they were."""
        super().close()
        del self.accelerator.backward
        for hook in self._hooks:
            hook.remove()
