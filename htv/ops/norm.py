"""What normalisations contribute to their scale and shift, and the gradient of a group
normalisation's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from htv.ops import backend, limits, reference, registry
from htv.ops.reference import cast, compute_dtype


def norm_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The op `norm_sums` of `htv.ops.schema`; where no kernel serves, some samples at a time: small
    temporaries.
    """
    operator = _operator("norm_sums", x)
    if operator is not None:
        return operator(grad, x, mean, rstd)
    step = max(1, limits.SCRATCH_BYTES // max(1, math.prod(x.shape[1:]) * 4))
    pieces = [
        reference.norm_sums(*some)
        for some in zip(*(t.split(step) for t in (grad, x, mean, rstd)), strict=True)
    ]
    scale, shift = zip(*pieces, strict=True)
    return torch.cat(scale), torch.cat(shift)


def group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What backward gives for x (S, C, *space), and (S, C) of every sample by itself for scale and
    shift.

    weight: (C,), ones if None; mean and rstd: (S, G), as torch.native_group_norm gives them.
    """
    dtype = compute_dtype(x.dtype)
    weight = mean.new_ones(x.shape[1]) if weight is None else weight
    if weight.dtype != dtype or mean.dtype != dtype:
        weight, mean, rstd = weight.to(dtype), mean.to(dtype), rstd.to(dtype)
    operator = _operator("group_norm_backward", x)
    if operator is not None and x.is_contiguous():
        operands = grad.contiguous(), x, weight, mean, rstd, needs_x
        grad_x, scale, shift = operator(*operands)
    else:
        grad_x, scale, shift = _group_norm_backward_by_torch(grad, x, weight, mean, rstd, needs_x)
    return cast(grad_x, x.dtype) if needs_x else None, scale, shift


def _group_norm_backward_by_torch(grad, x, weight, mean, rstd, needs_x):
    """One call of torch's backward gives it all: of one sample with the channels of all S."""
    samples, channels = x.shape[:2]
    if x.device.type != "cpu":  # there all must be of one type
        x, grad = x.to(mean.dtype), grad.to(mean.dtype)
    grad_x, scale, shift = torch.ops.aten.native_group_norm_backward.default(
        grad.contiguous(),
        x.contiguous(),
        mean.view(1, -1),
        rstd.view(1, -1),
        weight.expand(samples, -1).reshape(-1),
        1,
        samples * channels,
        math.prod(x.shape[2:]),
        mean.numel(),
        [needs_x, True, True],
    )
    return grad_x, scale.view(samples, channels), shift.view(samples, channels)


_operators = registry.kept_choices()


def _operator(op: str, x: Tensor) -> Callable | None:
    """Return the operator that serves an op for such inputs, or None where none does."""
    key = op, x.dtype, x.device, backend.setting()
    kept = _operators.get(key, False)
    if kept is not False:
        return kept
    problem = backend.Problem(op, "", x.device, compute_dtype(x.dtype))
    server = backend.choose(problem)
    found = None if server == "reference" else backend.operator(op, server)
    backend.keep(_operators, key, found, x.device)
    return found
