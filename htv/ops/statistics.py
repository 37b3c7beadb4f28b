"""The registry of statistics: one entry each, which everything that asks about a statistic reads.

An entry is made where the statistic is defined, in `htv.ops.reference`, by a decorator:

    @streaming("mean", number=0)
    def _mean(s: Summary, statistic: Statistic) -> tuple[Tensor, Tensor | None]: ...

    @order("median", number=7, counts=lambda groups: (-1, 1))
    def _median(values: Tensor, statistic: Statistic) -> Tensor: ...

Compiled kernels know a statistic by its number, which is written out and never follows from a
position: one that is given stays, and a new statistic takes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from htv.rules import Rule, Statistic

REBUILD = "rebuild it: pip install --no-build-isolation -e ."
MOST = 2**63 - 1  # of an integer parameter


@dataclass(frozen=True, eq=False)
class Definition:
    """What is known of one statistic.

    name, number:   of the statistic, each of them once.
    function:       its definition, see `streaming` and `order`.
    streams:        whether it keeps a fixed state per coordinate that adds up over groups; an
                    order statistic needs the values of all groups.
    state:          what it keeps beside sum and votes: fields of `htv.ops.reference.Summary`.
    masks:          whether it keeps some coordinates and drops others.
    mask_of_votes:  (votes, statistic) -> bool mask, of the shape of votes, where these decide it.
    by_sign:        whether it looks at signs, which a rounding may change.
    steep:          whether it may move more than the contribution that moves most.
    least:          the number of groups below which it is undefined.
    counts:         groups -> (lowest, highest) of its integer parameter.
    outvoted:       of an order statistic, (statistic, groups) -> how many values may be other than
                    zero where it still is zero; None where that is not known.
    ranks_sums:     of an order statistic, whether it ranks sums of values, which may overflow.
    """

    name: str
    number: int
    function: Callable
    streams: bool
    state: frozenset[str] = frozenset()
    masks: bool = False
    mask_of_votes: Callable[[Tensor, Statistic], Tensor] | None = None
    by_sign: bool = False
    steep: bool = False
    least: int = 1
    counts: Callable[[int], tuple[int, int]] = lambda groups: (-MOST - 1, MOST)
    outvoted: Callable[[Statistic, int], int] | None = None
    ranks_sums: bool = False


_by_name: dict[str, Definition] = {}
_by_number: dict[int, Definition] = {}


def streaming(
    name: str,
    *,
    number: int,
    state: Iterable[str] = (),
    masks: bool = False,
    mask_of_votes: Callable[[Tensor, Statistic], Tensor] | None = None,
    by_sign: bool = False,
    steep: bool = False,
    least: int = 1,
) -> Callable[[Callable], Callable]:
    """Enter a streaming statistic, (summary, statistic) -> (value, mask or None); see `Definition`.

    Raises ValueError if the name or the number is another's.
    """

    def enter(function: Callable) -> Callable:
        _enter(
            Definition(
                name,
                number,
                function,
                streams=True,
                state=frozenset(state),
                masks=masks or mask_of_votes is not None,
                mask_of_votes=mask_of_votes,
                by_sign=by_sign,
                steep=steep,
                least=least,
            )
        )
        return function

    return enter


def order(
    name: str,
    *,
    number: int,
    counts: Callable[[int], tuple[int, int]] | None = None,
    outvoted: Callable[[Statistic, int], int] | None = None,
    ranks_sums: bool = False,
    by_sign: bool = False,
    steep: bool = False,
    least: int = 1,
) -> Callable[[Callable], Callable]:
    """Enter an order statistic, (values (E, *shape), statistic) -> (*shape); see `Definition`.

    Raises ValueError if the name or the number is another's.
    """

    def enter(function: Callable) -> Callable:
        of_count = {} if counts is None else {"counts": counts}
        _enter(
            Definition(
                name,
                number,
                function,
                streams=False,
                by_sign=by_sign,
                steep=steep,
                least=least,
                outvoted=outvoted,
                ranks_sums=ranks_sums,
                **of_count,
            )
        )
        return function

    return enter


def _enter(definition: Definition) -> None:
    name, number = definition.name, definition.number
    if name in _by_name:
        raise ValueError(f"there is a statistic {name!r} already")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"statistic {name!r}: number must be an integer >= 0, got {number!r}")
    if number in _by_number:
        raise ValueError(
            f"statistic {name!r}: number {number} is that of {_by_number[number].name!r}, by which "
            f"compiled kernels know it; take one that is free, {max(_by_number) + 1}"
        )
    _by_name[name] = _by_number[number] = definition


def names() -> tuple[str, ...]:
    """Return the names of all statistics, by their numbers."""
    return tuple(_by_number[number].name for number in sorted(_by_number))


def table() -> str:
    """Return every name with its number, as compiled libraries export them: "mean=0 and_mask=1"."""
    return " ".join(f"{name}={_by_name[name].number}" for name in names())


def of(name: str) -> Definition:
    """Return the entry of a name. Raises ValueError if there is none."""
    try:
        return _by_name[name]
    except KeyError:
        raise ValueError(f"unknown statistic {name!r}, have {', '.join(names())}") from None


def by_number(number: int) -> Definition:
    """Return the entry of a number. Raises ValueError if there is none."""
    try:
        return _by_number[number]
    except KeyError:
        raise ValueError(f"unknown statistic {number}, have {table()}") from None


def resolve(rule: Rule, groups: int) -> Statistic:
    """Return the statistic of a rule for so many groups.

    Raises ValueError if the rule is undefined for so few, TypeError if it names no statistic.
    """
    kind = type(rule).__name__
    found = Rule.statistic(rule, groups) if rule.is_open else rule.statistic(groups)
    if not isinstance(found, Statistic):
        raise TypeError(f"{kind}.statistic() must return an htv.rules.Statistic, got {found!r}")
    if found.name not in _by_name and found.reduce is None:
        raise TypeError(
            f"{kind}.statistic() names {found.name!r}, and htv has no such statistic (it has "
            f"{', '.join(names())}). Remedy: to aggregate by a function of your own, define "
            f"{kind}.reduce(self, contributions) in place of statistic()"
        )
    return found


def parsed(listed: str) -> dict[str, int]:
    """Read what `table` writes. Raises ValueError."""
    pairs = [entry.split("=") for entry in listed.split()]
    found = {name: int(number) for name, number in pairs}
    if len(found) != len(pairs):
        raise ValueError(f"a statistic is listed twice: {listed}")
    return found


def require_agreement(
    found: Mapping[str, int], needed: Iterable[str], where: str, remedy: str = REBUILD
) -> None:
    """Refuse kernels whose numbers are not those of this registry.

    found:   name -> number, as the kernels have them.
    needed:  the statistics that kernels of theirs are registered for.
    where:   what they are, and
    remedy:  what to do, for the message.

    Raises ImportError that names each difference.
    """
    wrong = [
        f"{name} is {number} there and {_number_told(name)} here"
        for name, number in found.items()
        if name not in _by_name or _by_name[name].number != number
    ]
    wrong += [f"{name} is missing there" for name in needed if name not in found]
    if wrong:
        raise ImportError(
            f"{where} has other statistics than this version of htv ({'; '.join(wrong)}), so "
            f"its kernels would compute what nobody asked for. Remedy: {remedy}"
        )


def _number_told(name: str) -> str:
    return str(_by_name[name].number) if name in _by_name else "unknown"
