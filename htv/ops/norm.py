"""Sums that normalisations contribute to their scale and shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from htv.ops import backend, reference
from htv.ops.factors import SCRATCH_BYTES


def norm_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The op `norm_sums` of `htv.ops.schema`; where no kernel serves, some samples at a time: small temporaries."""
    if x.device.type == "cpu" and backend.NOT_BUILT is None and backend.named() in (None, "cpp"):
        return torch.ops.htv.norm_sums(grad, x, mean, rstd)
    step = max(1, SCRATCH_BYTES // max(1, math.prod(x.shape[1:]) * 4))
    pieces = [reference.norm_sums(*some) for some in zip(*(t.split(step) for t in (grad, x, mean, rstd)), strict=True)]
    scale, shift = zip(*pieces, strict=True)
    return torch.cat(scale), torch.cat(shift)
