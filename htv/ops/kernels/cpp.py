"""The C++ kernels for the CPU, csrc/cpu: what the compiled library serves, by op.

Every file of csrc/cpu registers the implementations of its ops with the library when it is loaded.
"""

from __future__ import annotations

import torch

from htv.ops.registry import register_kernel

REALS = (torch.float32, torch.float64)
COUNTED = ("mean", "and_mask", "xor_mask", "sign_sum")  # those that sum and votes decide
FUSED = (*COUNTED, "geometric_mean", "sand_mask", "median", "trimmed_mean", "winsorized_mean")
SLICED = "the sliced path serves it"
STREAMING = (*COUNTED, "geometric_mean", "sand_mask", "sign_agreement")

register_kernel(
    "stacked",
    "cpp",
    statistics=(*FUSED, "sign_agreement", "median_of_means"),
    dtypes=REALS,
    reason="states in registers, or values ranked in cache",
    otherwise="the reference serves it",
)
register_kernel(
    "linear",
    "cpp",
    statistics=FUSED,
    dtypes=REALS,
    reason="products tile by tile, contributions never stored",
    otherwise=SLICED,
)
register_kernel(
    "together",
    "cpp",
    statistics=FUSED,
    dtypes=REALS,
    reason="the two above, for many small parameters in one call",
    otherwise="one call for each",
)
register_kernel(
    "conv",
    "cpp",
    statistics=FUSED,
    dtypes=REALS,
    reason="windows packed straight into the panels of those tiles",
    otherwise=SLICED,
)
register_kernel(
    "embedding",
    "cpp",
    statistics=COUNTED,
    dtypes=REALS,
    reason="one pass over the lookups, sorted by token",
    otherwise="PyTorch's sums by token serve it",
)
register_kernel(
    "norm_sums", "cpp", dtypes=REALS, reason="one pass, nothing of the input's size stored"
)
register_kernel(
    "group_norm_backward", "cpp", dtypes=REALS, reason="one pass for input, scale and shift"
)
register_kernel(
    "shifted_cross_entropy", "cpp", dtypes=REALS, reason="logits are read once, nothing is stored"
)
register_kernel(
    "shifted_cross_entropy_grad",
    "cpp",
    dtypes=REALS,
    reason="logits are read once, and nothing but the gradient is stored",
)
register_kernel(
    "stacked_summary",
    "cpp",
    statistics=STREAMING,
    dtypes=REALS,
    reason="the states that `stacked` has in registers, as they are",
    otherwise="the reference serves it",
)
register_kernel(
    "linear_summary",
    "cpp",
    statistics=STREAMING,
    dtypes=REALS,
    reason="sum and votes, and the spread or the logarithms, by one pass over the products",
    otherwise=SLICED,
)
register_kernel(
    "conv_summary",
    "cpp",
    statistics=STREAMING,
    dtypes=REALS,
    reason="the same of the windows' products",
    otherwise=SLICED,
)
