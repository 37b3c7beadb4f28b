"""Wrong labels, made on purpose."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from htv.errors import described

NoiseKind = Literal["other", "uniform", "permuted"]


def label_noise(
    labels: Tensor, rate: float, num_classes: int, seed: int, kind: NoiseKind = "other"
) -> tuple[Tensor, Tensor]:
    """Give ``round(rate * N)`` labels, drawn without replacement, new values.

    labels:       (N,) int64 in [0, num_classes), on the CPU.
    rate:         in [0, 1].
    num_classes:  at least 2.
    seed:         decides which labels, and their new values.
    kind:         "other": each drawn from the other classes, so that every one of them is wrong;
                  "uniform": drawn from all classes, right by chance in one of num_classes cases
                  (what papers mean by random labels); "permuted": exchanged among the examples
                  drawn, so that classes stay as frequent as they are.

    Returns the noisy labels (N,) int64, and which differ from the true ones (N,) bool. Raises
    ValueError for arguments that are not as said.

    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> noisy, wrong = htv.data.label_noise(labels, 0.5, num_classes=3, seed=0)
    >>> int(wrong.sum()), torch.equal(noisy != labels, wrong)
    (3, True)
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate!r}")
    if num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2 for a label to be wrong, got {num_classes}"
        )
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be a tensor, (N,) int64, got {described(labels)}: "
            "torch.as_tensor(labels).long() makes it one"
        )
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    if kind == "other":
        offsets = torch.randint(1, num_classes, (len(chosen),), generator=generator)
        new = (labels[chosen] + offsets) % num_classes
    elif kind == "uniform":
        new = torch.randint(0, num_classes, (len(chosen),), generator=generator)
    elif kind == "permuted":
        new = labels[chosen[torch.randperm(len(chosen), generator=generator)]]
    else:
        raise ValueError(f"kind must be 'other', 'uniform' or 'permuted', got {kind!r}")
    noisy = labels.clone()
    noisy[chosen] = new
    return noisy, noisy != labels
