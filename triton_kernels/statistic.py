"""Streaming statistics over a tile of coordinates, as @triton.jit functions a kernel takes as
constexpr.

    init(zeros, COUNT) -> state
        a tuple of tensors shaped like `zeros`, all fp32
    update(state, c, nth, COUNT) -> state
        c: the contributions of the nth group, counted from 1
    merge(state, n, other, m) -> state
        of n groups and of m others; None where there is no merge
    finalize(state, groups, count, votes, k, COUNT) -> (value, mask)
        value: E * stat; mask: in [0, 1]

COUNT is known at compile time: the number of values kept per side by trimmed and winsorized mean,
what `update_logs` adds to magnitudes; 0 for the others.

Votes, the sum of the contributions' signs, are fp32: exact for 2**24 groups. A NaN contribution
votes NaN, which no later vote takes back, so NaN costs neither a register nor an instruction, and
is told apart from a sum that is NaN because inf met -inf. (Narrower counters share registers only
by shifts and masks, three instructions more per value and group; the tiles of `configs.py` have the
registers.)
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG_OFFSET = tl.constexpr(1e-10)  # keeps the logarithm of the geometric mean finite
SAND_UNDEFINED = tl.constexpr(1e-17)  # the soft mask where variance and excess agreement are both 0
ONE = tl.constexpr(0x3F800000)  # 1.0
SIGN_BIT = tl.constexpr(-(2**31))


class Streaming(NamedTuple):
    init: triton.JITFunction
    update: triton.JITFunction
    finalize: triton.JITFunction
    merge: triton.JITFunction | None
    words: int  # registers per coordinate


@triton.jit
def sign(c):
    """1 or -1 with the sign of c; c itself where it is 0 or NaN."""
    unit = (c.to(tl.int32, bitcast=True) & SIGN_BIT | ONE).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(c) > 0, unit, c)


@triton.jit
def poison(votes, value, mask):
    """No mask may hide a NaN."""
    nan = votes != votes
    return tl.where(nan, votes, value), tl.where(nan, 0.0, mask)


# -- the sum alone, votes alone --------------------------------------------------------------------


@triton.jit
def init_one(zeros, COUNT: tl.constexpr):
    return (zeros,)


@triton.jit
def merge_sums(state, n, other, m):
    merged = ()
    for j in tl.static_range(len(state)):
        merged = merged + (state[j] + other[j],)
    return merged


@triton.jit
def update_sum(state, c, nth, COUNT: tl.constexpr):
    return (state[0] + c,)


@triton.jit
def finalize_mean(state, groups, count, votes, k, COUNT: tl.constexpr):
    return state[0], tl.zeros_like(state[0])


@triton.jit
def update_votes(state, c, nth, COUNT: tl.constexpr):
    return (state[0] + sign(c),)


@triton.jit
def finalize_sign_agreement(state, groups, count, votes, k, COUNT: tl.constexpr):
    return tl.abs(state[0]), tl.zeros_like(state[0])


@triton.jit
def init_two(zeros, COUNT: tl.constexpr):
    return zeros, zeros


# -- masks of a sum --------------------------------------------------------------------------------


@triton.jit
def update_sum_votes(state, c, nth, COUNT: tl.constexpr):
    return state[0] + c, state[1] + sign(c)


@triton.jit
def finalize_and_mask(state, groups, count, votes, k, COUNT: tl.constexpr):
    keep = tl.abs(state[1]) >= count
    return poison(state[1], tl.where(keep, state[0], 0.0), keep.to(tl.float32))


@triton.jit
def finalize_xor_mask(state, groups, count, votes, k, COUNT: tl.constexpr):
    keep = tl.abs(state[1]) < count
    return poison(state[1], tl.where(keep, state[0], 0.0), keep.to(tl.float32))


@triton.jit
def init_three(zeros, COUNT: tl.constexpr):
    return zeros, zeros, zeros


@triton.jit
def update_geometric_mean(state, c, nth, COUNT: tl.constexpr):
    return state[0] + c, state[1] + sign(c), state[2] + tl.log2(tl.abs(c) + LOG_OFFSET)


@triton.jit
def update_logs(state, c, nth, COUNT: tl.constexpr):
    return state[0] + c, state[1] + sign(c), state[2] + tl.log2(tl.abs(c) + COUNT)


@triton.jit
def finalize_geometric_mean(state, groups, count, votes, k, COUNT: tl.constexpr):
    keep = tl.abs(state[1]) >= count
    mean = sign(state[0]) * tl.exp2(state[2] / groups)
    return poison(state[1], tl.where(keep, groups * mean, 0.0), keep.to(tl.float32))


@triton.jit
def update_sand_mask(state, c, nth, COUNT: tl.constexpr):
    """The third is the sum of squared deviations from the running mean (Welford), which the sum
    gives.
    """
    total = state[0] + c
    before, after = state[0] / tl.maximum(nth - 1, 1), total / nth
    return total, state[1] + sign(c), state[2] + (c - before) * (c - after)


@triton.jit
def merge_sand_mask(state, n, other, m):
    """Chan, Golub, LeVeque."""
    apart = state[0] / tl.maximum(n, 1) - other[0] / m
    squares = state[2] + other[2] + tl.where(n > 0, apart * (apart * (n * m / (n + m))), 0.0)
    return state[0] + other[0], state[1] + other[1], squares


@triton.jit
def tanh(x):
    """Of x >= 0, to a few units in the last place; NaN stays."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(x < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def finalize_sand_mask(state, groups, count, votes, k, COUNT: tl.constexpr):
    excess = (tl.abs(state[1]) - votes) / groups
    steep = k / (state[2] / (groups - 1)) * excess
    mask = tl.where(steep < 0, 0.0, tanh(tl.where(steep < 0, 0.0, steep)))
    mask = tl.where(steep != steep, SAND_UNDEFINED, mask)
    # A variance is NaN by inf - inf where the sum is not finite: NaN is what is lost there, else 0.
    lost = state[0] - state[0]
    return poison(state[1], tl.where(mask == 0, 0.0, mask * state[0] + lost), mask)


# -- the COUNT smallest and largest, and the sum of what lies between ------------------------------


@triton.jit
def init_extremes(zeros, COUNT: tl.constexpr):
    """COUNT smallest, ascending; COUNT largest, descending; sum, least and greatest of the values
    between.
    """
    state = ()
    for _ in tl.static_range(COUNT):
        state = state + (zeros + float("inf"),)
    for _ in tl.static_range(COUNT):
        state = state + (zeros - float("inf"),)
    return state + (zeros, zeros + float("inf"), zeros - float("inf"))


@triton.jit
def update_extremes(state, c, nth, COUNT: tl.constexpr):
    """What a value displaces from the smallest may be among the largest; what it displaces there
    lies between.

    Never a difference from the sum of all: an extreme value would take the last bits of the others
    with it.
    """
    kept, v = (), c
    for j in tl.static_range(COUNT):
        kept = kept + (tl.minimum(state[j], v),)
        v = tl.maximum(state[j], v)
    v = tl.where(
        nth > COUNT, v, -float("inf")
    )  # until then it is the infinity that stood for no value
    for j in tl.static_range(COUNT, 2 * COUNT):
        kept = kept + (tl.maximum(state[j], v),)
        v = tl.minimum(state[j], v)
    between = nth > 2 * COUNT
    total = state[2 * COUNT] + tl.where(c != c, c, tl.where(between, v, 0.0))
    least = tl.minimum(state[2 * COUNT + 1], tl.where(between, v, float("inf")))
    greatest = tl.maximum(state[2 * COUNT + 2], tl.where(between, v, -float("inf")))
    return kept + (total, least, greatest)


@triton.jit
def finalize_trimmed_mean(state, groups, count, votes, k, COUNT: tl.constexpr):
    total = state[2 * COUNT]
    return total * (groups / (groups - 2.0 * COUNT)), tl.zeros_like(total)


@triton.jit
def finalize_winsorized_mean(state, groups, count, votes, k, COUNT: tl.constexpr):
    total = state[2 * COUNT]
    clipped = total + COUNT * (state[2 * COUNT + 1] + state[2 * COUNT + 2])
    return tl.where(total != total, total, clipped), tl.zeros_like(total)


STREAMING = {
    "mean": Streaming(init_one, update_sum, finalize_mean, merge_sums, 1),
    "and_mask": Streaming(init_two, update_sum_votes, finalize_and_mask, merge_sums, 2),
    "xor_mask": Streaming(init_two, update_sum_votes, finalize_xor_mask, merge_sums, 2),
    "geometric_mean": Streaming(
        init_three, update_geometric_mean, finalize_geometric_mean, merge_sums, 3
    ),
    "sand_mask": Streaming(init_three, update_sand_mask, finalize_sand_mask, merge_sand_mask, 3),
    "sign_sum": Streaming(init_one, update_votes, finalize_mean, merge_sums, 1),
    "sign_agreement": Streaming(init_one, update_votes, finalize_sign_agreement, merge_sums, 1),
}
LOGS = Streaming(init_three, update_logs, finalize_geometric_mean, merge_sums, 3)
# The numbers of htv/ops/statistics.py, which are compared with these at the first call of a kernel.
NUMBERS = {
    "mean": 0,
    "and_mask": 1,
    "xor_mask": 2,
    "geometric_mean": 3,
    "sand_mask": 4,
    "sign_sum": 5,
    "sign_agreement": 6,
    "median": 7,
    "trimmed_mean": 8,
    "winsorized_mean": 9,
    "median_of_means": 10,
}
MOST_EXTREMES = 2  # values per side that are kept in registers


def extremes(name: str, count: int) -> Streaming | None:
    """Trimmed and winsorized mean as streaming statistics, where few values per side are kept."""
    if name not in ("trimmed_mean", "winsorized_mean") or count > MOST_EXTREMES:
        return None
    if count == 0:
        return STREAMING["mean"]
    # The trimmed mean asks for neither the least nor the greatest between: the compiler drops them.
    finalize, words = (
        (finalize_trimmed_mean, 1) if name == "trimmed_mean" else (finalize_winsorized_mean, 3)
    )
    return Streaming(init_extremes, update_extremes, finalize, None, 2 * count + words)


def summary(name: str) -> Streaming:
    """What is kept for a statistic's summary: sum and votes; then squares, or binary logarithms."""
    return {"sand_mask": STREAMING["sand_mask"], "geometric_mean": LOGS}.get(
        name, STREAMING["and_mask"]
    )


def summary_fields(
    name: str, states: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (words, splits, *shape) of `groups` groups -> total, votes, spread and logs, (*shape)
    or (0,) each.
    """
    total, votes, *more = (word.sum(dim=0) for word in states)
    spread = logs = total.new_empty(0)
    if name == "geometric_mean":
        logs = more[0] * math.log(2)
    if name == "sand_mask":  # as `merge_sand_mask`, of all at once
        splits = states.shape[1]
        sizes = [groups // splits + (split < groups % splits) for split in range(splits)]
        spread = more[0]
        for of_split, size in zip(states[0] if splits > 1 else (), sizes, strict=False):
            spread += (of_split / size - total / groups).square() * size
    return total, votes, spread, logs


def numbers(statistic) -> tuple[int, float, float]:
    """count, votes and k of an `htv.rules.Statistic` as kernels take them; |sum of signs| lies
    within int32.
    """
    return max(0, min(statistic.count, 2**30)), float(statistic.votes), float(statistic.k)
