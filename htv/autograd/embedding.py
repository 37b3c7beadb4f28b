"""Embedding tables with aggregated gradients; only rows that occur are computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from htv.autograd.ledger import MARKER, Function, Slot
from htv.groups import Voters
from htv.ops.factors import EmbeddingFactors


def embedding(ids: Tensor, weight: Slot, padding_idx: int | None, voters: Voters) -> Tensor:
    """F.embedding. ids: integers with the batch in one of their dims, weight: (V, D) -> (*ids.shape, D)."""
    return _Embedding.apply(ids, weight.value, weight, padding_idx, voters, *weight.tokens)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, ids, weight, weight_slot, padding_idx, voters, *tokens):
        ctx.slot, ctx.voters, ctx.num_embeddings, ctx.padding_idx = weight_slot, voters, len(weight), padding_idx
        ctx.unused = (None,) * (3 + len(tokens))
        ctx.save_for_backward(MARKER, ids)
        return F.embedding(ids, weight)

    @staticmethod
    def gradients(ctx, grad):
        _, ids = ctx.saved_tensors
        num_embeddings, padding_idx = ctx.num_embeddings, ctx.padding_idx

        def factors(voters: Voters, ids: Tensor, grad: Tensor) -> EmbeddingFactors:
            rows, bounds = voters.grad_rows(grad)
            return EmbeddingFactors(voters.rows(ids, 0), rows, bounds, num_embeddings, padding_idx)

        grad_weight = ctx.slot.grad(ctx.needs_input_grad[1], factors, ctx.voters, ids, grad)
        return None, grad_weight, *ctx.unused
