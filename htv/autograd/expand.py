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
from htv.ops.factors import EmbeddingFactors, StackedFactors


def expand(derived: DerivedTensor, ndim: int, groups: Groups) -> Tensor:
    """Copies of a derived tensor for every unit, broadcastable against (*lead, *rest) tensors of `ndim` dims.

    Its dims are aligned to the right of the ndim dims; those it has among the leading ones must have size 1.
    Returns (*lead, *its dims after them) with ndim dims.
    """
    padded = (1,) * (ndim - derived.source.dim()) + tuple(derived.source.shape)
    shape = (*groups.lead, *padded[len(groups.lead) :])
    return _Expand.apply(derived, shape, groups, *(slot.token for slot in derived.slots))


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


class DerivedTensor:
    """A tensor, the parameters it comes from, and the way back for contributions to it.

    source:  the one parameter itself, or a tensor computed from `parameters` with a graph.
    slots:   the parameters' slots.
    ids:     integers, where source is an embedding of them in the one parameter; else None.
    """

    def __init__(self, source: Tensor, parameters: list[Tensor], slots: list[Slot], ids: Tensor | None):
        self.source, self.parameters, self.slots, self.ids = source, parameters, slots, ids

    def record(self, stacked: Tensor, groups: Groups) -> None:
        """Record (E, *source.shape) contributions to the source as contributions to its parameters."""
        if self.source is self.parameters[0]:
            self.slots[0].ledger.record(StackedFactors(stacked, groups))
        elif self.ids is not None:
            ids = self.ids.expand(len(stacked), *self.ids.shape)
            factors = EmbeddingFactors(ids, stacked, len(self.parameters[0]), None, Groups.each(len(stacked)))
            self.slots[0].ledger.record(factors)
        else:
            for slot, values in zip(self.slots, self._pull_back(stacked), strict=True):
                if values is not None:
                    slot.ledger.record(StackedFactors(values, groups))

    def _pull_back(self, stacked: Tensor) -> tuple[Tensor | None, ...]:
        """One vector-Jacobian product per group, batched: (E, *shape) for every parameter."""
        with torch.enable_grad(), _pulling:
            return torch.autograd.grad(
                self.source,
                self.parameters,
                stacked.to(self.source.dtype),
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
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
            derived.record(groups.sum_units(grad).reshape(groups.count, *derived.source.shape), groups)
        return None, None, None, *(None for _ in derived.slots)
