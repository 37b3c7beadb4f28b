"""Parameters used elementwise (positions, class tokens, scales, gates): expanded so that every unit sees its own copy.

The gradient of the expanded tensor then is the stack of contributions. What is expanded may be the parameter itself or
a tensor *derived* from parameters alone (a slice, a reshape, exp of it); contributions to a derived tensor are pulled
back to its parameters through its own small graph, one vector-Jacobian product per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from htv.autograd.ledger import MARKER, Slot, full_precision
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops.factors import EmbeddingFactors, StackedFactors


def expand(derived: DerivedTensor, ndim: int, groups: Groups, dtype: torch.dtype | None = None) -> Tensor:
    """Copies of a derived tensor for every unit, broadcastable against (*lead, *rest) tensors of `ndim` dims.

    Its dims are aligned to the right of the ndim dims; those it has among the leading ones must have size 1.
    dtype: of the copies, if not the tensor's own. (One of no dims does not decide the type of a result, copies would.)
    Returns (*lead, *its dims after them) with ndim dims.
    """
    padded = (1,) * (ndim - derived.source.dim()) + tuple(derived.source.shape)
    shape = (*groups.lead, *padded[len(groups.lead) :])
    return _Expand.apply(derived, shape, groups, dtype, *(slot.token for slot in derived.slots))


class DerivedTensor:
    """A tensor, the parameters it comes from, and the way back for contributions to it.

    source:  the one parameter itself, or a tensor computed from `parameters` with a graph.
    slots:   the parameters' slots.
    ids:     integers, where source is an embedding of them in the one parameter; else None.

    The way back is fixed here: what is done to the source in place later does not concern the copies made now.
    Raises UnsupportedError if the source also depends on anything else that needs a gradient.
    """

    def __init__(self, source: Tensor, parameters: list[Tensor], slots: list[Slot], ids: Tensor | None):
        self.source, self.parameters, self.slots, self.ids = source, parameters, slots, ids
        self._edge = None
        if source is not parameters[0]:
            self._edge = get_gradient_edge(source)
            self._require_own_graph()
            if ids is not None and not self._edge.node.name().startswith("EmbeddingBackward"):
                self.ids = None  # changed in place since the lookup

    def _require_own_graph(self) -> None:
        own, seen, ahead = {id(p) for p in self.parameters}, set(), [self._edge.node]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if (leaf is not None and id(leaf) not in own) or node.name() == "HubBackward":
                what = "the batch" if leaf is None else f"a tensor of shape {tuple(leaf.shape)}"
                names = ", ".join(repr(slot.ledger.owner_name) for slot in self.slots)
                raise UnsupportedError(
                    f"a tensor of shape {tuple(self.source.shape)} was taken to be computed from the served "
                    f"parameters {names} alone, but it also depends on {what}, whose gradient would be lost. Remedy: "
                    f"detach that tensor, or exclude={names}"
                )
            ahead.extend(n for n, _ in node.next_functions)

    def record(self, stacked: Tensor, groups: Groups) -> None:
        """Record (E, *source.shape) contributions to the source as contributions to its parameters."""
        if self._edge is None:
            self.slots[0].record(lambda: StackedFactors(stacked, groups))
        elif self.ids is not None:
            ids = self.ids.expand(len(stacked), *self.ids.shape)
            count, each = len(self.parameters[0]), Groups.each(len(stacked))
            self.slots[0].record(lambda: EmbeddingFactors(ids, stacked, count, None, each))
        else:
            for slot, values in zip(self.slots, self._pull_back(stacked), strict=True):
                if values is not None:
                    slot.record(lambda values=values: StackedFactors(values, groups))

    def _pull_back(self, stacked: Tensor) -> tuple[Tensor | None, ...]:
        """One vector-Jacobian product per group, batched: (E, *shape) for every parameter."""
        with torch.enable_grad(), _without_hooks(self.parameters):
            return torch.autograd.grad(
                self._edge,
                self.parameters,
                stacked.to(self.source.dtype),
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )


@contextmanager
def _without_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Hooks on the parameters are for their gradients, not for contributions on their way into a ledger."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, derived, shape, groups, dtype, *tokens):
        ctx.derived, ctx.groups = derived, groups
        ctx.save_for_backward(MARKER)
        source = derived.source.detach()
        source = source if dtype is None else source.to(dtype)
        return source.reshape((1,) * (len(shape) - source.dim()) + tuple(source.shape)).expand(shape)

    @staticmethod
    def backward(ctx, grad):
        derived, groups = ctx.derived, ctx.groups
        with full_precision(grad.device):
            grad = grad.to(derived.source.dtype)
            derived.record(groups.sum_units(grad).reshape(groups.count, *derived.source.shape), groups)
        return None, None, None, None, *(None for _ in derived.slots)
