"""The state of optimizers: what it is kept in, and whether one can go on from a saved one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["load_as_kept", "require_state_of", "state_dtype"]

HALF = (torch.bfloat16, torch.float16)


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return what an optimizer keeps state in: at least float32, for sums in float16 stick."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


@torch.no_grad()
def load_as_kept(optimizer: Optimizer, state_dict: dict[str, Any], names: Iterable[str]) -> None:
    """Undo the cast of `Optimizer.load_state_dict(state_dict)`, to the type of the parameters.

    names:  of the state that is kept in `state_dtype`; what was saved in half precision becomes
            float32.
    """
    saved, names = state_dict["state"], tuple(names)
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(indices, parameters, strict=True):
        if p.dtype not in HALF or index not in saved:
            continue
        for name in names:
            if name in saved[index]:
                kept = saved[index][name].to(p.device, state_dtype(p), copy=True)
                optimizer.state[p][name] = kept


def require_state_of(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """ValueError unless an optimizer's state is of as many parameters in each group, and of their
    shapes.
    """
    theirs, ours = (
        [len(group["params"]) for group in groups]
        for groups in (state_dict["param_groups"], param_groups)
    )
    if theirs != ours:
        raise ValueError(
            f"state_dict has groups of {theirs} parameters, this optimizer has groups of {ours}: "
            "it is of another model, or was given its parameters in other groups"
        )
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in param_groups for p in group["params"]]
    for position, (index, p) in enumerate(zip(indices, parameters, strict=True)):
        for name, kept in state_dict["state"].get(index, {}).items():
            if isinstance(kept, Tensor) and kept.shape != p.shape:
                raise ValueError(
                    f"state_dict has {name!r} of shape {tuple(kept.shape)} for parameter "
                    f"{position}, whose shape is {tuple(p.shape)}: it is of another model"
                )
