"""What stands in for a module's `forward`, or another method, while the module is attached."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from htv.engine import handlers, ranks
from htv.engine.guard_state import CompileGuardState, register
from htv.engine.protocols import SessionLike
from htv.engine.usual import has_members
from htv.errors import UnsupportedError

__all__ = ["ForwardStandIn"]

LIKE_A_FUNCTION = (
    "__annotations__", "__closure__", "__code__", "__defaults__", "__globals__", "__kwdefaults__",
    "__name__", "__qualname__",
)  # fmt: skip
EXPORTING = (
    "an attached model cannot be exported or scripted ({}): what htv adds is no part of a graph "
    "that runs elsewhere. "
    "Remedy: call detach() on its handle first, or export a copy (copies of an attached model are "
    "not attached)"
)


def parameter_names(function) -> tuple[str, ...]:
    """Return the names of a function's positional parameters; () where it does not tell."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in kinds)


def thaw(frozen: list[nn.Module]) -> None:
    """Put the modules in `frozen`, which `ForwardStandIn.freeze` froze, back into train mode."""
    while frozen:
        frozen[-1].training = True
        frozen.pop()


class ForwardStandIn:
    """Stands in for a method of a module while it is attached; the outermost call enters the
    serving mode.

    To whom reads it (signature, `__code__`, `__wrapped__`) it looks like the method it stands for.
    Copies of the module, by copy.deepcopy, pickle or torch.save, are made as if it were not
    attached.
    """

    def __init__(self, session: SessionLike, module: nn.Module, path: str, method: str = "forward"):
        self.session, self.module, self.path, self.method = session, module, path, method
        self.inner = getattr(module, method)
        self.__wrapped__ = self.inner
        self.__doc__ = getattr(self.inner, "__doc__", None)
        self.__module__ = getattr(self.inner, "__module__", None)
        self.batch_misplaced = (
            False  # whether it ran without gradients on inputs unlike those of the model
        )
        self.parameters = [id(p) for p in module.parameters()]
        # Whether others take their places during a forward, which the session knows of.
        self.parameters_move = False
        own = [d for m in module.modules() for d in (m._parameters, m._modules)]
        plain = all(isinstance(d, dict) for d in own)  # a ScriptModule's are none
        self._members = [(d, tuple(d.values())) for d in own] if plain else None
        self.batch_norms = [
            (n, m)
            for n, m in module.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self.layer = handlers.layer_of(module, self.inner) if method == "forward" else None
        self._names: tuple[str, ...] | None = None
        self._ours = {method: self}
        if method == "forward":
            self._ours["__reduce_ex__"] = self._reduce_module
            self.key, self.guard_state = (
                register(self),
                CompileGuardState(module),
            )  # for torch.compile
        # Instance attributes of the user's, if any.
        self._own = {key: module.__dict__[key] for key in self._ours if key in module.__dict__}

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            if self.method != "forward" or not self.session.attached:
                return self.inner(*args, **kwargs)
            return self.session.run_compiled(self, args, kwargs)
        if not self.session.attached:  # somebody kept this, in a wrapper of their own
            return self.inner(*args, **kwargs)
        try:
            return self.session.run(self, args, kwargs)
        except UnsupportedError as error:
            error.locate(self.path, type(self.module).__name__)
            raise

    # -- how it looks ------------------------------------------------------------------------------

    def __getattr__(self, name: str):
        """Return an attribute `name` of the method it stands for, if this class does not
        have it.
        """
        if name in LIKE_A_FUNCTION:
            return getattr(self.__dict__["inner"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self):
        """Return a function of (module, ...) that is served too, for those who wrap methods by
        their function.
        """
        if (
            sys._getframe(1).f_globals.get("__name__") == "torch._jit_internal"
        ):  # the first to ask of a scripted module
            raise UnsupportedError(EXPORTING.format("torch.jit.script"))

        def tracked(module, *args, **kwargs):
            return (
                self(*args, **kwargs)
                if module is self.module
                else self._unbound()(module, *args, **kwargs)
            )

        unbound = self._unbound()
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(tracked, name, getattr(unbound, name, None))
        tracked.__wrapped__ = unbound
        return tracked

    def _unbound(self):
        return getattr(self.inner, "__func__", getattr(type(self.module), self.method))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of its positional parameters."""
        if self._names is None:
            self._names = parameter_names(self.inner)
        return self._names

    # -- what is checked before it runs ------------------------------------------------------------

    def check(self) -> None:
        """Refuse before anything runs: replaced parameters; a BatchNorm, which counts its batches
        first.
        """
        if torch._C._get_tracing_state() or torch.compiler.is_exporting():
            raise UnsupportedError(EXPORTING.format("torch.jit.trace or torch.export"))
        same = self.parameters_move or (self._members is not None and has_members(self._members))
        if not same and [id(p) for p in self.module.parameters()] != self.parameters:
            if not self.session.only_means:
                ranks.refuse_sharded(ranks.sharded_by(self.module))
                ranks.refuse_alone(self.module)
            known = set(self.parameters)
            new = (repr(n) for n, p in self.module.named_parameters() if id(p) not in known)
            raise RuntimeError(
                f"the model's parameters changed while attached: {next(new, 'some')} is not what "
                "it was, or is gone (a module was exchanged, tensor parallelism took them over, "
                "load_state_dict(assign=True) or functional_call was used, ...): detach and attach "
                "again; after fully_shard, call htv.distributed.fsdp(model, handle)"
            )
        if self.batch_norms:
            self.check_batch_norm()

    def check_batch_norm(self) -> None:
        """Refuse a BatchNorm in train mode, unless the handle was told what to do about it."""
        for name, module in self.batch_norms if self.session.batch_norm == "error" else ():
            if module.training:
                raise UnsupportedError(handlers.batch_norm_refusal(f"module {name!r}"))

    def freeze(self, frozen: list[nn.Module]) -> None:
        """Put BatchNorm modules on their running statistics, if the handle was told to, and note
        them in `frozen`.
        """
        for _, module in self.batch_norms if self.session.batch_norm == "frozen" else ():
            if module.training and module.running_mean is not None:
                frozen.append(module)
                module.training = False

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Apply `freeze` for the time of a block."""
        frozen: list[nn.Module] = []
        try:
            self.freeze(frozen)
            yield
        finally:
            thaw(frozen)

    # -- coming and going --------------------------------------------------------------------------

    def install(self) -> None:
        """Put it into the module's own attributes."""
        self.module.__dict__.update(self._ours)

    def restore(self) -> None:
        """Take out what `install` put in, unless the user has replaced it since."""
        attributes = self.module.__dict__
        for key, value in self._ours.items():
            if attributes.get(key) is value:
                del attributes[key]
                if key in self._own:
                    attributes[key] = self._own[key]

    def let_go(self) -> None:
        """Drop what holds it in a circle; it is not installed again."""
        self._ours = {}

    def _reduce_module(self, protocol):
        """Return the module's `__reduce_ex__`, as it would be without htv."""
        attributes = self.module.__dict__
        mine = self.session.forwards_of(self.module)
        before = {key: attributes[key] for f in mine for key in f._ours if key in attributes}
        try:
            for forward in mine:
                forward.restore()
            result = self.module.__reduce_ex__(protocol)
            if isinstance(result, tuple) and len(result) > 2 and result[2] is attributes:
                result = (*result[:2], dict(attributes), *result[3:])
            return result
        finally:
            attributes.update(before)

    def __reduce_ex__(self, protocol):
        raise RuntimeError(
            "this module cannot be copied or pickled while attached: call detach() on its handle "
            "first"
        )
