"""Embedding tables with aggregated gradients; only rows that occur are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.groups import Groups
from htv.ops.factors import EmbeddingFactors


def embedding(ids: Tensor, weight: Slot, padding_idx: int | None, groups: Groups) -> Tensor:
    """F.embedding. ids: (*lead, *rest) integers, weight: (V, D) -> (*lead, *rest, D)."""
    return _Embedding.apply(ids, weight.value, weight.token, weight, padding_idx, groups)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, weight_token, weight_slot, padding_idx, groups):
        ctx.slot, ctx.groups, ctx.num_embeddings, ctx.padding_idx = weight_slot, groups, len(weight), padding_idx
        ctx.save_for_backward(MARKER, ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        _, ids = ctx.saved_tensors
        with full_precision(grad.device):
            grad_weight = ctx.slot.grad(
                lambda: EmbeddingFactors(ids, grad, ctx.num_embeddings, ctx.padding_idx, ctx.groups),
                ctx.needs_input_grad[1],
            )
        return None, grad_weight, None, None, None, None
