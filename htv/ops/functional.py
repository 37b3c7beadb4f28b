"""Statistics of stacked contributions, as functions: (E, *shape) -> (*shape).

Differentiable any number of times, in forward mode and by the transforms of torch.func too;
derivatives of any of these kinds are those of the definition, `htv.ops.reference`.

They return ``stat({g_e})``, a mean-like value without the factor E; results have the dtype of `grads`, half-precision
inputs are computed in float32. A NaN among the E values of a coordinate gives NaN there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from htv.ops import backend, open_rules, reference, registry, schema, statistics
from htv.rules import (
    AndMask,
    GeometricMean,
    Median,
    MedianOfMeans,
    Rule,
    SandMask,
    Statistic,
    TrimmedMean,
    WinsorizedMean,
    XorMask,
)

__all__ = [
    "and_mask",
    "geometric_mean",
    "median",
    "median_of_means",
    "sand_mask",
    "sign_agreement",
    "trimmed_mean",
    "winsorized_mean",
    "xor_mask",
]

MASK_OFFSET = 1e-10  # keeps the division by the kept fraction finite when nothing is kept


def stacked(grads: Tensor, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The op `stacked` of `htv.ops.schema` for any (E, *shape), by the backend that serves it."""
    if statistic.reduce is not None:
        values = reference.cast(grads, reference.compute_dtype(grads.dtype))
        return open_rules.reduced(values, statistic), open_rules.no_mask(grads.device)
    if grads.numel() == 0:
        return reference.stacked(grads, Statistic("mean"))
    compiling = torch.compiler.is_compiling()
    operator = _operator(statistic.name, grads, compiling)
    flat = grads.reshape(len(grads), -1).contiguous()
    if operator is None or (not compiling and schema.transformed(grads)):
        value, mask_sum = reference.stacked(flat, statistic)
    elif (grads.requires_grad and torch.is_grad_enabled()) or compiling:
        value, mask_sum = operator(flat, *schema.numbers(statistic))
    else:
        with torch._C._AutoDispatchBelowAutograd():  # written in Python, and as slow as a small op
            value, mask_sum = operator(flat, *schema.numbers(statistic))
    return value.reshape(grads.shape[1:]), mask_sum


_operators = registry.kept_choices()


def _operator(name: str, grads: Tensor, compiling: bool) -> Callable | None:
    """Return the operator that serves a stacked statistic, or None for the reference."""
    key = None
    if not compiling:
        key = name, grads.dtype, grads.device, backend.setting()
        kept = _operators.get(key, False)
        if kept is not False:
            return kept
    dtype = reference.compute_dtype(grads.dtype)
    server = backend.choose(backend.Problem("stacked", name, grads.device, dtype))
    found = None if server == "reference" else backend.operator("stacked", server)
    if not compiling:
        backend.keep(_operators, key, found, grads.device)
    return found


def normalise(value: Tensor, mask_sum: Tensor, statistic: Statistic) -> Tensor:
    """Divide by the mean of the mask over the whole parameter, for the rules that ask for it."""
    if not statistic.normalise or value.numel() == 0:
        return value
    return value / (MASK_OFFSET + mask_sum / value.numel()).to(value.dtype)


def check_stacked(grads: Tensor) -> int:
    """Validate stacked contributions; returns E."""
    if not isinstance(grads, Tensor):
        raise TypeError(f"grads must be a tensor of shape (E, *shape), got {type(grads).__name__}")
    if not grads.dtype.is_floating_point:
        raise TypeError(
            f"grads must be floating point, got {grads.dtype}: convert with grads.float()"
        )
    if grads.dim() == 0:
        raise ValueError(
            "grads must have shape (E, *shape) with the groups in dim 0, got a 0-dim tensor"
        )
    if len(grads) == 0:
        raise ValueError("grads holds no groups: dim 0 has size E = 0")
    return len(grads)


def _apply(grads: Tensor, statistic: Statistic) -> Tensor:
    value, mask_sum = stacked(grads, statistic)
    return normalise(value, mask_sum, statistic).to(grads.dtype)


def apply_rule(grads: Tensor, rule: Rule) -> Tensor:
    """Return stat({g_e}) by any rule, your own too. grads: (E, *shape) -> (*shape), same dtype.

    Raises TypeError for a rule that names no statistic htv has, and what `htv.Rule.reduce` raises.
    """
    return _apply(grads, statistics.resolve(rule, check_stacked(grads)))


def sign_agreement(grads: Tensor) -> Tensor:
    """|sum_e sign(g_e)| / E, in [0, 1]; sign(0) = 0. Its derivative is 0. grads: (E, *shape) -> (*shape)."""
    check_stacked(grads)
    return _apply(grads, Statistic("sign_agreement"))


def and_mask(grads: Tensor, tau: float, rescale: bool = False) -> Tensor:
    """The mean where ``|sum_e sign(g_e)| >= tau * E``, else 0. See `htv.AndMask`. grads: (E, *shape) -> (*shape)."""
    return apply_rule(grads, AndMask(tau, rescale))


def xor_mask(grads: Tensor, tau: float) -> Tensor:
    """The mean where `and_mask` gives 0, and 0 where it keeps. See `htv.XorMask`. grads: (E, *shape) -> (*shape)."""
    return apply_rule(grads, XorMask(tau))


def geometric_mean(grads: Tensor, tau: float) -> Tensor:
    """Signed geometric mean where signs agree, else 0. See `htv.GeometricMean`. grads: (E, *shape) -> (*shape)."""
    return apply_rule(grads, GeometricMean(tau))


def sand_mask(grads: Tensor, tau: float, k: float) -> Tensor:
    """The smooth AND-mask; E >= 2. See `htv.SandMask`. grads: (E, *shape) -> (*shape)."""
    return apply_rule(grads, SandMask(tau, k))


def median(grads: Tensor, interpolation: str = "midpoint") -> Tensor:
    """Coordinate-wise median; for even E the "midpoint", "lower" or "higher" middle. grads: (E, *shape) -> (*shape)."""
    return apply_rule(grads, Median(interpolation))


def trimmed_mean(grads: Tensor, trim: int | float) -> Tensor:
    """Mean without `trim` values (int) or share of values (float) per side. grads: (E, *shape) -> (*shape).

    Raises ValueError unless 2 * count < E. See `htv.TrimmedMean`.
    """
    return apply_rule(grads, TrimmedMean(trim))


def winsorized_mean(grads: Tensor, winsorize: int | float) -> Tensor:
    """Mean after clipping to the (c + 1)-th smallest and largest values. grads: (E, *shape) -> (*shape).

    winsorize: c as a count per side (int) or a fraction per side (float); ValueError unless 2 * c < E.
    See `htv.WinsorizedMean`.
    """
    return apply_rule(grads, WinsorizedMean(winsorize))


def median_of_means(grads: Tensor, k: int) -> Tensor:
    """Median of the means of k consecutive buckets; ValueError unless k <= E. grads: (E, *shape) -> (*shape).

    See `htv.MedianOfMeans`.
    """
    return apply_rule(grads, MedianOfMeans(k))
