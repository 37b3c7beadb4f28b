"""What all served layers share: the tables they register in, and a call as they see it.

A server gets the serving mode and the call; it returns the layer's output, or NotImplemented to let
the call be judged like any other (no served parameter in it, or an input that is not the batch's).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.aggregation import ParameterArgument
from htv.engine.protocols import ModeLike, ParameterLike
from htv.engine.provenance import FromParameters, Lost, Mark, OfBatch
from htv.engine.usual import of_identity, put_usual, usual_mark
from htv.errors import UnsupportedError
from htv.groups import BatchLayout
from htv.ops.factors import Factors, StackedFactors

HANDLERS: dict[Callable, Callable] = {}
# The kinds of use layers note, by the factors they record. " bias" and " (computed)" are added to
# them. The mode itself notes the elementwise ones.
FACTORS: dict[str, type[Factors]] = {"elementwise": StackedFactors}
USES: dict[type[nn.Module], str] = {}  # the kind of use that a class of modules makes of its weight
# The argument that holds the examples, by module, of classes whose arguments' sizes do not tell.
BATCHES: dict[type[nn.Module], Callable[[Any], str | None]] = {}


@dataclass(frozen=True)
class Layer:
    """Describes the one torch call that the forward of a class of torch's modules makes.

    called:    the name of the function in torch.nn.functional.
    names:     the module's parameters and attributes that it is given, after the input.
    needs:     (attribute, value) that the module has to have for that; or None.
    function:  the function itself.
    """

    called: str
    names: tuple[str, ...]
    needs: tuple[str, object] | None = None
    functions: ClassVar[dict] = vars(F)

    @cached_property
    def function(self) -> Callable:
        return self.functions[self.called]


_CONV_NAMES = ("weight", "bias", "stride", "padding", "dilation", "groups")
_ZEROS = ("padding_mode", "zeros")
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer("linear", ("weight", "bias")),
    nn.Conv1d: Layer("conv1d", _CONV_NAMES, _ZEROS),
    nn.Conv2d: Layer("conv2d", _CONV_NAMES, _ZEROS),
    nn.Conv3d: Layer("conv3d", _CONV_NAMES, _ZEROS),
    nn.LayerNorm: Layer("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    nn.GroupNorm: Layer("group_norm", ("num_groups", "weight", "bias", "eps")),
    nn.RMSNorm: Layer("rms_norm", ("normalized_shape", "weight", "eps")),
    nn.Embedding: Layer(
        "embedding",
        ("weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ),
}


def layer_of(module: nn.Module, forward: Callable) -> Layer | None:
    """Return which call `forward`, that of `module`, makes, if it is as torch wrote it; else
    None.
    """
    layer = LAYERS.get(type(module))
    own = getattr(forward, "__func__", None)
    if layer is None or own is not type(module).forward or layer.function not in HANDLERS:
        return None
    is_torchs = own.__module__ == type(module).__module__ and not hasattr(own, "__wrapped__")
    return layer if is_torchs else None


def handles(
    *functions: Callable,
    uses: Mapping[str, type[Factors]] | None = None,
    modules: Mapping[type[nn.Module], str] | None = None,
    batch: Mapping[type[nn.Module], Callable[[Any], str | None]] | None = None,
):
    """Register the decorated server for torch functions.

    uses:     the kinds of use the server notes, and the factors it records for each.
    modules:  torch's modules that call the functions, and the kind of use each makes of its weight.
    batch:    of those whose arguments' sizes do not tell which of them holds the examples, a
              function from the module to the argument's name, or None.

    `uses` and `modules` tell `htv.explain` what to expect. ValueError where somebody else
    registered a function, a kind or a module as something else.
    """

    def register(server):
        _register(HANDLERS, dict.fromkeys(functions, server))
        _register(FACTORS, uses or {})
        _register(USES, modules or {})
        _register(BATCHES, batch or {})
        return server

    return register


def batch_argument(module: nn.Module, given: Iterable[str]) -> tuple[str, ...]:
    """Return which of the arguments that `module` is `given` by name holds the examples, where its
    class says so; else ().
    """
    choose = BATCHES.get(type(module))
    name = None if choose is None else choose(module)
    return (name,) if name is not None and name in given else ()


def _register(table: dict, rows: Mapping[Any, Any]) -> None:
    for key, value in rows.items():
        if table.setdefault(key, value) != value:
            raise ValueError(f"{key!r} is registered already, as {table[key]!r}")


class Call:
    """A call's arguments by name, and what its parameters are.

    x and parameters: the names of the input and of the parameters among the arguments.
    `layout`:          where the batch is in the input, or what else that is.
    `applicable`:     some parameter is served, or derived from served ones, gradients are on, and
                      the input was computed from the batch.
    """

    def __init__(
        self,
        mode: ModeLike,
        kind: str,
        signature: Signature,
        args,
        kwargs,
        x: str,
        *parameters: str,
    ):
        self.mode, self.kind = mode, kind
        if kwargs or len(args) != signature.count:
            self.arguments = arguments = signature.bind(args, kwargs)
        else:
            self.arguments = arguments = dict(zip(signature.names, args, strict=True))
        self.x = arguments[x]
        self.layout = usual_mark(mode.table, self.x) if mode.batch_size > 1 else None
        if type(self.layout) is not BatchLayout:
            self.x, self.layout = mode.input(self.x)
        self._uses: tuple[tuple, ...] = ()  # name, argument, its mark, the parameters behind it
        self.tracked: tuple[ParameterLike, ...] = ()
        for name in parameters:
            parameter, mark, owners = arguments[name], None, ()
            if parameter is not None:
                mark = of_identity(mode.own, parameter)
                if mark is None or not parameter.requires_grad:
                    mark = mode.mark(parameter)
                if type(mark) is FromParameters and parameter.requires_grad:
                    owners = mark.parameters
                    for owner in owners:
                        if owner not in self.tracked:
                            self.tracked += (owner,)
            self._uses = (*self._uses, (name, parameter, mark, owners))
        of_batch = type(self.layout) is BatchLayout or type(self.layout) is Lost
        self.applicable = bool(self.tracked) and of_batch and torch.is_grad_enabled()

    def __getitem__(self, name: str):
        return self.arguments[name]

    @property
    def parameters(self) -> list[Tensor | None]:
        return [parameter for _, parameter, _, _ in self._uses]

    def enter(self, features: int = 0, rows: bool = True) -> tuple[ParameterArgument, ...] | None:
        """The parameters' parameter arguments, or None if the use is passed on plainly. Raises if
        the input is not the batch's.

        features:  how many dims at the end the layer mixes; all but the first where it takes (S, C,
                   *space).
        rows:      whether its input consists of rows that could vote one by one.
        """
        groups, layout = self.mode.groups, self.layout
        known = type(layout) is BatchLayout and layout.dim < self.x.ndim - features
        if not (known and (rows or not groups.rows_vote)) and not self._may_enter(features, rows):
            return None
        arguments: tuple[ParameterArgument, ...] = ()
        for name, parameter, mark, owners in self._uses:
            if owners:
                arguments = (*arguments, self._argument(name, parameter, mark, owners))
            else:
                arguments = (*arguments, ParameterArgument(parameter))
        return arguments

    def _argument(
        self, name: str, parameter: Tensor, mark: Mark, owners: tuple[ParameterLike, ...]
    ) -> ParameterArgument:
        """The argument for one of the parameters, `parameter`, whose use is noted."""
        is_own = parameter is owners[0].parameter
        if name == "bias" and "norm" not in self.kind:
            use = f"{self.kind} bias"
        elif is_own:
            use = self.kind
        else:
            use = f"{self.kind} (computed)"
        for owner in owners:
            if use not in owner.uses:
                owner.uses.add(use)
        if not is_own:
            return self.mode.argument(parameter, mark)
        x = self.x  # ids and flattened tokens have more rows than examples
        one_each = x.ndim == 2 and x.shape[0] == self.mode.batch_size
        small = one_each and x.dtype.is_floating_point
        return owners[0].argument(self.mode.groups, self.mode.task, small)

    def _may_enter(self, features: int, rows: bool) -> bool:
        """Refuse the use, or tell whether it is served. False: it is passed on plainly."""
        problem = self.mode.why_not_batch(self.x, self.layout, features)
        if problem is None and not rows and self.mode.groups.rows_vote:
            problem = "it has no rows that could vote by themselves, as tokens() asks"
        if problem is None:
            return True
        names = ", ".join(repr(s.name) for s in self.tracked)
        message = (
            f"{self.kind} with parameter {names}: {problem}. Remedy: keep examples apart, or "
            f"exclude={names}"
        )
        if not self.mode.session.passes_plainly:
            raise UnsupportedError(message)
        self.mode.session.unsupported(message, self.tracked)
        return False

    def done(self, result: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """Mark the layer's result: the batch is where it was in the input, or at `layout`."""
        layout = layout or self.layout
        if not (layout.is_the_one and put_usual(self.mode.table, result, layout)):
            self.mode.marks.put(result, layout)
        return result


def behind(mode: ModeLike, parameter: Tensor | None) -> tuple[ParameterLike, ...]:
    """The served parameters a layer's parameter argument is or comes from."""
    return _owners(parameter, mode.mark(parameter))


def _owners(parameter: Tensor | None, mark: Mark | None) -> tuple[ParameterLike, ...]:
    return mark.parameters if isinstance(mark, FromParameters) and parameter.requires_grad else ()


class Signature:
    """The parameters of a torch function."""

    def __init__(self, full: inspect.Signature):
        self._full, self.names = full, tuple(full.parameters)
        self.count = len(self.names)
        self._defaults = {
            p.name: p.default for p in full.parameters.values() if p.default is not p.empty
        }

    @staticmethod
    def of(function: Callable) -> Signature:
        return Signature(inspect.signature(function))

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """The arguments by name, defaults included; what `inspect.Signature.bind` gives, at a tenth
        of its price.
        """
        count = len(args)
        positional = dict(zip(self.names, args, strict=False))
        arguments = {**self._defaults, **positional, **kwargs}
        twice = kwargs and not kwargs.keys().isdisjoint(positional)
        if twice or len(arguments) != len(self.names) or count > len(self.names):
            return self._full.bind(*args, **kwargs).arguments  # raises TypeError
        return arguments


def signature(text: str) -> Signature:
    """ "a, b, c=1" -> the signature; torch's builtins have none of their own."""
    parameters = []
    for part in text.split(", "):
        name, _, default = part.partition("=")
        value = eval(default, {}) if default else inspect.Parameter.empty  # literals written below
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value)
        )
    return Signature(inspect.Signature(parameters))


def refuse_rows(call: Call) -> None:
    """For layers whose channels come before other dims: these have no rows that could vote by
    themselves.
    """
    if call.mode.groups.rows_vote and call.x.dim() > 2:
        names = ", ".join(repr(s.name) for s in call.tracked)
        raise UnsupportedError(
            f"{call.kind} with parameter {names}: it has no rows that could vote by themselves, "
            f"as tokens() asks. Remedy: exclude={names}"
        )


def stands_alone(mode: ModeLike, value: Tensor | None) -> bool:
    """Whether a layer's argument is a parameter as it stands, served or not, or absent."""
    return value is None or mode.tracked(value) is not None or not value.requires_grad


def in_python(function: Callable) -> Callable:
    """Torch's own code of a function, but for the question whether somebody intercepts it: then the
    calls it makes can be served one by one.
    """
    asks = dict.fromkeys(("has_torch_function", "has_torch_function_variadic"), lambda *_: False)
    own = types.FunctionType(
        function.__code__,
        {**function.__globals__, **asks},
        f"{function.__name__}_in_python",
        function.__defaults__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


class Operands:
    """A call's tensors: those computed from served parameters, and those of the batch."""

    def __init__(self, mode: ModeLike, *tensors: Tensor):
        self.derived = [bool(behind(mode, t)) for t in tensors]
        self.of_batch = [isinstance(mode.mark(t), OfBatch) for t in tensors]

    @property
    def meet(self) -> bool:
        """Whether served parameters meet the batch here, with gradients on."""
        return torch.is_grad_enabled() and any(self.derived) and any(self.of_batch)
