"""How several ranks train a model, as far as htv must know: without `htv.distributed` each would
vote alone, and averaging votes is no vote.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from htv.errors import UnsupportedError

__all__ = [
    "refuse_alone",
    "refuse_derivatives",
    "refuse_sharded",
    "sharded_by",
    "vote_alone",
    "world_size",
]

REMEDIES = {
    "DistributedDataParallel": "htv.distributed.ddp(ddp_model, handle) once, before training",
    "fully_shard": "htv.distributed.fsdp(model, handle) once, after fully_shard",
}


def world_size() -> int:
    """Return how many ranks the default process group has; 1 without one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def sharded_by(model: nn.Module) -> str | None:
    """Name what shares the parameters of `model` between ranks: "fully_shard" (FSDP2), the old
    FullyShardedDataParallel, or a parameter that is a DTensor; None if each rank has all.
    """
    found = None
    for path, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            return "FullyShardedDataParallel"
        if "FSDPModule" in kinds:
            found = "fully_shard"
        for name, parameter in module._parameters.items():
            if found is None and _is_sharded(parameter):
                return f"parameter {f'{path}.{name}'.lstrip('.')!r}, a {type(parameter).__name__}"
    return found


def refuse_sharded(kind: str | None) -> None:
    """Raise UnsupportedError if ranks share a model in a way that cannot be served; `kind` is what
    `sharded_by` returned.
    """
    if kind == "FullyShardedDataParallel":
        raise UnsupportedError(
            "the model is sharded by FullyShardedDataParallel, whose flat parameters hide which "
            "gradient is whose. Remedy: FSDP2, torch.distributed.fsdp.fully_shard(model), and "
            "htv.distributed.fsdp(model, handle)"
        )
    if kind not in (None, "fully_shard"):
        raise UnsupportedError(
            f"the model is sharded over ranks ({kind}) in a way that htv does not serve: each rank "
            "would vote alone over its own part. Remedy: FSDP2 (fully_shard) or "
            "DistributedDataParallel with htv.distributed, or htv.Mean(), which is plain training"
        )


def refuse_alone(model: nn.Module) -> None:
    """Raise UnsupportedError inside what brings several ranks' gradients together: it would average
    their votes.
    """
    active = DistributedDataParallel._active_ddp_module
    wrappers = [active] if active is not None else []
    wrappers += [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    for wrapper in wrappers:
        ranks = wrapper.process_group.size()
        if ranks > 1:
            _refuse("DistributedDataParallel", f"{ranks} ranks")
    if sharded_by(model) == "fully_shard":
        _refuse("fully_shard", "its ranks")
    if _in_pipeline():
        raise UnsupportedError(
            "a stage of a pipeline: each micro-batch would vote alone, and the schedule scales the "
            "sum of their votes. Remedy: htv.distributed.pipeline(schedule, handle) once"
        )


def refuse_derivatives(model: nn.Module, name: str) -> None:
    """Raise UnsupportedError for derivatives in a loss that reach the parameter `name` of a sharded
    `model`: what a forward gathered is freed before the loss's own backward needs it again.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    kind = sharded_by(model)
    if kind is not None:
        raise UnsupportedError(
            f"a derivative in the loss (create_graph=True) reaches parameter {name!r} of a model "
            f"that is sharded over ranks ({kind}). Remedy: leave it whole on every rank, under "
            "DistributedDataParallel with htv.distributed.ddp or attach(..., process_group=...)"
        )


def vote_alone() -> bool:
    """Tell whether there are several ranks."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and world_size() > 1


def _in_pipeline() -> bool:
    """Tell whether a stage of torch.distributed.pipelining runs the forward under way."""
    stages = sys.modules.get("torch.distributed.pipelining.stage")
    frame = None if stages is None else sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == stages.__file__:
            return True
        frame = frame.f_back
    return False


def _refuse(kind: str, ranks: str) -> None:
    raise UnsupportedError(
        f"the model is trained by {kind} on {ranks}: each rank would vote alone over its own "
        f"examples, and the average of votes is no vote. Remedy: {REMEDIES[kind]}; its "
        "vote='local' if that is meant"
    )


def _is_sharded(parameter) -> bool:
    return any(
        c.__name__ in ("DTensor", "FlatParameter") for c in type(parameter).__mro__
    ) or hasattr(parameter, "_is_flat_param")
