"""Cross-entropies of shifted logits: the ops `shifted_cross_entropy` and
`shifted_cross_entropy_grad`.

A program walks the classes of some rows in blocks, keeping the largest shifted logit and the sum of
exponentials relative to it. Few classes are one block, many rows of it; of a vocabulary every
program has one row. The gradient needs no walk: its blocks are independent, as the forward left
both numbers of every row.

Not yet run on hardware: tested under the interpreter, and compiled offline.
"""

import torch
import triton
import triton.language as tl

from htv.triton_kernels.device import UPCAST, guard, require

MOST_BLOCK, TILE = 2048, 1024  # classes of a block; values of a program where a row has few
WARPS = 4


def tile(classes: int) -> tuple[int, int]:
    """Rows and classes of a program's block, both powers of 2."""
    block = min(MOST_BLOCK, max(16, triton.next_power_of_2(classes)))
    return max(1, min(128, TILE // block)), block


@triton.jit
def shifted(logits_ptr, shift_ptr, at, shift_at, valid, scale):
    z = tl.load(logits_ptr + at, mask=valid, other=0.0).to(tl.float32)
    z += tl.load(shift_ptr + shift_at, mask=valid, other=0.0).to(tl.float32) * scale
    return tl.where(valid, z, float("-inf"))


@triton.jit
def target_weight(weight_ptr, target, valid, WEIGHTED: tl.constexpr):
    """Of every row's class; NaN where it is none, which makes loss and gradient NaN."""
    if WEIGHTED:
        return tl.load(weight_ptr + target, mask=valid, other=float("nan"))
    return tl.where(valid, 1.0, float("nan"))


@triton.jit(do_not_specialize=["ignored"])
def loss_kernel(
    logits_ptr,
    shift_ptr,
    targets_ptr,
    weight_ptr,
    loss_ptr,
    peak_ptr,
    log_sum_ptr,
    rows,
    classes,
    stride,
    shift_stride,
    ignored,
    scale,
    smoothing,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(rows, classes) -> (rows,) loss, peak, log_sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets_ptr + row, mask=inside, other=0)
    kept = inside & (target != ignored)
    at, shift_at = row[:, None] * stride, row[:, None] * shift_stride
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :]
        z = shifted(
            logits_ptr, shift_ptr, at + c, shift_at + c, kept[:, None] & (c < classes), scale
        )
        higher = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = higher
    log_sum = tl.log(total)
    valid = kept & (target >= 0) & (target < classes)
    own = row * stride + target
    z_own = shifted(logits_ptr, shift_ptr, own, row * shift_stride + target, valid, scale)
    loss = target_weight(weight_ptr, target, valid, WEIGHTED) * ((peak - z_own) + log_sum)
    if SMOOTHED:
        everywhere = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, classes, BLOCK):
            c = begin + tl.arange(0, BLOCK)[None, :]
            there = kept[:, None] & (c < classes)
            z = shifted(logits_ptr, shift_ptr, at + c, shift_at + c, there, scale)
            surprise = (peak[:, None] - z) + log_sum[:, None]
            if WEIGHTED:
                surprise *= tl.load(weight_ptr + c, mask=c < classes, other=0.0)
            everywhere += tl.sum(tl.where(there, surprise, 0.0), axis=1)
        loss = (1 - smoothing) * loss + smoothing / classes * everywhere
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0), mask=inside)
    tl.store(peak_ptr + row, tl.where(kept, peak, 0.0), mask=inside)
    tl.store(log_sum_ptr + row, tl.where(kept, log_sum, 0.0), mask=inside)


@triton.jit(do_not_specialize=["ignored"])
def gradient_kernel(
    grad_ptr,
    logits_ptr,
    shift_ptr,
    targets_ptr,
    weight_ptr,
    weight_sum_ptr,
    peak_ptr,
    log_sum_ptr,
    grad_logits_ptr,
    rows,
    classes,
    grad_stride,
    stride,
    shift_stride,
    ignored,
    scale,
    smoothing,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(rows, classes) -> (rows, classes): grad * (sum(target) * softmax - target)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    target = tl.load(targets_ptr + row, mask=inside, other=0)
    kept = inside & (target != ignored)
    there = kept[:, None] & (c < classes)
    z = shifted(
        logits_ptr,
        shift_ptr,
        row[:, None] * stride + c,
        row[:, None] * shift_stride + c,
        there,
        scale,
    )
    peak = tl.load(peak_ptr + row, mask=kept, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=kept, other=0.0)
    softmax = tl.exp((z - peak[:, None]) - log_sum[:, None])
    valid = kept & (target >= 0) & (target < classes)
    own = (1 - smoothing) * target_weight(weight_ptr, target, valid, WEIGHTED)
    goal = tl.where(c == target[:, None], own[:, None], 0.0)
    total = own
    if SMOOTHED:
        if WEIGHTED:
            goal += smoothing / classes * tl.load(weight_ptr + c, mask=c < classes, other=0.0)
            total += smoothing / classes * tl.load(weight_sum_ptr)
        else:
            goal += smoothing / classes
            total += smoothing
    grad = tl.load(grad_ptr + row * grad_stride, mask=kept, other=0.0)
    by_class = tl.where(kept[:, None], grad[:, None] * (total[:, None] * softmax - goal), 0.0)
    to = grad_logits_ptr + row[:, None] * classes + c
    tl.store(
        to, by_class.to(grad_logits_ptr.dtype.element_ty), mask=inside[:, None] & (c < classes)
    )


def _check(op: str, logits, targets, shift, weight) -> None:
    require(op, "logits", logits)
    require(op, "shift", shift)
    if (
        logits.dim() != 2
        or shift.shape != logits.shape
        or logits.shape[1] == 0
        or targets.shape != logits.shape[:1]
    ):
        raise ValueError(
            f"{op} (Triton): logits and shift must be (N, K), K >= 1, and targets (N,), got "
            f"{tuple(logits.shape)}, "
            f"{tuple(shift.shape)} and {tuple(targets.shape)}"
        )
    if logits.shape[1] > 1 and (logits.stride(1) != 1 or shift.stride(1) != 1):
        raise ValueError(f"{op} (Triton): logits and shift must have stride 1 along dim 1")
    if targets.dtype != torch.int64 or not targets.is_contiguous():
        raise TypeError(f"{op} (Triton): targets must be int64, contiguous, got {targets.dtype}")
    if weight is not None and (weight.shape != logits.shape[1:] or weight.dtype != torch.float32):
        raise ValueError(
            f"{op} (Triton): weight must be ({logits.shape[1]},) float32, got {tuple(weight.shape)}"
        )


def shifted_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    shift: torch.Tensor,
    temperature: float,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op of this name: (N, K) -> (N,), (N,), (N,) fp32."""
    _check("shifted_cross_entropy", logits, targets, shift, weight)
    rows, classes = logits.shape
    loss, peak, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        height, block = tile(classes)
        with guard(logits):
            loss_kernel[(triton.cdiv(rows, height),)](
                logits,
                shift,
                targets,
                weight,
                loss,
                peak,
                log_sum,
                rows,
                classes,
                logits.stride(0),
                shift.stride(0),
                ignore_index,
                1 / temperature,
                label_smoothing,
                weight is not None,
                label_smoothing > 0,
                height,
                block,
                num_warps=WARPS,
            )
    return loss, peak, log_sum


def shifted_cross_entropy_grad(
    grad: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    shift: torch.Tensor,
    temperature: float,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
) -> torch.Tensor:
    """The op of this name: (N,) fp32 and what the other took and gave -> (N, K) in the type of
    logits.
    """
    _check("shifted_cross_entropy_grad", logits, targets, shift, weight)
    rows, classes = logits.shape
    # The interpreter's rounding to half precision is wrong.
    grad_logits = torch.empty(
        rows, classes, dtype=torch.float32 if UPCAST else logits.dtype, device=logits.device
    )
    if rows:
        height, block = tile(classes)
        with guard(logits):
            gradient_kernel[(triton.cdiv(rows, height), triton.cdiv(classes, block))](
                grad,
                logits,
                shift,
                targets,
                weight,
                None if weight is None else weight.sum(),
                peak,
                log_sum,
                grad_logits,
                rows,
                classes,
                grad.stride(0),
                logits.stride(0),
                shift.stride(0),
                ignore_index,
                1 / temperature,
                label_smoothing,
                weight is not None,
                label_smoothing > 0,
                height,
                block,
                num_warps=WARPS,
            )
    return grad_logits.to(logits.dtype)
