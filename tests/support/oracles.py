"""Definitions the library is tested against, written without it: NumPy and SciPy in float64."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from scipy.stats import mstats

import htv
from htv.rules import Rule
from htv.tools.check import aggregated, one_group_at_a_time

RULES = [
    htv.Mean(),
    htv.AndMask(0.0),
    htv.AndMask(0.4),
    htv.AndMask(0.4, rescale=True),
    htv.AndMask(1.0),
    htv.XorMask(0.4),
    htv.GeometricMean(0.2),
    htv.SandMask(0.3, k=0.5),
    htv.SignSum(),
    htv.Median(),
    htv.Median("lower"),
    htv.Median("higher"),
    htv.MedianOfMeans(3),
    htv.TrimmedMean(1),
    htv.TrimmedMean(0.2),
    htv.WinsorizedMean(1),
    htv.WinsorizedMean(0.2),
]
IDENTITIES = [
    htv.Mean(),
    htv.AndMask(0.0),
    htv.WinsorizedMean(0),
    htv.TrimmedMean(0),
    htv.MedianOfMeans(1),
]
by_name = {"ids": repr}  # for pytest.mark.parametrize


def _per_side(value, groups: int) -> int:
    return value if isinstance(value, int) else round(value * (groups - 1))


def stat(rule: Rule, c: np.ndarray) -> np.ndarray:
    """stat({c_e}) of (E, *shape) finite float64 contributions."""
    e = len(c)
    votes = np.abs(np.sign(c).sum(0))
    mean = c.mean(0)
    match rule:
        case htv.Mean():
            return mean
        case htv.AndMask(tau, rescale):
            keep = votes >= round(tau * e, 6)
            return keep * mean / (1e-10 + keep.mean() if rescale else 1)
        case htv.XorMask(tau):
            return (votes < round(tau * e, 6)) * mean
        case htv.GeometricMean(tau):
            return (
                (votes >= round(tau * e, 6))
                * np.sign(mean)
                * stats.gmean(np.abs(c) + 1e-10, axis=0)
            )
        case htv.SandMask(tau, k):
            with np.errstate(divide="ignore", invalid="ignore"):
                mask = np.maximum(
                    0, np.tanh(k / c.var(0, ddof=1) * ((votes - round(tau * e, 6)) / e))
                )
            mask = np.where(np.isnan(mask), 1e-17, mask)
            return mask * mean / (1e-10 + mask.mean())
        case htv.SignSum():
            return np.sign(c).mean(0)
        case htv.Median("midpoint"):
            return np.median(c, axis=0)
        case htv.Median(interpolation):
            return np.quantile(c, 0.5, axis=0, method=interpolation)
        case htv.MedianOfMeans(k):
            return np.median([part.mean(0) for part in np.array_split(c, k)], axis=0)
        case htv.TrimmedMean(trim):
            return stats.trim_mean(c, _per_side(trim, e) / e + 1e-9, axis=0)
        case htv.WinsorizedMean(winsorize):
            count = _per_side(winsorize, e) / e + 1e-9
            return np.asarray(mstats.winsorize(c, limits=(count, count), axis=0).mean(0))
    raise TypeError(rule)


def linear_contributions(x: torch.Tensor, grad_output: torch.Tensor, ids) -> np.ndarray:
    """(E, O, I) in float64, groups in the order of their sorted ids; x (N, *rest, I), grad_output
    (N, *rest, O).
    """
    ids = np.asarray(ids)
    x, grad_output = (
        t.double().reshape(len(ids), -1, t.shape[-1]).numpy() for t in (x, grad_output)
    )
    return np.stack(
        [np.einsum("nro,nri->oi", grad_output[ids == e], x[ids == e]) for e in np.unique(ids)]
    )


def away_from_ties(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Random values no sum of a few products of which is near zero by chance: odd multiples of 1/8,
    half-exact too.
    """
    values = torch.randint(0, 8, shape) * 2 + 1
    return (values * torch.randint(0, 2, shape).mul(2).sub(1)).to(dtype) / 8


def assert_exact_by_example(model, loss, size: int, rules) -> None:
    """Compare `.grad` under each rule with that of one example after the other, for the parameters
    that the loss reaches, of which there must be several.

    loss:  of some of the examples, 0 to `size` - 1, as a slice.
    """
    parameters = dict(model.named_parameters())
    parts = one_group_at_a_time(lambda e: loss(slice(e, e + 1)), parameters, size)
    reached = [name for name, c in parts.items() if c is not None and c.any()]
    assert len(reached) > 2
    for rule in rules:
        model.zero_grad()
        with htv.attach(model, rule):
            loss(slice(None)).backward()
        for name in reached:
            wanted = aggregated(parts[name], rule)
            torch.testing.assert_close(
                parameters[name].grad, wanted, rtol=1e-9, atol=1e-10, msg=f"{rule} {name}"
            )
