"""Embedding tables with aggregated gradients; only rows that occur are computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.groups import GroupedRows
from htv.ops.factors import EmbeddingFactors


def embedding(
    ids: Tensor, weight: ParameterArgument, padding_idx: int | None, grouped_rows: GroupedRows
) -> Tensor:
    """F.embedding. ids: integers with the batch in one of their dims, weight: (V, D) ->
    (*ids.shape, D).
    """
    return _Embedding.apply(ids, weight.value, weight, padding_idx, grouped_rows, *weight.tokens)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, ids, weight, weight_argument, padding_idx, grouped_rows, *tokens):
        ctx.argument, ctx.grouped_rows, ctx.num_embeddings, ctx.padding_idx = (
            weight_argument,
            grouped_rows,
            len(weight),
            padding_idx,
        )
        ctx.unused = (None,) * (3 + len(tokens))
        ctx.save_for_backward(MARKER, ids)
        return F.embedding(ids, weight)

    @staticmethod
    def gradients(ctx, grad):
        _, ids = ctx.saved_tensors
        num_embeddings, padding_idx = ctx.num_embeddings, ctx.padding_idx

        def factors(grouped_rows: GroupedRows, ids: Tensor, grad: Tensor) -> EmbeddingFactors:
            rows, bounds = grouped_rows.grad_rows(grad)
            return EmbeddingFactors(
                grouped_rows.rows(ids, 0), rows, bounds, num_embeddings, padding_idx
            )

        grad_weight = ctx.argument.grad(
            ctx.needs_input_grad[1], factors, ctx.grouped_rows, ids, grad
        )
        return None, grad_weight, *ctx.unused
