"""Whether a saved state is one that an optimizer can go on from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["require_state_of"]


def require_state_of(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """ValueError unless an optimizer's state is of as many parameters in each group, and of their shapes."""
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], param_groups))
    if theirs != ours:
        raise ValueError(
            f"state_dict has groups of {theirs} parameters, this optimizer has groups of {ours}: it is of another "
            "model, or was given its parameters in other groups"
        )
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in param_groups for p in group["params"]]
    for position, (index, p) in enumerate(zip(indices, parameters, strict=True)):
        for name, kept in state_dict["state"].get(index, {}).items():
            if isinstance(kept, Tensor) and kept.shape != p.shape:
                raise ValueError(
                    f"state_dict has {name!r} of shape {tuple(kept.shape)} for parameter {position}, whose shape is "
                    f"{tuple(p.shape)}: it is of another model"
                )
