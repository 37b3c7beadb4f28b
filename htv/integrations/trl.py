"""`SFTTrainer` of TRL: one vote over all sequences of a step, packed ones and padded ones."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import htv
from htv.errors import require
from htv.integrations.huggingface import HtvTrainerMixin

try:
    from trl import SFTTrainer
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError:
    require("htv.integrations.trl", "trainers", "trl", "datasets")
    raise

__all__ = ["HtvSFTTrainer"]


class HtvSFTTrainer(HtvTrainerMixin, SFTTrainer):
    """Fine-tune as `trl.SFTTrainer` does, with gradients aggregated by a rule.

    With packing (strategies "bfd" and "bfd_split") and padding_free, every sequence votes; with
    packing_strategy="wrapped", which cuts sequences anywhere, every row. TRL's fused language-model
    head is one function that htv cannot see into: while training, logits are formed by the model's
    own head, as `transformers.Trainer` does, which takes memory for (tokens x vocabulary) numbers.

    rule, vote, attach:  as for `HtvTrainerMixin`; all others as for `trl.SFTTrainer`.

    Raises UnsupportedError where router_aux_loss_coef couples the examples of a batch, and what
    `HtvTrainerMixin` raises.

    >>> HtvSFTTrainer(model, args, train_dataset=data, rule=htv.AndMask(0.4)).train()
    ... # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise htv.UnsupportedError(
                "router_aux_loss_coef: the load-balancing loss is one number of a whole batch, in "
                "which no example has a part of its own. Remedy: router_aux_loss_coef=0.0"
            )
        model = self.accelerator.unwrap_model(self.model)
        _show_head(model.get_base_model() if hasattr(model, "get_base_model") else model)


def _show_head(model: nn.Module) -> None:
    """Have forwards of a patched model that want a gradient form logits."""
    fused = model.forward

    @wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or not torch.is_grad_enabled():
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        logits = fused(*args, **kwargs).logits
        if shifted is None:
            logits, shifted = logits[:, :-1], labels[:, 1:]
        return _scored(logits, shifted, count)

    model.forward = forward


def _scored(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> FusedCausalLMOutput:
    """What TRL's head returns, as far as its trainer for supervised fine-tuning looks at it."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    mask = labels != -100
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    with torch.no_grad():
        shares = logits.detach().log_softmax(-1)
        entropy = (shares.exp() * -shares).sum(-1).masked_fill(~mask, 0)
        is_top1 = (logits.detach().argmax(-1) == labels) & mask
    tokens = mask.sum().clamp(min=1) if count is None else count
    return FusedCausalLMOutput(
        loss=losses.sum() / tokens,
        log_probs=-losses,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
    )
