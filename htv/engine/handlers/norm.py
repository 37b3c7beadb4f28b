"""Normalisations: with a backward of their own, or as a plain one without parameters and an
elementwise affine map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.norm import group_norm, layer_norm
from htv.engine.handlers.call import Call, Signature, handles, refuse_rows, signature
from htv.engine.protocols import ModeLike
from htv.engine.provenance import OfBatch
from htv.errors import UnsupportedError
from htv.ops.factors import StackedFactors

_LAYER_NORM = Signature.of(F.layer_norm)
_GROUP_NORM = Signature.of(F.group_norm)
_RMS_NORM = Signature.of(F.rms_norm)
_INSTANCE_NORM = Signature.of(F.instance_norm)
_BATCH_NORM = Signature.of(F.batch_norm)
_TORCH_BATCH_NORM = signature(
    "input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled"
)


@handles(F.layer_norm, uses={"layer_norm": StackedFactors}, modules={nn.LayerNorm: "layer_norm"})
def _layer_norm(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "layer_norm", _LAYER_NORM, args, kwargs, "input", "weight", "bias")
    shape = tuple(call.arguments["normalized_shape"])
    arguments = call.enter(features=len(shape)) if call.applicable else None
    if arguments is None:
        return NotImplemented
    return call.done(
        layer_norm(
            _as_autocast_would(call.x),
            shape,
            *arguments,
            call.arguments["eps"],
            mode.rows[call.layout],
        )
    )


@handles(F.group_norm, uses={"group_norm": StackedFactors}, modules={nn.GroupNorm: "group_norm"})
def _group_norm(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "group_norm", _GROUP_NORM, args, kwargs, "input", "weight", "bias")
    arguments = call.enter(features=call.x.dim() - 1, rows=False) if call.applicable else None
    if arguments is None:
        return NotImplemented
    return call.done(
        group_norm(
            _as_autocast_would(call.x),
            call.arguments["num_groups"],
            *arguments,
            call.arguments["eps"],
            mode.rows[call.layout],
        )
    )


@handles(F.rms_norm, torch.rms_norm, modules={nn.RMSNorm: "elementwise"})
def _rms_norm(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "rms_norm", _RMS_NORM, args, kwargs, "input", "weight")
    if not call.applicable:
        return NotImplemented
    normalised = mode.general(
        F.rms_norm,
        (call.x, tuple(call.arguments["normalized_shape"]), None, call.arguments["eps"]),
        {},
    )
    return mode.general(torch.mul, (normalised, call.arguments["weight"]), {})


@handles(
    F.instance_norm,
    modules=dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "elementwise"),
)
def _instance_norm(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "instance_norm", _INSTANCE_NORM, args, kwargs, "input", "weight", "bias")
    if not call.applicable:
        return NotImplemented
    if call.x.dim() < 3:
        raise UnsupportedError(
            f"instance_norm with parameter {call.tracked[0].name!r}: its input must be (N, C, "
            f"*space), got shape {tuple(call.x.shape)}"
        )
    refuse_rows(call)
    names = ("running_mean", "running_var", "use_input_stats", "momentum", "eps")
    without = {**{name: call[name] for name in names}, "weight": None, "bias": None}
    return _affine(mode, call, mode.general(F.instance_norm, (call.x,), without))


@handles(
    F.batch_norm,
    modules=dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "elementwise"),
)
def _batch_norm(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "batch_norm", _BATCH_NORM, args, kwargs, "input", "weight", "bias")
    if not torch.is_grad_enabled() or not isinstance(mode.mark(call.x), OfBatch):
        return NotImplemented
    shared = call.arguments["training"] or call.arguments["running_mean"] is None
    if shared and not mode.session.shares_statistics:
        names = ", ".join(repr(s.name) for s in call.tracked)
        raise UnsupportedError(
            batch_norm_refusal(f"parameter {names}" if names else "F.batch_norm")
        )
    if not call.applicable:
        return NotImplemented
    refuse_rows(call)
    names = ("running_mean", "running_var", "training", "momentum", "eps")
    without = {**{name: call[name] for name in names}, "weight": None, "bias": None}
    return _affine(mode, call, mode.general(F.batch_norm, (call.x,), without))


@handles(torch.batch_norm)
def _torch_batch_norm(mode: ModeLike, func, args, kwargs):
    bound = _TORCH_BATCH_NORM.bind(args, kwargs)
    bound.pop("cudnn_enabled")
    return mode.call(F.batch_norm, (), dict(bound))


def _affine(mode: ModeLike, call: Call, y: Tensor) -> Tensor:
    """y * weight + bias for y (N, C, *space) and parameters (C,), as elementwise operations."""
    shape = (-1,) + (1,) * (y.dim() - 2)
    for operation, parameter in (
        (torch.mul, call.arguments["weight"]),
        (torch.add, call.arguments["bias"]),
    ):
        if parameter is not None:
            y = mode.general(
                operation, (y, mode.general(torch.Tensor.reshape, (parameter, shape), {})), {}
            )
    return y if y.dtype == call.x.dtype else mode.general(torch.Tensor.to, (y, call.x.dtype), {})


def batch_norm_refusal(what: str) -> str:
    """Why a BatchNorm in train mode cannot be served, and what to do."""
    return (
        f"BatchNorm in train mode ({what}) couples the examples of the batch through their shared "
        "statistics, so no example has a gradient of its own. Call .eval() on the BatchNorm "
        "modules or attach(..., batch_norm='frozen') for frozen statistics, replace them "
        "(htv.replace_batchnorm makes them GroupNorm), or attach(..., batch_norm='shared') to let "
        "an example's part of the gradients include what passes through the shared statistics"
    )


def _as_autocast_would(x: Tensor) -> Tensor:
    """Autocast runs normalisations in float32 on CUDA, and as they come on the CPU."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return (
        x.float() if half and x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x
    )
