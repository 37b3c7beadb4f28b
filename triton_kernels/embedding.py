"""Statistics of an embedding table's per-group contributions, or some of these: `embedding`,
`embedding_contributions`.

Lookups are sorted by token and group, stably, so that a token's rows lie together, in a fixed
order, and those of each of its groups too. One program per token and block of features walks them:
rows of a group add up, the statistic absorbs the sum, the next group follows. Groups without the
token contribute zeros, which are counted, never read. Order statistics search the value of a rank
digit by digit, walking the token's rows anew for every 4 bits, where zeros do not decide it: no
contribution is stored. No atomics, and nothing waits for the device.

Not yet run on hardware: tested under the interpreter, and compiled offline for sm_80, sm_90 and
sm_100.
"""

import torch
import triton
import triton.language as tl

from htv.rules import Statistic
from htv.triton_kernels import device, product
from htv.triton_kernels import statistic as streaming
from htv.triton_kernels.stacked import DIGIT, DIGITS, LARGEST, midpoint, to_key, to_value

STREAMING = {
    "BLOCK": 256,
    "num_warps": 2,
}  # features of a program: four for a thread, 16 bytes a store
ORDER = {"BLOCK": 128, "num_warps": 2}  # which counts 15 digits of each
MOST_KEYS = 2**63 - 1  # tokens times groups


@triton.jit
def no_bucket(group_index, small, larger):
    return group_index, 1


@triton.jit
def bucket(group_index, small, larger):
    """The bucket of a group, as torch.tensor_split makes them, and how many groups it has."""
    in_larger = larger * (small + 1)
    found = tl.where(
        group_index < in_larger,
        group_index // (small + 1),
        larger + (group_index - in_larger) // small,
    )
    return found, small + (found < larger).to(tl.int32)


@triton.jit
def walk(lookups, d, valid, state, parameters, visit: tl.constexpr, bucket_of: tl.constexpr):
    """Lets `visit(state, value, nth, parameters)` see the values of those groups (or buckets) that
    have a token.

    lookups: (grad_output, order, voter, first, last, D, small, larger); first:last are the token's,
    in `order`. Returns the state, how many values there were, and NaN where one of them is.
    """
    grad_output_ptr, order_ptr, voter_ptr, first, last, D, small, larger = lookups
    zeros = tl.zeros(d.shape, tl.float32)
    c, total, nan, seen = zeros, zeros, zeros, 0
    for at in range(first, last):
        row = tl.load(order_ptr + at)
        c += tl.load(grad_output_ptr + row * D + d, mask=valid, other=0.0).to(tl.float32)
        group_index = tl.load(voter_ptr + at).to(tl.int32)
        following = tl.load(voter_ptr + at + 1, mask=at + 1 < last, other=-1).to(tl.int32)
        if following != group_index:
            total += c
            c = zeros
            mine, members = bucket_of(group_index, small, larger)
            others, _ = bucket_of(following, small, larger)
            if (following < 0) | (others != mine):
                seen += 1
                nan = tl.where(total != total, total, nan)
                state = visit(state, total / members, seen, parameters)
                total = zeros
    return state, seen, nan


@triton.jit
def absorb_sum(state, c, nth, parameters):
    return streaming.update_sum(state, c, nth, 0)


@triton.jit
def absorb_votes(state, c, nth, parameters):
    return streaming.update_votes(state, c, nth, 0)


@triton.jit
def absorb_sum_votes(state, c, nth, parameters):
    return streaming.update_sum_votes(state, c, nth, 0)


@triton.jit
def absorb_geometric_mean(state, c, nth, parameters):
    return streaming.update_geometric_mean(state, c, nth, 0)


@triton.jit
def absorb_sand_mask(state, c, nth, parameters):
    return streaming.update_sand_mask(state, c, nth, 0)


# `walk` visits with more than a statistic's update takes.
ABSORB = {
    streaming.update_sum: absorb_sum,
    streaming.update_votes: absorb_votes,
    streaming.update_sum_votes: absorb_sum_votes,
    streaming.update_geometric_mean: absorb_geometric_mean,
    streaming.update_sand_mask: absorb_sand_mask,
}


@triton.jit(do_not_specialize=["num_groups", "count"])
def streaming_kernel(
    grad_output_ptr,
    order_ptr,
    voter_ptr,
    starts_ptr,
    value_ptr,
    mask_ptr,
    D,
    num_groups,
    count,
    votes,
    k,
    init: tl.constexpr,
    update: tl.constexpr,
    finalize: tl.constexpr,
    merge: tl.constexpr,
    visit: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_output (R, D), order and voter (R,), starts (V + 1,) -> value (V, D), mask: its sum, one
    per program.

    Programs: tokens x blocks of features.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = d < D
    first, last = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    lookups = (grad_output_ptr, order_ptr, voter_ptr, first, last, D, 1, 0)
    zeros = tl.zeros((BLOCK,), tl.float32)
    state, seen, _ = walk(lookups, d, valid, init(zeros, 0), (), visit, no_bucket)
    absent = num_groups - seen
    if absent > 0:
        one, other = update(init(zeros, 0), zeros, absent, 0), ()
        for word in tl.static_range(len(one)):
            other = other + (one[word] * absent,)
        state = merge(state, seen, other, absent)
    value, mask = finalize(state, num_groups, count, votes, k, 0)
    tl.store(value_ptr + token * D + d, value, mask=valid)
    program = token * tl.num_programs(1) + tl.program_id(1)
    tl.store(mask_ptr + program, tl.sum(tl.where(valid, mask, 0.0)))


# -- order statistics ------------------------------------------------------------------------------


@triton.jit
def count_signs(state, v, nth, parameters):
    """How many values are negative, and how many are positive or NaN."""
    negative = v < 0
    return state[0] + negative.to(tl.int32), state[1] + ((v != 0) & ~negative).to(tl.int32)


@triton.jit
def count_smaller(state, v, nth, parameters):
    """How many keys are smaller than found + (digit << shift), for digits from 1 on."""
    found, shift = parameters
    key, counted = to_key(v), ()
    for digit in tl.static_range(1, DIGITS):
        counted = counted + (state[digit - 1] + (key < found + (digit << shift)).to(tl.int32),)
    return counted


@triton.jit
def count_not_larger(state, v, nth, parameters):
    """How many keys are not larger than one, and the least of those that are."""
    (low_key,) = parameters
    key = to_key(v)
    return state[0] + (key <= low_key).to(tl.int32), tl.minimum(
        state[1], tl.where(key > low_key, key, LARGEST)
    )


@triton.jit
def sum_inside(state, v, nth, parameters):
    """How many keys reach the higher of two, and the sum of the values between both."""
    low_key, high_key = parameters
    key = to_key(v)
    inside = tl.where((key > low_key) & (key < high_key), v, 0.0)
    return state[0] + (key >= high_key).to(tl.int32), state[1] + inside


@triton.jit
def search(lookups, d, valid, rank, size, bucket_of: tl.constexpr, BLOCK: tl.constexpr):
    """The key of a rank among `size` values, those that no lookup contributes to being zeros; see
    `stacked.search`.
    """
    found = tl.full((BLOCK,), -(2**31), tl.int32)
    for step in range(8):
        shift = 28 - step * DIGIT
        smaller = ()
        for _ in tl.static_range(1, DIGITS):
            smaller = smaller + (tl.zeros((BLOCK,), tl.int32),)
        smaller, seen, _ = walk(
            lookups, d, valid, smaller, (found, shift), count_smaller, bucket_of
        )
        fits = tl.zeros((BLOCK,), tl.int32)
        for digit in tl.static_range(1, DIGITS):
            zeros = tl.where(found + (digit << shift) > 0, size - seen, 0)
            fits += (smaller[digit - 1] + zeros <= rank).to(tl.int32)
        found += fits << shift
    return found


@triton.jit(do_not_specialize=["size", "small", "larger", "count"])
def order_kernel(
    grad_output_ptr,
    order_ptr,
    voter_ptr,
    starts_ptr,
    value_ptr,
    D,
    size,
    small,
    larger,
    count,
    scale,
    bucket_of: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for an order statistic of `size` values per coordinate, times `scale`."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = d < D
    first, last = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    lookups = (grad_output_ptr, order_ptr, voter_ptr, first, last, D, small, larger)
    low_rank = (size - 1) // 2 if KIND == "median" else count
    high_rank = size - 1 - low_rank
    none = tl.zeros((BLOCK,), tl.int32)
    signs, seen, nan = walk(lookups, d, valid, (none, none), (), count_signs, bucket_of)
    value = tl.zeros((BLOCK,), tl.float32)
    # Zeros from the low rank to the high one: so are median and trimmed mean, and what is clipped
    # to them.
    is_open = valid & ((signs[0] > low_rank) | (size - signs[1] <= high_rank))
    if tl.max(is_open.to(tl.int32)) > 0:
        low_key = search(lookups, d, valid, low_rank, size, bucket_of, BLOCK)
        low, absent = to_value(low_key), size - seen
        start = (
            tl.where(low_key >= 0, absent, 0),
            tl.where((absent > 0) & (low_key < 0), 0, LARGEST),
        )
        counted, _, _ = walk(lookups, d, valid, start, (low_key,), count_not_larger, bucket_of)
        not_larger = counted[0]
        if KIND == "median":
            high = to_value(tl.where(not_larger > high_rank, low_key, counted[1]))
            value = tl.where(count == 0, midpoint(low, high), tl.where(count < 0, low, high))
        else:
            high_key = search(lookups, d, valid, high_rank, size, bucket_of, BLOCK)
            high = to_value(high_key)
            start = tl.where(high_key <= 0, absent, 0), tl.zeros((BLOCK,), tl.float32)
            counted, _, _ = walk(
                lookups, d, valid, start, (low_key, high_key), sum_inside, bucket_of
            )
            tails = (not_larger - count).to(tl.float32) * low + (counted[0] - count).to(
                tl.float32
            ) * high
            inner = tl.where(
                low_key == high_key, (size - 2 * count).to(tl.float32) * low, counted[1] + tails
            )
            if KIND == "trimmed_mean":
                value = inner / (size - 2 * count)
            else:
                value = (
                    tl.where(count > 0, inner + count.to(tl.float32) * (low + high), inner) / size
                )
    tl.store(value_ptr + token * D + d, tl.where(nan != nan, nan, value * scale), mask=valid)


# -- contributions of some tokens ------------------------------------------------------------------


@triton.jit
def contributions_kernel(
    grad_output_ptr,
    order_ptr,
    voter_ptr,
    starts_ptr,
    tokens_ptr,
    out_ptr,
    D,
    num_tokens,
    BLOCK: tl.constexpr,
):
    """The same lookups and tokens (N,) -> out (groups, N, D), of zeros, where groups have a token.

    Programs: tokens x blocks of features. Each writes every place of its own once.
    """
    nth = tl.program_id(0)
    token = tl.load(tokens_ptr + nth)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = d < D
    first, last = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    c = tl.zeros((BLOCK,), tl.float32)
    for at in range(first, last):
        row = tl.load(order_ptr + at)
        c += tl.load(grad_output_ptr + row * D + d, mask=valid, other=0.0).to(tl.float32)
        group_index = tl.load(voter_ptr + at)
        following = tl.load(voter_ptr + at + 1, mask=at + 1 < last, other=-1)
        if following != group_index:
            tl.store(out_ptr + (group_index * num_tokens + nth) * D + d, c, mask=valid)
            c = tl.zeros((BLOCK,), tl.float32)


# -- the host's side -------------------------------------------------------------------------------


def embedding(
    grad_output: torch.Tensor,
    ids: torch.Tensor,
    group_index: torch.Tensor,
    num_embeddings: int,
    groups: int,
    statistic: Statistic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_output (R, D), ids and voter (R,) -> value (num_embeddings, D) fp32, mask_sum () fp64.

    The contract is that of the op `embedding` in `htv.ops.schema`. Rows whose id does not lie in 0
    to num_embeddings - 1 take no part: looking for them would wait for the device, and the lookup
    itself refuses all but those of a padding_idx.
    """
    product.require_served("embedding", statistic, groups)
    _require("embedding", grad_output, ids, group_index, num_embeddings, groups)
    features = grad_output.shape[1]
    value = grad_output.new_empty((num_embeddings, features), dtype=torch.float32)
    if value.numel() == 0:
        return value, grad_output.new_zeros((), dtype=torch.float64)
    factors = grad_output.contiguous(), *_sorted(ids, group_index, num_embeddings, groups)
    found = streaming.STREAMING.get(statistic.name)
    grid = num_embeddings, triton.cdiv(features, (STREAMING if found else ORDER)["BLOCK"])
    with device.guard(grad_output):
        if found is None:
            _ranked(factors, grid, groups, statistic, value)
            return value, value.new_zeros((), dtype=torch.float64)
        mask = value.new_empty(grid[0] * grid[1])
        streaming_kernel[grid](
            *factors,
            value,
            mask,
            features,
            groups,
            *streaming.numbers(statistic),
            *found[:4],
            ABSORB[found.update],
            **STREAMING,
        )
    return value, mask.sum(dtype=torch.float64)


def embedding_contributions(
    grad_output: torch.Tensor,
    ids: torch.Tensor,
    group_index: torch.Tensor,
    tokens: torch.Tensor,
    num_embeddings: int,
    groups: int,
) -> torch.Tensor:
    """The same lookups and tokens (N,), in 0 to num_embeddings - 1 -> contributions (groups, N, D)
    fp32 to their rows.

    The contract is that of the op in `htv.ops.schema`.
    """
    _require("embedding_contributions", grad_output, ids, group_index, num_embeddings, groups)
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or tokens.device != grad_output.device:
        raise TypeError(
            f"embedding_contributions (Triton): tokens must be (N,) int64 on {grad_output.device}, "
            "got "
            f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
        )
    features = grad_output.shape[1]
    out = grad_output.new_zeros((groups, len(tokens), features), dtype=torch.float32)
    if out.numel() == 0:
        return out
    lookups = grad_output.contiguous(), *_sorted(ids, group_index, num_embeddings, groups)
    grid = len(tokens), triton.cdiv(features, STREAMING["BLOCK"])
    with device.guard(grad_output):
        contributions_kernel[grid](
            *lookups, tokens.contiguous(), out, features, len(tokens), **STREAMING
        )
    return out


def _require(op, grad_output, ids, group_index, num_embeddings, groups):
    device.require(op, "grad_output", grad_output)
    rows = len(grad_output)
    if grad_output.dim() != 2 or ids.shape != (rows,) or group_index.shape != (rows,):
        raise ValueError(
            f"{op} (Triton): wants grad_output (R, D), ids (R,) and voter (R,), "
            f"got {tuple(grad_output.shape)}, {tuple(ids.shape)} and {tuple(group_index.shape)}"
        )
    if {ids.dtype, group_index.dtype} != {torch.int64} or {ids.device, group_index.device} != {
        grad_output.device
    }:
        raise TypeError(
            f"{op} (Triton): ids and voter must be int64 on {grad_output.device}, "
            f"got {ids.dtype} on {ids.device} and {group_index.dtype} on {group_index.device}"
        )
    if num_embeddings < 0 or groups < 1 or num_embeddings * groups > MOST_KEYS:
        raise ValueError(
            f"{op} (Triton): cannot tell {num_embeddings} tokens of {groups} groups apart"
        )


def _sorted(ids, group_index, tokens, groups):
    """order (R,), voter (R,) in that order, starts (tokens + 1,): token t's lookups are
    starts[t]:starts[t + 1].
    """
    keys = torch.where((ids >= 0) & (ids < tokens), ids * groups + group_index, tokens * groups)
    keys, order = keys.sort(stable=True)
    firsts = torch.arange(0, tokens * groups + 1, groups, device=ids.device)
    return order, keys % groups, torch.searchsorted(keys, firsts)


def _ranked(factors, grid, groups, statistic, value):
    buckets = statistic.name == "median_of_means"
    size = statistic.count if buckets else groups
    order_kernel[grid](
        *factors,
        value,
        value.shape[1],
        size,
        groups // size,
        groups % size,
        0 if buckets else statistic.count,
        float(groups),
        bucket if buckets else no_bucket,
        "median" if buckets else statistic.name,
        **ORDER,
    )
