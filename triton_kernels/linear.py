"""Statistics of a linear layer's per-group contributions without forming them: a product whose accumulator starts
afresh at every group.

Each program owns a tile of the weight and walks all rows: g_e^T x_e accumulates in registers in fp32, the statistic
absorbs it, the next group follows. No atomics and no split over groups, so the same inputs give the same bits.

Runs on CUDA tensors, and on CPU tensors when TRITON_INTERPRET=1 is set before Triton is imported.
Not yet run on hardware: tested under the interpreter, and compiled offline for sm_80 and sm_90.
"""

import torch
import triton
import triton.language as tl

from htv.triton_kernels import configs
from htv.triton_kernels.statistic import STATISTICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_FEATURES = 2**24  # times the rows of a block, within int32; blocks themselves start at int64 addresses
INTERPRETED = triton.knobs.runtime.interpret  # read when the kernels below are decorated, and not again


@triton.jit(do_not_specialize=["num_groups", "count"])
def linear_kernel(
    x_ptr,
    grad_output_ptr,
    offsets_ptr,
    value_ptr,
    mask_ptr,
    num_groups,
    O,
    I,
    count,
    init: tl.constexpr,
    update: tl.constexpr,
    finalize: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES_PER_COLUMN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    # Programs that run together form a near-square patch of tiles, so that they share rows of x and g in L2.
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, TILES_PER_COLUMN)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.arange(0, BLOCK_R)
    g_offset = r[:, None] * O + o[None, :]  # (BLOCK_R, BLOCK_O)
    x_offset = r[:, None] * I + i[None, :]  # (BLOCK_R, BLOCK_I)
    o_valid, i_valid = o[None, :] < O, i[None, :] < I

    state = init(BLOCK_O, BLOCK_I)
    begin = tl.load(offsets_ptr).to(tl.int64)
    for group in range(num_groups):
        end = tl.load(offsets_ptr + group + 1).to(tl.int64)
        c = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for row in range(begin, end, BLOCK_R):
            # Both operands are masked: a row of the next group could be inf, and 0 * inf is NaN.
            r_valid = (r < end - row)[:, None]
            g = tl.load(grad_output_ptr + row * O + g_offset, mask=r_valid & o_valid, other=0.0)
            x = tl.load(x_ptr + row * I + x_offset, mask=r_valid & i_valid, other=0.0)
            if UPCAST:
                g, x = g.to(tl.float32), x.to(tl.float32)
            c = tl.dot(tl.trans(g), x, c, input_precision="ieee")
        state = update(state, c)
        begin = end

    value, mask = finalize(state, count)
    valid = (o < O)[:, None] & i_valid
    tl.store(value_ptr + o.to(tl.int64)[:, None] * I + i[None, :], value, mask=valid)
    tl.store(mask_ptr + tile, tl.sum((mask & valid).to(tl.int32)))


def linear(
    x: torch.Tensor, grad_output: torch.Tensor, offsets: torch.Tensor, statistic: str, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, I), grad_output (R, O), offsets (E + 1,) -> value (O, I) fp32, mask_sum () fp64.

    The contract is that of the op `linear` in `htv.ops.schema`. `offsets` may lie on the CPU, where they are checked,
    or on the device, where they are trusted. fp32 inputs are multiplied in full fp32, not in TF32: near a sign change
    the rounding of TF32 would decide votes.
    """
    _check(x, grad_output, offsets, statistic)
    return launch(x.contiguous(), grad_output.contiguous(), offsets, statistic, count)


def launch(x, grad_output, offsets, statistic, count, config=None):
    """`linear` of checked, contiguous arguments, with a given tile if need be."""
    O, I, num_groups = grad_output.shape[1], x.shape[1], len(offsets) - 1
    config = config or _choose(x, grad_output, num_groups)
    value = torch.empty((O, I), dtype=torch.float32, device=x.device)
    mask = torch.empty(config.tiles(O, I), dtype=torch.int32, device=x.device)
    if len(mask):
        with torch.cuda.device_of(x):
            linear_kernel[(len(mask),)](
                x,
                grad_output,
                offsets.to(x.device),
                value,
                mask,
                num_groups,
                O,
                I,
                count,
                *STATISTICS[statistic],
                UPCAST=INTERPRETED,  # the interpreter's half-precision arithmetic is wrong
                enable_fp_fusion=True,
                **config._asdict(),
            )
    return value, mask.sum(dtype=torch.float64)


def _choose(x, grad_output, num_groups):
    (rows, I), O = x.shape, grad_output.shape[1]
    capability, multiprocessors = (9, 0), 1
    if x.is_cuda:
        device = torch.cuda.get_device_properties(x.device)
        capability, multiprocessors = (device.major, device.minor), device.multi_processor_count
    aligned = (O | I | x.data_ptr() | grad_output.data_ptr()) % 16 == 0
    return configs.choose(capability, multiprocessors, x.element_size(), O, I, rows / num_groups, aligned)


def _check(x, grad_output, offsets, statistic):
    if statistic not in STATISTICS:
        raise ValueError(f"linear (Triton): unknown statistic {statistic!r}, have {', '.join(STATISTICS)}")
    if x.dtype not in DTYPES or grad_output.dtype != x.dtype:
        raise TypeError(
            f"linear (Triton): x and grad_output must share a dtype among {', '.join(map(str, DTYPES))}, "
            f"got {x.dtype} and {grad_output.dtype}"
        )
    wanted = "cpu" if INTERPRETED else "cuda"
    if x.device.type != wanted or grad_output.device != x.device:
        raise ValueError(
            f"linear (Triton): x and grad_output must lie on one {wanted} device"
            f"{' under the interpreter' * INTERPRETED}, got {x.device} and {grad_output.device}"
        )
    if x.dim() != 2 or grad_output.dim() != 2 or len(x) != len(grad_output):
        raise ValueError(
            "linear (Triton): wants x (R, I) and grad_output (R, O), "
            f"got {tuple(x.shape)} and {tuple(grad_output.shape)}"
        )
    if max(x.shape[1], grad_output.shape[1]) > MOST_FEATURES:
        raise ValueError(
            f"linear (Triton): at most {MOST_FEATURES} features, got {x.shape[1]} and {grad_output.shape[1]}"
        )
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(
            f"linear (Triton): offsets must be E + 1 >= 2 integers, got {offsets.dtype} of shape {tuple(offsets.shape)}"
        )
    if not offsets.is_cuda and not (offsets[0] >= 0 and offsets[-1] <= len(x) and (offsets[1:] >= offsets[:-1]).all()):
        raise ValueError(f"linear (Triton): offsets must ascend within the {len(x)} rows, got {offsets.tolist()}")
