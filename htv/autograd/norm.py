"""Layer and group normalisation with aggregated gradients of scale and shift.

Both are y = x_hat * weight + bias with statistics inside one example, so the contribution of a group is the sum over
its positions of grad * x_hat and of grad: one vector per group, no more than the activations themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.groups import Voters
from htv.ops.factors import SCRATCH_BYTES, StackedFactors
from htv.ops.reference import compute_dtype


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Slot, bias: Slot, eps: float, voters: Voters) -> Tensor:
    """F.layer_norm. x: (*rest, *shape) with the batch in one of rest; weight and bias: shape."""
    tokens = *weight.tokens, *bias.tokens
    return _LayerNorm.apply(x, weight.value, bias.value, weight, bias, shape, eps, voters, *tokens)


def group_norm(x: Tensor, num_groups: int, weight: Slot, bias: Slot, eps: float, voters: Voters) -> Tensor:
    """F.group_norm. x: (S, C, *space); weight and bias: (C,)."""
    tokens = *weight.tokens, *bias.tokens
    return _GroupNorm.apply(x, weight.value, bias.value, weight, bias, num_groups, eps, voters, *tokens)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_slot, bias_slot, shape, eps, voters, *tokens):
        ctx.slots, ctx.shape, ctx.voters = (weight_slot, bias_slot), shape, voters
        ctx.unused = (None,) * (5 + len(tokens))
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(MARKER, x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        _, x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, voters = ctx.shape, ctx.voters

        def rows(t: Tensor) -> Tensor:
            """(*rest, *shape) -> (S, ..., prod(shape)), the batch's dim in front; (S, ..., 1) of mean and rstd."""
            return t.flatten(t.dim() - len(shape)).movedim(voters.dim, 0)

        with full_precision(grad.device):
            grads = _affine_grads(ctx, shape, *map(rows, (x, mean, rstd, grad)))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                    grad, x, shape, mean, rstd, weight, bias, [True, False, False]
                )
        return grad_x, *grads, *ctx.unused


def _group_norm_format(x: Tensor) -> torch.memory_format:
    """What F.group_norm computes and returns: the input's memory format on the CPU, contiguous elsewhere."""
    if x.device.type == "cpu":
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_slot, bias_slot, num_groups, eps, voters, *tokens):
        ctx.slots, ctx.num_groups, ctx.voters = (weight_slot, bias_slot), num_groups, voters
        ctx.unused = (None,) * (5 + len(tokens))
        n, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        x = x.contiguous(memory_format=_group_norm_format(x))
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, space, num_groups, eps)
        ctx.save_for_backward(MARKER, x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        _, x, weight, mean, rstd = ctx.saved_tensors
        with full_precision(grad.device):
            grad_x, *sums = _of_every_sample(grad, x, weight, mean, rstd, ctx.num_groups, ctx.needs_input_grad[0])
            make = lambda voters, sums: StackedFactors(voters.along(sums))
            grads = [
                slot.grad(needed, make, ctx.voters, of_samples)
                for slot, needed, of_samples in zip(ctx.slots, ctx.needs_input_grad[1:3], sums, strict=True)
            ]
        return grad_x, *grads, *ctx.unused


def _of_every_sample(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What backward gives for x (S, C, *space), and (S, C) of every sample by itself for scale and shift.

    One call of torch's backward gives it all: of one sample with the channels of all S.
    """
    samples, channels = x.shape[:2]
    given, dtype = x.dtype, compute_dtype(x.dtype)
    if x.device.type != "cpu":  # there all must be of one type
        x, grad = x.to(dtype), grad.to(dtype)
    weight = mean.new_ones(channels) if weight is None else weight
    grad_x, scale, shift = torch.ops.aten.native_group_norm_backward(
        grad.reshape(1, samples * channels, -1).contiguous(),
        x.reshape(1, samples * channels, -1).contiguous(),
        mean.to(dtype).reshape(1, -1),
        rstd.to(dtype).reshape(1, -1),
        weight.to(dtype).expand(samples, -1).reshape(-1),
        1,
        samples * channels,
        math.prod(x.shape[2:]),
        samples * num_groups,
        [needs_x, True, True],
    )
    grad_x = grad_x.reshape(x.shape).to(given) if needs_x else None
    return grad_x, scale.reshape(samples, channels), shift.reshape(samples, channels)


class _Normalised:
    """x and its statistics, with the output gradient, taken a few indices of the batch at a time: small temporaries.

    All of x and grad: (S, *rest, features), indices of the batch's dim in front; mean and rstd broadcast against them.
    """

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, grad: Tensor):
        self.tensors, self.dtype = (x, mean, rstd, grad), compute_dtype(x.dtype)
        self.chunk = max(1, SCRATCH_BYTES // max(1, math.prod(x.shape[1:]) * 4))

    def stacked(self, combine: Callable[[Tensor, Tensor], Tensor], voters: Voters) -> Tensor:
        """(E, features): the sum over each group's rows of combine(grad, x_hat); unsummed where rows vote."""
        pieces = []
        for x, mean, rstd, grad in zip(*(t.split(self.chunk) for t in self.tensors), strict=True):
            x_hat = (x.to(self.dtype) - mean.to(self.dtype)) * rstd.to(self.dtype)
            piece = combine(grad.to(self.dtype), x_hat)
            pieces.append(piece if voters.rows_vote else piece.flatten(1, -2).sum(dim=1) if piece.dim() > 2 else piece)
        joined = torch.cat(pieces).movedim(0, voters.dim) if voters.rows_vote else torch.cat(pieces)
        return voters.sums(joined) if voters.rows_vote else voters.along(joined, dim=0)


def _affine_grads(ctx, shape: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of scale and shift, of that shape, or None where they are recorded. tensors: of `_Normalised`."""

    def grad(index: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        def factors(voters: Voters, *tensors: Tensor) -> StackedFactors:
            stacked = _Normalised(*tensors).stacked(combine, voters)
            return StackedFactors(stacked.reshape(len(stacked), *shape))

        return ctx.slots[index].grad(ctx.needs_input_grad[1 + index], factors, ctx.voters, *tensors)

    return grad(0, lambda grad, x_hat: grad * x_hat), grad(1, lambda grad, x_hat: grad)
