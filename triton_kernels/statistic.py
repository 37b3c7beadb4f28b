"""Streaming statistics over a tile of coordinates, as @triton.jit functions a kernel takes as constexpr.

    init(BLOCK_O, BLOCK_I) -> state             a tuple of (BLOCK_O, BLOCK_I) tensors
    update(state, c) -> state                   c: one group's contributions, fp32
    finalize(state, count) -> (value, mask)     value: E * stat, fp32; mask: int1, False for statistics without one

Votes, the sum of the contributions' signs, are int32 and compared in integers. A NaN contribution parks the votes of
its coordinate at `NAN_VOTES`, so far below zero that the votes of fewer than 2**29 other groups cannot bring them
back: NaN is remembered without a register of its own, and is told apart from a sum that is NaN because inf met -inf.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NAN_VOTES = tl.constexpr(-(2**30))


class Statistic(NamedTuple):
    init: triton.JITFunction
    update: triton.JITFunction
    finalize: triton.JITFunction


@triton.jit
def _vote(votes, c):
    votes += (c > 0).to(tl.int32) - (c < 0).to(tl.int32)
    return tl.where(c != c, NAN_VOTES, votes)


@triton.jit
def _saw_nan(votes):
    return votes < NAN_VOTES // 2


@triton.jit
def _keep(votes, count):
    return tl.abs(votes) >= count


@triton.jit
def _sum_init(BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    return (tl.zeros((BLOCK_O, BLOCK_I), tl.float32),)


@triton.jit
def _sum_update(state, c):
    return (state[0] + c,)


@triton.jit
def _votes_init(BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    return (tl.zeros((BLOCK_O, BLOCK_I), tl.int32),)


@triton.jit
def _votes_update(state, c):
    return (_vote(state[0], c),)


@triton.jit
def _sum_votes_init(BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    return tl.zeros((BLOCK_O, BLOCK_I), tl.float32), tl.zeros((BLOCK_O, BLOCK_I), tl.int32)


@triton.jit
def _sum_votes_update(state, c):
    return state[0] + c, _vote(state[1], c)


@triton.jit
def _mean_finalize(state, count):
    total = state[0]
    return total, tl.zeros(total.shape, tl.int1)


@triton.jit
def _masked(total, votes, mask):
    """Masked-out coordinates are 0 whatever their sum; those that saw NaN are NaN and outside the mask."""
    nan = _saw_nan(votes)
    return tl.where(mask | nan, total, 0.0), mask & (nan == 0)


@triton.jit
def _and_mask_finalize(state, count):
    total, votes = state
    return _masked(total, votes, _keep(votes, count))


@triton.jit
def _xor_mask_finalize(state, count):
    total, votes = state
    return _masked(total, votes, _keep(votes, count) == 0)


@triton.jit
def _sign_sum_finalize(state, count):
    votes = state[0]
    return tl.where(_saw_nan(votes), float("nan"), votes.to(tl.float32)), tl.zeros(votes.shape, tl.int1)


STATISTICS = {
    "mean": Statistic(_sum_init, _sum_update, _mean_finalize),
    "and_mask": Statistic(_sum_votes_init, _sum_votes_update, _and_mask_finalize),
    "xor_mask": Statistic(_sum_votes_init, _sum_votes_update, _xor_mask_finalize),
    "sign_sum": Statistic(_votes_init, _votes_update, _sign_sum_finalize),
}
