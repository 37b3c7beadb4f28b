"""Where the contributions to one parameter meet before the rule is applied.

Every use of a served parameter takes a *token* of its node, an empty tensor that only carries a
graph edge:

    parameter -> AggregationNode -> token -> use 1, use 2, ...

Parameters whose contributions are small share a node and its token, each with a buffer of its own.
In backward every use records its factors in its parameter's buffer and returns no gradient for the
token. The autograd engine runs the node once all uses of the token that this backward reaches have
run; the node then applies the rule to the recorded factors, summed per group, and returns the
parameters' gradients. So counting the uses (tied weights, a module called twice, an output the loss
ignores) is left to the engine, and factors live no longer than they must.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from htv.autograd.accumulation import Gathering
from htv.errors import UnsupportedError
from htv.groups import GroupedRows, Groups
from htv.ops import aggregate
from htv.ops.factors import Factors
from htv.rules import Rule

# Saved first by every Function: a forward run again without htv (activation checkpointing of a
# function that is no module) saves something else first, which torch.utils.checkpoint notices.
MARKER = torch.empty(0, 7, dtype=torch.uint8, device="cpu")


MOST_PASSES = 64  # backward passes whose voters are remembered at a time, in as many threads


class NestedBackwards:
    """Which backward passes run inside another (reentrant activation checkpointing), and who votes
    in each, as far as buffers met them.
    """

    def __init__(self) -> None:
        self.outer: dict[int, int] = {}  # the pass that another runs inside
        # By outermost pass, and a parameter that has them.
        self.groups: dict[int, tuple[Groups, str]] = {}
        self.latest: tuple[int, Groups | None] = (-1, None)  # the last that were found the same

    def require_same_groups(self, task: int, groups: Groups, name: str) -> None:
        """Refuse a backward that joins forwards with different voters, whichever parameters they
        reach.
        """
        inner = task
        if self.outer:
            task = self.outermost(task)
        known = self.groups.setdefault(task, (groups, name))
        if known[0] is groups or known[0].same_groups(groups):
            if len(self.groups) > MOST_PASSES:
                self.groups.pop(next(iter(self.groups)))
            self.latest = inner, groups
            return
        told = [f"{g.described()} for {n!r}" for g, n in (known, (groups, name))]
        raise UnsupportedError(
            f"one backward joins two forwards with different groups: {told[0]}, {told[1]}. A part "
            "of the model was called by itself, with something else in the batch's dim (tokens, "
            "time steps), or with other groups. Remedy: run the calls of one step inside `with "
            "handle.forward(batch): ...`, name the method that makes them, attach(..., "
            "methods=('training_step',)), or call backward() once per forward"
        )

    def related(self, a: int, b: int) -> bool:
        """Whether two passes are parts of one outermost backward."""
        return self.outermost(a) == self.outermost(b)

    def outermost(self, task: int) -> int:
        """Return the pass that `task` is a part of."""
        while task in self.outer:
            task = self.outer[task]
        return task


class BufferListener:
    """Whose contributions a buffer gathers: one parameter, with what its buffers have in common.

    name:          of the parameter.
    attached:      whether the handle still serves it.
    passes:        shared by all parameters of a handle.
    settled:       the passes this parameter's rule was applied in, as long as they matter.
    gathering:     what takes contributions that are to vote with those of other backward passes or
                   ranks, or None.
    """

    name: str
    attached: bool = True
    passes: NestedBackwards
    settled: set[int]
    gathering: Gathering | None = None

    def guard(self) -> None:
        """Called before anything is recorded where `attached` is false; raises."""

    def differentiate(self, grad: Tensor, groups: Groups) -> None:
        """Called where create_graph=True asks for a graph of a use's backward, with the gradient
        that this gets and who votes with its rows; raises where that is not served.
        """

    def deliver(self, grad: Tensor | None, current: int) -> None:
        """Called with the aggregated gradient just before the node hands it to autograd; None where
        it accumulates.

        current: the backward pass under way.
        """

    def observe(self, parts: list[Factors]) -> None:
        """Called with what a pass recorded before it is aggregated, if the buffer was told to."""


class ContributionBuffer:
    """Factors recorded for one parameter in the backward passes under way: several threads may run
    one each.

    rule and groups:  what to aggregate with, and who votes.
    owner:            told of what happens; not kept alive, since autograd's graph keeps buffers.
    observes:         whether to show the owner what is recorded.
    consumed:         whether a backward has applied the rule: later forwards take another buffer.
    dtype and device: the parameter's when its node was made: autograd gives a parameter that was
                      moved another place to put its gradient.
    token:            a weak reference to the node's token, which a use's graph keeps.
    shared:           whether the node serves other parameters, too.
    used:             whether a use records here.
    """

    dtype: torch.dtype
    device: torch.device
    token: Callable[[], Tensor | None]
    shared: bool = False
    used: bool = False

    def __init__(self, rule: Rule, groups: Groups, owner: BufferListener, observes: bool = False):
        self.rule, self.groups, self.observes = rule, groups, observes
        self.parameter_name, self._owner = owner.name, weakref.ref(owner)
        self._parts: dict[int, list[Factors]] = {}  # by pass
        self.consumed = False

    def made(
        self, make: Callable[..., Factors], grouped_rows: GroupedRows, tensors: tuple[Tensor, ...]
    ) -> Factors:
        """The factors of one use."""
        return make(grouped_rows, *tensors)

    def record(self, factors: Factors, born: int = -1) -> None:
        """Add the contributions of one use. What an interrupted pass left behind stays apart.

        born:  the backward pass in which the use's forward ran, -1 for none: then this pass runs
               inside that one.
        """
        current = torch._C._current_graph_task_id()
        owner = self._owner()
        if owner is not None:  # else the model is gone, but not its graph
            if not owner.attached:
                owner.guard()
            passes = owner.passes
            if born != -1 and born != current:
                passes.outer[current] = born
            if passes.outer:
                self._refuse_reentry(owner, current)
        if current in self._parts:
            self._parts[current].append(factors)
        else:
            self._parts[current] = [factors]

    def _refuse_reentry(self, owner: BufferListener, current: int) -> None:
        """One outermost backward may apply the rule to a parameter once."""
        others = owner.settled | set(self._parts)
        if any(other != current and owner.passes.related(other, current) for other in others):
            raise RuntimeError(
                f"parameter {owner.name!r} is used in a reentrant activation checkpoint and also "
                "elsewhere in the same backward: its contributions arrive in separate passes and "
                "cannot be added before the rule is applied. Call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )

    def taken(self, current: int) -> list[Factors] | None:
        """What the pass under way, `current`, recorded, which is consumed by that; None for
        nothing.
        """
        parts = self._parts.pop(current, None)
        if parts is None:
            return None
        self.consumed = True
        if self.groups.rows and len(parts) > 1:
            self._require_all_rows(parts)
        owner = self._owner()
        if owner is not None:
            task, groups = owner.passes.latest
            if task != current or groups is not self.groups or owner.passes.outer:
                owner.passes.require_same_groups(current, self.groups, owner.name)
            if owner.passes.outer:
                owner.settled.add(current)
            else:
                owner.settled = {current}
            if self.observes:
                owner.observe(parts)
        return parts

    def _require_all_rows(self, parts: list[Factors]) -> None:
        """Of a parameter used several times the rows are added one by one, so they must be the same
        ones: of uses that saw some rows only nobody knows which these were.
        """
        rows, counts = self.groups.rows, {p.count for p in parts}
        if self.groups.voting is None and not (len(counts) == 1 and counts <= set(rows)):
            raise UnsupportedError(
                f"parameter {self.parameter_name!r} is used {len(parts)} times under tokens(), "
                f"with {' and '.join(map(str, sorted(counts)))} rows where the batch has "
                f"{rows[0]}: which token each of them belongs to is not known. Remedy: "
                f"exclude={self.parameter_name!r}, or let the layer see all tokens and pick "
                "some of what it returns"
            )

    def settle(self, parameter: Tensor, gradient_node) -> Tensor | None:
        """The aggregated gradient of what the pass under way recorded, or None if nothing was, or
        the owner accumulates it.

        gradient_node: where autograd takes the gradient next.
        """
        current = torch._C._current_graph_task_id()
        parts = self.taken(current)
        if parts is None:
            return None
        owner = self._owner()
        if owner is None or owner.gathering is None:
            return self.delivered(current, aggregate.aggregate(parts, self.rule), parameter)
        return self._gathered(owner, parts, parameter, gradient_node, current)

    def _gathered(
        self,
        owner: BufferListener,
        parts: list[Factors],
        parameter: Tensor,
        gradient_node,
        current: int,
    ) -> Tensor | None:
        """What goes into `.grad` now, of contributions that vote with others later."""
        _refuse_autograd_grad(gradient_node)
        # A reentrant checkpoint's pass is a part of the one it runs inside: the same voters.
        grad = owner.gathering.add(owner.passes.outermost(current), parts, self.groups)
        if grad is None:
            owner.deliver(None, current)
            return None
        return self.delivered(current, grad, parameter)

    def delivered(self, current: int, grad: Tensor, parameter: Tensor) -> Tensor:
        """The gradient as the node returns it, once the owner knows of it."""
        if grad.dtype != parameter.dtype:
            grad = grad.to(parameter.dtype)
        owner = self._owner()
        if owner is not None:
            owner.deliver(grad, current)
        return grad


def settle_together(
    buffers: tuple[ContributionBuffer, ...], parameters: tuple[Tensor, ...], edges: tuple
) -> list[Tensor | None]:
    """`ContributionBuffer.settle` of several of one rule, in few operations; of those whose
    gradient goes anywhere.

    edges:  where autograd takes the gradients next, (node, input) each.
    """
    current = torch._C._current_graph_task_id()
    grads: list[Tensor | None] = [None] * len(buffers)
    ready = {}
    for i, buffer in enumerate(buffers):
        parts = buffer.taken(current)
        if parts is None:
            continue
        try:  # torch.autograd.grad may ask for other gradients only
            if not torch._C._will_engine_execute_node(edges[i][0]):
                continue
        except RuntimeError:  # torch does not tell here
            pass
        owner = buffer._owner()
        if owner is None or owner.gathering is None:
            ready[i] = parts
        else:
            grads[i] = buffer._gathered(owner, parts, parameters[i], edges[i][0], current)
    if ready:
        found = aggregate.aggregate_together([*ready.values()], buffers[0].rule)
        for i, grad in zip(ready, found, strict=True):
            grads[i] = buffers[i].delivered(current, grad, parameters[i])
    return grads


def _refuse_autograd_grad(gradient_node) -> None:
    try:
        torch._C._will_engine_execute_node(gradient_node)
    except RuntimeError:  # torch tells of leaves only in backward()
        raise RuntimeError(
            "torch.autograd.grad() inside accumulate(), or where ranks vote together, would return "
            "no aggregated gradient, for the rule is applied later: call backward()"
        ) from None


class _FunctionMeta(type(torch.autograd.Function)):
    """Lets autograd's engine call `backward` at once; torch first looks for it, in Python."""

    def __init__(cls, name, bases, attributes):
        super().__init__(name, bases, attributes)
        cls._backward_cls.apply = cls.backward


class Function(torch.autograd.Function, metaclass=_FunctionMeta):
    """As torch's, but for the arguments it looks at one by one in Python, in case a functorch
    transform left them.

    A subclass defines `gradients` in the place of `backward`: statistics and plain sums keep the
    type of their operands even where backward runs under autocast. One whose arguments may be
    differentiated again (create_graph=True) defines `differentiable`, too.
    """

    @classmethod
    def apply(cls, *args):
        if torch.compiler._is_compiling_flag or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def backward(ctx, *grads):
        gradients = _with_graph if torch.is_grad_enabled() else ctx._forward_cls.gradients
        if torch._C._is_any_autocast_enabled():
            device = next((g.device.type for g in grads if g is not None), "cpu")
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return gradients(ctx, *grads)
        return gradients(ctx, *grads)

    @staticmethod
    def gradients(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments, from those of the outputs."""
        raise NotImplementedError

    @staticmethod
    def differentiable(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...] | None:
        """Return the same with a graph, in which what is served is used as in a forward; nothing is
        recorded, and no served argument has a gradient. None where that is not defined.
        """
        return None


def _with_graph(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a Function where create_graph=True asks for a graph of them.

    No contribution is recorded: what such a pass computes becomes a part of the loss, and the
    backward of that brings all contributions to one vote.
    """
    nodes = [node for node, _ in ctx.next_functions if _is_aggregation(node)]
    arguments = getattr(ctx, "arguments", ())
    buffers = [r.buffer for argument in arguments for r in argument.recorders or ()]
    buffers = buffers or [buffer for node in nodes for buffer in node.buffers]
    names = named(buffers)
    if any(_runs(node) for node in nodes):
        raise RuntimeError(TWICE.format(names))
    batched = torch._C._functorch.is_legacy_batchedtensor
    given = [grad for grad in grads if grad is not None]
    # Functions have no graph here.
    if torch._C._are_functorch_transforms_active() or any(batched(grad) for grad in given):
        raise RuntimeError(
            "torch.autograd.grad(..., create_graph=True) inside torch.func or with "
            "is_grads_batched=True (vectorize=True) does not come by the uses of parameter "
            f"{names}, which htv serves. Remedy: without these, torch.autograd.grad(..., "
            "create_graph=True) once for every output"
        )
    owner = buffers[0]._owner() if buffers else None
    if owner is not None:
        for grad in given:
            owner.differentiate(grad, buffers[0].groups)
    found = ctx._forward_cls.differentiable(ctx, *grads)
    if found is None:
        raise RuntimeError(
            f"htv has no derivative of the backward of {ctx._forward_cls.__name__.lstrip('_')} "
            f"with parameter {names}, as create_graph=True asks for. Remedy: exclude={names}, or "
            "call torch.autograd.grad() without create_graph=True"
        )
    return found


def named(buffers: Sequence[ContributionBuffer]) -> str:
    """The parameters whose uses record in some buffers, for messages."""
    return ", ".join(dict.fromkeys(repr(b.parameter_name) for b in buffers if b.used))


def _is_aggregation(node) -> bool:
    return getattr(type(node), "_forward_cls", None) is AggregationNode


def _runs(node) -> bool:
    """Whether the pass under way goes on to a node that is no leaf's."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch does not tell here: the node decides
        return True


TWICE = (
    "a vote has no derivative: create_graph=True asks for a graph of the gradient of parameter {}, "
    "which htv serves. Remedy: call backward() without create_graph=True; for derivatives of the "
    "input in the loss give torch.autograd.grad(..., create_graph=True) the input alone; or detach "
    "the handle for that step"
)


class AggregationNode(Function):
    """parameters -> token; backward applies the rule to everything their buffers recorded."""

    @staticmethod
    def forward(ctx, buffers: tuple[ContributionBuffer, ...], *parameters: Tensor) -> Tensor:
        ctx.materialize_grads = False
        ctx.buffers, ctx.parameters = buffers, parameters
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        buffers, parameters = ctx.buffers, ctx.parameters
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE.format(named(buffers)))
        device = parameters[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return AggregationNode.backward(ctx, None)
        if buffers[1:]:
            return None, *settle_together(buffers, parameters, ctx.next_functions)
        return None, buffers[0].settle(parameters[0], ctx.next_functions[0][0])


class UseRecorder:
    """Where the contributions of one use go: one parameter's buffer.

    token:   the graph edge to the node.
    adapt:   from the factors of what the layer computes with to those of the parameter, where the
             two differ.
    born:    the backward pass in which the use's forward ran, -1 for none.
    """

    __slots__ = ("_adapt", "adapts", "born", "buffer", "token")

    def __init__(
        self,
        token: Tensor,
        buffer: ContributionBuffer,
        adapt: Callable[[Factors], Factors] | None = None,
        born: int = -1,
    ):
        self.token, self.buffer, self._adapt = token, buffer, adapt
        self.adapts = adapt is not None
        self.born = born

    def wanted(self) -> bool:
        """Whether the pass under way goes on to the node: torch.autograd.grad may ask for other
        gradients only.
        """
        node = self.token.grad_fn
        try:
            return node is None or torch._C._will_engine_execute_node(node)
        except RuntimeError:  # see `_runs`
            return True

    def adapted(self, adapt: Callable[[Factors], Factors]) -> UseRecorder:
        """Return one for what is computed from what this is for. adapt: from its factors back."""
        own = self._adapt
        both = adapt if own is None else lambda factors: own(adapt(factors))
        return UseRecorder(self.token, self.buffer, both, self.born)

    def record(self, factors: Factors) -> None:
        """In backward: record factors of what the layer computes with."""
        self.buffer.record(factors if self._adapt is None else self._adapt(factors), self.born)


class ParameterArgument:
    """One tensor argument of a layer's Function whose gradient is wanted: served by htv, plain, or
    absent.

    value:   what the layer computes with; detached if served.
    recorders:   if served, where contributions go: one for a parameter, one for each that a derived
                 tensor comes from.
    tokens:  the recorders' tokens, for the Function's arguments.
    """

    __slots__ = ("recorders", "tokens", "value")

    def __init__(self, value: Tensor | None, recorders: Sequence[UseRecorder] | None = None):
        self.value, self.recorders = value, recorders
        if recorders is None:
            self.tokens = ()
        elif recorders[1:]:
            self.tokens = tuple([recorder.token for recorder in recorders])
        else:
            self.tokens = (recorders[0].token,)

    @property
    def is_served(self) -> bool:
        return self.recorders is not None

    def computed(self, value: Tensor, adapt: Callable[[Factors], Factors]) -> ParameterArgument:
        """What stands for a value computed from this one's. adapt: from its factors to this one's.

        For a use in a backward: what is served is detached there as it is here, what is plain has
        its graph.
        """
        if self.recorders is None:
            return ParameterArgument(value)
        return ParameterArgument(value, [recorder.adapted(adapt) for recorder in self.recorders])

    def record(
        self, make: Callable[..., Factors], grouped_rows: GroupedRows, *tensors: Tensor
    ) -> None:
        """In backward: record make(voters, *tensors), if this pass wants a gradient of what is
        served.

        make holds no tensors itself, so that what is recorded is known by its arguments: where a
        compiled backward is traced, it is called when that runs.
        """
        factors = None
        for recorder in self.recorders:
            if recorder.wanted():
                factors = (
                    recorder.buffer.made(make, grouped_rows, tensors)
                    if factors is None
                    else factors
                )
                recorder.record(factors)

    def grad(
        self,
        needed: bool,
        make: Callable[..., Factors],
        grouped_rows: GroupedRows,
        *tensors: Tensor,
    ) -> Tensor | None:
        """In backward: record the factors if served (no gradient here), else the plain gradient if
        needed.
        """
        recorders = self.recorders
        if recorders is not None:
            recorder = recorders[0]
            if recorders[1:] or recorder.adapts or type(recorder.buffer) is not ContributionBuffer:
                self.record(make, grouped_rows, *tensors)
                return None
            node = recorder.token.grad_fn  # one parameter as it stands
            try:
                wanted = node is None or torch._C._will_engine_execute_node(node)
            except RuntimeError:  # see `UseRecorder.wanted`
                wanted = True
            if wanted:
                recorder.buffer.record(make(grouped_rows, *tensors), recorder.born)
            return None
        return make(grouped_rows.ungrouped(), *tensors).total() if needed else None
