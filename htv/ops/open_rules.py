"""Rules of the user's own: calling their `reduce`, and looking at what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.rules import Statistic

__all__ = ["is_one_value", "no_mask", "reduced"]


def reduced(contributions: Tensor, statistic: Statistic) -> Tensor:
    """Return what the `reduce` of a rule makes of contributions, without the factor E.

    contributions: (E, *box) -> (*box), of the same dtype and device; it may be a view of them.
    Raises TypeError or ValueError that names the rule's class where it returns anything else.
    """
    found = statistic.reduce(contributions)
    kind = type(statistic.reduce.__self__).__name__
    if not isinstance(found, Tensor):
        raise TypeError(f"{kind}.reduce() must return a tensor, got {type(found).__name__}")
    if found.shape != contributions.shape[1:]:
        raise ValueError(
            f"{kind}.reduce() must return (*box), {tuple(contributions.shape[1:])}, for "
            f"contributions (E, *box), {tuple(contributions.shape)}; got {tuple(found.shape)}"
        )
    if found.dtype != contributions.dtype:
        raise TypeError(
            f"{kind}.reduce() must return the dtype of the contributions, {contributions.dtype}, "
            f"got {found.dtype}: return result.to(contributions.dtype)"
        )
    if found.device != contributions.device:
        raise ValueError(
            f"{kind}.reduce() must return a tensor on {contributions.device}, as the contributions "
            f"are, got one on {found.device}"
        )
    return found


def is_one_value(box: Tensor) -> bool:
    """Tell whether a tensor of several coordinates holds one value everywhere, NaN being one."""
    if box.numel() < 2:
        return False
    first = box.flatten()[0]
    return bool(((box == first) | (box.isnan() & first.isnan())).all())


def no_mask(device: torch.device) -> Tensor:
    """Return the sum of the mask of a rule that has none: () float64."""
    return torch.zeros((), dtype=torch.float64, device=device)
