"""One served parameter of an attached model: where its uses meet, and a guard on what reaches its
`.grad`.
"""

from __future__ import annotations

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
    UseRecorder,
)
from htv.engine.protocols import SessionLike
from htv.groups import Groups
from htv.ops.agreement import Agreement, agreement
from htv.ops.factors import Factors
from htv.rules import Rule

MOST_DELIVERED = 256  # gradients a parameter expects at a time, in as many threads
NODE_BYTES = 1 << 20  # that the contributions to parameters of one node may take


def share_nodes(
    parameters: Iterable[TrackedParameter], groups: Groups
) -> dict[TrackedParameter, tuple[TrackedParameter, ...]]:
    """Choose which of `parameters` share a node, for `groups`: vectors in a row, of one rule, whose
    contributions together are small.

    A node costs as much as a small layer. It runs when the last use of any of its parameters has
    run: contributions to the others wait for that.
    """
    nodes: list[list[TrackedParameter]] = []
    taken, kind = 0, None
    for tracked in parameters:
        p = tracked.parameter
        size = groups.count * p.numel() * p.element_size()
        if p.dim() > 1 or size > NODE_BYTES:
            continue
        if kind != (tracked.rule, p.dtype, p.device) or taken + size > NODE_BYTES:
            kind, taken = (tracked.rule, p.dtype, p.device), 0
            nodes.append([])
        nodes[-1].append(tracked)
        taken += size
    return {tracked: tuple(node) for node in nodes for tracked in node}


class TrackedParameter(BufferListener):
    """Tracks one served parameter: its rule, a node per thread for forwards not yet differentiated,
    a guard on its gradient.
    """

    def __init__(self, session: SessionLike, name: str, parameter: nn.Parameter, rule: Rule):
        self._session = weakref.ref(session)
        self.name, self.parameter, self.rule = name, parameter, rule
        self.passes, self.settled = session.passes, set()
        self.uses: set[str] = set()
        self.agreement: Agreement | None = None
        self.refusal: str | None = None  # why some use was let through plainly
        self.deferred: str | None = None  # why a use is to be refused, if a loss reaches it
        self._nodes = threading.local()  # .mine: references to a token and its buffer, or None
        self._delivered: dict[int, tuple[int, int]] = {}  # by backward pass
        self._twice = -1  # the last backward pass in which two nodes delivered
        self.hook = None
        self._given: tuple[int, int] | None = (
            None  # the last gradient delivered: its memory and version
        )

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
        try:
            node = self._nodes.mine
        except AttributeError:  # the first in this thread
            node = None
        if node is not None:
            token, buffer = node[0](), node[1]()
            if token is not None and buffer is not None and not buffer.consumed:
                if buffer.groups is groups or buffer.groups.same_groups(groups):
                    return UseRecorder(token, buffer, None, born)
        return UseRecorder(*self._open(groups), None, born)

    def _may_join(self, groups: Groups) -> bool:
        """Tell whether the parameter can get a node with others: none of its own takes more
        uses.
        """
        try:
            node = self._nodes.mine
        except AttributeError:
            node = None
        buffer = None if node is None or node[0]() is None else node[1]()
        has_hub = buffer is not None and not buffer.consumed and buffer.groups.same_groups(groups)
        return self.parameter.requires_grad and not has_hub and not self._is_hooked()

    def _is_hooked(self) -> bool:
        """Tell whether others look at the gradient: hooks would see None where only other
        parameters of the node get one.
        """
        p = self.parameter
        return len(p._backward_hooks or ()) > (self.hook is not None) or bool(
            p._post_accumulate_grad_hooks
        )

    def _open(self, groups: Groups) -> tuple[Tensor, ContributionBuffer]:
        """Make a node, for all that shares it and has none; return this parameter's token and
        buffer.
        """
        session = self._session()
        sharing = (self,) if self.parameter.dim() > 1 else session.sharing_node(self, groups)
        if len(sharing) == 1 or self._is_hooked():
            buffer = ContributionBuffer(self.rule, groups, self, session.collects_stats)
            token = AggregationNode.apply((buffer,), self.parameter)
            # They live as long as a use's graph does: what a failed backward recorded dies with it.
            self._nodes.mine = weakref.ref(token), weakref.ref(buffer)
            return token, buffer
        members = [s for s in sharing if s is self or s._may_join(groups)]
        buffers = tuple(
            [ContributionBuffer(s.rule, groups, s, session.collects_stats) for s in members]
        )
        token = AggregationNode.apply(buffers, *[s.parameter for s in members])
        for tracked, buffer in zip(members, buffers, strict=True):
            tracked._nodes.mine = weakref.ref(token), weakref.ref(buffer)
        return token, buffers[members.index(self)]

    def defer(self, message: str) -> None:
        """Refuse a use, with `message`, when a gradient comes by it."""
        self.deferred = message

    def watch(self) -> None:
        """Make gradients that come by another way than the node an error."""
        self.deferred = None
        if self.hook is None and self.parameter.requires_grad:
            reference = weakref.ref(self)

            def check(grad: Tensor) -> None:
                tracked = reference()
                if tracked is None or grad is None or tracked.refusal is not None:
                    return
                current = torch._C._current_graph_task_id()
                delivered, expected = tracked._delivered, None
                if current in delivered:
                    expected = delivered[current]
                    del delivered[current]
                if expected != (grad.data_ptr(), grad._version):
                    tracked.refuse_gradient(tracked._twice == current)

            self.hook = _hook_first(self.parameter, check)

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
            f"backward after detach: the forward ran while parameter {self.name!r} was served, but "
            "its handle has "
            "been detached since; run the forward again, or detach after backward"
        )

    def observe(self, parts: list[Factors]) -> None:
        if self.session.examine is not None:
            self.session.examine(self.name, parts)
        else:
            self.agreement = agreement(parts, self.rule)

    def deliver(self, grad: Tensor | None, current: int) -> None:
        # No reference is kept: autograd may then take the tensor for .grad without a copy.
        if current in self._delivered:
            self._twice = current
        self._nodes.mine = None
        if grad is None or self._delivered:
            self.expect(grad, current)
        if grad is None:
            given = None
        else:
            given = self._delivered[current] = grad.data_ptr(), grad._version
        session = self._session()
        session.backward_started = True
        if grad is not None and not session.told_of_sums:
            held = self.parameter.grad
            if held is not None and self._given == (held.data_ptr(), held._version):
                session.warn_of_sums(self)  # as trainers' accumulation does
            self._given = given

    def expect(self, grad: Tensor | None, current: int) -> None:
        """Note that `grad`, and nothing else, reaches the parameter in the backward pass
        `current`.
        """
        if grad is None:
            self._delivered.pop(current, None)
            return
        self._delivered[current] = grad.data_ptr(), grad._version
        if len(self._delivered) > MOST_DELIVERED:  # of passes that went elsewhere in the end
            self._delivered.pop(next(iter(self._delivered)))

    def accumulate(self, batches: MicroBatches | None) -> None:
        """Gather contributions over several backward passes from now on, as `batches` asks; None:
        drop what was gathered.
        """
        self.accumulation = None if batches is None else Accumulation(self.rule, batches)
        self._given = None

    def add_accumulated(self, grad: Tensor | None) -> None:
        """Put `grad`, the aggregated gradient of an accumulation, where backward() would."""
        if grad is not None:
            grad = grad.to(self.parameter.dtype)
            self.parameter.grad = (
                grad if self.parameter.grad is None else self.parameter.grad + grad
            )

    def refuse_gradient(self, twice: bool) -> None:
        """Refuse more than an aggregated gradient; `twice`: the parameter got two of them."""
        if self.deferred is not None:
            self.session.unsupported(self.deferred, (self,))
            return
        if twice:
            why = (
                f"parameter {self.name!r} got two aggregated gradients in one backward, and their "
                "sum is no vote: the "
                "loss joins two forwards with different groups, or one forward from before another "
                "backward() and one "
                "from after it. Remedy: call backward() once per forward, or run the forwards of "
                "one loss together, "
            )
        else:
            why = (
                f"parameter {self.name!r} reached the loss by a path htv does not serve: it was "
                "used outside the "
                "model's forward (a penalty on the weights, say: take the optimizer's weight "
                "decay), by something in "
                "it that htv cannot see (a custom autograd.Function, a function of "
                "torch.jit.script), or a tensor hook "
                "changed the gradient in place. Remedy: use it inside the forward by operations "
                "htv.explain lists as "
                "served, run what uses it outside inside `with handle.forward(batch): ...`, "
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
