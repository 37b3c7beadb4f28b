"""Parameters used elementwise (positions, class tokens, scales, gates): expanded so that every unit sees its own copy.

The gradient of the expanded tensor then is the stack of contributions. What is expanded may be the parameter itself or
a tensor *derived* from parameters alone (a slice, a reshape, exp of it); contributions to a derived tensor are pulled
back to its parameters through its own small graph, one vector-Jacobian product per group.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from htv.autograd.ledger import Slot, full_precision
from htv.groups import Groups
from htv.ops.factors import StackedFactors


def expand(source: Tensor, parameters: list[Tensor], slots: list[Slot], ndim: int, groups: Groups) -> Tensor:
    """Copies of `source` for every unit, broadcastable against (*lead, *rest) tensors of `ndim` dims.

    source:      parameters[0] itself, or a tensor computed from `parameters` with a graph; its dims are aligned to the
                 right of the ndim dims, and those it has among the leading ones must have size 1.
    Returns (*lead, *source dims after them) with ndim dims.
    """
    padded = (1,) * (ndim - source.dim()) + tuple(source.shape)
    shape = (*groups.lead, *padded[len(groups.lead) :])
    tokens = [slot.token for slot in slots]
    return _Expand.apply(_Derived(source, parameters, slots), shape, groups, *tokens)


class _Pulling(threading.local):
    """Marks the inner differentiation of a derived tensor, so that hooks on parameters can tell it from a backward."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_) -> None:
        self.depth -= 1


_pulling = _Pulling()


def pulling_back() -> bool:
    """Whether gradients now reaching parameters are contributions on their way into a ledger."""
    return _pulling.depth > 0


class _Derived:
    """A tensor, the parameters it comes from, and the way back."""

    def __init__(self, source: Tensor, parameters: list[Tensor], slots: list[Slot]):
        self.source, self.parameters, self.slots = source, parameters, slots

    def pull_back(self, stacked: Tensor) -> list[Tensor | None]:
        """(E, *source.shape) contributions to the source -> (E, *shape) for every parameter."""
        if len(self.parameters) == 1 and self.source is self.parameters[0]:
            return [stacked]
        with torch.enable_grad(), _pulling:
            return list(
                torch.autograd.grad(
                    self.source,
                    self.parameters,
                    stacked.to(self.source.dtype),
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                )
            )


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, derived, shape, groups, *tokens):
        ctx.derived, ctx.groups = derived, groups
        source = derived.source.detach()
        return source.reshape((1,) * (len(shape) - source.dim()) + tuple(source.shape)).expand(shape)

    @staticmethod
    def backward(ctx, grad):
        derived, groups = ctx.derived, ctx.groups
        with full_precision(grad.device):
            stacked = groups.sum_units(grad)
            stacked = stacked.reshape(groups.count, *derived.source.shape)
            for slot, values in zip(derived.slots, derived.pull_back(stacked), strict=True):
                if values is not None:
                    slot.ledger.record(StackedFactors(values, groups))
        return None, None, None, *(None for _ in derived.slots)
