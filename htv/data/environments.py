"""Problems with environments: one mechanism they share, and shortcuts that differ from one to the next.

From Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_environments(count: int = 4, shared: float = 0.1, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """One example per environment, ``x = scale * [identity | shared]`` and ``y = 1``: a linear regression.

    A feature of its own explains each environment at once; the last feature, weaker, explains all of them.

    Returns x (count, count + 1) and y (count, 1), float32.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 environment, got {count!r}")
    own = torch.eye(count)
    return scale * torch.cat([own, torch.full((count, 1), shared)], dim=1), torch.ones(count, 1)
