"""Statistics of a convolution's per-group contributions without forming them all: the op `conv`.

A weight with 16 output channels or more per convolution group is that of a linear layer whose input
rows are windows of x, which the product's loads gather as they go (an implicit GEMM). One with
fewer, depthwise above all, has too little work per window for tensor cores: its contributions,
small beside the activations, are summed by a kernel of their own and then aggregated as stacked
ones are.

Images are read with their channels last, where neighbours in a row of the product are neighbours in
memory; others are first copied so: 2 reads or writes per value, where the product reads each about
as often as the kernel has taps.

Not yet run on hardware: tested under the interpreter, and compiled offline for sm_80, sm_90 and
sm_100.
"""

import math

import torch
import triton
import triton.language as tl

from htv.rules import Statistic
from htv.triton_kernels import device, product, stacked
from htv.triton_kernels import statistic as streaming

FEW_OUTPUTS = (
    16  # output channels of one convolution group below which tensor cores have too little to do
)
MOST_VALUES = (
    2**31
)  # of the samples that a block of rows looks into; samples themselves start at int64 addresses
DEPTHWISE = {"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
LEAST_ROWS = 8 * DEPTHWISE["BLOCK_R"]  # of a split of one group
MOST_TAPS = 7  # of a program: more sums than that do not fit its registers


@triton.jit(do_not_specialize=["num_splits"])
def depthwise_kernel(
    x_ptr,
    grad_output_ptr,
    offsets_ptr,
    out_ptr,
    num_splits,
    O: tl.constexpr,
    STRIDE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Contributions to a weight with few outputs per part, split into sums over a share of each
    group's positions.

    x (S, D, H, W, STRIDE), grad_output (S * L, O), offsets (E + 1,) of samples -> out (E,
    num_splits, O, width, taps). OUTPUTS: output channels per part; GEOMETRY: as
    `product.load_windows` takes it; TAPS: taps of one program. Programs: (groups x splits, blocks
    of output channels, input channels of a part x shares of the taps).
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
    taps: tl.constexpr = GEOMETRY[7] * taps_H * taps_W
    shares: tl.constexpr = (taps + TAPS - 1) // TAPS
    group, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    channel, share = tl.program_id(2) // shares, tl.program_id(2) % shares
    o = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    seen = o // OUTPUTS * width + channel
    r = tl.arange(0, BLOCK_R)

    begin = tl.load(offsets_ptr + group).to(tl.int64) * area
    end = tl.load(offsets_ptr + group + 1).to(tl.int64) * area
    size = (end - begin + num_splits - 1) // num_splits
    begin += split * size
    end = tl.minimum(end, begin + size)
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    for row in range(begin, end, BLOCK_R):
        valid = (r < end - row)[:, None] & (o < O)[None, :]
        g = tl.load(
            grad_output_ptr + row * O + (r[:, None] * O + o[None, :]), mask=valid, other=0.0
        ).to(tl.float32)
        sample = row // area
        p = (row - sample * area).to(tl.int32) + r
        s = p // area
        p = p - s * area
        z = p // (out_H * out_W) * GEOMETRY[10] - GEOMETRY[13]
        y = p // out_W % out_H * GEOMETRY[11] - GEOMETRY[14]
        w = p % out_W * GEOMETRY[12] - GEOMETRY[15]
        base = x_ptr + sample * D * H * W * STRIDE
        more = ()
        for t in tl.static_range(TAPS):
            tap = share * TAPS + t
            tz = z + tap // (taps_H * taps_W) * GEOMETRY[16]
            ty = y + tap // taps_W % taps_H * GEOMETRY[17]
            tw = w + tap % taps_W * GEOMETRY[18]
            inside = (tz >= 0) & (tz < D) & (ty >= 0) & (ty < H) & (tw >= 0) & (tw < W)
            offset = (((s * D + tz) * H + ty) * W + tw)[:, None] * STRIDE + seen[None, :]
            x = tl.load(base + offset, mask=valid & inside[:, None], other=0.0).to(tl.float32)
            more = more + (sums[t] + g * x,)
        sums = more
    for t in tl.static_range(TAPS):
        tap = share * TAPS + t
        at = ((tl.program_id(0).to(tl.int64) * O + o) * width + channel) * taps + tap
        tl.store(out_ptr + at, tl.sum(sums[t], axis=0), mask=o < tl.where(tap < taps, O, 0))


def conv(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    statistic: Statistic,
    choice=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (S, C, *space), grad_output (S, O, *out_space), offsets (E + 1,) of samples
    -> value (O, C / groups, *kernel) fp32, mask_sum () fp64.

    The contract is that of the op `conv` in `htv.ops.schema`, except that `offsets` may lie on the
    device, where they are trusted. choice: (Config, splits) instead of the table's; of a depthwise
    weight, (None, splits).
    """
    product.require_served("conv", statistic, len(offsets) - 1)
    window = kernel, stride, padding, dilation, groups
    _check(x, grad_output, offsets, *window)
    shape = grad_output.shape[1], x.shape[1] // groups, *kernel
    if 0 in shape:
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros((), dtype=torch.float64)
    found = _factors(x, grad_output, offsets, *window, choice)
    if isinstance(found, torch.Tensor):
        value, mask_sum = stacked.stacked(found, statistic)
        return value.view(shape) * len(found), mask_sum
    value, mask_sum = product.aggregate(found, statistic, choice)
    return _as_weight(value, shape), mask_sum


def conv_summary(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    name: str,
    log_offset: float,
    choice=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `conv_summary` of `htv.ops.schema`, for the streaming statistic of this name; as
    `conv`.
    """
    window = kernel, stride, padding, dilation, groups
    _check(x, grad_output, offsets, *window)
    shape = grad_output.shape[1], x.shape[1] // groups, *kernel
    if 0 in shape:
        nothing = x.new_empty((streaming.summary(name).words, 1, *shape), dtype=torch.float32)
        return streaming.summary_fields(name, nothing, len(offsets) - 1)
    found = _factors(x, grad_output, offsets, *window, choice)
    if isinstance(found, torch.Tensor):
        fields = stacked.stacked_summary(found, name, log_offset)
        return tuple(field.view(shape) if field.numel() else field for field in fields)
    fields = product.summary(found, name, log_offset, choice)
    return tuple(_as_weight(field, shape) if field.numel() else field for field in fields)


def _as_weight(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(O, taps and channels) -> (O, C / groups, *kernel)."""
    _, width, *kernel = shape
    return value.unflatten(1, (*kernel, width)).movedim(-1, 1).contiguous()


def _factors(
    x, grad_output, offsets, kernel, stride, padding, dilation, groups, choice
) -> product.Factors | torch.Tensor:
    """What determines contributions; or, with few outputs per group of the convolution, the
    contributions (E, P).
    """
    width, outputs = x.shape[1] // groups, grad_output.shape[1] // groups
    columns = width * math.prod(kernel)
    offsets = device.offsets_on(x.device, offsets)
    geometry = _geometry(x, grad_output, width, kernel, stride, padding, dilation)
    samples, seen = len(x), math.prod(grad_output.shape[2:])
    x, grad_output = (t.movedim(1, -1).contiguous().flatten(0, -2) for t in (x, grad_output))
    if samples * seen == 0:
        return product.Factors(
            x.new_empty((0, columns)), grad_output.new_empty((0, outputs * groups)),
            torch.zeros_like(offsets), 1, 1, outputs * groups, columns, columns, product.load_rows,
            None,
        )  # fmt: skip
    if groups > 1 and outputs < FEW_OUTPUTS:
        splits = (
            choice[1]
            if choice
            else _splits(x.device, len(offsets) - 1, len(grad_output), geometry, grad_output)
        )
        return _contributions(x, grad_output, offsets, geometry, outputs, splits)
    return product.Factors(
        x,
        grad_output,
        offsets,
        seen,
        groups,
        outputs,
        columns,
        width,
        product.load_windows,
        geometry,
    )


def _geometry(x, grad_output, width, kernel, stride, padding, dilation):
    """As `product.load_windows` takes it: missing dims are of size 1."""
    three = lambda values, missing: (missing,) * (3 - len(values)) + tuple(values)
    sizes = (x.shape[2:], grad_output.shape[2:], kernel, stride)
    return (
        width,
        *(n for v in sizes for n in three(v, 1)),
        *three(padding, 0),
        *three(dilation, 1),
    )


def _splits(where, groups, rows, geometry, grad_output):
    """Of every group's positions, so that each multiprocessor has two programs where groups are
    long enough.
    """
    taps = math.prod(geometry[7:10])
    programs = groups * triton.cdiv(grad_output.shape[1], DEPTHWISE["BLOCK_C"]) * geometry[0] * taps
    programs //= min(geometry[9], MOST_TAPS)
    wanted = 2 * device.capability(where)[1] // max(1, programs)
    return max(1, min(wanted, rows // groups // LEAST_ROWS))


def _contributions(x, grad_output, offsets, geometry, outputs, splits):
    """(E, O * width * taps)."""
    O, width, taps = grad_output.shape[1], geometry[0], math.prod(geometry[7:10])
    groups, together = len(offsets) - 1, min(geometry[9], MOST_TAPS)
    out = x.new_empty((groups, splits, O * width * taps), dtype=torch.float32)
    grid = (
        groups * splits,
        triton.cdiv(O, DEPTHWISE["BLOCK_C"]),
        width * triton.cdiv(taps, together),
    )
    with device.guard(x):
        depthwise_kernel[grid](
            x,
            grad_output,
            offsets,
            out,
            splits,
            O,
            x.shape[1],
            outputs,
            geometry,
            together,
            **DEPTHWISE,
        )
    return out.squeeze(1) if splits == 1 else out.sum(dim=1)


def _check(x, grad_output, offsets, kernel, stride, padding, dilation, groups):
    device.require("conv", "x and grad_output", x, grad_output)
    dims = x.dim() - 2
    if dims not in (1, 2, 3) or grad_output.dim() != x.dim() or len(x) != len(grad_output):
        raise ValueError(
            "conv (Triton): wants x (S, C, *space) and grad_output (S, O, *out_space) with 1 to 3 "
            "spatial dims, "
            f"got {tuple(x.shape)} and {tuple(grad_output.shape)}"
        )
    for name, sizes, least in (
        ("kernel", kernel, 0),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(sizes) != dims or min(sizes) < least:
            raise ValueError(
                f"conv (Triton): {name} must be {dims} numbers of at least {least}, got "
                f"{list(sizes)}"
            )
    if groups < 1 or x.shape[1] % groups or grad_output.shape[1] % groups:
        raise ValueError(
            f"conv (Triton): {x.shape[1]} input and {grad_output.shape[1]} output channels do not "
            "split into "
            f"{groups} groups"
        )
    found = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    if len(x) > 0 and 0 not in kernel and found != tuple(grad_output.shape[2:]):
        raise ValueError(
            f"conv (Triton): the output of {tuple(x.shape)} has {found} positions, grad_output "
            f"{tuple(grad_output.shape[2:])}"
        )
    device.check_offsets("conv", offsets, len(x))
    positions = max(1, math.prod(grad_output.shape[2:]))
    if x[:1].numel() * (64 // positions + 2) >= MOST_VALUES:
        raise ValueError(
            f"conv (Triton): samples of {x[:1].numel()} values are too large; use the reference "
            "backend"
        )
