"""Lightning: one vote over all micro-batches and all devices of a step."""

from __future__ import annotations

from typing import Any

import htv
from htv.attach import RuleChoice
from htv.errors import require
from htv.integrations.voting import TrainerVotes, measurements

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ImportError:
    require("htv.integrations.lightning", "trainers", "lightning")
    raise

__all__ = ["HtvCallback"]


class HtvCallback(Callback):
    """Aggregate the gradients of a LightningModule by a rule while a Trainer fits it.

    rule:        as for `htv.attach`.
    accumulate:  for manual optimisation: whether a step has several `manual_backward`; then call
                 `finish` after the last of them, before clipping. Automatic optimisation follows
                 accumulate_grad_batches.
    vote, hook:  as for `htv.distributed.ddp`.
    attach:      further arguments of `htv.attach`; names of parameters are those of the module.
                 With stats=True, what `htv.integrations.accelerate.measurements` returns is logged
                 to the trainer's logger.

    One step of an optimizer is one vote of all examples of its micro-batches on all devices, under
    DDPStrategy and ModelParallelStrategy (FSDP2), and it ends before gradient_clip_val is applied.
    The module is plain before and after.

    Raises what `htv.attach` does when training begins, and UnsupportedError for FSDPStrategy,
    which is FSDP1, and strategies that wrap the module in anything else.

    >>> trainer = lightning.Trainer(callbacks=[HtvCallback(htv.AndMask(0.4))])  # doctest: +SKIP
    """

    def __init__(
        self,
        rule: RuleChoice,
        accumulate: bool = False,
        vote: str = "examples",
        hook: Any = None,
        **attach: Any,
    ):
        self._rule, self._accumulate, self._vote, self._hook = rule, accumulate, vote, hook
        self._attach = attach
        self._votes: TrainerVotes | None = None

    @property
    def handle(self) -> htv.Handle | None:
        """Return the handle while the module is fitted, or None."""
        return None if self._votes is None else self._votes.handle

    def finish(self) -> None:
        """Apply the rule to what the backwards of a step gathered, under manual optimisation.

        Raises RuntimeError outside `Trainer.fit`, and where devices have not met.
        """
        if self._votes is None:
            raise RuntimeError("finish() outside Trainer.fit: there is no vote to end")
        self._votes.finish()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        several = self._accumulate
        if pl_module.automatic_optimization:
            several = trainer.accumulate_grad_batches > 1 or any(
                isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks
            )
        wrapped = trainer.strategy.model
        self._votes = TrainerVotes(
            wrapped, pl_module, self._rule, several, self._vote, self._hook, self._attach
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Lightning has FSDP2 reduce every micro-batch: fine for a sum, too early for a vote.
        if pl_module.automatic_optimization:
            for module in pl_module.modules():
                if hasattr(module, "set_requires_gradient_sync"):
                    waits = trainer.fit_loop._should_accumulate()
                    module.set_requires_gradient_sync(not waits)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before gradients are unscaled, and long before they are clipped.
        if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            self._votes.finish()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        if pl_module.automatic_optimization and not scales:
            self._votes.finish()  # where the last training_step of a step returned None
        else:
            self._votes.require_finished()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._attach.get("stats"):
            pl_module.log_dict(measurements(self.handle))

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        votes, self._votes = self._votes, None
        if votes is not None:
            votes.close()
