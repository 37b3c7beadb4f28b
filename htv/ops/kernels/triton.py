"""The Triton kernels, triton_kernels/: their wrappers as ops, and what they serve.

Triton is imported at the first call of a kernel, never here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable

import torch

from htv.ops import registry, schema, statistics
from htv.ops.kernels import cpp
from htv.ops.registry import register_kernel

FUSED = (*cpp.FUSED, "median_of_means")
HALF_OR_SINGLE = (torch.float32,)  # what float32, bfloat16 and float16 are computed in


@functools.cache
def _module(name: str):
    """Import a module of `htv.triton_kernels`, whose statistics must be those of the registry."""
    where = "htv.triton_kernels.statistic"
    numbers, needed = importlib.import_module(where).NUMBERS, registry.statistics_of("triton")
    statistics.require_agreement(numbers, needed, where, remedy="bring its NUMBERS up to date")
    return importlib.import_module(f"htv.triton_kernels.{name}")


def _wrapper(op: str, module: str) -> Callable:
    """Return the implementation of an op by the function of its name in a module."""

    def plain(*arguments):
        return getattr(_module(module), op)(*arguments)

    def of_a_statistic(*arguments):
        *factors, number, count, votes, k = arguments
        groups = schema.groups_of(op, factors)
        statistic = schema.checked(op, number, count, votes, k, groups)
        return getattr(_module(module), op)(*factors, statistic)

    def of_a_summary(*arguments):
        *factors, number, log_offset = arguments
        name = schema.checked_summary(op, number, log_offset, schema.groups_of(op, factors))
        return getattr(_module(module), op)(*factors, name, log_offset)

    if schema.yields_a_summary(op):
        return of_a_summary
    return of_a_statistic if schema.takes_a_statistic(op) else plain


def _register(
    op: str,
    module: str,
    *,
    reason: str,
    statistics: Iterable[str] | None = None,
    otherwise: str = "the general paths serve it",
) -> None:
    """Register a kernel, the function of the op's name in `htv.triton_kernels.{module}`."""
    register_kernel(
        op,
        "triton",
        reason=reason,
        statistics=statistics,
        dtypes=HALF_OR_SINGLE,
        otherwise=otherwise,
    )
    schema.define_beside(op, "triton", _wrapper(op, module))


_register(
    "stacked",
    "stacked",
    statistics=(*FUSED, "sign_agreement"),
    reason="one read of the contributions, up to 64 groups",
    otherwise="the reference serves it",
)
_register(
    "linear",
    "linear",
    statistics=FUSED,
    reason="products in half precision, statistics in registers: contributions are never stored",
    otherwise=cpp.SLICED,
)
_register(
    "conv",
    "conv",
    statistics=FUSED,
    reason="products in half precision, statistics in registers: contributions are never stored",
    otherwise=cpp.SLICED,
)
_register(
    "embedding",
    "embedding",
    statistics=(*FUSED, "sign_agreement"),
    reason="sorted once, a program per token; PyTorch's sums by pairs wait for the device",
    otherwise="PyTorch's sums by token serve it",
)
_register(
    "embedding_contributions",
    "embedding",
    reason="the rows of some tokens, asking nothing of the device",
)
_register(
    "shifted_cross_entropy",
    "cross_entropy",
    reason="logits are read once, and nothing of their size is stored",
)
_register(
    "shifted_cross_entropy_grad",
    "cross_entropy",
    reason="logits are read once, and nothing of their size is stored but the gradient",
)
_register(
    "stacked_summary",
    "stacked",
    statistics=cpp.STREAMING,
    reason="one read of the contributions",
    otherwise="the reference serves it",
)
_register(
    "linear_summary",
    "linear",
    statistics=cpp.STREAMING,
    reason="the states that `linear` has in registers, as they are",
    otherwise=cpp.SLICED,
)
_register(
    "conv_summary",
    "conv",
    statistics=cpp.STREAMING,
    reason="the states that `conv` has in registers, as they are",
    otherwise=cpp.SLICED,
)
