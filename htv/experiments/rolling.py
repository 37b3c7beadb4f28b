"""SGD, M3, RM3 and RA3 on a convnet of which half the labels are random."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from htv.data import Dataset
from htv.experiments import images
from htv.experiments.experiment import (
    Experiment,
    Finding,
    Progress,
    Records,
    Summary,
    Table,
    spread,
)
from htv.experiments.images import Training
from htv.methods import M3, RA3, RM3

UPDATES = {"SGD": None, "M3": None, "RM3": RM3, "RA3": RA3}


@dataclass(frozen=True)
class Settings:
    training: Training
    rate: float = 0.5
    network: str = "convnet"
    weight_decay: float = 0.0
    matched: float = 0.85  # the accuracy on pristine examples at which updates are compared as well


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    training = settings.training
    task = images.make_task(data, training, settings.rate, seed)
    network = images.make_network(settings.network, data, seed)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=training.learning_rate, weight_decay=settings.weight_decay
    )
    wrap = UPDATES[variant]
    optimizer = optimizer if wrap is None else wrap(optimizer)
    rule = M3 if variant == "M3" else None
    curves = images.fit(network, task, optimizer, training, seed, progress, rule=rule)
    curves["gap"] = [
        ta - va for ta, va in zip(curves["train_accuracy"], curves["test_accuracy"], strict=True)
    ]
    matched = _when(curves["clean_accuracy"], settings.matched, curves["memorised"])
    best = max(curves["test_accuracy"])
    return {**images.last(curves), "best_test": best, "matched": matched, "curves": curves}


def _when(reached: list[float], level: float, value: list[float]) -> float | None:
    """What one curve was when another first reached a level, between looks on a straight line; None
    if it never did.
    """
    for now in range(1, len(reached)):
        if reached[now - 1] < level <= reached[now]:
            part = (level - reached[now - 1]) / (reached[now] - reached[now - 1])
            return value[now - 1] + part * (value[now] - value[now - 1])
    return None


COLUMNS = {
    "corrupt examples, as labelled": "memorised",
    "pristine examples": "clean_accuracy",
    "training": "train_accuracy",
    "test": "test_accuracy",
    "best test on the way": "best_test",
    "training minus test": "gap",
}


def summarise(records: Records) -> Summary:
    settings = records.settings
    last = f"corrupt, when {settings.matched:.0%} of the pristine are right"
    rows = [[v, *(spread(records.values(v, key)) for key in (*COLUMNS.values(), "matched"))]
            for v in records.variants]  # fmt: skip
    end = Table(["update", *COLUMNS, last], rows, f"Accuracy at the end, {settings.rate:.0%} noise")
    rows = [
        [v, *(spread(_means(records, v, key)) for key in ("memorised", "gap"))]
        for v in records.variants
    ]
    mean = Table(
        ["update", "corrupt examples, as labelled", "training minus test"],
        rows,
        "Mean over training",
    )
    corrupt, gap = (
        {v: statistics.fmean(_means(records, v, key)) for v in records.variants}
        for key in ("memorised", "gap")
    )
    at_end = {v: records.mean(v, "memorised") for v in records.variants}
    series = lambda values: ", ".join(f"{v} {value:.1%}" for v, value in values.items())
    findings = [
        Finding(f"{median} holds the accuracy on corrupt examples below SGD's, and below that of "
                "RA3, the control",
                f"mean over training: {series(corrupt)}; at the end SGD {at_end['SGD']:.1%}, "
                f"{median} {at_end[median]:.1%}, RA3 {at_end['RA3']:.1%}",
                corrupt[median] < min(corrupt["SGD"], corrupt["RA3"]) - 0.02)
        for median in ("RM3", "M3")
    ]  # fmt: skip
    findings += [
        Finding(
            "RM3 and M3 shrink the gap between training and test accuracy against SGD",
            f"mean over training: {series(gap)}",
            max(gap["RM3"], gap["M3"]) < gap["SGD"] - 0.02,
        ),
        Finding(
            "RA3 does not: lag and averaging are not what does it",
            f"mean over training, corrupt: SGD {corrupt['SGD']:.1%}, RA3 {corrupt['RA3']:.1%}",
            abs(corrupt["RA3"] - corrupt["SGD"]) < 0.5 * (corrupt["SGD"] - corrupt["RM3"]),
        ),
    ]
    return Summary([end, mean], findings)


def _means(records: Records, variant: str, key: str) -> list[float]:
    """Of a curve, for every seed: at the end, all that trains for long enough has learnt what it is
    going to.
    """
    return [statistics.fmean(result["curves"][key]) for result in records.results(variant)]


def plot(records: Records, figure) -> None:
    titles = {"memorised": "corrupt examples, as labelled", "clean_accuracy": "pristine examples",
              "test_accuracy": "test"}  # fmt: skip
    for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        for variant in records.variants:
            curves = [result["curves"] for result in records.results(variant)]
            axes.plot(curves[0]["epoch"], images.seed_mean([c[key] for c in curves]), label=variant)
        images.share_axis(axes, title)
    axes.legend()


EXPERIMENT = Experiment(
    name="rolling",
    title="Medians of three under label noise",
    paper="Zielinski, Krishnan, Chatterjee 2020, arXiv 2003.07422",
    full=Settings(
        Training(images=4000, epochs=50, learning_rate=0.05, batch_size=32, test_images=2000)
    ),
    quick=Settings(
        Training(images=320, epochs=60, learning_rate=0.1, batch_size=32, test_images=300, looks=6)
    ),
    variants=lambda settings: list(UPDATES),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    size=(12, 4.2),
)
