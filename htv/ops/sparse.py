"""Embedding tables: contributions by pairs of token and group; all others are zeros and are counted
as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from htv.groups import segment_sum
from htv.ops import backend, limits, reference, schema, sliced, statistics
from htv.ops.factors import EmbeddingFactors, Factors
from htv.ops.reference import Summary
from htv.rules import Statistic


def _server(part: EmbeddingFactors, statistic: Statistic) -> str:
    return backend.choose(backend.Problem("embedding", statistic.name, part.device, part.dtype))


def table(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """E * stat of the contributions to an embedding table, and the sum of the mask."""
    if statistic.reduce is not None:
        return _reduced_table(part, statistic)
    server = _server(part, statistic)
    if server == "reference":
        by_pairs = streaming if statistics.of(statistic.name).streams else order
        return by_pairs(part, statistic)
    # Triton passes over the rows of a padding_idx: to leave them out would wait for the device.
    ids, group_index, grad = (
        part.lookups if server == "cpp" else (part.ids, part.group_index, part.grad_output)
    )
    rows = grad.contiguous(), ids.long().contiguous(), group_index.contiguous()
    return backend.operator("embedding", server)(
        *rows, part.shape[0], part.count, *schema.numbers(statistic)
    )


def _reduced_table(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """By a rule of the user's own: the rows that lookups touch, and all others as zeros."""
    value, mask_sum = sliced.of_zeros(part, statistic)
    tokens = part.pairs.touched[0]
    if len(tokens):
        value[tokens], _ = sliced.sliced([part.compact(tokens)], statistic)
    return value, mask_sum


def touched_rows(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The rows of the table that lookups may touch, and all others: together each of 0 to V - 1
    once.

    On a device that would have to be asked how many they are, as many rows may be touched as there
    are lookups.
    """
    rows = part.shape[0]
    touched = torch.zeros(rows + 1, dtype=torch.uint8, device=part.device)
    touched.scatter_(0, torch.where(part.ids >= 0, part.ids.long(), rows), 1)
    if _server(part, statistic) != "triton":
        return touched[:rows].nonzero().flatten(), (touched[:rows] == 0).nonzero().flatten()
    order, most = touched[:rows].sort(stable=True).indices, min(rows, len(part.ids))
    return order[rows - most :], order[: rows - most]


def table_rows(part: EmbeddingFactors, tokens: Tensor, statistic: Statistic) -> Factors:
    """The contributions to some rows, for `Factors.fill_block`. tokens: (N,) of what `touched_rows`
    gave.
    """
    return (
        _TableRows(part, tokens) if _server(part, statistic) == "triton" else part.compact(tokens)
    )


class _TableRows(Factors):
    """Rows of an embedding table, by Triton: nothing is asked of the device."""

    scratch = 64 << 20  # in L2

    def __init__(self, part: EmbeddingFactors, tokens: Tensor):
        self.part, self.tokens = part, tokens
        self.shape, self.count = (len(tokens), part.shape[1]), part.count
        self.dtype, self.device = part.dtype, part.device

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        part = self.part
        lookups = (
            part.grad_output[:, columns].contiguous(),
            part.ids.long(),
            part.group_index,
            self.tokens[rows],
        )
        out.copy_(
            backend.operator("embedding_contributions", "triton")(
                *lookups, part.shape[0], part.count
            )
        )


def streaming(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Streaming statistics from pairs of token and group, and everything else counted as the zeros
    it is.
    """
    tokens = part.pairs.touched[0]
    value, mask = sliced.of_zeros(part, statistic)
    mask_sum = mask * ((part.shape[0] - len(tokens)) * part.shape[1])
    for columns, summary in _touched_summaries(part, statistic.name):
        rows, rows_mask = reference.finish(summary, statistic)
        value[tokens, columns] = rows * part.count
        mask_sum = mask_sum + rows_mask
    return value, mask_sum


def summary_of_table(
    part: EmbeddingFactors, name: str, log_offset: float = reference.LOG_OFFSET
) -> Summary:
    """Of the whole table; `log_offset` as for `Summary.of`."""
    whole = _zeros(part.count, part, name, log_offset)
    whole = whole.map(lambda t: t.expand(part.shape).clone())
    for columns, summary in _touched_summaries(part, name, log_offset):
        for table, rows in zip(whole.tensors, summary.tensors, strict=True):
            table[part.pairs.touched[0], columns] = rows
    return whole


def _touched_summaries(
    part: EmbeddingFactors, name: str, log_offset: float = reference.LOG_OFFSET
) -> Iterator[tuple[slice, Summary]]:
    """Ranges of columns and the summary (touched tokens, columns) of all groups' contributions
    there.
    """
    pairs, groups, state = part.pairs, part.count, statistics.of(name).state
    sizes = pairs.touched[1]
    if len(sizes) == 0:
        return
    bounds, others = (
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).cpu(),
        (groups - sizes)[:, None].to(part.dtype),
    )
    row_of = torch.repeat_interleave(sizes)
    width = max(16, limits.SCRATCH_BYTES // (4 * max(1, len(row_of))))
    for left in range(0, part.shape[1], width):
        columns = slice(left, min(left + width, part.shape[1]))
        values = pairs.values[:, columns]
        total, votes = segment_sum(values, bounds), segment_sum(values.sign(), bounds)
        votes = votes.masked_fill_(
            segment_sum(values.isnan().to(values.dtype), bounds) > 0, torch.nan
        )
        spread = logs = None
        if "spread" in state:
            mean = total / groups
            spread = segment_sum((values - mean[row_of]).square(), bounds) + others * mean.square()
        if "logs" in state:
            logs = segment_sum((values.abs() + log_offset).log(), bounds)
            logs += others * math.log(log_offset)
        yield columns, Summary(groups, total, votes, spread, logs)


def _zeros(count: int, like: Factors, name: str, log_offset: float) -> Summary:
    """Of contributions that are zero, for one coordinate."""
    zeros = torch.zeros(count, 1, dtype=like.dtype, device=like.device)
    return Summary.of(zeros, name, log_offset)


def order(part: EmbeddingFactors, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Order statistics: rows of tokens that enough groups have are ranked, others are as zeros."""
    pairs = part.pairs
    value, mask_sum = sliced.of_zeros(part, statistic)
    tokens, sizes = pairs.touched
    matter = sizes > outvoted(statistic, part.count)
    if statistics.of(statistic.name).ranks_sums:  # where one may overflow, or be inf - inf
        small = (pairs.values.abs() <= torch.finfo(part.dtype).max / part.count).all(dim=1)
        matter[torch.repeat_interleave(sizes)[~small]] = True
    matter = tokens[matter]
    if len(matter):
        value[matter], mask_sum = sliced.sliced([part.compact(matter)], statistic)
    nan = pairs.values.isnan()
    value.index_put_(
        (pairs.tokens[nan.nonzero()[:, 0]], nan.nonzero()[:, 1]), value.new_tensor(torch.nan)
    )
    return value, mask_sum


def outvoted(statistic: Statistic, count: int) -> int:
    """How many of E values may be other than zero without the order statistic being so."""
    found = statistics.of(statistic.name).outvoted
    return 0 if found is None else found(statistic, count)
