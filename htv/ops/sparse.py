"""Embedding tables: contributions by pairs of token and group; all others are zeros and are counted as such."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from htv.ops import factors, reference, sliced
from htv.ops.factors import EmbeddingFactors, Factors
from htv.ops.reference import Summary
from htv.rules import Statistic


def streaming(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Embedding tables: pairs of token and group, and everything else counted as the zeros it is."""
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    mask_sum = sliced.mask_of_zeros(part, statistic)
    untouched = part.shape[0]
    total_mask = torch.zeros_like(mask_sum)
    for tokens, summary in _token_summaries(part, statistic.name):
        rows, rows_mask = reference.finish(summary, statistic)
        value[tokens] = rows * part.count
        total_mask += rows_mask
        untouched -= len(tokens)
    return value, total_mask + mask_sum * (untouched * part.shape[1])


def summary_of_table(part: EmbeddingFactors, name: str) -> Summary:
    """Of the whole table."""
    whole = _zeros(part.count, part, name).map(lambda t: t.expand(part.shape).clone())
    for tokens, summary in _token_summaries(part, name):
        for table, rows in zip(_tensors(whole), _tensors(summary), strict=True):
            table[tokens] = rows
    return whole


def _tensors(summary: Summary) -> list[Tensor]:
    tensors: list[Tensor] = []
    summary.map(tensors.append)
    return tensors


def _token_summaries(part: EmbeddingFactors, name: str) -> Iterator[tuple[Tensor, Summary]]:
    """Tokens (t,) and the summary (t, D) of their contributions, those that equally many groups have together."""
    pairs = part.pairs
    tokens, sizes = pairs.tokens.unique_consecutive(return_counts=True)
    first = sizes.cumsum(0) - sizes
    bits = torch.finfo(part.dtype).bits
    for size in sizes.unique().tolist():
        step = max(1, factors.SCRATCH_BYTES * 8 // (size * max(1, part.shape[1]) * bits))
        for which in (sizes == size).nonzero().flatten().split(step):
            at = first[which] + torch.arange(size, device=part.device)[:, None]
            summary = Summary.of(pairs.values[at], name)
            yield tokens[which], summary if size == part.count else summary + _zeros(part.count - size, part, name)


def _zeros(count: int, like: Factors, name: str) -> Summary:
    """Of contributions that are zero, for one coordinate."""
    return Summary.of(torch.zeros(count, 1, dtype=like.dtype, device=like.device), name)


def order(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Embedding tables: rows of tokens that enough groups have are ranked, all others are zero."""
    pairs = part.pairs
    value = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    tokens, sizes = pairs.tokens.unique_consecutive(return_counts=True)
    mask_sum = torch.zeros((), dtype=torch.float64, device=part.device)
    matter = tokens[sizes > outvoted(statistic, part.count)]
    if len(matter):
        value[matter], mask_sum = sliced.sliced([part.compact(matter)], statistic)
    nan = pairs.values.isnan()
    value.index_put_((pairs.tokens[nan.nonzero()[:, 0]], nan.nonzero()[:, 1]), value.new_tensor(torch.nan))
    return value, mask_sum


def outvoted(statistic: Statistic, count: int) -> int:
    """How many of E values may be other than zero without the order statistic being so."""
    if statistic.name == "median":
        return (count - 1) // 2
    if statistic.name == "median_of_means":
        return (statistic.count - 1) // 2
    return statistic.count  # values cut or clipped per side
