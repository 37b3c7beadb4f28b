"""What an experiment is."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from htv.experiments import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from htv.data import Dataset

Progress = Callable[
    [float, str], None
]  # the share that is done, in [0, 1], and a few words on how it goes


@dataclass(frozen=True)
class Records:
    """Finished runs of one experiment, each {"variant", "seed", "seconds", "result"}, by variant
    and then seed.

    classes:  of the images, where there are any.
    """

    settings: Any
    runs: list[dict]
    classes: int | None = None

    @property
    def chance(self) -> float:
        """How often a guess among the classes is right."""
        return 1 / self.classes

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run["variant"] for run in self.runs))

    def results(self, variant: str) -> list[dict]:
        """What `run_one` returned, for every seed."""
        return [run["result"] for run in self.runs if run["variant"] == variant]

    def values(self, variant: str, key: str) -> list[float]:
        """One number of every seed's result; a run that diverged (its number is None) counts as
        NaN.
        """
        return [
            float("nan") if result[key] is None else result[key] for result in self.results(variant)
        ]

    def mean(self, variant: str, key: str) -> float:
        return statistics.fmean(self.values(variant, key))


@dataclass(frozen=True)
class Finding:
    """A statement of the paper, what was found here in numbers, and whether the two agree."""

    claim: str
    here: str
    agrees: bool


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    title: str = ""


@dataclass(frozen=True)
class Summary:
    """All of it made from the records alone."""

    tables: list[Table]
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One result of a paper.

    name, title:  as on the command line, and in words.
    paper:        authors, year, arXiv number.
    full, quick:  settings, a frozen dataclass of plain values: for an hour on two cores at most,
                  for half a minute.
    variants:     settings -> the names of what is compared.
    run_one:      (settings, variant, seed, data, progress) -> numbers, and lists of numbers for
                  curves. It depends on its arguments only: variants of one seed share data and
                  initial weights. `data` is None unless `images` is set.
    summarise:    records -> tables and findings.
    plot:         (records, an empty matplotlib figure) -> None.
    seeds:        how many by default, full and quick.
    images:       whether it runs on a data set of images: the digits, or the idx folder given by
                  --data.
    needs:        modules that its runs import besides torch and numpy.
    size:         width and height of the picture, in inches.
    """

    name: str
    title: str
    paper: str
    full: Any
    quick: Any
    variants: Callable[[Any], Sequence[str]]
    run_one: Callable[[Any, str, int, Dataset | None, Progress], dict]
    summarise: Callable[[Records], Summary]
    plot: Callable[[Records, Figure], None]
    seeds: int = 5
    quick_seeds: int = 1
    images: bool = False
    needs: tuple[str, ...] = ()
    size: tuple[float, float] = (10, 4.2)

    def settings(self, quick: bool) -> Any:
        return self.quick if quick else self.full

    def runs(self, settings: Any, seeds: int) -> list[tuple[str, int]]:
        """(variant, seed), all variants of a seed before the next seed."""
        return [(variant, seed) for seed in range(seeds) for variant in self.variants(settings)]


def load(name: str) -> Experiment:
    """The experiment of that name; ValueError lists all."""
    if name not in NAMES:
        raise ValueError(f"unknown experiment {name!r}; choose from {', '.join(NAMES)}")
    return importlib.import_module(f"htv.experiments.{name.replace('-', '_')}").EXPERIMENT


def spread(values: list[float], form: str = ".1%") -> str:
    """The mean, and the standard deviation over seeds where there are several: "98.2% ± 0.4%";
    "nan" if one is.
    """
    mean = format(statistics.fmean(values), form)
    spreads = len(values) > 1 and all(map(math.isfinite, values))
    return f"{mean} ± {format(statistics.stdev(values), form)}" if spreads else mean
