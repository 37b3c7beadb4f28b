"""Attached models under torch.compile.

Dynamo cannot follow all that a served forward does beside calling torch. It traces `call` instead:
that reads the model's tensors and settings, so that Dynamo guards on them, and hands them to
`_traced`, which it does not look into. AOTAutograd then runs that as plain Python on tensors
without values, forward and backward, under the usual mode and with the usual layers, tokens and
nodes (`htv.engine.compile.traced`).

Who votes is an input of the compiled graph, so a backward that is traced makes no factors: each
node leaves one operator in the graph, `htv::settle`, with the tensors its uses recorded. When the
compiled backward runs, the operator makes the factors of them, and an ordinary buffer applies the
rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from htv.engine import inputs
from htv.engine.compile.returned import described, held_by, rebuilt
from htv.engine.compile.traced import TracedGroups, TracedMode, TracedSession
from htv.engine.forward import EXPORTING, ForwardStandIn
from htv.engine.group_spec import StaticGroupSpec
from htv.engine.guard_state import PASSES, CompileGuardState, forwards
from htv.engine.mode import ServingMode
from htv.errors import UnsupportedError
from htv.rules import refuse_open

__all__ = ["call"]

# -- what Dynamo sees ------------------------------------------------------------------------------


def call(forward: ForwardStandIn, args: tuple, kwargs: dict):
    """A forward of an attached module. Traced by Dynamo, and written for it."""
    session = forward.session
    if not torch.is_grad_enabled() and session.batch_norm != "frozen":
        return forward.inner(*args, **kwargs)
    guard_state, spec, tensors = forward.guard_state, session.voters.spec, []
    for module, name, child in guard_state.children:
        if module._modules[name] is not child:
            raise RuntimeError(
                f"the model's parameters changed while attached: module {name!r} was exchanged; "
                "detach and attach again"
            )
    for (module, name), parameter in zip(guard_state.tensors, guard_state.parameters):  # noqa: B905
        tensor = getattr(module, name)
        if parameter is not None and tensor is not parameter:
            raise RuntimeError(
                f"the model's parameters changed while attached: {name!r}; detach and attach again"
            )
        tensors.append(tensor)
    settings = [getattr(module, name) for module, name in guard_state.settings]
    if spec is not None and (spec.count is not None or spec.also):
        torch._dynamo.graph_break(
            msg="torch.compile does not trace groups(ids, count=..., also=...), where rows meet "
            "that values tell of: call the model without torch.compile, or without fullgraph=True"
        )
        return _eagerly(forward, args, kwargs)
    voting = ("each", None, "size") if spec is None else (spec.kind, spec.value, spec.weight)
    given = args, kwargs
    settings, voting, args, kwargs = pytree.tree_map(
        _without_none, (settings, voting, args, kwargs)
    )
    _tried(forward.key, tensors, voting, args, kwargs)
    refusal = _refusal_of(forward.key)
    if refusal is not None:
        torch._dynamo.graph_break(msg=refusal)  # raises that with fullgraph=True
        return _eagerly(forward, *given)
    results = _traced(forward.key, tensors, settings, voting, args, kwargs)
    return rebuilt(_structure_of(forward.key), results, guard_state.classes)


_NONE = "<htv: None>"  # None cannot enter a function that is not looked into


def _without_none(value):
    return _NONE if value is None else value


def _with_none(value):
    if isinstance(value, torch.SymInt):
        return int(value)  # compiled once for each size
    return None if isinstance(value, str) and value == _NONE else value


@torch._dynamo.assume_constant_result
def _structure_of(key: str) -> tuple:
    """Only a list of tensors can leave such a function: what else the forward returned last is a
    constant.
    """
    return forwards[key].guard_state.structure


@torch._dynamo.assume_constant_result
def _refusal_of(key: str) -> str | None:
    """Why the forward that was tried last cannot be compiled."""
    return forwards[key].guard_state.refusal


# -- what AOTAutograd runs -------------------------------------------------------------------------


@torch._dynamo.nonstrict_trace
def _tried(key: str, tensors: list[Tensor], voting: tuple, args: tuple, kwargs: dict) -> list:
    """Note what htv refuses in a forward and its backward, while Dynamo can still leave the forward
    alone. What is refused later, it can only fail on.
    """
    forward = forwards[key]
    if _for_shapes(tensors):
        voting, args, kwargs = pytree.tree_map(_with_none, (voting, args, kwargs))
        forward.guard_state.refusal = _why_not(forward, tensors, voting, args, kwargs)
    return []


@torch._dynamo.nonstrict_trace
def _traced(
    key: str, tensors: list[Tensor], settings: list, voting: tuple, args: tuple, kwargs: dict
) -> list[Tensor]:
    voting, args, kwargs = pytree.tree_map(_with_none, (voting, args, kwargs))
    forward, results = forwards[key], []
    result = _run(forward, tensors, voting, args, kwargs)
    classes, held = forward.guard_state.classes, held_by(forward.module)
    forward.guard_state.structure = described(result, results, classes, held)
    return results


def _for_shapes(tensors: list[Tensor]) -> bool:
    """Whether it is Dynamo that runs a forward, to learn the shapes of what it returns."""
    return all(isinstance(t, FakeTensor) for t in tensors) and get_proxy_mode() is None


def _run(forward: ForwardStandIn, tensors: list[Tensor], voting: tuple, args: tuple, kwargs: dict):
    session = forward.session
    if not any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in tensors):
        return session.run(
            forward, args, kwargs
        )  # nothing is traced: Dynamo gave up, or the backend is "eager"
    for_shapes = _for_shapes(tensors)
    _require_traceable(forward, tensors)
    outer = session.running()
    try:
        session.thread.running = True
        with _exchanged(forward.guard_state, tensors), forward.frozen_statistics():
            if for_shapes or not torch.is_grad_enabled():
                return forward.inner(*args, **kwargs)
            forward.check_batch_norm()
            with _intercept(forward, tensors, voting, args, kwargs):
                return forward.inner(*args, **kwargs)
    except DataDependentOutputException as error:
        if for_shapes:  # Dynamo breaks the graph here, or says why it must not
            raise
        raise UnsupportedError(_ON_VALUES.format(error.func)) from error
    finally:
        session.thread.running = outer


def _require_traceable(forward: ForwardStandIn, tensors: list[Tensor]) -> None:
    """Refuse what no compiled forward can serve, whatever it computes."""
    session = forward.session
    if not _for_shapes(tensors) and not all(isinstance(t, FunctionalTensor) for t in tensors):
        raise UnsupportedError(
            "an attached model can be traced by torch.compile alone: detach its handle first"
        )
    if torch.compiler.is_exporting():
        raise UnsupportedError(EXPORTING.format("torch.export"))
    if torch.is_grad_enabled():
        remedy = "run this model without torch.compile"
        refuse_open(session.rules, "a compiled model", remedy)
    if torch.is_grad_enabled() and not session.only_means:
        session.joint.check_ranks(forward)


def _why_not(
    forward: ForwardStandIn, tensors: list[Tensor], voting: tuple, args: tuple, kwargs: dict
) -> str | None:
    """Run a forward and its backward on tensors without values; return what htv refuses in them."""
    session = forward.session
    try:
        _require_traceable(forward, tensors)
    except UnsupportedError as error:
        return str(error)
    if not torch.is_grad_enabled() or session.passes_plainly:
        return None
    kept, outer = len(session.settlements), session.running()
    copies = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    sizes = next((t.fake_mode.shape_env for t in tensors), None)
    unseen = nullcontext() if sizes is None else sizes.ignore_fresh_unbacked_symbols()
    try:
        session.thread.running = True
        with unseen, _exchanged(forward.guard_state, copies), forward.frozen_statistics():
            forward.check_batch_norm()
            with _intercept(forward, copies, voting, args, kwargs):
                results: list[Tensor] = []
                result = forward.inner(*args, **kwargs)
                described(result, results, [], held_by(forward.module))
            outputs = [t for t in results if t.requires_grad]
            leaves = [t for t in copies if t.requires_grad]
            torch.autograd.grad(
                outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True
            )
    except UnsupportedError as error:
        error.locate(forward.path, type(forward.module).__name__)
        return str(error)
    except DataDependentOutputException as error:
        return _ON_VALUES.format(error.func)
    except Exception:  # a fault that the forward's own run shows, with the right words
        return None
    finally:
        session.thread.running = outer
        del session.settlements[kept:]
    return None


_ON_VALUES = (
    "the way of a parameter's contributions depends on values ({}), which torch.compile does not "
    "have. Remedy: run this model without torch.compile, or without fullgraph=True"
)


def _eagerly(forward: ForwardStandIn, args: tuple, kwargs: dict):
    """Run a forward that was refused as if nothing were compiled."""
    return forward.session.run(forward, args, kwargs)


PASSES.update(f.__code__ for f in (_run, _why_not))
_eagerly = torch._dynamo.disable(_eagerly)
_run = torch._dynamo.disable(
    _run
)  # where Dynamo gives up (fullgraph=False), all of it runs eagerly


@contextmanager
def _exchanged(guard_state: CompileGuardState, tensors: list[Tensor]) -> Iterator[None]:
    """The model with other tensors in it. What its forward sets otherwise would be lost, and is
    refused.
    """
    cells = [(_store(module, name), name) for module, name in guard_state.tensors]
    before = [store[name] for store, name in cells]
    settings = [(vars(module), name, vars(module)[name]) for module, name in guard_state.settings]
    for (store, name), tensor in zip(cells, tensors, strict=True):
        store[name] = tensor
    try:
        yield
        changed = [
            name
            for (store, name), tensor in zip(cells, tensors, strict=True)
            if store[name] is not tensor
        ]
        changed += [
            name
            for store, name, value in settings
            if store[name] is not value and store[name] != value
        ]
        if changed:
            raise UnsupportedError(
                f"the forward sets attribute {changed[0]!r} of a module, which a compiled forward "
                "would not do again: make it a buffer and write to it in place"
            )
    finally:
        for (store, name), tensor in zip(cells, before, strict=True):
            store[name] = tensor
        for store, name, value in settings:
            store[name] = value


def _store(module: torch.nn.Module, name: str) -> dict:
    return next(
        store for store in (module._parameters, module._buffers, vars(module)) if name in store
    )


def _intercept(
    forward: ForwardStandIn, tensors: list[Tensor], voting: tuple, args: tuple, kwargs: dict
) -> ServingMode:
    named = inputs.named_tensors(forward.names, args, kwargs)
    for name, tensor in named:
        if isinstance(tensor, PackedSequence):
            raise UnsupportedError(
                f"argument {name!r} is a PackedSequence, which torch.compile hides from htv. "
                "Remedy: run this model without torch.compile"
            )
        for size in tensor.shape:
            int(size)  # compiled once for each size
    session, (kind, value, weight) = forward.session, voting
    value = torch.tensor(value) if isinstance(value, (list, tuple)) else value
    size = None if value is None or kind == "packed" else len(value)
    wanted = session.settings.batch if forward is session.root else session.voters.named_in(named)
    batch = inputs.choose(named, session.settings.batch_dim, wanted, size, kind)
    plan = StaticGroupSpec.of(kind, weight, batch, value)
    session.voters.source = batch.source
    if kind == "each" and not session.joint.later:
        session.require_enough(plan.batch_size, batch.source)
    return TracedMode(TracedSession(forward, tensors), TracedGroups(plan, value), batch)
