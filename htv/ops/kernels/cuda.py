"""The CUDA kernels, csrc/cuda: what the compiled library serves where it was built with them."""

from __future__ import annotations

import torch

from htv.ops.kernels import cpp
from htv.ops.registry import register_kernel

REALS = (torch.float32, torch.float64)

register_kernel(
    "stacked",
    "cuda",
    statistics=(*cpp.FUSED, "sign_agreement", "median_of_means"),
    dtypes=REALS,
    reason="reads what Triton's reads; beyond 64 groups once, where Triton's reads 8 times",
    otherwise="the reference serves it",
)
register_kernel(
    "linear",
    "cuda",
    statistics=(*cpp.COUNTED, "median", "trimmed_mean", "winsorized_mean"),
    dtypes=REALS,
    longest=1,
    reason="votes are int8 products, ranks are recomputed; Triton's pads every row to 16",
    otherwise=cpp.SLICED,
)
