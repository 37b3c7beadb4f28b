"""The cross-entropy of shifted logits, fused: no tensor of the logits' size but their gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from htv.ops import backend, reference, schema

__all__ = ["shifted_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def shifted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shift: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute ``cross_entropy(logits + shift / temperature, targets)`` without storing the sum.

    logits:           (N, K), (K,) or (N, K, d1, ...): classes where `F.cross_entropy` has them.
                      They are read in place if they are (N, K) with classes side by side, else
                      copied once.
    targets:          int64, the shape of the logits without K: classes, or `ignore_index`.
    shift:            the shape of the logits, or (K,) for one shift for all; any floating-point
                      type. No gradient flows into it. Logits of another model make the shift of a
                      product of experts: whatever is constant over the classes, as the normaliser
                      of their softmax, cancels.
    temperature:      > 0, divides the shift.
    reduction:        "mean", "sum" or "none", as for `F.cross_entropy`.
    ignore_index:     targets that count for nothing, likewise.
    label_smoothing:  in [0, 1], likewise.
    weight:           (K,) of the classes, likewise; or None.

    Returns the loss, (), or the shape of targets for reduction "none", in float64 for float64
    logits and float32 for all others; arithmetic is in that type too. Differentiable by the logits,
    as often as needed, in forward mode and by the transforms of torch.func too.

    An ignored row contributes exactly 0, whatever it holds. A target of another value outside of 0
    to K - 1 raises on the CPU and is NaN on a GPU, where looking would wait for the device.

    Raises TypeError and ValueError for types and shapes other than these.

    >>> shift = torch.tensor([0.75, 0.25]).log()
    >>> htv.methods.shifted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), shift).exp()
    tensor(1.3333)
    """
    _check(logits, targets, shift, temperature, reduction, label_smoothing, weight)
    dtype = reference.compute_dtype(logits.dtype)
    rows, flat_targets, shift = (
        _rows(logits),
        targets,
        shift.detach() if shift.requires_grad else shift,
    )
    if torch.float64 in (dtype, shift.dtype):  # kernels take both in double precision, or none
        shift = shift.to(dtype)
    shift = _rows(shift) if shift.shape == logits.shape else shift.contiguous().expand(rows.shape)
    if targets.dim() != 1 or not targets.is_contiguous():
        flat_targets = targets.reshape(-1).contiguous()
    if weight is not None:
        weight = weight.detach().to(dtype).contiguous()
    numbers = float(temperature), weight, ignore_index, float(label_smoothing)
    if not torch.compiler.is_compiling() and schema.transformed(logits):
        loss = _by_definition(rows, flat_targets, shift.detach(), *numbers, reduction)
        return loss.reshape(targets.shape) if reduction == "none" else loss
    loss = _ShiftedCrossEntropy.apply(rows, flat_targets, shift, *numbers, reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


def _rows(logits: Tensor) -> Tensor:
    """(N, K) with stride 1 along K; the logits themselves or a view of them where possible."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    elif logits.dim() > 2:
        logits = logits.movedim(1, -1).flatten(0, -2)
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _check(logits, targets, shift, temperature, reduction, label_smoothing, weight) -> None:
    tensors = {"logits": logits, "shift": shift} | ({} if weight is None else {"weight": weight})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of a floating-point type, got {got}")
    for name, tensor in (tensors | {"targets": targets}).items():
        if tensor.device != logits.device:
            raise ValueError(
                f"{name} is on {tensor.device}, logits are on {logits.device}: move one of them"
            )
    if targets.dtype != torch.int64:
        raise TypeError(
            f"targets must be classes in int64, got {targets.dtype}; for probabilities add the "
            "shift to the logits and use F.cross_entropy"
        )
    if logits.dim() == 0 or logits.shape[class_dim := min(1, logits.dim() - 1)] == 0:
        raise ValueError(
            f"logits must be (N, K), (K,) or (N, K, d1, ...) with K >= 1, got {tuple(logits.shape)}"
        )
    classes, expected = (
        logits.shape[class_dim],
        (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :]),
    )
    if targets.shape != expected:
        raise ValueError(
            f"targets must be {tuple(expected)}, the shape of logits without its classes, got "
            f"{tuple(targets.shape)}"
        )
    if shift.shape not in (logits.shape, (classes,)):
        raise ValueError(
            f"shift must be {tuple(logits.shape)} as logits, or ({classes},), got "
            f"{tuple(shift.shape)}"
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"weight must be ({classes},), one for each class, got {tuple(weight.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _call(op: str, logits: Tensor, *arguments):
    """The op by the backend that serves these logits, inside of an autograd.Function."""
    problem = backend.Problem(op, "mean", logits.device, reference.compute_dtype(logits.dtype))
    operator = backend.operator(op, backend.choose(problem))
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with (
        torch._C._AutoDispatchBelowAutograd()
    ):  # which is written in Python and takes as long as a small op
        return operator(*arguments)


def _count(targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: how many rows count, or the weights of their classes."""
    counted = targets != ignore_index
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[targets.clamp(0, len(weight) - 1)], 0).sum()


def _by_definition(
    logits, targets, shift, temperature, weight, ignore_index, label_smoothing, reduction
) -> Tensor:
    """In plain PyTorch, for forward mode and the transforms of torch.func."""
    # Ignored rows may hold anything, of which 0 times would be NaN.
    ignored = (targets == ignore_index).unsqueeze(1)
    logits, shift = logits.masked_fill(ignored, 0), shift.masked_fill(ignored, 0)
    numbers = temperature, weight, ignore_index, label_smoothing
    loss = reference.shifted_cross_entropy(logits, targets, shift, *numbers)[0]
    if reduction == "none":
        return loss
    return loss.sum() / _count(targets, weight, ignore_index) if reduction == "mean" else loss.sum()


class _ShiftedCrossEntropy(torch.autograd.Function):
    """Reduces as well: what a mean divides by needs no graph."""

    @staticmethod
    def forward(
        ctx, logits, targets, shift, temperature, weight, ignore_index, label_smoothing, reduction
    ):
        numbers = temperature, weight, ignore_index, label_smoothing
        loss, peak, log_sum = _call(
            "shifted_cross_entropy", logits, logits, targets, shift, *numbers
        )
        count = _count(targets, weight, ignore_index) if reduction == "mean" else None
        ctx.reduction, ctx.numbers = reduction, (temperature, ignore_index, label_smoothing)
        ctx.save_for_backward(logits, targets, shift, weight, peak, log_sum, count)
        if reduction == "none":
            return loss
        return loss.sum() if count is None else loss.sum() / count

    @staticmethod
    def backward(ctx, grad):
        logits, targets, shift, weight, peak, log_sum, count = ctx.saved_tensors
        if ctx.reduction != "none":
            grad = (grad if count is None else grad / count).expand(len(targets))
        temperature, ignore_index, label_smoothing = ctx.numbers
        arguments = (
            grad,
            logits,
            targets,
            shift,
            temperature,
            weight,
            ignore_index,
            label_smoothing,
            peak,
            log_sum,
        )
        if torch.is_grad_enabled():
            return _Gradient.apply(*arguments), *(None,) * 7
        return _call("shifted_cross_entropy_grad", logits, *arguments), *(None,) * 7


class _Gradient(torch.autograd.Function):
    """Of the loss by the logits; differentiable in turn, by plain PyTorch."""

    @staticmethod
    def forward(ctx, grad, logits, targets, shift, *numbers):
        *numbers, peak, log_sum = numbers
        temperature, weight, *ctx.ignore_smoothing = numbers
        ctx.temperature = temperature
        ctx.save_for_backward(grad, logits, targets, shift, weight)
        return _call(
            "shifted_cross_entropy_grad",
            logits,
            grad,
            logits,
            targets,
            shift,
            *numbers,
            peak,
            log_sum,
        )

    @staticmethod
    def backward(ctx, grad_grad):
        *given, targets, shift, weight = ctx.saved_tensors
        ignore_index, label_smoothing = ctx.ignore_smoothing
        numbers = ctx.temperature, weight, ignore_index, label_smoothing
        ignored = (targets == ignore_index).unsqueeze(
            1
        )  # may hold anything, of which 0 times would be NaN
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            given = [
                t if further and t.requires_grad else t.detach().requires_grad_() for t in given
            ]
            grad, logits = given[0].masked_fill(ignored[:, 0], 0), given[1].masked_fill(ignored, 0)
            shift = shift.masked_fill(ignored, 0)
            _, peak, log_sum = reference.shifted_cross_entropy(logits, targets, shift, *numbers)
            value = reference.shifted_cross_entropy_grad(
                grad, logits, targets, shift, *numbers, peak, log_sum
            )
            found = torch.autograd.grad(value, given, grad_grad, create_graph=further)
        return *found, *(None,) * 8
