"""Where the contributions to one parameter meet before the rule is applied.

Every use of a served parameter takes a *token* of its hub, an empty tensor that only carries a graph edge:

    parameter -> Hub -> token -> use 1, use 2, ...

In backward each use records its factors in the hub's ledger and returns no gradient for the token. The autograd engine
runs the hub once all its uses that this backward reaches have run; the hub then applies the rule to the recorded
factors, summed per group, and returns the parameter's gradient. So counting the uses (tied weights, a module called
twice, an output the loss ignores) is left to the engine, and factors live no longer than they must.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from htv.groups import Groups
from htv.ops import aggregate
from htv.ops.aggregate import Agreement
from htv.ops.factors import Factors
from htv.rules import Rule


class Ledger:
    """Factors recorded for one parameter in the backward pass under way.

    rule and groups:  what to aggregate with, and who votes.
    guard:            called before anything is recorded; raises if the handle is gone.
    deliver:          called with the aggregated gradient just before the hub hands it to autograd.
    observe:          called with the parameter's `Agreement` if not None (one more pass over the contributions).
    """

    def __init__(
        self,
        rule: Rule,
        groups: Groups,
        guard: Callable[[], None],
        deliver: Callable[[Tensor], None],
        observe: Callable[[Agreement], None] | None,
    ):
        self.rule, self.groups, self.guard, self.deliver, self.observe = rule, groups, guard, deliver, observe
        self._parts: list[Factors] = []
        self._pass = -1

    def record(self, factors: Factors) -> None:
        """Add the contributions of one use. What an interrupted backward left behind is dropped."""
        self.guard()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "htv does not differentiate through an aggregated gradient: call backward() or torch.autograd.grad() "
                "without create_graph=True, or detach the handle for that step"
            )
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._parts, self._pass = [], current
        self._parts.append(factors)

    def settle(self, parameter: Tensor) -> Tensor | None:
        """The aggregated gradient of what this pass recorded, or None if nothing was."""
        self.guard()
        parts, self._parts = self._parts, []
        if not parts or self._pass != torch._C._current_graph_task_id():
            return None
        if self.observe is not None:
            self.observe(aggregate.agreement(parts, self.rule))
        grad = aggregate.aggregate(parts, self.rule).to(parameter.dtype)
        self.deliver(grad)
        return grad


class Hub(torch.autograd.Function):
    """parameter -> token; backward applies the ledger's rule to everything recorded."""

    @staticmethod
    def forward(ctx, parameter: Tensor, ledger: Ledger) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ledger, ctx.parameter = ledger, parameter.detach()
        return parameter.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        with full_precision(ctx.parameter.device):
            return ctx.ledger.settle(ctx.parameter), None


def full_precision(device: torch.device) -> torch.autocast:
    """Statistics and plain sums keep the type of their operands even where backward runs under autocast."""
    return torch.autocast(device.type, enabled=False)


class Slot:
    """One parameter argument of a layer's Function: served by htv, differentiated plainly, or absent.

    value:   what the layer computes with; detached if served.
    token:   the graph edge to the hub if served.
    ledger:  where to record if served.
    """

    __slots__ = ("ledger", "token", "value")

    def __init__(self, value: Tensor | None, token: Tensor | None = None, ledger: Ledger | None = None):
        self.value, self.token, self.ledger = value, token, ledger

    def grad(self, factors: Callable[[], Factors], needed: bool) -> Tensor | None:
        """In backward: record the factors if served (no gradient here), else the plain gradient if needed."""
        if self.ledger is not None:
            self.ledger.record(factors())
            return None
        return factors().total() if needed else None
