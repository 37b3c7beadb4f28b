"""Statistics of stacked contributions, as functions: (E, *shape) -> (*shape).

Differentiable any number of times, in forward mode and by the transforms of torch.func too;
derivatives of any of these kinds are those of the definition, `htv.ops.reference`.

They return ``stat({g_e})``, a mean-like value without the factor E; results have the dtype of
`grads`, half-precision inputs are computed in float32. A NaN among the E values of a coordinate
gives NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from htv.ops import backend, open_rules, reference, registry, schema, statistics
from htv.ops.reference import Summary
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


def summary(grads: Tensor, name: str, log_offset: float = reference.LOG_OFFSET) -> Summary:
    """`Summary.of` of any (E, *shape), by the backend that serves it."""
    dtype = reference.compute_dtype(grads.dtype)
    server = backend.choose(backend.Problem("stacked_summary", name, grads.device, dtype))
    differentiated = grads.requires_grad and torch.is_grad_enabled()
    if server == "reference" or differentiated or schema.transformed(grads):
        return Summary.of(reference.cast(grads, dtype), name, log_offset)
    operator = backend.operator("stacked_summary", server)
    flat = grads.reshape(len(grads), math.prod(grads.shape[1:])).contiguous()
    found = Summary.of_fields(len(grads), name, operator(flat, schema.code(name), log_offset))
    return found.map(lambda field: field.reshape(grads.shape[1:]))


_operators = registry.kept_choices()


def _operator(name: str, grads: Tensor, compiling: bool) -> Callable[..., Any] | None:
    """Return the operator that serves a stacked statistic, or None for the reference."""
    key = name, grads.dtype, grads.device, None if compiling else backend.setting()
    if not compiling:
        kept: Any = _operators.get(key, False)
        if kept is not False:
            return cast("Callable[..., Any] | None", kept)
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
    """Compute ``|sum_e sign(g_e)| / E`` of each coordinate, in [0, 1]; sign(0) = 0.

    grads:  (E, *shape), floating point.

    Returns (*shape), same dtype; its derivative is 0. NaN where one of the E values is. Raises
    TypeError or ValueError for what is no stack of E >= 1 tensors.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> grads = torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 1.0]])
    >>> htv.sign_agreement(grads)
    tensor([1.0000, 0.0000, 0.5000])
    """
    check_stacked(grads)
    return _apply(grads, Statistic("sign_agreement"))


def and_mask(grads: Tensor, tau: float, rescale: bool = False) -> Tensor:
    """Keep the mean where the signs agree, ``|sum_e sign(g_e)| >= tau * E``; elsewhere give 0.

    grads:    (E, *shape), floating point.
    tau:      in [0, 1], the share of the E values that must agree, net of dissent.
    rescale:  divide the result by ``1e-10 +`` the share of coordinates that are kept.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.AndMask` for the rule.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> grads = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> htv.and_mask(grads, 1.0)
    tensor([2., 0.])
    """
    return apply_rule(grads, AndMask(tau, rescale))


def xor_mask(grads: Tensor, tau: float) -> Tensor:
    """Keep the mean where `and_mask` gives 0, and give 0 where that keeps it.

    grads:  (E, *shape), floating point.
    tau:    in [0, 1], as for `and_mask`.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.XorMask` for the rule.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> grads = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> htv.xor_mask(grads, 1.0)
    tensor([0.0000, 0.5000])
    """
    return apply_rule(grads, XorMask(tau))


def geometric_mean(grads: Tensor, tau: float) -> Tensor:
    """Compute the signed geometric mean where the signs agree; elsewhere give 0.

    It is ``sign(mean) * exp(mean_e log(|g_e| + 1e-10))``; 1e-10 is the paper's and absolute.

    grads:  (E, *shape), floating point.
    tau:    in [0, 1], as for `and_mask`.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.GeometricMean` for the rule.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> grads = torch.tensor([[1.0, 2.0], [4.0, -1.0]])
    >>> htv.geometric_mean(grads, 1.0)
    tensor([2., 0.])
    """
    return apply_rule(grads, GeometricMean(tau))


def sand_mask(grads: Tensor, tau: float, k: float) -> Tensor:
    """Mask the mean smoothly by how far the signs agree: SAND-mask.

    The mask is ``m = max(0, tanh(k / Var_e(g) * (agreement - tau)))`` with the unbiased variance,
    the result ``m * mean / (1e-10 + mean(m))``.

    grads:  (E, *shape), floating point, E >= 2.
    tau:    in [0, 1], the agreement at which the mask opens.
    k:      > 0, its steepness, in units of the variance.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.SandMask` for the rule.

    Shahtalebi et al. 2021, "SAND-mask", arXiv 2106.02266.

    >>> grads = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> htv.sand_mask(grads, 0.5, k=1.0)
    tensor([4., 0.])
    """
    return apply_rule(grads, SandMask(tau, k))


def median(
    grads: Tensor,
    interpolation: Literal["midpoint", "lower", "higher"] = "midpoint",
) -> Tensor:
    """Compute the median of each coordinate.

    grads:          (E, *shape), floating point.
    interpolation:  which for even E: the "midpoint" of the two middle values, the "lower" or the
                    "higher" one.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.Median` for the rule.

    >>> grads = torch.tensor([[1.0], [2.0], [4.0], [100.0]])
    >>> htv.median(grads), htv.median(grads, "lower")
    (tensor([3.]), tensor([2.]))
    """
    return apply_rule(grads, Median(interpolation))


def trimmed_mean(grads: Tensor, trim: int | float) -> Tensor:
    """Compute the mean of each coordinate without its smallest and its largest values.

    grads:  (E, *shape), floating point.
    trim:   how many values are left out per side (int), or which share of E (float in [0, .5),
            nearest rank).

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else, such as a count with 2 * trim >= E. See `htv.TrimmedMean` for
    the rule.

    >>> grads = torch.tensor([[0.0], [1.0], [2.0], [6.0], [100.0]])
    >>> htv.trimmed_mean(grads, 1)
    tensor([3.])
    """
    return apply_rule(grads, TrimmedMean(trim))


def winsorized_mean(grads: Tensor, winsorize: int | float) -> Tensor:
    """Compute the mean of each coordinate after clipping its smallest and its largest values.

    Values are clipped to the (c + 1)-th smallest and largest.

    grads:      (E, *shape), floating point.
    winsorize:  c, a count per side (int), or a share of E per side (float in [0, .5), nearest
                rank).

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else, such as a count with 2 * c >= E. See `htv.WinsorizedMean` for
    the rule.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> grads = torch.tensor([[0.0], [1.0], [2.0], [6.0], [100.0]])
    >>> htv.winsorized_mean(grads, 1)
    tensor([3.2000])
    """
    return apply_rule(grads, WinsorizedMean(winsorize))


def median_of_means(grads: Tensor, k: int) -> Tensor:
    """Compute the median of the means of k consecutive, nearly equal buckets.

    grads:  (E, *shape), floating point.
    k:      how many buckets, from 1 to E.

    Returns (*shape), same dtype, differentiable. NaN where one of the E values is. Raises TypeError
    or ValueError for anything else. See `htv.MedianOfMeans` for the rule.

    Zielinski, Krishnan, Chatterjee 2020, "Weak and strong gradient directions", arXiv 2003.07422.

    >>> grads = torch.tensor([[1.0], [3.0], [4.0], [6.0], [100.0], [200.0]])
    >>> htv.median_of_means(grads, 3)
    tensor([5.])
    """
    return apply_rule(grads, MedianOfMeans(k))
