"""The torch functions htv serves: each takes the layer's parameters as slots and aggregates their gradients.

A server gets the intercepting mode and the call; it returns the layer's output, or NotImplemented to let the call be
judged like any other (no served parameter in it, or an input that is not the batch's).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.conv import conv, conv_transpose
from htv.autograd.derived import Lookup, Projection
from htv.autograd.embedding import embedding
from htv.autograd.ledger import Slot
from htv.autograd.linear import bilinear, linear
from htv.autograd.norm import group_norm, layer_norm
from htv.errors import UnsupportedError
from htv.groups import Place, Voters
from htv.layout import Constant, Derived, OfBatch

if TYPE_CHECKING:
    from htv.intercept import Intercept
    from htv.served import Served

SERVERS: dict[Callable, Callable] = {}


def serves(*functions: Callable):
    """Register the decorated server for torch functions."""

    def register(server):
        SERVERS.update(dict.fromkeys(functions, server))
        return server

    return register


class Call:
    """A call's arguments by name, and what its parameters are.

    x and parameters: the names of the input and of the parameters among the arguments.
    `applicable`:     some parameter is served, or derived from served ones, gradients are on, and the input was computed
                      from the batch.
    """

    def __init__(
        self, mode: Intercept, kind: str, signature: inspect.Signature, args, kwargs, x: str, *parameters: str
    ):
        self.mode, self.kind, self.names = mode, kind, parameters
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.arguments = bound.arguments
        self.x: Tensor = self.arguments[x]
        self.parameters: list[Tensor | None] = [self.arguments[name] for name in parameters]
        self.served = tuple(dict.fromkeys(s for p in self.parameters for s in _behind(mode, p)))
        of_batch = isinstance(mode.mark(self.x), OfBatch)
        self.applicable = bool(torch.is_grad_enabled() and self.served and of_batch)

    def __getitem__(self, name: str):
        return self.arguments[name]

    @property
    def place(self) -> Place:
        """Where the batch is in the input."""
        return self.mode.mark(self.x)

    @property
    def voters(self) -> Voters:
        return self.mode.voters(self.place)

    def enter(self, features: int = 0, rows: bool = True) -> list[Slot] | None:
        """The parameters' slots, or None if the use is passed on plainly. Raises if the input is not the batch's.

        features:  how many dims at the end the layer mixes; all but the first where it takes (S, C, *space).
        rows:      whether its input consists of rows that could vote one by one.
        """
        names = ", ".join(repr(s.name) for s in self.served)
        problem = self.mode.why_not_batch(self.x, features)
        if problem is None and not rows and self.mode.groups.rows_vote:
            problem = "it has no rows that could vote by themselves, as tokens() asks"
        if problem is not None:
            message = f"{self.kind} with parameter {names}: {problem}. Remedy: keep examples apart, or exclude={names}"
            if not self.mode.handle.passes_plainly:
                raise UnsupportedError(message)
            self.mode.handle.unsupported(message, self.served)
            return None
        for name, parameter in zip(self.names, self.parameters, strict=True):
            served = self.mode.served(parameter)
            for behind in _behind(self.mode, parameter):
                bias = name == "bias" and "norm" not in self.kind
                behind.note(f"{self.kind} bias" if bias else self.kind if served else f"{self.kind} (computed)")
        return [self.mode.slot(p) for p in self.parameters]

    def done(self, result: Tensor, place: Place | None = None) -> Tensor:
        """Mark the layer's result: the batch is where it was in the input, unless said otherwise."""
        self.mode.marks.put(result, place or self.place)
        return result


def _behind(mode: Intercept, parameter: Tensor | None) -> tuple[Served, ...]:
    """The served parameters a layer's parameter argument is or comes from."""
    mark = mode.mark(parameter)
    return mark.parameters if isinstance(mark, Derived) and parameter.requires_grad else ()


def _signature(text: str) -> inspect.Signature:
    """ "a, b, c=1" -> the signature; torch's builtins have none of their own."""
    parameters = []
    for part in text.split(", "):
        name, _, default = part.partition("=")
        value = eval(default, {}) if default else inspect.Parameter.empty  # literals written below
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(parameters)


_LINEAR = _signature("input, weight, bias=None")
_BILINEAR = _signature("input1, input2, weight, bias=None")
_PRELU = _signature("input, weight")
_CONV_TRANSPOSE = _signature("input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1")
_CONV = _signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
_EMBEDDING = inspect.signature(F.embedding)
_LAYER_NORM = inspect.signature(F.layer_norm)
_GROUP_NORM = inspect.signature(F.group_norm)
_RMS_NORM = inspect.signature(F.rms_norm)
_INSTANCE_NORM = inspect.signature(F.instance_norm)
_BATCH_NORM = inspect.signature(F.batch_norm)


@serves(F.linear)
def _linear(mode: Intercept, func, args, kwargs):
    call = Call(mode, "linear", _LINEAR, args, kwargs, "input", "weight", "bias")
    if call.served and torch.is_grad_enabled() and isinstance(mode.mark(call.x), Constant):
        y = mode.general(func, args, kwargs)
        if isinstance(mode.mark(y), Derived) and all(_is_parameter(mode, p) for p in call.parameters):
            mode.marks.put(y, Derived(call.served, y, Projection(call.x, bool(_behind(mode, call["weight"])))))
        return y
    slots = call.enter(features=1) if call.applicable else None
    return NotImplemented if slots is None else call.done(linear(call.x, *slots, call.voters))


def _is_parameter(mode: Intercept, value: Tensor | None) -> bool:
    """Whether a layer's argument is a parameter as it stands, served or not, or absent."""
    return value is None or mode.served(value) is not None or not value.requires_grad


@serves(F.bilinear)
def _bilinear(mode: Intercept, func, args, kwargs):
    call = Call(mode, "bilinear", _BILINEAR, args, kwargs, "input1", "weight", "bias")
    right = call["input2"]
    if not call.served or not torch.is_grad_enabled():
        return NotImplemented
    place, other = mode.mark(call.x), mode.mark(right)
    if not isinstance(place, Place) or not isinstance(other, Place) or not place.same(other, mode.groups.num_units):
        raise UnsupportedError(
            f"bilinear with parameter {call.served[0].name!r}: both inputs must hold the batch in the same dim; "
            f"exclude={call.served[0].name!r} to give it a plain gradient"
        )
    slots = call.enter(features=1)
    return NotImplemented if slots is None else call.done(bilinear(call.x, right, *slots, call.voters))


@serves(F.conv1d, F.conv2d, F.conv3d)
def _conv(mode: Intercept, func, args, kwargs):
    call = Call(mode, func.__name__, _CONV, args, kwargs, "input", "weight", "bias")
    slots = _enter_images(call) if call.applicable else None
    if slots is None:
        return NotImplemented
    options = (call[name] for name in ("stride", "padding", "dilation", "groups"))
    return call.done(conv(call.x, *slots, *options, call.voters))


@serves(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv_transpose(mode: Intercept, func, args, kwargs):
    call = Call(mode, func.__name__, _CONV_TRANSPOSE, args, kwargs, "input", "weight", "bias")
    slots = _enter_images(call) if call.applicable else None
    if slots is None:
        return NotImplemented
    options = (call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation"))
    return call.done(conv_transpose(call.x, *slots, *options, call.voters))


def _enter_images(call: Call) -> list[Slot] | None:
    """The slots of a layer that takes (S, C, *space); one image without S is no batch."""
    if call.x.dim() < call["weight"].dim():
        return call.enter(features=call.x.dim())
    return call.enter(features=call.x.dim() - 1, rows=False)


@serves(F.embedding)
def _embedding(mode: Intercept, func, args, kwargs):
    call = Call(mode, "embedding", _EMBEDDING, args, kwargs, "input", "weight")
    ids, padding_idx = call.x, call["padding_idx"]
    _refuse_options(call, "max_norm", "scale_grad_by_freq", "sparse")
    if call.served and isinstance(mode.mark(ids), Constant) and padding_idx is None:
        return _embedding_of_constants(mode, func, args, kwargs, call)
    slots = call.enter() if call.applicable else None
    if slots is None:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(call["weight"])
    return call.done(embedding(ids, *slots, padding_idx, call.voters))


def _refuse_options(call: Call, *options: str) -> None:
    for option in options if call.served else ():
        if call[option]:
            name = call.served[0].name
            raise UnsupportedError(
                f"{call.kind} with parameter {name!r}: {option}={call[option]!r} has no per-group meaning; turn it off "
                f"or exclude={name!r}"
            )


def _embedding_of_constants(mode: Intercept, func, args, kwargs, call: Call):
    """The same ids for every example (positions): derived from the table alone, by ids that keep its factors small."""
    ids = call.x
    if ids.dim() > 1 and len(ids) > 1 and ids.stride(0) == 0:  # expanded over the batch: look them up once
        first = ids[:1]
        mode.marks.put(first, mode.mark(ids))
        replaced = [first if value is ids else value for value in args]
        once = _embedding(mode, func, replaced, {k: first if v is ids else v for k, v in kwargs.items()})
        return mode.general(torch.Tensor.expand, (once, len(ids), *(-1,) * ids.dim()), {})
    rows = mode.general(func, args, kwargs)
    if isinstance(mode.mark(rows), Derived) and _is_parameter(mode, call["weight"]):
        mode.marks.put(rows, Derived(call.served, rows, Lookup(ids)))
    return rows


@serves(F.layer_norm)
def _layer_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "layer_norm", _LAYER_NORM, args, kwargs, "input", "weight", "bias")
    shape = tuple(call["normalized_shape"])
    slots = call.enter(features=len(shape)) if call.applicable else None
    if slots is None:
        return NotImplemented
    return call.done(layer_norm(_as_autocast_would(call.x), shape, *slots, call["eps"], call.voters))


@serves(F.group_norm)
def _group_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "group_norm", _GROUP_NORM, args, kwargs, "input", "weight", "bias")
    slots = call.enter(features=call.x.dim() - 1, rows=False) if call.applicable else None
    if slots is None:
        return NotImplemented
    return call.done(group_norm(_as_autocast_would(call.x), call["num_groups"], *slots, call["eps"], call.voters))


@serves(F.rms_norm, torch.rms_norm)
def _rms_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "rms_norm", _RMS_NORM, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    normalised = mode.general(F.rms_norm, (call.x, tuple(call["normalized_shape"]), None, call["eps"]), {})
    return mode.general(torch.mul, (normalised, call["weight"]), {})


@serves(F.instance_norm)
def _instance_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "instance_norm", _INSTANCE_NORM, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    if call.x.dim() < 3:
        raise UnsupportedError(
            f"instance_norm with parameter {call.served[0].name!r}: its input must be (N, C, *space), got shape "
            f"{tuple(call.x.shape)}"
        )
    names = ("running_mean", "running_var", "use_input_stats", "momentum", "eps")
    without = {**{name: call[name] for name in names}, "weight": None, "bias": None}
    return _affine(mode, call, mode.general(F.instance_norm, (call.x,), without))


@serves(F.batch_norm)
def _batch_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "batch_norm", _BATCH_NORM, args, kwargs, "input", "weight", "bias")
    if not torch.is_grad_enabled():
        return NotImplemented
    shared = call["training"] or call["running_mean"] is None
    if shared and not mode.handle.shares_statistics:
        names = ", ".join(repr(s.name) for s in call.served)
        raise UnsupportedError(batch_norm_refusal(f"parameter {names}" if names else "F.batch_norm"))
    if not call.applicable:
        return NotImplemented
    names = ("running_mean", "running_var", "training", "momentum", "eps")
    without = {**{name: call[name] for name in names}, "weight": None, "bias": None}
    return _affine(mode, call, mode.general(F.batch_norm, (call.x,), without))


def _affine(mode: Intercept, call: Call, y: Tensor) -> Tensor:
    """y * weight + bias for y (N, C, *space) and parameters (C,), as elementwise operations."""
    shape = (-1,) + (1,) * (y.dim() - 2)
    for operation, parameter in ((torch.mul, call["weight"]), (torch.add, call["bias"])):
        if parameter is not None:
            y = mode.general(operation, (y, mode.general(torch.Tensor.reshape, (parameter, shape), {})), {})
    return y


def batch_norm_refusal(what: str) -> str:
    """Why a BatchNorm in train mode cannot be served, and what to do."""
    return (
        f"BatchNorm in train mode ({what}) couples the examples of the batch through their shared statistics, so no "
        "example has a gradient of its own. Call .eval() on the BatchNorm modules or attach(..., "
        "batch_norm='frozen') for frozen statistics, replace them (htv.replace_batchnorm makes them GroupNorm), or "
        "attach(..., batch_norm='shared') to let an example's part of the gradients include what passes through the "
        "shared statistics"
    )


@serves(F.prelu, torch.prelu)
def _prelu(mode: Intercept, func, args, kwargs):
    call = Call(mode, "prelu", _PRELU, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    x, weight = call.x, call["weight"]
    if weight.numel() > 1 or x.dim() > 1:
        shape = (-1,) + (1,) * max(0, x.dim() - 2) if weight.numel() > 1 else (1,) * x.dim()
        weight = mode.general(torch.Tensor.reshape, (weight, shape), {})
    positive = mode.general(torch.gt, (x, 0), {})
    return mode.general(torch.where, (positive, x, mode.general(torch.mul, (x, weight), {})), {})


def _as_autocast_would(x: Tensor) -> Tensor:
    """Autocast runs normalisations in float32 on CUDA, and as they come on the CPU."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half and x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x
