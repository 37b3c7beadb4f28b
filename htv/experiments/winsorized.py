"""Winsorized gradient descent: training accuracy beyond the proper one, over percentiles and label
noise.
"""

from __future__ import annotations

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
from htv.methods import adjusted_overfit, proper_accuracy
from htv.methods import winsorized as percentile_rule


@dataclass(frozen=True)
class Settings:
    training: Training
    percentiles: tuple[float, ...] = (0, 1, 2, 4, 8)
    rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


def variants(settings: Settings) -> list[str]:
    return [_name(rate, c) for rate in settings.rates for c in settings.percentiles]


def _name(rate: float, percentile: float) -> str:
    return f"{rate:.0%} noise, c = {percentile:g}"


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    rate, percentile = variant.split(" noise, c = ")
    rate, percentile, training = float(rate.rstrip("%")) / 100, float(percentile), settings.training
    task = images.make_task(data, training, rate, seed)
    network = images.make_network("mlp", data, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate)
    rule = percentile_rule(percentile) if percentile else None
    curves = images.fit(network, task, optimizer, training, seed, progress, rule=rule)
    accuracies = zip(curves["train_accuracy"], curves["test_accuracy"], strict=True)
    curves["overfit"] = [adjusted_overfit(ta, va, rate, data.num_classes) for ta, va in accuracies]
    last = images.last(curves)
    return {**last, "most_overfit": max(curves["overfit"]), "curves": curves}


def _tables(records: Records) -> list[Table]:
    settings, found = records.settings, []
    titles = {
        "overfit": "Adjusted overfit at the end: training accuracy beyond what test accuracy "
        "accounts for",
        "train_accuracy": "Training accuracy, as labelled; on top the proper one, of a classifier "
        "that knows the truth",
        "test_accuracy": "Test accuracy",
    }
    for key, title in titles.items():
        rows = [[f"{c:g}",
                 *(spread(records.values(_name(rate, c), key)) for rate in settings.rates)]
                for c in settings.percentiles]  # fmt: skip
        if key == "train_accuracy":
            rows.insert(
                0, ["proper", *(f"{_proper(records, rate):.1%}" for rate in settings.rates)]
            )
        found.append(Table(["c", *(f"{rate:.0%} noise" for rate in settings.rates)], rows, title))
    return found


def _proper(records: Records, rate: float) -> float:
    """The training accuracy of a classifier that knows the truth and nothing of the noise."""
    return proper_accuracy(1.0, rate, records.classes)


def summarise(records: Records) -> Summary:
    settings = records.settings
    noisy = [rate for rate in settings.rates if rate > 0]
    at = lambda rate, c, key="overfit": records.mean(_name(rate, c), key)
    overfit = {c: sum(at(rate, c) for rate in noisy) / len(noisy) for c in settings.percentiles}
    clean = {c: at(settings.rates[0], c, "train_accuracy") for c in settings.percentiles}
    series = lambda values: ", ".join(f"{value:.1%} (c = {c:g})" for c, value in values.items())
    ordered = list(overfit.values())
    findings = [
        Finding(
            "Overfit falls monotonically with c",
            f"mean over the noise: {series(overfit)}",
            all(
                later <= earlier + 0.01
                for earlier, later in zip(ordered, ordered[1:], strict=False)
            ),
        ),
        _held(
            records,
            "For c > 1 training accuracy under label noise does not rise above the proper accuracy",
            [rate for rate in noisy if rate < 1],
        ),
        _held(
            records, "Nor does it where all labels are noise", [rate for rate in noisy if rate == 1]
        ),
        Finding(
            "Large c underfits clean data",
            f"training accuracy without noise: {series(clean)}",
            clean[settings.percentiles[-1]] < clean[settings.percentiles[0]] - 0.02,
        ),  # fmt: skip
    ]
    return Summary(_tables(records), findings)


def _held(records: Records, claim: str, rates: list[float]) -> Finding:
    """Whether training accuracy stays within two points of the proper accuracy at every c > 1."""
    beyond = {
        c: max(
            records.mean(_name(rate, c), "train_accuracy") - _proper(records, rate)
            for rate in rates
        )
        for c in records.settings.percentiles
    }
    series = ", ".join(f"{100 * points:+.1f} points (c = {c:g})" for c, points in beyond.items())
    at = " or ".join(f"{rate:.0%}" for rate in rates)
    held = all(points < 0.02 for c, points in beyond.items() if c > 1)
    return Finding(claim, f"beyond it, at most, at {at} noise: {series}", held)


def plot(records: Records, figure) -> None:
    settings = records.settings
    panels = figure.subplots(1, len(settings.rates), sharey=True, squeeze=False)[0]
    for axes, rate in zip(panels, settings.rates, strict=True):
        for index, c in enumerate(settings.percentiles):
            curves = [result["curves"] for result in records.results(_name(rate, c))]
            for key, style in {"train_accuracy": "-", "test_accuracy": ":"}.items():
                axes.plot(curves[0]["epoch"], images.seed_mean([r[key] for r in curves]), style,
                          color=f"C{index}",
                          label=f"c = {c:g}" if style == "-" else None)  # fmt: skip
        axes.axhline(_proper(records, rate), color="gray", linestyle="--", linewidth=1)
        images.share_axis(axes, f"{rate:.0%} noise", ylabel="")
    panels[0].set(ylabel="training accuracy (dotted: test; dashed: proper)")
    panels[-1].legend()


EXPERIMENT = Experiment(
    name="winsorized",
    title="Winsorized gradient descent under label noise",
    paper="Chatterjee 2020, arXiv 2002.10657",
    full=Settings(Training(images=60000, epochs=30, learning_rate=0.1, test_images=2000)),
    quick=Settings(
        Training(images=500, epochs=20, learning_rate=0.1, test_images=300, looks=5),
        percentiles=(0, 2, 8),
        rates=(0.0, 0.5, 1.0),
    ),
    variants=variants,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=1,
    images=True,
    size=(15, 4.2),
)
