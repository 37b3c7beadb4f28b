"""Wrong labels, made on purpose."""

from __future__ import annotations

import torch
from torch import Tensor


def label_noise(labels: Tensor, rate: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Change a share of the labels to another class each, drawn uniformly from the other classes.

    labels: (N,) int64 in [0, num_classes), on the CPU.
    Returns the noisy labels (N,) int64 and which were changed (N,) bool, exactly ``round(rate * N)`` of them.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 for a label to be wrong, got {num_classes}")
    generator = torch.Generator().manual_seed(seed)
    changed = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    offsets = torch.randint(1, num_classes, (len(changed),), generator=generator)
    noisy, mask = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    noisy[changed] = (labels[changed] + offsets) % num_classes
    mask[changed] = True
    return noisy, mask
