"""The usual case of what every torch call of a forward and every gradient passes through.

Compiled where htv was built (csrc/engine): a step makes thousands of these calls. Elsewhere the
functions here do the same in Python, `ServingMode.unusual` serves all calls, and nothing is kept
for calls that are alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from htv import _engine as compiled
except ImportError:  # built without: HTV_BUILD=0
    compiled = None

__all__ = [
    "GradientGuard",
    "call_layer",
    "compiled",
    "has_members",
    "of_identity",
    "put_usual",
    "usual_mark",
]

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
Table = dict[int, tuple[weakref.ref, Any, int | None, bool]]


def _usual_mark(table: Table, tensor: Tensor) -> Any:
    """Return the mark of a plain `tensor` that is what it was when it got that, out of the `table`
    of `htv.engine.provenance.Marks`; None where that is not the case, or not known.
    """
    entry = table.get(id(tensor))
    if entry is None or entry[2] is None or entry[0]() is not tensor:
        return None
    same = entry[2] == tensor._version and tensor.requires_grad <= entry[3]
    return entry[1] if same else None


def _put_usual(table: Table, tensor: Tensor, mark: Any) -> bool:
    """Put the `mark` of a plain `tensor` into the `table`; False where it is none, or a function
    mode would take what is asked of it for calls of the forward.
    """
    plain = type(tensor) in PLAIN_TYPES and not torch._C._len_torch_function_stack()
    if not plain or tensor.is_inference():
        return False
    table[id(tensor)] = weakref.ref(tensor), mark, tensor._version, tensor.requires_grad
    return True


def _of_identity(table: dict[int, Any], value: object) -> Any:
    """Return what the `table` has for this very object, `value`, or None."""
    return table.get(id(value))


def _has_members(members: list[tuple[dict, tuple]]) -> bool:
    """Tell whether each dict still holds these values, in this order, and no others.

    members:  (a module's parameters or its parts, by name; the values they had).
    """
    return all([*map(id, own.values())] == [*map(id, known)] for own, known in members)


def _call_layer(mode: Any, layer: Any, module: torch.nn.Module, x: Tensor) -> Any:
    """Make the one torch call of a layer of torch's own, `module`, under the `mode` at once, as its
    forward would; return NotImplemented where the forward is to be called: always, in Python.

    layer:  which call that is, an `htv.engine.handlers.call.Layer`.
    x:      what the forward was given.
    """
    return NotImplemented


class _GradientGuard:
    """Guards a served parameter's gradient, as a hook on it: nothing but what the engine delivered
    may reach it.

    owner:  a weak reference to the `TrackedParameter`, which is told of what it did not deliver.
    most:   how many deliveries are waited for at a time, in as many threads.
    """

    def __init__(self, owner: weakref.ref, most: int):
        self._owner, self._most = owner, most
        self._deliveries: dict[int, tuple[int, int]] = {}  # by backward pass: memory and version
        self._given: tuple[int, int] | None = None  # the last of them

    def __len__(self) -> int:
        return len(self._deliveries)

    def expect(self, gradient: Tensor | None, task: int) -> bool:
        """Note that `gradient`, None for none, and nothing else reaches the parameter in the
        backward pass `task`; tell whether something was to reach it already.
        """
        again = task in self._deliveries
        if gradient is None:
            self._deliveries.pop(task, None)
            return again
        self._given = self._deliveries[task] = gradient.data_ptr(), gradient._version
        if len(self._deliveries) > self._most:  # of passes that went elsewhere in the end
            self._deliveries.pop(min(self._deliveries))
        return again

    def gave(self, gradient: Tensor) -> bool:
        """Tell whether `gradient`, not changed since, is the last one that was delivered."""
        return self._given == (gradient.data_ptr(), gradient._version)

    def forget(self) -> None:
        """Forget which gradient was delivered last."""
        self._given = None

    def __call__(self, gradient: Tensor | None) -> None:
        owner = self._owner()
        if owner is None or gradient is None:
            return
        task = torch._C._current_graph_task_id()
        expected = self._deliveries.pop(task, None)
        if expected != (gradient.data_ptr(), gradient._version):
            owner.refuse_unexpected(task)


call_layer: Callable[..., Any] = _call_layer
usual_mark: Callable[[Table, Tensor], Any] = _usual_mark
put_usual: Callable[[Table, Tensor, Any], bool] = _put_usual
of_identity: Callable[[dict[int, Any], object], Any] = _of_identity
has_members: Callable[[list[tuple[dict, tuple]]], bool] = _has_members
GradientGuard = _GradientGuard
if compiled is not None:
    usual_mark, put_usual = compiled.usual_mark, compiled.put_usual
    of_identity, has_members = compiled.of_identity, compiled.has_members
    GradientGuard, call_layer = compiled.GradientGuard, compiled.call_layer
