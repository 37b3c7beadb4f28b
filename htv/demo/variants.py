"""The competitors: a name on the command line, a rule or none."""

from __future__ import annotations

from dataclasses import dataclass

from htv.rules import AndMask, Median, MedianOfMeans, Rule, TrimmedMean, WinsorizedMean

# name: (class, default parameter, what the parameter is)
RULES = {
    "and-mask": (AndMask, 0.2, "tau"),
    "median": (Median, None, None),
    "winsorized": (WinsorizedMean, 0.2, "winsorize"),
    "trimmed": (TrimmedMean, 0.2, "trim"),
    "median-of-means": (MedianOfMeans, 3, "k"),
}
DEFAULT = ("and-mask", "median", "winsorized")


@dataclass(frozen=True)
class Variant:
    """`spec` as the command line takes it, for example "and-mask:0.2"; `rule` None is plain
    training without htv.
    """

    spec: str
    rule: Rule | None


PLAIN = Variant("plain", None)


def parse(spec: str, batch_size: int) -> Variant:
    """Read `plain`, or the name of a rule with an optional parameter after a colon. ValueError says
    what is wrong.
    """
    name, colon, text = spec.strip().lower().partition(":")
    if name == "plain" and not colon:
        return PLAIN
    if name not in RULES:
        raise ValueError(f"unknown rule {spec!r}; choose from plain, {', '.join(RULES)}")
    make, default, parameter = RULES[name]
    if colon and parameter is None:
        raise ValueError(f"{name} takes no parameter, got {spec!r}")
    value = _number(text, spec, parameter) if colon else default
    try:
        rule = make() if parameter is None else make(value)
        rule.statistic(batch_size)  # is it defined for so few examples?
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}") from error
    return Variant(name if parameter is None else f"{name}:{value}", rule)


def parse_all(specs: list[str] | None, batch_size: int) -> list[Variant]:
    """Every spec may be a comma-separated list. Plain comes first; repetitions count once."""
    given = [part for spec in specs or DEFAULT for part in spec.split(",") if part.strip()]
    variants = [PLAIN, *(parse(spec, batch_size) for spec in given)]
    return list(dict.fromkeys(variants))


def _number(text: str, spec: str, parameter: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{spec}: {parameter} must be a number, got {text!r}")
