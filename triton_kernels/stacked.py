"""Statistics of stacked contributions (E, P): one program per block of coordinates, neighbours on
neighbours.

Streaming statistics pass once over the groups. Order statistics sort up to `MOST_SORTED` values in
registers, by a network from which the compiler drops what the wanted ranks do not need; of more,
they search the value of a rank digit by digit, counting smaller values in a pass over the groups
for every 4 bits.

Not yet run on hardware: tested under the interpreter, and compiled offline.
"""

import torch
import triton
import triton.language as tl

from htv.rules import Statistic
from htv.triton_kernels import statistic as streaming
from htv.triton_kernels.device import guard, require

MOST_SORTED = 64  # values in registers; networks of more take the compiler half a minute
DIGIT = tl.constexpr(4)  # bits
DIGITS = tl.constexpr(16)
LARGEST = tl.constexpr(2**31 - 1)
STREAMING_BLOCK, SEARCH_BLOCK = 512, 256  # coordinates of a program, of 128 threads
ORDER = ("median", "trimmed_mean", "winsorized_mean", "median_of_means")


@triton.jit(do_not_specialize=["num_groups", "count"])
def streaming_kernel(
    grads_ptr,
    value_ptr,
    mask_ptr,
    coordinates,
    num_groups,
    count,
    votes,
    k,
    init: tl.constexpr,
    update: tl.constexpr,
    finalize: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grads (E, coordinates) -> value (coordinates), stat without the factor E; mask: its sum, one
    per program.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < coordinates
    state = init(tl.zeros((BLOCK,), tl.float32), 0)
    for group in range(num_groups):
        row = grads_ptr + tl.cast(group, tl.int64) * coordinates
        state = update(state, tl.load(row + at, mask=valid, other=0.0).to(tl.float32), group + 1, 0)
    value, mask = finalize(state, num_groups, count, votes, k, 0)
    tl.store(value_ptr + at, value / num_groups, mask=valid)
    tl.store(mask_ptr + tl.program_id(0), tl.sum(tl.where(valid, mask, 0.0)))


@triton.jit(do_not_specialize=["num_groups"])
def summary_kernel(
    grads_ptr,
    out_ptr,
    coordinates,
    num_groups,
    init: tl.constexpr,
    update: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grads (E, coordinates) -> the state (words, coordinates)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < coordinates
    state = init(tl.zeros((BLOCK,), tl.float32), COUNT)
    for group in range(num_groups):
        row = grads_ptr + tl.cast(group, tl.int64) * coordinates
        c = tl.load(row + at, mask=valid, other=0.0).to(tl.float32)
        state = update(state, c, group + 1, COUNT)
    for word in tl.static_range(len(state)):
        row = out_ptr + tl.cast(coordinates, tl.int64) * word
        tl.store(row + at, state[word], mask=valid)


# -- what is ranked --------------------------------------------------------------------------------


@triton.jit
def to_key(v):
    """Integers that compare as the values do, NaN above all."""
    bits = v.to(tl.int32, bitcast=True)
    return tl.where(v != v, LARGEST, bits ^ ((bits >> 31) & LARGEST))


@triton.jit
def to_value(key):
    return (key ^ ((key >> 31) & LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def one_value(grads_ptr, nth, groups, size, coordinates, at, valid):
    """The nth contribution, twice: the second is NaN where the result has to be."""
    v = tl.load(grads_ptr + nth * tl.cast(coordinates, tl.int64) + at, mask=valid, other=0.0).to(
        tl.float32
    )
    return v, v


@triton.jit
def one_bucket(grads_ptr, nth, groups, size, coordinates, at, valid):
    """The mean of the nth of `size` buckets of groups, as torch.tensor_split makes them."""
    small, larger = groups // size, groups % size
    first = nth * small + tl.minimum(nth, larger)
    members = small + (nth < larger).to(tl.int32)
    total = tl.zeros(at.shape, tl.float32)
    for group in range(first, first + members):
        row = grads_ptr + group * tl.cast(coordinates, tl.int64)
        total += tl.load(row + at, mask=valid, other=0.0).to(tl.float32)
    return total / members, total


@triton.jit
def one_sum(grads_ptr, nth, groups, size, coordinates, at, valid):
    """The same from the sums of buckets."""
    members = groups // size + (nth < groups % size).to(tl.int32)
    total = tl.load(grads_ptr + nth * tl.cast(coordinates, tl.int64) + at, mask=valid, other=0.0)
    return total / members, total


# -- from ranks to statistics ----------------------------------------------------------------------


@triton.jit
def midpoint(lower, higher):
    """(lower + higher) / 2 that neither overflows nor rounds when both are equal."""
    return tl.where(lower == higher, lower, 0.5 * lower + 0.5 * higher)


@triton.jit
def between(lower, higher, COUNT: tl.constexpr):
    if COUNT == 0:
        return midpoint(lower, higher)
    return lower if COUNT < 0 else higher


@triton.constexpr_function
def network(size: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort of any number of values, as pairs (i, j), i < j, to be put in
    order.
    """
    pairs, p = [], 1
    while p < size:
        k = p
        while k >= 1:
            for start in range(k % p, size - k, 2 * k):
                for i in range(start, start + min(k, size - start - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    return tuple(pairs)


@triton.jit(do_not_specialize=["groups"])
def sort_kernel(
    grads_ptr,
    value_ptr,
    coordinates,
    groups,
    scale,
    load_value: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An order statistic of SIZE values per coordinate, times `scale`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < coordinates
    nan = tl.zeros((BLOCK,), tl.float32)
    pairs: tl.constexpr = network(SIZE)
    keys = ()
    for nth in tl.static_range(SIZE):
        v, poison = load_value(grads_ptr, nth, groups, SIZE, coordinates, at, valid)
        nan = tl.where(poison != poison, poison, nan)
        keys = keys + (to_key(v),)
    for step in tl.static_range(len(pairs)):
        low = tl.minimum(keys[pairs[step][0]], keys[pairs[step][1]])
        high = tl.maximum(keys[pairs[step][0]], keys[pairs[step][1]])
        between_them = keys[pairs[step][0] + 1 : pairs[step][1]]
        keys = keys[: pairs[step][0]] + (low,) + between_them + (high,) + keys[pairs[step][1] + 1 :]
    if KIND == "median":
        value = between(to_value(keys[(SIZE - 1) // 2]), to_value(keys[SIZE // 2]), COUNT)
    else:
        # Summed from both ends inwards: opposite tails cancel before they can round.
        value = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(COUNT, SIZE // 2):
            value += to_value(keys[j]) + to_value(keys[SIZE - 1 - j])
        if SIZE % 2 == 1:
            value += to_value(keys[SIZE // 2])
        if KIND == "trimmed_mean":
            value = value / (SIZE - 2 * COUNT)
        else:
            if COUNT > 0:
                value += COUNT * (to_value(keys[COUNT]) + to_value(keys[SIZE - 1 - COUNT]))
            value = value / SIZE
    tl.store(value_ptr + at, tl.where(nan != nan, nan, value * scale), mask=valid)


@triton.jit
def search(
    grads_ptr,
    rank,
    groups,
    size,
    coordinates,
    at,
    valid,
    load_value: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The key of a rank: the largest that at most `rank` keys are smaller than, found from its
    highest digit on.
    """
    found = tl.full((BLOCK,), -(2**31), tl.int32)
    for step in range(8):
        shift = 28 - step * DIGIT
        smaller = ()  # than found + (digit << shift), digits from 1 on
        for _ in tl.static_range(1, DIGITS):
            smaller = smaller + (tl.zeros((BLOCK,), tl.int32),)
        for nth in range(size):
            v, poison = load_value(grads_ptr, nth, groups, size, coordinates, at, valid)
            key, counted = to_key(v), ()
            for digit in tl.static_range(1, DIGITS):
                counted = counted + (
                    smaller[digit - 1] + (key < found + (digit << shift)).to(tl.int32),
                )
            smaller = counted
        fits = tl.zeros((BLOCK,), tl.int32)
        for digit in tl.static_range(1, DIGITS):
            fits += (smaller[digit - 1] <= rank).to(tl.int32)
        found += fits << shift
    return found


@triton.jit(do_not_specialize=["groups", "size", "count"])
def search_kernel(
    grads_ptr,
    value_ptr,
    coordinates,
    groups,
    size,
    count,
    scale,
    load_value: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for any number of values, read again and again."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < coordinates
    low_rank = (size - 1) // 2 if KIND == "median" else count
    high_rank = size - 1 - low_rank
    low_key = search(grads_ptr, low_rank, groups, size, coordinates, at, valid, load_value, BLOCK)
    # One pass finds all else a median needs: how many are not larger, and the least of those that
    # are.
    nan = tl.zeros((BLOCK,), tl.float32)
    not_larger = tl.zeros((BLOCK,), tl.int32)
    next_key = tl.full((BLOCK,), LARGEST, tl.int32)
    for nth in range(size):
        v, poison = load_value(grads_ptr, nth, groups, size, coordinates, at, valid)
        nan = tl.where(poison != poison, poison, nan)
        key = to_key(v)
        not_larger += (key <= low_key).to(tl.int32)
        next_key = tl.minimum(next_key, tl.where(key > low_key, key, LARGEST))
    low = to_value(low_key)
    if KIND == "median":
        high = to_value(tl.where(not_larger > high_rank, low_key, next_key))
        value = tl.where(count == 0, midpoint(low, high), tl.where(count < 0, low, high))
    else:
        high_key = search(
            grads_ptr, high_rank, groups, size, coordinates, at, valid, load_value, BLOCK
        )
        high = to_value(high_key)
        inside = tl.zeros((BLOCK,), tl.float32)
        not_smaller = tl.zeros((BLOCK,), tl.int32)
        for nth in range(size):
            v, poison = load_value(grads_ptr, nth, groups, size, coordinates, at, valid)
            key = to_key(v)
            not_smaller += (key >= high_key).to(tl.int32)
            inside += tl.where((key > low_key) & (key < high_key), v, 0.0)
        inner = inside + (
            (not_larger - count).to(tl.float32) * low + (not_smaller - count).to(tl.float32) * high
        )
        inner = tl.where(low_key == high_key, (size - 2 * count).to(tl.float32) * low, inner)
        if KIND == "trimmed_mean":
            value = inner / (size - 2 * count)
        else:
            value = tl.where(count > 0, inner + count.to(tl.float32) * (low + high), inner) / size
    tl.store(value_ptr + at, tl.where(nan != nan, nan, value * scale), mask=valid)


def sort_block(size: int) -> int:
    """Coordinates of a program, of 128 threads: four in a row for each, 16 bytes a load, as long as
    registers last.
    """
    if size <= 16:
        return 512
    if size <= 32:
        return 256
    return 128


def ranked(
    values: torch.Tensor,
    groups: int,
    coordinates: int,
    statistic: Statistic,
    value: torch.Tensor,
    scale: float,
    load: triton.JITFunction | None = None,
) -> None:
    """An order statistic times `scale`, into `value` (coordinates,) fp32, of values (E,
    coordinates).

    load: how a value is had from them, if not as the statistic says.
    """
    buckets = statistic.name == "median_of_means"
    size = statistic.count if buckets else groups
    load = load or (one_bucket if buckets else one_value)
    kind, count = ("median", 0) if buckets else (statistic.name, statistic.count)
    with guard(value):
        if size <= MOST_SORTED:
            block = sort_block(size)
            sort_kernel[(triton.cdiv(coordinates, block),)](
                values,
                value,
                coordinates,
                groups,
                scale,
                load,
                kind,
                size,
                count,
                block,
                num_warps=4,
            )
        else:
            search_kernel[(triton.cdiv(coordinates, SEARCH_BLOCK),)](
                values,
                value,
                coordinates,
                groups,
                size,
                count,
                scale,
                load,
                kind,
                SEARCH_BLOCK,
                num_warps=4,
            )


def stacked(grads: torch.Tensor, statistic: Statistic) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `stacked` of `htv.ops.schema`: grads (E, P) contiguous -> value (P,) fp32, mask_sum ()
    fp64.
    """
    _require_rows(grads)
    groups, coordinates = grads.shape
    value = grads.new_empty(coordinates, dtype=torch.float32)
    if statistic.name in ORDER:
        if coordinates:
            ranked(grads, groups, coordinates, statistic, value, 1.0)
        return value, grads.new_zeros((), dtype=torch.float64)
    found = streaming.STREAMING[statistic.name]
    mask = grads.new_empty(triton.cdiv(coordinates, STREAMING_BLOCK), dtype=torch.float32)
    if coordinates:
        with guard(grads):
            streaming_kernel[(len(mask),)](
                grads,
                value,
                mask,
                coordinates,
                groups,
                *streaming.numbers(statistic),
                *found[:3],
                STREAMING_BLOCK,
                num_warps=4,
            )
    return value, mask.sum(dtype=torch.float64)


def stacked_summary(
    grads: torch.Tensor, name: str, log_offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `stacked_summary` of `htv.ops.schema`, for the streaming statistic of this name."""
    _require_rows(grads)
    (groups, coordinates), found = grads.shape, streaming.summary(name)
    states = grads.new_empty((found.words, 1, coordinates), dtype=torch.float32)
    if coordinates:
        with guard(grads):
            summary_kernel[(triton.cdiv(coordinates, STREAMING_BLOCK),)](
                grads,
                states,
                coordinates,
                groups,
                found.init,
                found.update,
                log_offset if found is streaming.LOGS else 0,
                STREAMING_BLOCK,
                num_warps=4,
            )
    return streaming.summary_fields(name, states, groups)


def _require_rows(grads: torch.Tensor) -> None:
    require("stacked", "grads", grads)
    if grads.dim() != 2 or not grads.is_contiguous() or len(grads) == 0:
        raise ValueError(
            f"stacked (Triton): grads must be (E, P), contiguous, E >= 1, got {tuple(grads.shape)}"
        )
