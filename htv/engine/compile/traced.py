"""What stands for groups, parameters and their nodes while a compiled forward and its backward are
traced.

Tensors have no values then, and who votes is not known. The stand-ins live as long as the trace;
settlements stay: they tell the operator that a traced node leaves in the graph what to do when the
compiled backward runs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

from htv.autograd.aggregation import (
    AggregationNode,
    BufferListener,
    ContributionBuffer,
    NestedBackwards,
    ParameterArgument,
    UseRecorder,
)
from htv.autograd.deferred import DeferredFactors, deferred_refusal
from htv.engine.forward import ForwardStandIn
from htv.engine.group_spec import StaticGroupSpec
from htv.engine.guard_state import keys
from htv.engine.mode import ServingMode
from htv.engine.parameter import TrackedParameter
from htv.engine.provenance import LOST, FromParameters, Mark
from htv.engine.torch_ops import tensors_in
from htv.errors import UnsupportedError
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops.factors import Factors


class TracedGroups(Groups):
    """Tells who votes in a forward that is being traced: known when it runs.

    plan:   all about it but the values.
    value:  the ids, bounds or mask, or None.
    """

    def __init__(self, plan: StaticGroupSpec, value: Tensor | None):
        super().__init__(
            plan.batch_size, None, input_layout=BatchLayout(plan.dim), rows_vote=plan.kind == "rows"
        )
        object.__setattr__(self, "plan", plan)
        object.__setattr__(self, "value", value)

    def described(self) -> str:
        return f"{self.plan.kind} of {self.batch_size} examples"

    def same_groups(self, other: TracedGroups) -> bool:
        return self.plan == other.plan and self.value is other.value

    def grouped_rows(self, layout: BatchLayout) -> GroupedRows:
        return EachRow(self, layout)


class EachRow(GroupedRows):
    """Lists every index of a batch's dim by itself, as contributions are computed while tracing."""

    def __init__(self, groups: TracedGroups, layout: BatchLayout):
        self.groups, self.layout, self.dim, self.order = groups, layout, layout.dim, None
        self.rows_vote, self.plain = groups.rows_vote, False
        self.count = layout.size(groups.batch_size)

    def ungrouped(self) -> EachRow:
        return self

    @property
    def offsets(self) -> Tensor:
        return torch.arange(self.count + 1)

    def bounds(self, rows: Tensor) -> Tensor:
        per_index = 1 if self.rows_vote else len(rows) // max(1, self.count)
        return torch.arange(0, len(rows) + 1, max(1, per_index))

    def along(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        return tensor.movedim(self.dim if dim is None else dim, 0)


class TracedMode(ServingMode):
    """The mode, for tensors without values."""

    def mark(self, tensor: Tensor | None) -> Mark | None:
        if tensor is not None and not isinstance(tensor, (FunctionalTensor, FakeTensor)):
            raise UnsupportedError(
                f"a tensor of shape {tuple(tensor.shape)} is neither an argument of the forward "
                "nor a parameter, buffer or attribute of its modules (a global, a list's item, a "
                "closure's variable): the compiled forward would keep its present value. Remedy: "
                "register it as a buffer, or pass it as an argument"
            )
        return super().mark(tensor)

    def mark_results(self, func, args, kwargs, operands, result) -> None:
        """The examples' numbers have values; where they meet a tensor without, nobody knows where
        the batch went.
        """
        try:
            with _disable_current_modes():
                super().mark_results(func, args, kwargs, operands, result)
        except UnsupportedError:
            raise
        except (RuntimeError, AssertionError):
            for output in tensors_in((result,), None):
                self.marks.put(output, LOST)

    def why_not_batch(self, x: Tensor, mark: Mark | None, features: int) -> str | None:
        why = super().why_not_batch(x, mark, features)
        return (
            why
            and f"{why} (or one that picks rows by the values of a tensor, which torch.compile "
            "does not have)"
        )


class TracedParameter(BufferListener):
    """Stands for a served parameter in one trace.

    Refers to its node weakly: a cycle through autograd's graph would never be collected.
    """

    def __init__(self, tracked: TrackedParameter, parameter: Tensor):
        self.tracked, self.parameter, self.name, self.rule = (
            tracked,
            parameter,
            tracked.name,
            tracked.rule,
        )
        self.passes, self.settled = NestedBackwards(), set()
        self.note, self.defer, self.uses = tracked.note, tracked.defer, tracked.uses
        self._hub = lambda: None, lambda: None
        self.delivered: list[Tensor] = []
        check = weakref.WeakMethod(self._check_gradient)
        parameter.register_hook(lambda grad: check() and check()(grad))

    @property
    def refusal(self) -> str | None:
        return self.tracked.refusal

    @refusal.setter
    def refusal(self, value: str) -> None:
        self.tracked.refusal = value

    def recorder(self, groups: TracedGroups, born: int = -1) -> UseRecorder:
        token, buffer = (reference() for reference in self._hub)
        if token is None or buffer is None or not buffer.groups.same_groups(groups):
            buffer = TracedBuffer(self, groups)
            token = AggregationNode.apply((buffer,), self.parameter)
            self._hub = weakref.ref(token), weakref.ref(buffer)
        buffer.used = True
        return UseRecorder(token, buffer)

    def argument(self, groups: TracedGroups, born: int, small: bool) -> ParameterArgument:
        return ParameterArgument(self.parameter.detach(), (self.recorder(groups, born),))

    def differentiate(self, grad: Tensor, groups: Groups) -> None:
        raise UnsupportedError(
            f"a derivative in the forward (create_graph=True) reaches parameter {self.name!r}, and "
            "torch.compile has no second derivatives. Remedy: run this model without torch.compile"
        )

    def _check_gradient(self, grad: Tensor | None) -> None:
        """Inside one graph, what comes by another way is added where no hook on the real parameter
        sees it.
        """
        delivered, self.delivered = self.delivered, []
        if grad is not None and self.refusal is None and not any(grad is d for d in delivered):
            self.tracked.refuse_gradient(twice=len(delivered) > 1)


_traced_parameters: weakref.WeakValueDictionary[int, TracedParameter] = (
    weakref.WeakValueDictionary()
)


class TracedSession:
    """What the mode needs of a session, for one trace."""

    def __init__(self, forward: ForwardStandIn, tensors: list[Tensor]):
        session = forward.session
        self.passes_plainly, self.shares_statistics = (
            session.passes_plainly,
            session.shares_statistics,
        )
        self.unsupported = session.unsupported
        self._tracked: dict[int, TracedParameter] = {}
        self.own_marks: dict[int, FromParameters] = {}
        self._constants: list[Tensor] = []
        for tensor, parameter in zip(tensors, forward.guard_state.parameters, strict=True):
            tracked = session.tracked_parameter(parameter)
            if tracked is None:
                self._constants.append(tensor)
                continue
            traced = _traced_parameters.get(id(tensor))
            if (
                traced is None or traced.parameter is not tensor
            ):  # else from another call in the same graph
                traced = _traced_parameters[id(tensor)] = TracedParameter(tracked, tensor)
            self._tracked[id(tensor)] = traced
            self.own_marks[id(tensor)] = FromParameters((traced,), tensor)

        self.note_loss = session.note_loss

    def stands_in(self, tensor: Tensor) -> None:
        """The tensors of a trace are those of the modules, exchanged for it."""

    def tracked_parameter(self, tensor: Tensor) -> TracedParameter | None:
        return self._tracked.get(id(tensor))

    def known_results(self, groups: Groups) -> None:
        """Nothing is kept of tensors without values."""

    def constants(self) -> list[Tensor]:
        return self._constants


class TracedBuffer(ContributionBuffer):
    """Gathers what a traced backward records, and leaves the operator that settles it when the
    backward runs.
    """

    def __init__(self, owner: TracedParameter, groups: TracedGroups):
        super().__init__(owner.rule, groups, owner)
        self.owner = owner  # nobody else may keep it

    def made(
        self, make: Callable[..., Factors], grouped_rows: GroupedRows, tensors: tuple[Tensor, ...]
    ) -> DeferredFactors:
        return DeferredFactors(make, grouped_rows, tensors)

    def settle(self, parameter: Tensor, gradient_node) -> Tensor | None:
        parts = self.taken(torch._C._current_graph_task_id())
        if parts is None:
            return None
        if not all(isinstance(part, DeferredFactors) for part in parts):
            raise deferred_refusal(self.parameter_name)
        tensors = [tensor for part in parts for tensor in part.tensors]
        recipes = [(part.recipe(), len(part.tensors)) for part in parts]
        key = next(keys)
        _settlements[key] = settlement = Settlement(self.owner.tracked, self.groups.plan, recipes)
        self.owner.tracked.session.settlements.append(settlement)
        grad = torch.ops.htv.settle(tensors, self.groups.value, key)
        self.owner._hub = lambda: None, lambda: None
        self.owner.delivered.append(grad)
        return grad


# -- when the compiled backward runs ---------------------------------------------------------------


class Settlement:
    """How one traced node's gradient is computed. recipes: of each use, and how many tensors it
    takes.
    """

    def __init__(
        self,
        tracked: TrackedParameter,
        plan: StaticGroupSpec,
        recipes: list[tuple[Callable[..., Factors], int]],
    ):
        self.tracked, self.plan, self.recipes = tracked, plan, recipes

    def empty(self) -> Tensor:
        p = self.tracked.parameter
        return torch.empty(p.shape, dtype=p.dtype, device=p.device)

    def run(self, tensors: Iterator[Tensor], value: Tensor | None) -> Tensor:
        tracked, parameter, groups = self.tracked, self.tracked.parameter, self.plan.groups(value)
        buffer = ContributionBuffer(tracked.rule, groups, tracked, tracked.session.collects_stats)
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            if not tracked.attached:
                tracked.guard()
            for recipe, count in self.recipes:
                buffer.record(recipe(groups, parameter, list(itertools.islice(tensors, count))))
            if not tracked.session.joint.later and not groups.rows_vote:
                tracked.session.require_several(groups.count, f"of {groups.batch_size} examples")
            node = None if tracked.gathering is None else _gradient_node(parameter)
            grad = buffer.settle(parameter, node)
            grad = (
                self.empty().zero_() if grad is None else grad.contiguous()
            )  # None: it accumulates
        tracked.expect(grad, torch._C._current_graph_task_id())
        return grad


@torch.enable_grad()
def _gradient_node(parameter: Tensor):
    """Where autograd takes a gradient of the parameter."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


_settlements: weakref.WeakValueDictionary[str, Settlement] = (
    weakref.WeakValueDictionary()
)  # sessions keep them alive

_library = torch.library.Library("htv", "FRAGMENT")
_library.define(
    "settle(Tensor[] tensors, Tensor? value, str key) -> Tensor",
    tags=(
        torch.Tag.cudagraph_unsafe,
    ),  # what it does beside computing, a replayed CUDA graph would not
)


def _settle(tensors: list[Tensor], value: Tensor | None, key: str) -> Tensor:
    settlement = _settlements.get(key)
    if settlement is None:
        raise RuntimeError(
            "backward through a compiled forward of a model that was attached, but is gone"
        )
    return settlement.run(iter(tensors), value)


_library.impl("settle", _settle, "CompositeExplicitAutograd")
torch.library.register_fake(
    "htv::settle", lambda tensors, value, key: _settlements[key].empty(), lib=_library
)
