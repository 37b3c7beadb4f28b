"""Factors of embedding tables: few rows that any group has touched."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.groups import segment_sum, to_device_async
from htv.ops.factors.base import Factors
from htv.ops.reference import compute_dtype


class EmbeddingFactors(Factors):
    """Embedding table of shape (V, D): the contribution of a group to row v sums its output
    gradients at token v.
    """

    def __init__(
        self,
        ids: Tensor,
        grad_output: Tensor,
        bounds: Tensor,
        num_embeddings: int,
        padding_idx: int | None = None,
    ):
        """ids: (R,) integers; grad_output: (R, D); group e owns rows bounds[e]:bounds[e + 1].

        Rows of `padding_idx` get the id -1 and take no part; `padded` says whether there may be
        any.
        """
        if ids.device.type == "cpu":
            group_index = torch.repeat_interleave(bounds.diff())
        else:
            rows = torch.arange(len(ids), device=ids.device)
            group_index = torch.bucketize(
                rows, to_device_async(bounds[1:-1], ids.device), right=True
            )
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx, -1)
        self._init(ids, group_index, grad_output, num_embeddings, len(bounds) - 1)
        self.padded = padding_idx is not None

    def _init(
        self, ids: Tensor, group_index: Tensor, grad_output: Tensor, num_embeddings: int, count: int
    ) -> None:
        self.ids, self.group_index, self.grad_output, self.padded = (
            ids,
            group_index,
            grad_output,
            False,
        )
        self.count, self.device, self.dtype = (
            count,
            grad_output.device,
            compute_dtype(grad_output.dtype),
        )
        self.shape = (num_embeddings, grad_output.shape[1])

    @staticmethod
    def joined(parts: list[EmbeddingFactors]) -> EmbeddingFactors:
        """The sum of several factors of one table."""
        whole = object.__new__(EmbeddingFactors)
        ids, group_index, grads = (
            torch.cat(t)
            for t in zip(*((p.ids, p.group_index, p.grad_output) for p in parts), strict=True)
        )
        whole._init(ids, group_index, grads, parts[0].shape[0], parts[0].count)
        whole.padded = any(part.padded for part in parts)
        return whole

    @functools.cached_property
    def lookups(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, voter and grad_output without those of `padding_idx`. How many there are is read
        from the device.
        """
        if not self.padded:
            return self.ids, self.group_index, self.grad_output
        kept = (self.ids >= 0).nonzero().flatten()
        return tuple(
            t.index_select(0, kept) for t in (self.ids, self.group_index, self.grad_output)
        )

    @functools.cached_property
    def pairs(self) -> Pairs:
        """What is not zero: the contributions of a group to the row of a token it has."""
        ids, group_index, grad_output = self.lookups
        key, order = (ids.long() * self.count + group_index).sort(stable=True)
        key, sizes = key.unique_consecutive(return_counts=True)
        values = grad_output[order].to(self.dtype)
        values = segment_sum(values, _offsets(sizes)) if len(key) < len(order) else values
        return Pairs(key // self.count, key % self.count, values)

    def compact(self, tokens: Tensor) -> EmbeddingFactors:
        """Factors of the table made of the rows `tokens` alone (sorted)."""
        pairs, layout = self.pairs, torch.searchsorted(tokens, self.pairs.tokens)
        kept = (tokens[layout.clamp(max=len(tokens) - 1)] == pairs.tokens).nonzero().flatten()
        small = object.__new__(EmbeddingFactors)
        small._init(
            layout[kept], pairs.group_index[kept], pairs.values[kept], len(tokens), self.count
        )
        small.pairs = Pairs(small.ids, small.group_index, small.grad_output)
        return small

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        pairs = self.pairs
        first, last = torch.searchsorted(
            pairs.tokens, pairs.tokens.new_tensor([rows.start, rows.stop])
        ).tolist()
        argument = pairs.group_index[first:last] * (rows.stop - rows.start) + (
            pairs.tokens[first:last] - rows.start
        )
        out.zero_().flatten(0, 1)[argument] = pairs.values[first:last, columns]

    def contribution(self, group: int) -> Tensor:
        mine = (self.pairs.group_index == group).nonzero().flatten()
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        whole[self.pairs.tokens[mine]] = self.pairs.values[mine]
        return whole

    def total(self) -> Tensor:
        return self._total(self.ids)

    def total_of(self, groups: slice) -> Tensor:
        others = (self.group_index < groups.start) | (self.group_index >= groups.stop)
        return self._total(self.ids.masked_fill(others, -1))

    def _total(self, ids: Tensor) -> Tensor:
        """ids: (R,), with -1 for rows that take no part."""
        return torch.ops.aten.embedding_dense_backward(
            self.grad_output, ids, self.shape[0], -1, False
        )

    def squared_norms(self) -> Tensor:
        group_index, order = self.pairs.group_index.sort(stable=True)
        norms = self.pairs.values.double().square().sum(dim=1)[order]
        return segment_sum(norms, _offsets(group_index.bincount(minlength=self.count)))

    def projections(self, direction: Tensor) -> Tensor:
        ids, group_index, grad_output = self.lookups
        each = (grad_output * direction[ids]).sum(dim=1, dtype=torch.float64)
        group_index, order = group_index.sort(stable=True)
        return segment_sum(each[order], _offsets(group_index.bincount(minlength=self.count)))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Contributions to an embedding table by (token, group), sorted by both; every other
    contribution is zero.

    tokens and voter: (P,) int64, no pair twice; values: (P, D).
    """

    tokens: Tensor
    group_index: Tensor
    values: Tensor

    @functools.cached_property
    def touched(self) -> tuple[Tensor, Tensor]:
        """The tokens that any group has, sorted, and how many groups have each."""
        return self.tokens.unique_consecutive(return_counts=True)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).cpu()
