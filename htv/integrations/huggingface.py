"""Hugging Face `Trainer`: one vote over all micro-batches and all ranks of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import htv
from htv.attach import RuleChoice
from htv.errors import require
from htv.integrations.accelerate import AcceleratorVotes
from htv.integrations.voting import measurements

try:
    from transformers import Trainer, TrainerCallback
except ImportError:
    require("htv.integrations.huggingface", "trainers", "accelerate", "transformers")
    raise

__all__ = ["HtvTrainer", "HtvTrainerMixin"]


class HtvTrainerMixin:
    """Let a `transformers.Trainer` aggregate gradients by a rule; comes before it in the bases.

    rule:    as for `htv.attach`, by keyword.
    vote:    as for `htv.distributed.ddp`: who votes where there are several ranks.
    attach:  further arguments of `htv.attach`, such as {"exclude": "*.bias"}; with
             {"stats": True}, what `htv.integrations.accelerate.measurements` returns is logged
             beside the loss.

    The model is attached while `train` runs, and plain before and after. One optimizer step is one
    vote, of all examples of its gradient_accumulation_steps micro-batches on all ranks, and it ends
    before max_grad_norm is applied. Where batches are packed (`DataCollatorWithFlattening`, packing
    and padding_free of TRL), every sequence votes. At one example per step a warning says that its
    aggregate is the plain gradient.

    Raises what `htv.attach` does when training begins, and UnsupportedError for DataParallel,
    FSDP1, DeepSpeed, and optimizers that step inside backward.

    >>> class MyTrainer(HtvTrainerMixin, Trainer): ...  # doctest: +SKIP
    >>> MyTrainer(model, args, train_dataset=data, rule=htv.AndMask(0.4)).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        rule: RuleChoice,
        vote: str = "examples",
        attach: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self._htv_arguments = rule, vote, dict(attach or {})
        self._htv_votes: AcceleratorVotes | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_BeginsVotes(self))

    @property
    def htv_handle(self) -> htv.Handle | None:
        """Return the handle while `train` runs, or None."""
        return None if self._htv_votes is None else self._htv_votes.handle

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with votes; see `transformers.Trainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_votes()

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; sequences that are packed into one row vote one by one.

        model, inputs:  of the step; see `transformers.Trainer.compute_loss`.
        """
        with self._packed(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write numbers to the log, and how far examples agree if it is collected.

        logs:  by name.
        """
        _, _, attach = self._htv_arguments
        if attach.get("stats") and self.htv_handle is not None and "loss" in logs:
            logs = {**logs, **measurements(self.htv_handle)}
        super().log(logs, *args, **kwargs)

    def _begin_votes(self) -> None:
        self._end_votes()
        self._refuse_early_steps()
        rule, vote, attach = self._htv_arguments
        several = self.args.gradient_accumulation_steps > 1
        optimizers = [self.optimizer]
        self._htv_votes = AcceleratorVotes(
            self.accelerator, self.model_wrapped, optimizers, rule, several, vote, attach=attach
        )

    def _end_votes(self) -> None:
        votes, self._htv_votes = self._htv_votes, None
        if votes is not None:
            votes.close()

    def _refuse_early_steps(self) -> None:
        name = str(getattr(self.args.optim, "value", self.args.optim))
        hooked = any(p._post_accumulate_grad_hooks for p in self.model.parameters())
        if "layerwise" in name or "lomo" in name or hooked:
            raise htv.UnsupportedError(
                f"optim={name!r}: hooks on parameters take gradients while backward runs, before "
                "all examples of a step have voted. Remedy: optim='adamw_torch', or the variant "
                "that is not layerwise, and no register_post_accumulate_grad_hook"
            )

    def _packed(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Let sequences vote where several stand in one row."""
        bounds = sequence_bounds(inputs)
        if bounds is None or self.htv_handle is None or not self.model.training:
            return nullcontext()
        if getattr(self.data_collator, "pad_to_multiple_of", None):
            raise htv.UnsupportedError(
                "pad_to_multiple_of with packed sequences: every padding token would vote as a "
                "sequence of its own. Remedy: pad_to_multiple_of=None"
            )
        return self.htv_handle.packed(bounds)


def sequence_bounds(inputs: dict[str, Any]) -> Tensor | None:
    """Return where the sequences of a packed batch begin, and its end; None if there is one row
    per sequence.

    inputs:  of the model.
    """
    bounds, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if bounds is not None:
        return bounds if len(bounds) > 2 else None
    one_row = isinstance(positions, Tensor) and positions.dim() == 2 and len(positions) == 1
    if not one_row or "attention_mask" in inputs:
        return None
    starts = (positions[0] == 0).nonzero().flatten()
    if len(starts) < 2:
        return None
    return torch.cat([starts, starts.new_tensor([positions.shape[1]])])


class _BeginsVotes(TrainerCallback):
    """Attaches when the model is wrapped and its checkpoint loaded."""

    def __init__(self, trainer: HtvTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_votes()


class HtvTrainer(HtvTrainerMixin, Trainer):
    """Train as `transformers.Trainer` does, with gradients aggregated by a rule.

    rule, vote, attach:  as for `HtvTrainerMixin`; all others as for `transformers.Trainer`.

    >>> HtvTrainer(model, args, train_dataset=data, rule=htv.AndMask(0.4)).train()  # doctest: +SKIP
    """
