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
from htv.layout import Constant, Derived

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

    `applicable`: some parameter is served, gradients are on, and the input comes from the batch.
    """

    def __init__(self, mode: Intercept, signature: inspect.Signature, args, kwargs, x: str, *parameters: str):
        self.mode, self.names = mode, parameters
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.arguments = bound.arguments
        self.x: Tensor = self.arguments[x]
        self.parameters: list[Tensor | None] = [self.arguments[name] for name in parameters]
        self.applicable = (
            torch.is_grad_enabled()
            and any(mode.served(p) is not None for p in self.parameters)
            and not isinstance(mode.mark(self.x), (Constant, Derived))
            and not any(self._is_computed(p) for p in self.parameters)
        )

    def _is_computed(self, parameter: Tensor | None) -> bool:
        """Derived from served parameters, without being one: not served by layers."""
        return isinstance(self.mode.mark(parameter), Derived) and self.mode.served(parameter) is None

    def __getitem__(self, name: str):
        return self.arguments[name]

    def enter(self, kind: str, lead_only: bool = False):
        """Check the input and note the use; returns the parameters' slots."""
        self.mode.require_batch(self.x, kind, *self.parameters, lead_only=lead_only)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            served = self.mode.served(parameter)
            if served is not None:
                served.note(f"{kind} bias" if name == "bias" and "norm" not in kind else kind)
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
    call = Call(mode, _LINEAR, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    return linear(call.x, *call.enter("linear"), mode.groups)


@serves(F.conv1d, F.conv2d, F.conv3d)
def _conv(mode: Intercept, func, args, kwargs):
    call = Call(mode, _CONV, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    if call.x.dim() != call["weight"].dim():
        raise ValueError(
            f"{func.__name__}: input of shape {tuple(call.x.shape)} has no batch dim; htv needs (N, C, *space)"
        )
    weight, bias = call.enter(func.__name__, lead_only=True)
    return conv(call.x, weight, bias, call["stride"], call["padding"], call["dilation"], call["groups"], mode.groups)


@serves(F.embedding)
def _embedding(mode: Intercept, func, args, kwargs):
    call = Call(mode, _EMBEDDING, args, kwargs, "input", "weight")
    ids = call.x
    served = mode.served(call["weight"])
    if served is not None:
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if call[option]:
                raise UnsupportedError(
                    f"embedding with parameter {served.name!r}: {option}={call[option]!r} has no per-group meaning; "
                    f"turn it off or exclude={served.name!r}"
                )
        if isinstance(mode.mark(ids), Constant) and ids.dim() > 1 and ids.stride(0) == 0 and mode.groups.fits(ids):
            # The same ids for every example: look them up once, so that the result stays derived from the table alone.
            first = ids[:1]
            mode.marks.put(first, mode.mark(ids))
            once = _embedding(mode, func, (first, *args[1:]), kwargs)
            return mode.general(torch.Tensor.expand, (once, len(ids), *(-1,) * ids.dim()), {})
    padding_idx = call["padding_idx"]
    if served is not None and isinstance(mode.mark(ids), Constant) and padding_idx is None:
        rows = mode.general(func, args, kwargs)  # derived from the table alone
        if isinstance(mode.mark(rows), Derived):
            mode.marks.put(rows, Derived((served,), rows, ids))
        return rows
    if not call.applicable:
        return NotImplemented
    (weight,) = call.enter("embedding")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(call["weight"])
    return embedding(ids, weight, padding_idx, mode.groups)


@serves(F.layer_norm)
def _layer_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, _LAYER_NORM, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    weight, bias = call.enter("layer_norm")
    x = _as_autocast_would(call.x)
    return layer_norm(x, tuple(call["normalized_shape"]), weight, bias, call["eps"], mode.groups)


@serves(F.group_norm)
def _group_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, _GROUP_NORM, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    weight, bias = call.enter("group_norm", lead_only=True)
    return group_norm(_as_autocast_would(call.x), call["num_groups"], weight, bias, call["eps"], mode.groups)


@serves(F.rms_norm, torch.rms_norm)
def _rms_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, _RMS_NORM, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    normalised = F.rms_norm(call.x, tuple(call["normalized_shape"]), None, call["eps"])
    return mode.general(torch.mul, (normalised, call["weight"]), {})


@serves(F.batch_norm)
def _batch_norm(mode: Intercept, func, args, kwargs):
    call = Call(mode, _BATCH_NORM, args, kwargs, "input", "weight", "bias")
    if not torch.is_grad_enabled():
        return NotImplemented
    if call["training"] or call["running_mean"] is None:
        names = ", ".join(repr(s.name) for s in map(mode.served, call.parameters) if s is not None)
        raise UnsupportedError(batch_norm_refusal(f"parameter {names}" if names else "F.batch_norm"))
    if not call.applicable:
        return NotImplemented
    shape = (-1,) + (1,) * (call.x.dim() - 2)
    y = F.batch_norm(call.x, call["running_mean"], call["running_var"], None, None, False, 0.0, call["eps"])
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
    """Autocast runs normalisations in float32."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16) else x
