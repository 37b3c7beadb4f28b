"""The aggregation rules: what `.grad` holds instead of the plain sum.

htv's own rules are frozen dataclasses. They are validated when they are made, print as the call
that makes them, can be pickled, and resolve themselves for a given number of groups into a
`Statistic`, the form kernels understand. Rules of your own subclass `Rule` and define `reduce`.

Scale convention: the aggregated gradient is ``E * stat({c_e})`` over the contributions ``c_e`` of E
groups, so that ``Mean()`` is what plain autograd puts in `.grad`, for mean- and sum-reduced losses
alike.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from torch import Tensor

from htv.errors import UnsupportedError

__all__ = [
    "AndMask",
    "GeometricMean",
    "Mean",
    "Median",
    "MedianOfMeans",
    "Rule",
    "SandMask",
    "SignSum",
    "TrimmedMean",
    "WinsorizedMean",
    "XorMask",
]


@dataclass(frozen=True)
class Statistic:
    """Name a statistic, with its numbers: a rule resolved for so many groups, as kernels take it.

    name:       which statistic: a name of `htv.ops.statistics`, or `OPEN` for a rule of the user's.
    count:      its integer parameter: least |sum of signs| that is kept (masks), values per side
                (trimmed and winsorized mean), number of buckets (median of means), -1 / 0 / +1 for
                the lower / midpoint / higher median; 0 where a statistic has none.
    votes:      `sand_mask` only: tau * E, the |sum of signs| at which the soft mask opens.
    k:          `sand_mask` only: its steepness, in units of the contributions' variance.
    normalise:  divide the result by ``1e-10 + mean(mask)`` over the coordinates of one parameter.
    reduce:     of a rule of the user's own, its method; None for all others.
    """

    name: str
    count: int = 0
    votes: float = 0.0
    k: float = 0.0
    normalise: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None


OPEN = "reduce"  # the name of the statistic of rules that define reduce()


class Rule:
    """Aggregate by a function of your own: subclass this and define `reduce`. Base of all rules.

    Such a rule serves every layer, on every device, wherever a rule is taken: `htv.attach`,
    `htv.linear_grad`, `htv.check`. It may be a plain class, compared by identity, or a dataclass
    with fields. It is refused under torch.compile, inside `handle.accumulate()` and on several
    ranks.

    streaming:  whether a fixed state per coordinate is enough; order rules, and rules of your own,
                need all E values.
    is_open:    whether the class is a rule of the user's own, that is, defines `reduce`.

    Raises TypeError, when it is made, for a class that defines neither `reduce` nor `statistic`.

    >>> class Clipped(htv.Rule):
    ...     def reduce(self, contributions):
    ...         return contributions.clamp(-1, 1).mean(dim=0)
    >>> x, grad_output = torch.ones(2, 1), torch.tensor([[0.5, 3.0], [0.5, 0.0]])
    >>> htv.linear_grad(x, grad_output, Clipped()).flatten()
    tensor([1., 1.])
    """

    streaming: ClassVar[bool] = True
    is_open: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_open = cls.reduce is not Rule.reduce
        if cls.is_open:
            cls.streaming = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.is_open and cls.statistic is Rule.statistic:
            raise TypeError(
                f"{cls.__name__} is not a complete rule: define {cls.__name__}.reduce(self, "
                "contributions), which takes (E, *box) and returns (*box); see htv.Rule"
            )
        return super().__new__(cls)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"

    @property
    def needs_several(self) -> bool:
        """Tell whether one group alone makes the rule meaningless: plain is what it would get."""
        return True

    def reduce(self, contributions: Tensor) -> Tensor:
        """Return what becomes of E groups' contributions to some coordinates of one parameter.

        contributions:  (E, *box), what each group adds to the plain gradient there, in the order of
                        the groups; float32 for half precision, else of the parameter's type. They
                        may be written to, but not kept.

        Returns (*box), of the same dtype and device; anything else is refused by a TypeError or
        ValueError that names the class. `.grad` holds E times that, as for all rules, so that
        ``contributions.mean(dim=0)`` is plain training.

        The box has as many dims as the parameter and holds a part of its coordinates, so that all
        contributions to it fit into a few MB. Where it is cut is not promised: the result at a
        coordinate should follow from the E values there, or at least make sense for any box. The
        norm over a whole parameter, for one, cannot be taken. Where no group contributes (rows of
        an embedding that nobody looks up) the values are zeros, and the result need not be.

        Gradients are off, and autocast too. NaN and infinity come as they are: to return NaN where
        there is any is what htv's own rules do.
        """
        raise TypeError(f"{type(self).__name__} does not define reduce()")

    def statistic(self, num_groups: int) -> Statistic:
        """Resolve the rule for `num_groups` groups; a rule of your own has no need to define it.

        Raises ValueError where the rule is undefined for so few.
        """
        _check_groups(num_groups, 1, self, "there is nothing to reduce")
        return Statistic(OPEN, reduce=self.reduce)


def refuse_open(rules: Iterable[Rule], where: str, remedy: str) -> None:
    """Raise UnsupportedError for the first of some rules that is of the user's own.

    where:   what cannot serve it: "a compiled model".
    remedy:  what to do instead.
    """
    for rule in rules:
        if rule.is_open:
            raise UnsupportedError(
                f"{type(rule).__name__} is a rule of your own, and {where} cannot call its "
                f"reduce(). Remedy: {remedy}"
            )


def _check_groups(num_groups: int, least: int, rule: Rule, why: str) -> None:
    if num_groups < least:
        raise ValueError(
            f"{rule} needs at least {least} group{'s' * (least > 1)}, got {num_groups}: {why}"
        )


def _check_real(owner: str, name: str, value: object, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number {wanted}, got {value!r}")
    if not low <= value <= high:  # also catches NaN
        raise ValueError(f"{owner}: {name} must lie {wanted}, got {value!r}")


def _check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def needed_votes(tau: float, num_groups: int) -> float:
    """Return tau * E, snapped to the integer it is meant to be.

    So exact ties such as tau = .4, E = 50 are kept.
    The comparison ``|sum of signs| >= tau * E`` is between integers once this is rounded up.
    """
    votes = float(tau) * num_groups
    nearest = round(votes)
    return float(nearest) if abs(votes - nearest) <= 1e-7 * num_groups else votes


@dataclass(frozen=True)
class Mean(Rule):
    """Take the plain sum of contributions: what autograd does without htv.

    >>> x, grad_output = torch.ones(3, 1), torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 3.0]])
    >>> htv.linear_grad(x, grad_output, htv.Mean()).flatten()
    tensor([9., 3.])
    """

    @property
    def needs_several(self) -> bool:
        return False

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(num_groups, 1, self, "there is nothing to average")
        return Statistic("mean")


@dataclass(frozen=True)
class _Masked(Rule):
    tau: float

    _name: ClassVar[str]

    def __post_init__(self) -> None:
        _check_real(type(self).__name__, "tau", self.tau, 0.0, 1.0, "in [0, 1]")

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(num_groups, 1, self, "there is nothing to agree on")
        return Statistic(self._name, count=math.ceil(needed_votes(self.tau, num_groups)))


@dataclass(frozen=True)
class AndMask(_Masked):
    """Keep the mean where a share of the groups, net of dissent, agrees on its sign; else give 0.

    tau:      in [0, 1]: a coordinate is kept iff ``|sum_e sign(c_e)| >= tau * E``; an exact zero
              votes for neither sign.
    rescale:  divide the result by ``1e-10 + kept fraction`` of its parameter tensor.

    Raises TypeError or ValueError for anything else.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> x, grad_output = torch.ones(3, 1), torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 3.0]])
    >>> htv.linear_grad(x, grad_output, htv.AndMask(0.9)).flatten()
    tensor([9., 0.])
    """

    rescale: bool = False

    _name = "and_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bool("AndMask", "rescale", self.rescale)

    @property
    def needs_several(self) -> bool:
        return self.tau > 0

    def statistic(self, num_groups: int) -> Statistic:
        resolved = super().statistic(num_groups)
        return Statistic(resolved.name, resolved.count, normalise=self.rescale)


@dataclass(frozen=True)
class XorMask(_Masked):
    """Keep the mean only where groups disagree: the complement of `AndMask`, a diagnostic.

    tau:  in [0, 1]: a coordinate is kept iff ``|sum_e sign(c_e)| < tau * E``.

    Raises TypeError or ValueError for anything else.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> x, grad_output = torch.ones(3, 1), torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 3.0]])
    >>> htv.linear_grad(x, grad_output, htv.XorMask(0.9)).flatten()
    tensor([0., 3.])
    """

    _name = "xor_mask"


@dataclass(frozen=True)
class GeometricMean(_Masked):
    """Take ``sign(mean) * exp(mean_e log(|c_e| + 1e-10))`` where `AndMask` keeps; else 0.

    tau:  in [0, 1], as that of `AndMask`.

    The 1e-10 is the paper's and absolute: contributions much smaller than it are not told apart
    from zero. Raises TypeError or ValueError for another tau.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> x, grad_output = torch.ones(2, 1), torch.tensor([[1.0, 2.0], [4.0, -2.0]])
    >>> htv.linear_grad(x, grad_output, htv.GeometricMean(0.9)).flatten().round()
    tensor([4., 0.])
    """

    _name = "geometric_mean"


@dataclass(frozen=True)
class SandMask(Rule):
    """Weight the mean by a smooth AND-mask, ``m = max(0, tanh(k / Var_e(c) * (agreement - tau)))``.

    tau:  in [0, 1], the share of the groups, net of dissent, at which the mask opens. At 1 it is 0
          everywhere, and a warning says so.
    k:    above 0, the steepness of the mask, in units of the contributions' variance.

    The result is ``m * mean / (1e-10 + mean(m))``, over one parameter. The variance is unbiased, so
    at least two groups are needed. Its unit makes this the one rule whose mask depends on the scale
    of the loss: contributions to a mean-reduced loss are 1 / E of the groups' own gradients, in
    whose units papers give k, so pass ``k / E**2`` for theirs. Raises TypeError or ValueError for
    anything else.

    Shahtalebi et al. 2021, "SAND-mask", arXiv 2106.02266.

    >>> x, grad_output = torch.ones(2, 1), torch.tensor([[1.0, 2.0], [1.5, -2.0]])
    >>> htv.linear_grad(x, grad_output, htv.SandMask(0.5, k=1.0)).flatten().round()
    tensor([5., 0.])
    """

    tau: float
    k: float

    def __post_init__(self) -> None:
        _check_real("SandMask", "tau", self.tau, 0.0, 1.0, "in [0, 1]")
        if self.tau == 1:
            warnings.warn(
                "SandMask: at tau = 1 the mask is 0 everywhere, and nothing is ever trained",
                stacklevel=3,
            )
        _check_real(
            "SandMask", "k", self.k, math.ulp(0.0), sys.float_info.max, "above 0 and finite"
        )

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(num_groups, 2, self, "its mask divides by the variance over groups")
        votes = needed_votes(self.tau, num_groups)
        return Statistic("sand_mask", votes=votes, k=float(self.k), normalise=True)


@dataclass(frozen=True)
class SignSum(Rule):
    """Sum the signs of the contributions: a group has one vote per coordinate, whatever its size.

    >>> x, grad_output = torch.ones(3, 1), torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 3.0]])
    >>> htv.linear_grad(x, grad_output, htv.SignSum()).flatten()
    tensor([3., 1.])
    """

    @property
    def needs_several(self) -> bool:
        return False

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(num_groups, 1, self, "there is nothing to count")
        return Statistic("sign_sum")


@dataclass(frozen=True)
class Median(Rule):
    """Take E times the coordinate-wise median.

    interpolation:  for even E, the "midpoint" of the two middle values, or the "lower" or "higher"
                    of them.

    Raises ValueError for another one.

    >>> x, grad_output = torch.ones(3, 1), torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 3.0]])
    >>> htv.linear_grad(x, grad_output, htv.Median()).flatten()
    tensor([9., 6.])
    """

    interpolation: Literal["midpoint", "lower", "higher"] = "midpoint"

    streaming = False

    def __post_init__(self) -> None:
        if self.interpolation not in ("midpoint", "lower", "higher"):
            raise ValueError(
                "Median: interpolation must be 'midpoint', 'lower' or 'higher', "
                f"got {self.interpolation!r}"
            )

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(num_groups, 1, self, "there is nothing to rank")
        return Statistic(
            "median", count={"lower": -1, "midpoint": 0, "higher": 1}[self.interpolation]
        )


@dataclass(frozen=True)
class MedianOfMeans(Rule):
    """Take E times the median of the means of consecutive, nearly equal buckets of groups.

    k:  the number of buckets, an integer >= 1 and at most E; M3 is ``k = 3``. The first ``E mod k``
        of them hold one group more, as in `torch.tensor_split`.

    Raises TypeError or ValueError for anything else.

    Zielinski, Krishnan, Chatterjee 2020, "Weak and strong gradient directions", arXiv 2003.07422.

    >>> x, grad_output = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [2.0], [8.0]])
    >>> htv.linear_grad(x, grad_output, htv.MedianOfMeans(2)).flatten()
    tensor([14.])
    """

    k: int

    streaming = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, Integral):
            raise TypeError(f"MedianOfMeans: k must be an integer >= 1, got {self.k!r}")
        if self.k < 1:
            raise ValueError(f"MedianOfMeans: k must be >= 1, got {self.k}")

    @property
    def needs_several(self) -> bool:
        return self.k > 1

    def statistic(self, num_groups: int) -> Statistic:
        _check_groups(
            num_groups, int(self.k), self, "each of its k buckets needs one; use a smaller k"
        )
        return Statistic("median_of_means", count=int(self.k))


def _check_extremes(owner: str, name: str, value: object) -> None:
    wanted = "a count per side (int >= 0) or a fraction per side (float in [0, .5))"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
    if isinstance(value, Integral):
        if value < 0:
            raise ValueError(f"{owner}: {name} must be {wanted}, got {value}")
    elif not 0.0 <= value < 0.5:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value!r}")


def _extremes_per_side(rule: Rule, name: str, value: int | float, num_groups: int) -> int:
    """Return the count per side.

    A fraction q means the nearest rank to ``q * (E - 1)``, halves to even, as percentiles do.
    """
    _check_groups(num_groups, 1, rule, "there is nothing to rank")
    if isinstance(value, Integral):
        count = int(value)
    else:
        count = min(round(float(value) * (num_groups - 1)), (num_groups - 1) // 2)
    if 2 * count >= num_groups:
        raise ValueError(
            f"{rule}: {name}={value} takes {count} values from each side of {num_groups} groups "
            f"and leaves none; use at most {(num_groups - 1) // 2}"
        )
    return count


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Take E times the mean without the smallest and largest values of each coordinate.

    trim:  how many of them to leave out on each side: a count (int), or a fraction of E (float in
           [0, .5)), nearest rank. Twice the count must stay below E.

    Raises TypeError or ValueError for anything else.

    >>> x, grad_output = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [2.0], [8.0]])
    >>> htv.linear_grad(x, grad_output, htv.TrimmedMean(1)).flatten()
    tensor([10.])
    """

    trim: int | float

    streaming = False

    def __post_init__(self) -> None:
        _check_extremes("TrimmedMean", "trim", self.trim)

    @property
    def needs_several(self) -> bool:
        return self.trim > 0

    def statistic(self, num_groups: int) -> Statistic:
        return Statistic(
            "trimmed_mean", count=_extremes_per_side(self, "trim", self.trim, num_groups)
        )


@dataclass(frozen=True)
class WinsorizedMean(Rule):
    """Take E times the mean after clipping the smallest and largest values of each coordinate.

    winsorize:  c, how many values to clip on each side, to the (c+1)-th: a count (int), or a
                fraction of E (float in [0, .5)), nearest rank. Twice the count must stay below E.

    Raises TypeError or ValueError for anything else.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657 (his c is a percentile: pass
    ``winsorize=c / 100``).

    >>> x, grad_output = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [2.0], [8.0]])
    >>> htv.linear_grad(x, grad_output, htv.WinsorizedMean(1)).flatten()
    tensor([10.])
    """

    winsorize: int | float

    streaming = False

    def __post_init__(self) -> None:
        _check_extremes("WinsorizedMean", "winsorize", self.winsorize)

    @property
    def needs_several(self) -> bool:
        return self.winsorize > 0

    def statistic(self, num_groups: int) -> Statistic:
        return Statistic(
            "winsorized_mean",
            count=_extremes_per_side(self, "winsorize", self.winsorize, num_groups),
        )
