"""Whether a model is trained by several ranks: there each would vote alone, and averaging votes is
no vote.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from htv.errors import UnsupportedError

__all__ = ["refuse_data_parallel", "refuse_sharded", "sharded_by", "world_size"]

REMEDY = "Remedy: htv.Mean(), which is plain training, or training in one process"


def world_size() -> int:
    """Return how many ranks the default process group has; 1 without one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def sharded_by(model: nn.Module) -> str | None:
    """Name what shares the parameters of `model` between ranks: FSDP, or DTensors; None if each
    rank has all.
    """
    for path, module in model.named_modules():
        if _is_fsdp(module):
            return "FullyShardedDataParallel"
        for name, parameter in module._parameters.items():
            if _is_sharded(parameter):
                return f"parameter {f'{path}.{name}'.lstrip('.')!r}, a {type(parameter).__name__}"
    return None


def refuse_sharded(model: nn.Module, kind: str | None) -> None:
    """Raise UnsupportedError if ranks share `model`, or DDP wraps a part of it; `kind` is what
    `sharded_by` returned.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _refuse_ranks(module, "DistributedDataParallel")
    if kind is not None:
        raise UnsupportedError(
            f"the model is sharded over ranks ({kind}): each rank would vote alone over its own "
            f"examples. {REMEDY}"
        )


def refuse_data_parallel() -> None:
    """Raise UnsupportedError inside the forward of a DistributedDataParallel of several ranks."""
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        _refuse_ranks(active, "DistributedDataParallel")


def vote_alone() -> bool:
    """Tell whether there are several ranks; raise where DistributedDataParallel would average their
    votes.
    """
    if DistributedDataParallel._active_ddp_module is not None:
        refuse_data_parallel()
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and world_size() > 1


def _refuse_ranks(module: DistributedDataParallel, kind: str) -> None:
    ranks = module.process_group.size()
    if ranks > 1:
        raise UnsupportedError(
            f"the model is trained by {kind} on {ranks} ranks: each rank would vote alone over "
            f"its own examples, and the average of votes is no vote. {REMEDY}"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return any(
        c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__
    )


def _is_sharded(parameter) -> bool:
    return any(
        c.__name__ in ("DTensor", "FlatParameter") for c in type(parameter).__mro__
    ) or hasattr(parameter, "_is_flat_param")
