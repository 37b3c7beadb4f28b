"""`SFTTrainer` of TRL: one vote over all sequences of a step, packed ones and padded ones."""

from __future__ import annotations

import types
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import htv
from htv.engine.forward import ForwardStandIn
from htv.errors import require
from htv.integrations.huggingface import HtvTrainerMixin

try:
    from trl import SFTTrainer
except ImportError:
    require("htv.integrations.trl", "trainers", "trl", "datasets")
    raise

__all__ = ["HtvSFTTrainer", "show_head"]

HEAD = "_ChunkedLogProbFunction"  # what TRL's patched forward calls its fused head
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in TRL's order


class HtvSFTTrainer(HtvTrainerMixin, SFTTrainer):
    """Fine-tune as `trl.SFTTrainer` does, with gradients aggregated by a rule.

    With packing (strategies "bfd" and "bfd_split") and padding_free, every sequence votes; with
    packing_strategy="wrapped", which cuts sequences anywhere, every row. `show_head` is called on
    the model: its logits take memory for (tokens x vocabulary) numbers.

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
        show_head(self.accelerator.unwrap_model(self.model))


def show_head(model: nn.Module) -> None:
    """Let htv see into TRL's fused language-model head, for a loss on its log-probabilities.

    TRL's trainers (DPO, GRPO, KTO, RLOO) and `trl.trainer.utils.add_fused_lm_head` have the head
    computed by one function that no gradient of an example can be told from. From here on, forwards
    that want a gradient form the logits by the model's own head, a linear layer, and compute from
    them what TRL does: log-probabilities and entropy, with its temperature, scale and softcap. That
    takes memory for (tokens x vocabulary) numbers. Forwards without gradients stay TRL's.

    model:  one that `add_fused_lm_head` was called on, as those trainers do, or PEFT's model around
            it. Call this before `htv.attach`; `HtvSFTTrainer` does it itself.

    Raises ValueError for a model without TRL's head, and RuntimeError for one that is attached.

    >>> add_fused_lm_head(model, outputs=("entropy",))  # doctest: +SKIP
    >>> show_head(model)  # doctest: +SKIP
    >>> handle = htv.attach(model, htv.AndMask(0.4))  # doctest: +SKIP
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    fused = model.forward
    if isinstance(fused, ForwardStandIn):
        raise RuntimeError("show_head of an attached model: call it before htv.attach")
    own = getattr(fused, "__func__", None)
    if HEAD not in getattr(own, "__globals__", {}):
        raise ValueError(
            f"{type(model).__name__} has no fused head of TRL's whose parts htv knows. Remedy: "
            "call trl.trainer.utils.add_fused_lm_head(model) first; TRL 1.16 is known to work"
        )
    in_parts = types.FunctionType(
        own.__code__,
        {**own.__globals__, HEAD: _LogProbs},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    in_parts.__kwdefaults__ = own.__kwdefaults__

    @wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or not torch.is_grad_enabled():
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        return in_parts(model, *args, fused_lm_head=True, **kwargs)

    model.forward = forward


class _LogProbs:
    """TRL's `ChunkedLogProbFunction`, by calls that htv sees."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Return log-probabilities of the targets, then what of TRL's optional outputs is asked
        for. hidden: (R, H), targets: (R,); `chunk_size` says nothing here.
        """
        logits = F.linear(hidden, weight, bias)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                found["log_sum_sq_probs"] = (2 * log_p).logsumexp(-1)
            if "mean_logits" in outputs:
                found["mean_logits"] = logits.mean(-1)
            if "is_top1" in outputs:
                found["is_top1"] = logits.argmax(-1) == targets
        picked = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return picked, entropy, *(found.get(name) for name in OPTIONAL_OUTPUTS[1:])
