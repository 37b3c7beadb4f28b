"""One served parameter of an attached model: where its uses meet, and a guard on what reaches its
`.grad`.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from htv.autograd.accumulation import Accumulation, MicroBatches
from htv.autograd.aggregation import (
    AggregationNode,
    BufferListener,
    ContributionBuffer,
    ParameterArgument,
    UseRecorder,
)
from htv.engine import graph_reading, ranks
from htv.engine.protocols import SessionLike
from htv.engine.usual import GradientGuard
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops.agreement import Agreement, AgreementSums, agreement_sums
from htv.ops.factors import Factors
from htv.rules import Rule

MOST_DELIVERED = 256  # gradients a parameter expects at a time, in as many threads
NODE_BYTES = 1 << 20  # that what is recorded for the parameters of one node may take


def share_nodes(
    parameters: Iterable[TrackedParameter], groups: Groups, matrices: bool
) -> dict[TrackedParameter, tuple[TrackedParameter, ...]]:
    """Choose which of `parameters` share a node, for `groups`: those of one rule for which little
    is recorded together. Vectors and, where `matrices` says that a layer sees one row per example,
    matrices.

    A node costs as much as a small layer. It runs when the last use of any of its parameters has
    run: contributions to the others wait for that.
    """
    kinds: list[tuple] = []  # rules may not be hashable
    nodes: list[list[TrackedParameter]] = []  # the last one of each kind
    taken: list[int] = []
    sharing: dict[TrackedParameter, list[TrackedParameter]] = {}
    for tracked in parameters:
        p = tracked.parameter
        # Of a vector the contributions are kept, of a matrix the rows they come from.
        values = groups.batch_size * sum(p.shape) if p.dim() == 2 else groups.count * p.numel()
        size = values * p.element_size()
        if p.dim() > 1 + matrices or size > NODE_BYTES:
            continue
        kind = tracked.rule, p.dtype, p.device
        if kind not in kinds:
            kinds.append(kind)
            nodes.append([])
            taken.append(0)
        number = kinds.index(kind)
        if taken[number] + size > NODE_BYTES:
            nodes[number], taken[number] = [], 0
        nodes[number].append(tracked)
        taken[number] += size
        sharing[tracked] = nodes[number]
    return {tracked: tuple(node) for tracked, node in sharing.items()}


class TrackedParameter(BufferListener):
    """Tracks one served parameter: its rule, a node per thread for forwards not yet differentiated,
    a guard on its gradient.
    """

    def __init__(self, session: SessionLike, name: str, parameter: nn.Parameter, rule: Rule):
        self._session = weakref.ref(session)
        self.name, self.parameter, self.rule = name, parameter, rule
        self.passes, self.settled = session.passes, set()
        self.uses: set[str] = set()
        # Tells how far the contributions to the last vote agreed; None before the first.
        self.measured: Callable[[], Agreement] | None = None
        self.refusal: str | None = None  # why some use was let through plainly
        self.deferred: str | None = None  # why a use is to be refused, if a loss reaches it
        self._buffers = threading.local()  # .mine: a reference to that of the open node, or None
        self._gradients = GradientGuard(weakref.ref(self), MOST_DELIVERED)
        self._twice = -1  # the last backward pass in which two nodes delivered
        self.hook = None
        # The gradient that the last vote of an accumulation left, if it is still there.
        self._aggregate: Callable[[], Tensor | None] = lambda: None

    @property
    def session(self) -> SessionLike | None:
        """Return the session, which owns this; None once it is gone."""
        return self._session()

    def note(self, use: str) -> None:
        """Remember a kind of use, `use`, for `htv.explain`."""
        self.uses.add(use)

    def recorder(self, groups: Groups, born: int = -1) -> UseRecorder:
        """Return where one more use, under `groups`, records its contributions: uses share a node
        until a backward has consumed it.

        born: the backward pass that the use's forward runs in, or -1.
        """
        buffer = self._open_buffer(groups)
        if buffer is None:
            token, buffer = self._open(groups, small=False)
        else:
            token = buffer.token()
        buffer.used = True
        return UseRecorder(token, buffer, None, born)

    def argument(self, groups: Groups, born: int, small: bool) -> ParameterArgument:
        """Return what stands for the parameter in a layer's call; see `recorder`.

        small:  whether what the call records is small for a small parameter: a row per example.
        """
        buffer = self._open_buffer(groups)
        if buffer is None:
            token, buffer = self._open(groups, small)
        elif small or buffer.used or not buffer.shared or self.parameter.ndim <= 1:
            token = buffer.token()
        else:  # the node of others would keep much for long
            token, buffer = self._open(groups, small)
        buffer.used = True
        recorder = UseRecorder(token, buffer, None, born)
        return ParameterArgument(self.parameter.detach(), (recorder,))

    def _open_buffer(self, groups: Groups) -> ContributionBuffer | None:
        """Return the buffer of the node that takes more uses, under `groups`, if there is one."""
        try:
            reference = self._buffers.mine
        except AttributeError:  # the first in this thread
            return None
        buffer = None if reference is None else reference()
        if buffer is None or buffer.consumed or buffer.token() is None:
            return None
        p = self.parameter
        if buffer.dtype != p.dtype or buffer.device != p.device:  # `.to` since, in the forward
            return None
        same = buffer.groups is groups or buffer.groups.same_groups(groups)
        return buffer if same else None

    def _is_hooked(self) -> bool:
        """Tell whether others look at the gradient: hooks would see None where only other
        parameters of the node get one.
        """
        p = self.parameter
        hooks = p._backward_hooks
        return bool(p._post_accumulate_grad_hooks) or (
            hooks is not None and len(hooks) > (self.hook is not None)
        )

    def _joins(self, groups: Groups, first: Tensor) -> bool:
        """Tell whether a node made for another parameter, `first`, may serve this one: it has no
        open one, and is still of the type that it had when sharing was decided.
        """
        p = self.parameter
        free = p.requires_grad and self._open_buffer(groups) is None
        alike = p.dtype == first.dtype and p.device == first.device
        return free and alike and not self._is_hooked()

    def _open(self, groups: Groups, small: bool) -> tuple[Tensor, ContributionBuffer]:
        """Make a node, for all that shares it and has none; return this parameter's token and
        buffer.
        """
        session = self._session()
        sharing = (self,)
        if small or self.parameter.ndim <= 1:
            sharing = session.sharing_node(self, groups, small)
            if sharing[1:] and self._is_hooked():
                sharing = (self,)
        members: tuple[TrackedParameter, ...] = ()
        buffers: tuple[ContributionBuffer, ...] = ()
        parameters: tuple[Tensor, ...] = ()
        for tracked in sharing:
            if tracked is self or tracked._joins(groups, self.parameter):
                buffer = ContributionBuffer(tracked.rule, groups, tracked, session.collects_stats)
                members, buffers = (*members, tracked), (*buffers, buffer)
                parameters = (*parameters, tracked.parameter)
        token = AggregationNode.apply(buffers, *parameters)
        # They live as long as a use's graph does: what a failed backward recorded dies with it.
        reference = weakref.ref(token)
        for tracked, buffer, parameter in zip(members, buffers, parameters, strict=True):
            buffer.token, buffer.shared = reference, bool(members[1:])
            buffer.dtype, buffer.device = parameter.dtype, parameter.device
            tracked._buffers.mine = weakref.ref(buffer)
            if tracked is self:
                mine = buffer
        return token, mine

    def defer(self, message: str) -> None:
        """Refuse a use, with `message`, when a gradient comes by it."""
        self.deferred = message

    def watch(self) -> None:
        """Make gradients that come by another way than the node an error."""
        self.deferred = None
        if self.hook is None and self.parameter.requires_grad:
            self.hook = _hook_first(self.parameter, self._gradients)

    def adopt(self, parameter: nn.Parameter) -> None:
        """Track `parameter` in the place of the one so far."""
        attached = self.attached
        self.unwatch()
        self.attached, self.parameter = attached, parameter
        self._buffers = threading.local()
        self.watch()

    def unwatch(self) -> None:
        """Take the guard off: the parameter is not served any more."""
        self.attached = False
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
            if not self.parameter._backward_hooks:
                self.parameter._backward_hooks = None

    def guard(self) -> None:
        raise RuntimeError(
            f"backward after detach: the forward ran while parameter {self.name!r} was served, "
            "but its handle has been detached since; run the forward again, or detach after "
            "backward"
        )

    def observe(self, parts: list[Factors]) -> None:
        if self.session.examine is not None:
            self.session.examine(self.name, parts)
        elif self.gathering is None:  # else the vote has other backwards, or ranks
            self.measure(agreement_sums(parts, self.rule), parts[0].count)

    def measure(self, sums: AgreementSums | None, count: int) -> None:
        """Keep how far the contributions of a vote's `count` groups agree; None for nothing new."""
        if sums is not None:
            coordinates = math.prod(self.parameter.shape)
            self.measured = functools.partial(sums.agreement, count, coordinates)

    def differentiate(self, grad: Tensor, groups: Groups) -> None:
        session, task = self._session(), torch._C._current_graph_task_id()
        if session.differentiated != task:  # once in a pass: it looks at all modules
            ranks.refuse_derivatives(session.model, self.name)
            session.differentiated = task
        mixed = None if session.shares_statistics else graph_reading.mixed_in(grad, groups)
        if mixed is not None:
            raise UnsupportedError(
                f"a derivative in the loss (create_graph=True) is of something in which {mixed} "
                f"brings examples together, and it reaches parameter {self.name!r}: what an "
                "example contributes cannot be told. Remedy: differentiate the sum of what each "
                f"example has, as in torch.autograd.grad(u.sum(), x, create_graph=True), or "
                f"exclude={self.name!r}"
            )

    def deliver(self, grad: Tensor | None, current: int) -> None:
        # No reference is kept: autograd may then take the tensor for .grad without a copy.
        self._buffers.mine = None
        session = self._session()
        session.voters.backward_started = True
        if grad is not None and self.gathering is None and not session.told_of_sums:
            held = self.parameter.grad
            if held is not None and self._gradients.gave(held):
                session.warn_of_sums(self)  # as trainers' accumulation does
        if self._gradients.expect(grad, current):
            self._twice = current

    def expect(self, grad: Tensor | None, current: int) -> None:
        """Note that `grad`, and nothing else, reaches the parameter in the backward pass
        `current`.
        """
        self._gradients.expect(grad, current)

    def refuse_unexpected(self, current: int) -> None:
        """Refuse what reached the parameter in the backward pass `current`, if nothing was let
        through plainly.
        """
        if self.refusal is None:
            self.refuse_gradient(self._twice == current)

    def accumulate(
        self, batches: MicroBatches | None, fraction: float = 1.0, observes: bool = False
    ) -> None:
        """Gather contributions, times `fraction`, over several backward passes from now on, as
        `batches` asks, and how far they agree if it `observes`; None: drop what was gathered.
        """
        self.gathering = None
        if batches is not None:
            start = self.refuse_stale
            self.gathering = Accumulation(self.rule, batches, start, fraction, observes)
        self._gradients.forget()

    def refuse_stale(self) -> None:
        """Refuse to begin a vote while `.grad` still holds the aggregate of the last one."""
        held = self.parameter.grad
        if held is None or held is not self._aggregate() or not bool((held != 0).any()):
            return
        raise RuntimeError(
            f".grad of {self.name!r} holds the aggregate of an earlier vote already, and the next "
            "would be added to it. Remedy: zero_grad() after the optimizer's step, and "
            "handle.finish() once per step, after its last backward"
        )

    def add_accumulated(self, grad: Tensor | None) -> None:
        """Put `grad`, the aggregated gradient of an accumulation, where backward() would."""
        if grad is not None:
            grad = grad.to(self.parameter.dtype)
            if self.parameter.grad is not None:
                grad = self.parameter.grad + grad
            self.parameter.grad = grad
            self._aggregate = weakref.ref(grad)

    def refuse_gradient(self, twice: bool) -> None:
        """Refuse more than an aggregated gradient; `twice`: the parameter got two of them."""
        if self.deferred is not None:
            self.session.unsupported(self.deferred, (self,))
            return
        if twice:
            why = (
                f"parameter {self.name!r} got two aggregated gradients in one backward, and their "
                "sum is no vote: the loss joins two forwards with different groups, or one "
                "forward from before another backward() and one from after it. Remedy: call "
                "backward() once per forward, or run the forwards of one loss together, "
            )
        else:
            why = (
                f"parameter {self.name!r} reached the loss by a path htv does not serve: it was "
                "used outside the model's forward (a penalty on the weights, say: take the "
                "optimizer's weight decay), by something in it that htv cannot see (a custom "
                "autograd.Function, a function of torch.jit.script, torch.vmap over a parameter), "
                "or a tensor hook changed the gradient in place. Remedy: use it inside the forward "
                "by operations htv.explain lists as served, run what uses it outside inside `with "
                "handle.forward(batch): ...`, "
            )
        self.session.unsupported(f"{why}or exclude={self.name!r}", (self,))


def _hook_first(tensor: Tensor, hook: Callable[[Tensor], None]):
    """Register a hook that runs before the user's, which may replace the gradient."""
    handle = tensor.register_hook(hook)
    hooks = tensor._backward_hooks
    others = {key: value for key, value in hooks.items() if key != handle.id}
    hooks.clear()  # torch runs them in the order of insertion into the underlying dict
    hooks[handle.id] = hook
    hooks.update(others)
    return handle
