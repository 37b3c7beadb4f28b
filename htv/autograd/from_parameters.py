"""Tensors computed from served parameters alone, and the way of contributions to them back to the
parameters.

A slice of a position table, a chunk of a fused projection, `w.t()`, `exp(p)`, a normalised or
merged weight: layers and elementwise operations compute with them, and what each group contributes
to them is pulled back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from htv.autograd.aggregation import ParameterArgument, UseRecorder
from htv.autograd.deferred import DeferredFactors
from htv.errors import UnsupportedError
from htv.groups import GroupedRows, to_device_async
from htv.ops.factors import (
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.ops.reference import compute_dtype


class Lookup:
    """An origin: the source is an embedding of ids, the same in every forward of the batch, in its
    one parameter.
    """

    def __init__(self, ids: Tensor):
        self.tensor, self.nodes = ids, ("EmbeddingBackward", "IndexBackward")

    def by_example(self, number: int, parameter: Tensor) -> Callable[..., Factors]:
        """Makes factors of a parameter from voters, `tensor` and the gradient of a source that has
        a part per example.
        """
        num_embeddings = len(parameter)

        def make(grouped_rows: GroupedRows, ids: Tensor, grad: Tensor) -> Factors:
            rows, bounds = grouped_rows.grad_rows(grad)
            return EmbeddingFactors(grouped_rows.rows(ids, 0), rows, bounds, num_embeddings)

        return make

    @staticmethod
    def stacked(ids: Tensor, values: Tensor, num_embeddings: int) -> Factors:
        """Contributions from (E, *ids.shape, D), one to the whole source from every group."""
        rows = values.flatten(0, -2)
        bounds = torch.arange(len(values) + 1) * ids.numel()
        return EmbeddingFactors(ids.flatten().repeat(len(values)), rows, bounds, num_embeddings)


class Projection:
    """An origin: the source is a linear layer's output for a constant input; its parameters are
    weight, maybe bias.
    """

    def __init__(self, x: Tensor, has_weight: bool):
        self.tensor, self.has_weight, self.nodes = x, has_weight, ("",)

    def by_example(self, number: int, parameter: Tensor) -> Callable[..., Factors]:
        is_bias = number > 0 or not self.has_weight

        def make(grouped_rows: GroupedRows, x: Tensor, grad: Tensor) -> Factors:
            if is_bias:
                return StackedFactors(grouped_rows.sums(grad))
            rows, bounds = grouped_rows.grad_rows(grad)
            return LinearFactors(grouped_rows.rows(x.to(grad.dtype)), rows, bounds)

        return make


Origin = Lookup | Projection


class PartFactors(Factors):
    """Contributions to a tensor of which every group has its own part: the gradient there, zeros
    elsewhere.
    """

    def __init__(self, grad: Tensor, grouped_rows: GroupedRows):
        self.grad, self.grouped_rows, self.count = grad, grouped_rows, grouped_rows.count
        self.shape, self.device, self.dtype = (
            tuple(grad.shape),
            grad.device,
            compute_dtype(grad.dtype),
        )

    def contribution(self, group: int) -> Tensor:
        start, end = self.grouped_rows.offsets[group : group + 2].tolist()
        order, weights = self.grouped_rows.order, self.grouped_rows.groups.weights
        mine = torch.arange(start, end) if order is None else order[start:end]
        part = torch.zeros_like(self.grad, dtype=self.dtype)
        rows = part.movedim(self.grouped_rows.dim, 0)
        mine = to_device_async(mine, self.device)
        rows[mine] = self.grad.movedim(self.grouped_rows.dim, 0)[mine].to(self.dtype)
        return part if weights is None else part * weights[group].item()

    def total(self) -> Tensor:
        return sum(self.contribution(e) for e in range(self.count))


class TensorFromParameters:
    """A tensor computed from `parameters` with a graph of its own.

    source:  the tensor.
    recorders:   those of the parameters.
    origin:  how the source was made, if that is known.

    The way back is fixed here: what is done to the source in place later does not concern the uses
    made now. Raises UnsupportedError if the source also depends on anything else that needs a
    gradient.
    """

    def __init__(
        self,
        source: Tensor,
        parameters: list[Tensor],
        recorders: list[UseRecorder],
        origin: Origin | None = None,
    ):
        self.source, self.parameters, self.recorders, self.origin = (
            source,
            parameters,
            recorders,
            origin,
        )
        self._view = _view_of(source, parameters[0]) if len(parameters) == 1 else None
        self._edge = get_gradient_edge(source)
        self._require_own_graph()
        if origin is not None and not self._edge.node.name().startswith(origin.nodes):
            self.origin = None  # changed in place since

    def _require_own_graph(self) -> None:
        own, seen, ahead = {id(p) for p in self.parameters}, set(), [self._edge.node]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if (
                leaf is not None and id(leaf) not in own
            ) or node.name() == "AggregationNodeBackward":
                what = "the batch" if leaf is None else f"a tensor of shape {tuple(leaf.shape)}"
                names = ", ".join(
                    repr(recorder.buffer.parameter_name) for recorder in self.recorders
                )
                raise UnsupportedError(
                    f"a tensor of shape {tuple(self.source.shape)} was taken to be computed from "
                    f"the served parameters {names} alone, but it also depends on {what}, whose "
                    f"gradient would be lost. Remedy: detach that tensor, or exclude={names}"
                )
            ahead.extend(n for n, _ in node.next_functions)

    def argument(self) -> ParameterArgument:
        """For a layer that computes with the source."""
        adapted = [
            UseRecorder(s.token, s.buffer, self._adapt(number), s.born)
            for number, s in enumerate(self.recorders)
        ]
        return ParameterArgument(self.source.detach(), adapted)

    @property
    def is_view(self) -> bool:
        return self._view is not None

    def record_by_example(self, grad: Tensor, grouped_rows: GroupedRows) -> None:
        """Record the gradient of a source of which every example has its own part, where
        `grouped_rows` says.
        """
        for number, (recorder, p) in enumerate(zip(self.recorders, self.parameters, strict=True)):
            if not recorder.wanted():
                continue
            if self.origin is not None:
                make, tensors = self.origin.by_example(number, p), (self.origin.tensor, grad)
                recorder.record(recorder.buffer.made(make, grouped_rows, tensors))
            else:
                pull_back = lambda grad, number=number: self._pull_back(grad, number)
                recorder.record(GroupwiseFactors(PartFactors(grad, grouped_rows), pull_back, p))

    def _adapt(self, number: int) -> Callable[[Factors], Factors]:
        """From factors of the source to factors of one parameter."""
        parameter = self.parameters[number]

        def adapt(factors: Factors) -> Factors:
            if isinstance(factors, DeferredFactors):
                return self._adapt_later(factors, number)
            if self._view is not None:
                return ViewFactors.of(factors, self._view, parameter)
            if isinstance(factors, StackedFactors):
                if isinstance(self.origin, Lookup):
                    return Lookup.stacked(self.origin.tensor, factors.values, len(parameter))
                return StackedFactors(self._pull_back(factors.values, number, batched=True))
            return GroupwiseFactors(factors, lambda grad: self._pull_back(grad, number), parameter)

        return adapt

    def _adapt_later(self, later: DeferredFactors, number: int) -> DeferredFactors:
        """The same where a backward is traced: through the graph of the source now, the rest when
        the backward runs.
        """
        if self._view is not None:
            view = self._view
            return later.then(lambda factors, parameter: ViewFactors.of(factors, view, parameter))
        values = later.stacked_now(self.recorders[number].buffer.parameter_name)
        if isinstance(self.origin, Lookup):
            count = len(self.parameters[number])
            make = lambda grouped_rows, ids, values: Lookup.stacked(
                ids, grouped_rows.along(values, dim=0), count
            )
            return DeferredFactors(make, later.grouped_rows, (self.origin.tensor, values))
        make = lambda grouped_rows, values: StackedFactors(grouped_rows.along(values, dim=0))
        return DeferredFactors(
            make, later.grouped_rows, (self._pull_back(values, number, batched=True),)
        )

    def _pull_back(self, grad: Tensor, number: int, batched: bool = False) -> Tensor:
        """One parameter's part of the vector-Jacobian product of (*source.shape), or of a stack of
        these.
        """
        parameter = self.parameters[number]
        with torch.enable_grad(), _without_hooks(self.parameters):
            (found,) = torch.autograd.grad(
                self._edge,
                parameter,
                grad.to(self.source.dtype),
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
        if found is None:
            found = grad.new_zeros(*grad.shape[: grad.dim() - self.source.dim()], *parameter.shape)
        return found


def _view_of(
    source: Tensor, parameter: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """(size, stride, offset into the parameter) of a view that shows no element twice; None for
    other tensors.
    """
    if (
        source._base is not parameter
        or source.dtype != parameter.dtype
        or source.is_conj()
        or source.is_neg()
    ):
        return None
    end = 1  # what the dims so far reach over; one that strides less shows elements again
    for stride, size in sorted(
        (s, n) for s, n in zip(source.stride(), source.shape, strict=True) if n > 1
    ):
        if stride < end:
            return None
        end = stride * size
    dense = torch.empty_like(parameter, device="meta")
    if dense.stride() != parameter.stride():
        return None
    return (
        tuple(source.shape),
        source.stride(),
        source.storage_offset() - parameter.storage_offset(),
    )


@contextmanager
def _without_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Hooks on the parameters are for their gradients, not for contributions on their way into a
    buffer.
    """
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)
