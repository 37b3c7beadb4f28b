"""The product whose accumulator starts afresh at every group: the kernel behind `linear` and
`conv`.

Each program owns a tile of the weight and walks the rows of its groups: g_e^T x_e accumulates in
fp32, the statistic absorbs it, the next group follows. No atomics, and a group is never split, so
the same inputs give the same bits.

The loop runs over blocks of rows, not over groups and then rows: loads of the next group are under
way while the statistic absorbs this one, and (compiled for sm_90) the wait for the tensor cores at
a group's end is the only one that drains them. With loops nested, the pipeline of `num_stages`
blocks would fill anew for every group.

Groups may be split among programs (`num_splits`), each of which then leaves its state: to be
merged, where a weight has too few tiles for all multiprocessors, or to be ranked, where every split
is one group and its state the contribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from htv.rules import Statistic
from htv.triton_kernels import configs, device, stacked
from htv.triton_kernels import statistic as streaming


@triton.jit
def load_rows(x_ptr, row, r, r_valid, i, i_valid, part, stride, GEOMETRY: tl.constexpr):
    """x[row + r, i] of a matrix: a linear layer's input. (BLOCK_R, BLOCK_I)"""
    offset = r[:, None] * stride + i[None, :]
    return tl.load(
        x_ptr + row * stride + offset, mask=r_valid[:, None] & i_valid[None, :], other=0.0
    )


@triton.jit
def load_windows(x_ptr, row, r, r_valid, i, i_valid, part, stride, GEOMETRY: tl.constexpr):
    """What position `row + r` of a convolution's output sees of x (S, D, H, W, stride) at tap and
    channel i.

    GEOMETRY: (width, D, H, W, out_D, out_H, out_W, kernel..., stride..., padding..., dilation...)
    with `width` channels of this part, known at compile time: divisions by constants are cheap.
    Columns are ordered by tap, then channel.
    """
    width: tl.constexpr = GEOMETRY[0]
    D: tl.constexpr = GEOMETRY[1]
    H: tl.constexpr = GEOMETRY[2]
    W: tl.constexpr = GEOMETRY[3]
    out_H: tl.constexpr = GEOMETRY[5]
    out_W: tl.constexpr = GEOMETRY[6]
    area: tl.constexpr = GEOMETRY[4] * out_H * out_W
    taps_H: tl.constexpr = GEOMETRY[8]
    taps_W: tl.constexpr = GEOMETRY[9]
    sample = row // area
    p = (row - sample * area).to(tl.int32) + r
    s = p // area
    p = p - s * area
    z = p // (out_H * out_W) * GEOMETRY[10] - GEOMETRY[13]
    y = p // out_W % out_H * GEOMETRY[11] - GEOMETRY[14]
    w = p % out_W * GEOMETRY[12] - GEOMETRY[15]
    tap = i // width
    dz = tap // (taps_H * taps_W) * GEOMETRY[16]
    dy = tap // taps_W % taps_H * GEOMETRY[17]
    dw = tap % taps_W * GEOMETRY[18]
    offset = (((s * D + z) * H + y) * W + w)[:, None] * stride + (
        ((dz * H + dy) * W + dw) * stride + i % width
    )[None, :]
    valid = r_valid[:, None] & i_valid[None, :]
    if GEOMETRY[13] > 0:
        valid &= (z[:, None] + dz[None, :] >= 0) & (z[:, None] + dz[None, :] < D)
    if GEOMETRY[14] > 0:
        valid &= (y[:, None] + dy[None, :] >= 0) & (y[:, None] + dy[None, :] < H)
    if GEOMETRY[15] > 0:
        valid &= (w[:, None] + dw[None, :] >= 0) & (w[:, None] + dw[None, :] < W)
    base = x_ptr + sample * D * H * W * stride + part * width
    return tl.load(base + offset, mask=valid, other=0.0)


@triton.jit
def count_blocks(offsets_ptr, first, last, rows, BLOCK_R: tl.constexpr, LANES: tl.constexpr):
    """How many blocks of rows the groups first:last have; an empty group has one."""
    blocks = 0
    for start in range(first, last, LANES):
        group = start + tl.arange(0, LANES)
        begin = tl.load(offsets_ptr + group, mask=group < last, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + group + 1, mask=group < last, other=0).to(tl.int64)
        size = tl.maximum((end - begin) * rows + BLOCK_R - 1, BLOCK_R) // BLOCK_R
        blocks += tl.sum(tl.where(group < last, size, 0).to(tl.int32))
    return blocks


@triton.jit(do_not_specialize=["num_groups", "num_splits", "count"])
def product_kernel(
    x_ptr,
    grad_output_ptr,
    offsets_ptr,
    out_ptr,
    mask_ptr,
    num_groups,
    num_splits,
    rows,
    O,
    I,
    top,
    left,
    height,
    width,
    x_stride,
    grad_output_stride,
    count,
    votes,
    k,
    init: tl.constexpr,
    update: tl.constexpr,
    finalize: tl.constexpr,
    load_x: tl.constexpr,
    GEOMETRY: tl.constexpr,
    COUNT: tl.constexpr,
    RESULT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES_PER_COLUMN: tl.constexpr,
):
    """The box (top:top + height, left:left + width) of a weight (O, I), or of every part of a
    grouped one.

    x:            what `load_x` reads; offsets (E + 1,), in units of `rows` rows
    grad_output:  (R, parts * O), rows `grad_output_stride` apart
    RESULT:       what `out` receives of every split; they take groups as torch.tensor_split does
        statistic     (parts, height, width), of all groups: num_splits is 1; and `mask`
                      the sum of the mask per program
        state         (words, num_splits, parts, height, width)
        contribution  (num_splits, parts, height, width), of one group: num_splits is num_groups
    Programs: parts x splits x tiles, tiles fastest.
    """
    program = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(height, BLOCK_O), tl.cdiv(width, BLOCK_I)
    tiles = tiles_o * tiles_i
    tile, split, part = (
        program % tiles,
        program // tiles % num_splits,
        program // tiles // num_splits,
    )
    # Programs that run together form a near-square patch of tiles, so that they share rows of x and
    # g in L2.
    tile_o, tile_i = tl.swizzle2d(
        tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, TILES_PER_COLUMN
    )
    small, larger = num_groups // num_splits, num_groups % num_splits
    first = split * small + tl.minimum(split, larger)
    last = first + small + (split < larger).to(tl.int32)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o_valid, i_valid = o < height, i < width
    r = tl.arange(0, BLOCK_R)
    grad_output_ptr += part * O + top
    g_offset = r[:, None] * grad_output_stride + o[None, :]  # (BLOCK_R, BLOCK_O)

    zeros = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    state, c, group = init(zeros, COUNT), zeros, first
    row = tl.load(offsets_ptr + first).to(tl.int64) * rows
    end = tl.load(offsets_ptr + first + 1).to(tl.int64) * rows
    for _ in range(count_blocks(offsets_ptr, first, last, rows, BLOCK_R, 128)):
        # Both operands are masked: a row of the next group could be inf, and 0 * inf is NaN.
        r_valid = r < end - row
        g_valid = r_valid[:, None] & o_valid[None, :]
        g = tl.load(grad_output_ptr + row * grad_output_stride + g_offset, mask=g_valid, other=0.0)
        x = load_x(x_ptr, row, r, r_valid, left + i, i_valid, part, x_stride, GEOMETRY)
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        c = tl.dot(tl.trans(g), x, c, input_precision=PRECISION)
        row += BLOCK_R
        ends = row >= end
        if RESULT != "contribution":  # else no registers go to a state: tiles can be larger
            if ends:
                state = update(state, c, group - first + 1, COUNT)
                c = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        row = tl.where(ends, end, row)
        group += ends.to(tl.int32)
        end = tl.load(offsets_ptr + tl.minimum(group + 1, last)).to(tl.int64) * rows

    valid = o_valid[:, None] & i_valid[None, :]
    at = o.to(tl.int64)[:, None] * width + i[None, :]
    plane = tl.cast(height, tl.int64) * width
    if RESULT == "statistic":
        value, mask = finalize(state, num_groups, count, votes, k, COUNT)
        tl.store(out_ptr + part * plane + at, value, mask=valid)
        tl.store(mask_ptr + program, tl.sum(tl.where(valid, mask, 0.0)))
    else:
        if RESULT == "contribution":
            state = (c,)
        parts = tl.num_programs(0) // tiles // num_splits
        for word in tl.static_range(len(state)):
            layout = (word * num_splits + split).to(tl.int64) * parts + part
            tl.store(out_ptr + layout * plane + at, state[word], mask=valid)


@triton.jit(do_not_specialize=["num_groups", "num_splits", "count"])
def merge_kernel(
    states_ptr,
    value_ptr,
    mask_ptr,
    coordinates,
    num_groups,
    num_splits,
    count,
    votes,
    k,
    init: tl.constexpr,
    merge: tl.constexpr,
    finalize: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """states (words, num_splits, coordinates), as the product left them -> value (coordinates),
    mask per program.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < coordinates
    small, larger = num_groups // num_splits, num_groups % num_splits
    size = tl.cast(coordinates, tl.int64)
    state = init(tl.zeros((BLOCK,), tl.float32), 0)
    seen = 0
    for split in range(num_splits):
        groups = small + (split < larger).to(tl.int32)
        other = ()
        for word in tl.static_range(WORDS):
            other = other + (
                tl.load(states_ptr + (word * num_splits + split) * size + at, valid, other=0.0),
            )
        state = merge(state, seen, other, groups)
        seen += groups
    value, mask = finalize(state, num_groups, count, votes, k, 0)
    tl.store(value_ptr + at, value, mask=valid)
    tl.store(mask_ptr + tl.program_id(0), tl.sum(tl.where(valid, mask, 0.0)))


# -- the host's side -------------------------------------------------------------------------------

SCRATCH_BYTES = (
    64 << 20
)  # contributions of a box of coordinates, or states of splits: about what L2 holds
MERGE_BLOCK = 256  # coordinates of a program
LONG_GROUPS = (
    512  # rows from which writing and reading a contribution costs less than smaller tiles do
)


class Factors(NamedTuple):
    """What determines contributions: operands as kernels read them.

    x:            the memory `load_x` reads, (pixels or rows, channels); its dim 0 has a stride of
                  its own
    grad_output:  (R, parts * outputs), rows may lie apart
    offsets:      (E + 1,) on the device; group e owns rows rows * offsets[e] : rows * offsets[e +
                  1]
    channels:     of x, per part
    """

    x: torch.Tensor
    grad_output: torch.Tensor
    offsets: torch.Tensor
    rows: int
    parts: int
    outputs: int
    inputs: int
    channels: int
    load_x: triton.JITFunction
    geometry: tuple[int, ...] | None

    @property
    def groups(self) -> int:
        return len(self.offsets) - 1

    def part(self, first: int, last: int) -> Factors:
        """Factors of some parts."""
        return self._replace(
            x=self.x[:, first * self.channels :],
            grad_output=self.grad_output[:, first * self.outputs :],
            parts=last - first,
        )

    def problem(self, words: int) -> configs.Problem:
        capability, multiprocessors = device.capability(self.x.device)
        x, g = self.x, self.grad_output
        sizes = (
            self.outputs,
            self.inputs,
            self.channels,
            x.stride(0),
            g.stride(0),
            x.data_ptr(),
            g.data_ptr(),
        )
        return configs.Problem(
            configs.architecture(capability),
            "half" if x.element_size() == 2 else precision(x.dtype).replace("ieee", "fp32"),
            multiprocessors,
            words,
            math.gcd(*sizes) % 16 == 0,
            self.outputs,
            self.inputs,
            self.parts,
            self.groups,
            len(g) / self.groups,
        )


def precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied in full unless TF32 is allowed: near a sign change its rounding would
    decide votes.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not device.UPCAST
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def aggregate(
    factors: Factors, statistic: Statistic, choice=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """E * stat of all groups' contributions: value (parts * outputs, inputs) fp32, mask_sum ()
    fp64.

    choice: (Config, splits) instead of the table's.

    Streaming statistics are absorbed on chip. So are the few extremes of a trimmed or winsorized
    mean where groups are short or too many to sort: their 5 to 7 registers per coordinate leave
    room for tiles of 64 x 64 alone, which read 2.7 times the bytes per product that tiles of 128 x
    256 do. All other order statistics rank contributions that are written, a box of coordinates at
    a time, and read once: 8 bytes per contribution beside 2 * rows operations, which at 4 TB/s and
    500 TFLOP/s is the smaller part from 500 rows on. Keeping E values per coordinate on chip would
    shrink tiles to 32 x 32; recomputing the products for every digit of a search would cost eight
    times the product.
    """
    found = absorbed(factors, statistic)
    value = factors.x.new_empty(
        (factors.parts, factors.outputs, factors.inputs), dtype=torch.float32
    )
    if found is not None:
        mask_sum = _streaming(factors, statistic, found, value, choice)
    else:
        mask_sum = value.new_zeros((), dtype=torch.float64)
        _ranked(factors, statistic, value, choice)
    return value.flatten(0, 1), mask_sum


def summary(
    factors: Factors, name: str, log_offset: float, choice=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `stacked.stacked_summary` returns, (parts * outputs, inputs) each, of all groups'
    contributions. choice: as for `aggregate`.
    """
    found, sizes = streaming.summary(name), (factors.parts, factors.outputs, factors.inputs)
    fitting = SCRATCH_BYTES // (4 * found.words * math.prod(sizes))
    config, splits = choice or configs.choose(factors.problem(found.words), fitting)
    states = factors.x.new_empty((found.words, splits, *sizes), dtype=torch.float32)
    offset = log_offset if found is streaming.LOGS else 0.0
    launch(
        factors, (0, 0, *sizes[1:]), states, states, "state", found, Statistic(name), config,
        splits, offset,
    )  # fmt: skip
    return streaming.summary_fields(name, states.flatten(2, 3), factors.groups)


def absorbed(factors: Factors, statistic: Statistic) -> streaming.Streaming | None:
    """How a statistic is absorbed on chip; None where contributions are written and ranked."""
    name, count = statistic.name, statistic.count
    found = streaming.STREAMING.get(name) or streaming.extremes(name, count)
    if name not in streaming.STREAMING and count > 0 and found is not None:
        if (
            factors.groups <= stacked.MOST_SORTED
            and len(factors.grad_output) >= LONG_GROUPS * factors.groups
        ):
            return None
    return found


def launch(factors, box, out, mask, result, found, statistic, config, splits, log_offset=0.0):
    """The product over a box of coordinates: (top, left, height, width)."""
    top, left, height, width = box
    x, g = factors.x, factors.grad_output
    programs = config.tiles(height, width) * splits * factors.parts
    extremes = found.init is streaming.init_extremes
    with device.guard(x):
        product_kernel[(programs,)](
            x,
            g,
            factors.offsets,
            out,
            mask,
            factors.groups,
            splits,
            factors.rows,
            factors.outputs,
            factors.inputs,
            top,
            left,
            height,
            width,
            x.stride(0),
            g.stride(0),
            *streaming.numbers(statistic),
            *found[:3],
            load_x=factors.load_x,
            GEOMETRY=factors.geometry,
            COUNT=statistic.count if extremes else log_offset or 0,
            RESULT=result,
            UPCAST=device.UPCAST,
            PRECISION=precision(x.dtype),
            enable_fp_fusion=True,
            **config._asdict(),
        )


def _streaming(factors, statistic, found, value, choice):
    fitting = SCRATCH_BYTES // (4 * found.words * value.numel()) if found.merge else 1
    config, splits = choice or configs.choose(factors.problem(found.words), fitting)
    box = (0, 0, factors.outputs, factors.inputs)
    if splits == 1:
        mask = value.new_empty(config.tiles(*box[2:]) * factors.parts)
        launch(factors, box, value, mask, "statistic", found, statistic, config, 1)
        return mask.sum(dtype=torch.float64)
    states = value.new_empty((found.words, splits, *value.shape))
    launch(factors, box, states, states, "state", found, statistic, config, splits)
    mask = value.new_empty(triton.cdiv(value.numel(), MERGE_BLOCK))
    with device.guard(value):
        merge_kernel[(len(mask),)](
            states,
            value,
            mask,
            value.numel(),
            factors.groups,
            splits,
            *streaming.numbers(statistic),
            found.init,
            found.merge,
            found.finalize,
            found.words,
            MERGE_BLOCK,
        )
    return mask.sum(dtype=torch.float64)


def _ranked(factors, statistic, value, choice):
    """Contributions of a box of coordinates, or the sums of its buckets, then their order
    statistic; next box.
    """
    buckets = statistic.name == "median_of_means"
    splits = statistic.count if buckets else factors.groups
    found, result = streaming.STREAMING["mean"], "state" if buckets else "contribution"
    scratch = value.new_empty(0)
    for (first, last), box in boxes(factors, splits):
        top, left, height, width = box
        some = factors.part(first, last)
        if choice:
            config = choice[0]
        else:
            config = configs.choose(some.problem(1 if buckets else 0), 1)[0]
        size = (last - first) * height * width
        scratch = scratch if scratch.numel() >= splits * size else value.new_empty(splits * size)
        launch(some, box, scratch, scratch, result, found, statistic, config, splits)
        layout = value[first:last, top : top + height, left : left + width]
        out = (
            layout
            if layout.is_contiguous()
            else torch.empty_like(layout, memory_format=torch.contiguous_format)
        )
        load = stacked.one_sum if buckets else stacked.one_value
        stacked.ranked(scratch, factors.groups, size, statistic, out, float(factors.groups), load)
        if out is not layout:
            layout.copy_(out)


def boxes(
    factors: Factors, planes: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int, int, int]]]:
    """((first part, last part), (top, left, height, width)) whose values fit `planes` times into
    SCRATCH_BYTES.

    Whole parts if possible, else whole columns; sides are multiples of 128, or of 16 where those do
    not fit.
    """
    fitting = max(256, SCRATCH_BYTES // (4 * planes))
    O, I = factors.outputs, factors.inputs
    step = fitting // (O * I)
    if step > 0:
        for first in range(0, factors.parts, step):
            yield (first, min(first + step, factors.parts)), (0, 0, O, I)
        return
    height, width = fitting // I, I
    if height < 128:
        side = math.isqrt(fitting)
        height = width = side // 128 * 128 or side // 16 * 16
    else:
        height = height // 128 * 128
    for part in range(factors.parts):
        for top in range(0, O, height):
            for left in range(0, I, width):
                yield (part, part + 1), (top, left, min(height, O - top), min(width, I - left))


def require_served(op: str, statistic: Statistic, groups: int) -> None:
    """Raises ValueError unless ops on factors serve the statistic of so many groups."""
    name, count = statistic.name, statistic.count
    if name not in streaming.STREAMING and name not in stacked.ORDER:
        names = ", ".join((*streaming.STREAMING, *stacked.ORDER))
        raise ValueError(f"{op} (Triton): unknown statistic {name!r}, have {names}")
    if name in ("trimmed_mean", "winsorized_mean") and not 0 <= 2 * count < groups:
        raise ValueError(
            f"{op} (Triton): {name} wants 0 <= 2 * count < groups, got count {count} of {groups} "
            "groups"
        )
    if name == "median_of_means" and not 1 <= count <= groups:
        raise ValueError(f"{op} (Triton): median_of_means wants 1 to {groups} buckets, got {count}")
