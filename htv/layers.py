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

from htv.autograd.conv import conv
from htv.autograd.embedding import embedding
from htv.autograd.linear import linear
from htv.autograd.norm import group_norm, layer_norm
from htv.errors import UnsupportedError
from htv.layout import Batch, Constant, Derived

if TYPE_CHECKING:
    from htv.intercept import Intercept

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
    `applicable`:     some parameter is served, gradients are on, and the input was computed from the batch.
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
        self.served = tuple(s for s in map(mode.served, self.parameters) if s is not None)
        self.applicable = bool(
            torch.is_grad_enabled()
            and self.served
            and isinstance(mode.mark(self.x), Batch)
            and not any(self._is_computed(p) for p in self.parameters)
        )

    def _is_computed(self, parameter: Tensor | None) -> bool:
        """Derived from served parameters, without being one: not served by layers."""
        return isinstance(self.mode.mark(parameter), Derived) and self.mode.served(parameter) is None

    def __getitem__(self, name: str):
        return self.arguments[name]

    def enter(self, features: int = 0, lead_only: bool = False):
        """The parameters' slots, or None if the use is passed on plainly. Raises if the input is not the batch's.

        features:   how many dims the layer needs behind the batch's.
        lead_only:  it needs the batch in dim 0 alone.
        """
        names = ", ".join(repr(s.name) for s in self.served)
        problem = self.mode.why_not_batch(self.x, features)
        if problem is None and lead_only and len(self.mode.groups.lead) > 1:
            problem = UnsupportedError, f"it cannot take packed sequences of shape {self.mode.groups.lead}"
        if problem is not None:
            error, why = problem
            message = f"{self.kind} with parameter {names}: {why}; or exclude={names}"
            if not self.mode.handle.passes_plainly:
                raise error(message)
            self.mode.handle.unsupported(message, self.served)
            return None
        for name, parameter in zip(self.names, self.parameters, strict=True):
            served = self.mode.served(parameter)
            if served is not None:
                served.note(f"{self.kind} bias" if name == "bias" and "norm" not in self.kind else self.kind)
        return [self.mode.slot(p) for p in self.parameters]


def _signature(text: str) -> inspect.Signature:
    """ "a, b, c=1" -> the signature; torch's builtins have none of their own."""
    parameters = []
    for part in text.split(", "):
        name, _, default = part.partition("=")
        value = eval(default, {}) if default else inspect.Parameter.empty  # literals written below
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(parameters)


_LINEAR = _signature("input, weight, bias=None")
_CONV = _signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
_EMBEDDING = inspect.signature(F.embedding)
_LAYER_NORM = inspect.signature(F.layer_norm)
_GROUP_NORM = inspect.signature(F.group_norm)
_RMS_NORM = inspect.signature(F.rms_norm)
_BATCH_NORM = inspect.signature(F.batch_norm)


@serves(F.linear)
def _linear(mode: Intercept, func, args, kwargs):
    call = Call(mode, "linear", _LINEAR, args, kwargs, "input", "weight", "bias")
    slots = call.enter(features=1) if call.applicable else None
    return NotImplemented if slots is None else linear(call.x, *slots, mode.groups)


@serves(F.conv1d, F.conv2d, F.conv3d)
def _conv(mode: Intercept, func, args, kwargs):
    call = Call(mode, func.__name__, _CONV, args, kwargs, "input", "weight", "bias")
    slots = call.enter(features=call["weight"].dim() - 1, lead_only=True) if call.applicable else None
    if slots is None:
        return NotImplemented
    return conv(call.x, *slots, call["stride"], call["padding"], call["dilation"], call["groups"], mode.groups)


@serves(F.embedding)
def _embedding(mode: Intercept, func, args, kwargs):
    call = Call(mode, "embedding", _EMBEDDING, args, kwargs, "input", "weight")
    ids, padding_idx = call.x, call["padding_idx"]
    for option in ("max_norm", "scale_grad_by_freq", "sparse") if call.served else ():
        if call[option]:
            name = call.served[0].name
            raise UnsupportedError(
                f"embedding with parameter {name!r}: {option}={call[option]!r} has no per-group meaning; turn it off "
                f"or exclude={name!r}"
            )
    if call.served and isinstance(mode.mark(ids), Constant) and padding_idx is None:
        return _embedding_of_constants(mode, func, args, kwargs, call)
    slots = call.enter() if call.applicable else None
    if slots is None:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(call["weight"])
    return embedding(ids, *slots, padding_idx, mode.groups)


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
    if isinstance(mode.mark(rows), Derived):
        mode.marks.put(rows, Derived(call.served, rows, ids))
    return rows


@serves(F.layer_norm)
def _layer_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "layer_norm", _LAYER_NORM, args, kwargs, "input", "weight", "bias")
    shape = tuple(call["normalized_shape"])
    slots = call.enter(features=len(shape)) if call.applicable else None
    if slots is None:
        return NotImplemented
    return layer_norm(_as_autocast_would(call.x), shape, *slots, call["eps"], mode.groups)


@serves(F.group_norm)
def _group_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "group_norm", _GROUP_NORM, args, kwargs, "input", "weight", "bias")
    slots = call.enter(features=1, lead_only=True) if call.applicable else None
    if slots is None:
        return NotImplemented
    return group_norm(_as_autocast_would(call.x), call["num_groups"], *slots, call["eps"], mode.groups)


@serves(F.rms_norm, torch.rms_norm)
def _rms_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "rms_norm", _RMS_NORM, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    normalised = mode.general(F.rms_norm, (call.x, tuple(call["normalized_shape"]), None, call["eps"]), {})
    return mode.general(torch.mul, (normalised, call["weight"]), {})


@serves(F.batch_norm)
def _batch_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, "batch_norm", _BATCH_NORM, args, kwargs, "input", "weight", "bias")
    if not torch.is_grad_enabled():
        return NotImplemented
    if call["training"] or call["running_mean"] is None:
        names = ", ".join(repr(s.name) for s in call.served)
        raise UnsupportedError(batch_norm_refusal(f"parameter {names}" if names else "F.batch_norm"))
    if not call.applicable:
        return NotImplemented
    shape = (-1,) + (1,) * (call.x.dim() - 2)
    frozen = (call.x, call["running_mean"], call["running_var"], None, None, False, 0.0, call["eps"])
    y = mode.general(F.batch_norm, frozen, {})
    for operation, parameter in ((torch.mul, call["weight"]), (torch.add, call["bias"])):
        if parameter is not None:
            y = mode.general(operation, (y, mode.general(torch.Tensor.reshape, (parameter, shape), {})), {})
    return y


def batch_norm_refusal(what: str) -> str:
    """Why a BatchNorm in train mode cannot be served, and what to do."""
    return (
        f"BatchNorm in train mode ({what}) couples the examples of the batch through their shared statistics, so no "
        "example has a gradient of its own. Call .eval() on the BatchNorm modules (frozen statistics), or replace them "
        "by GroupNorm or LayerNorm"
    )


def _as_autocast_would(x: Tensor) -> Tensor:
    """Autocast runs normalisations in float32 on CUDA, and as they come on the CPU."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half and x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x
