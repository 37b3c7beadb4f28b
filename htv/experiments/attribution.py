"""Whom the gradients serve: shares of pristine and corrupt examples through training, and who is
learnt first.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from htv.attach import attach
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
from htv.methods import Attribution, LearntTracker
from htv.rules import Mean


@dataclass(frozen=True)
class Settings:
    training: Training
    network: str = "mlp"
    rates: tuple[float, ...] = (0.25, 0.5, 0.75)
    permutations: int = 50
    early: int = 5  # epochs


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    training, rate = settings.training, float(variant.removesuffix("% noise")) / 100
    task = images.make_task(data, training, rate, seed)
    network = images.make_network(settings.network, data, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate)
    tracker = LearntTracker(len(task.x))
    everyone, taken = torch.arange(len(task.x)), 0
    curves = {
        "epoch": [],
        "f_p": [],
        "f_c": [],
        "null_low": [],
        "null_high": [],
        "i_p": [],
        "i_c": [],
    }
    with attach(network, Mean()) as handle:
        attribution = Attribution(handle, task.wrong, settings.permutations, seed)
        for epoch, batches in enumerate(images.epochs(len(task.x), training, seed), start=1):
            for ids in batches:
                optimizer.zero_grad()
                with attribution.step(ids):
                    F.cross_entropy(network(task.x[ids]), task.noisy[ids]).backward()
                optimizer.step()
                taken += 1
            with torch.no_grad():
                tracker.update(taken, everyone, network(task.x).argmax(dim=1) == task.noisy)
            steps, influence = attribution.steps[-len(batches) :], attribution.influence()
            low, high = zip(*(step.null for step in steps), strict=True)
            now = {"epoch": epoch, "f_p": _middle(s.pristine for s in steps),
                   "f_c": _middle(s.corrupt for s in steps), "null_low": _middle(low),
                   "null_high": _middle(high), "i_p": influence.pristine,
                   "i_c": influence.corrupt}  # fmt: skip
            for key, value in now.items():
                curves[key].append(value)
            progress(epoch / training.epochs, f"f_p {now['f_p']:.2f}")
    crossing = next(
        (e for e, p, c in zip(*(curves[k] for k in ("epoch", "f_p", "f_c")), strict=True) if c > p),
        None,
    )
    return {
        "early_f_p": statistics.fmean(curves["f_p"][: settings.early]),
        "last_epoch_f_c": curves["f_c"][-1],
        "crossing": crossing,
        "pristine_learnt": _median(tracker.first[~task.wrong]) / len(batches),
        "corrupt_learnt": _median(tracker.first[task.wrong]) / len(batches),
        "share_of_pristine": (~task.wrong).double().mean().item(),
        "train_accuracy": (tracker.last >= 0).double().mean().item(),
        "curves": curves,
    }


def _middle(values) -> float:
    """The median of an epoch's steps: the very first ones may be about anything."""
    return torch.tensor(list(values), dtype=torch.float64).nanmedian().item()


def _median(steps: torch.Tensor) -> float:
    """Of the steps at which examples were learnt; infinite if half of them never were."""
    return torch.where(steps < 0, math.inf, steps.double()).median().item()


def summarise(records: Records) -> Summary:
    columns = {"share of pristine": ("share_of_pristine", ".1%"),
               "f_p, early": ("early_f_p", ".1%"),
               "f_c, last epoch": ("last_epoch_f_c", ".1%"),
               "f_c above f_p from epoch": ("crossing", ".1f"),
               "half the pristine once right by epoch": ("pristine_learnt", ".1f"),
               "half the corrupt": ("corrupt_learnt", ".1f"),
               "training accuracy": ("train_accuracy", ".1%")}  # fmt: skip
    rows = [
        [v, *(spread(records.values(v, key), form) for key, form in columns.values())]
        for v in records.variants
    ]
    at = lambda key: {v: records.mean(v, key) for v in records.variants}
    series = lambda key, form: ", ".join(f"{value:{form}} ({v})" for v, value in at(key).items())
    beyond = {v: at("early_f_p")[v] > at("share_of_pristine")[v] + 0.05 for v in records.variants}
    never = lambda value: math.inf if math.isnan(value) else value  # JSON has no infinity
    learnt = [(at("pristine_learnt")[v], never(at("corrupt_learnt")[v])) for v in records.variants]
    findings = [
        Finding("At first the gradient is mostly that of pristine examples, far beyond their share",
                f"f_p in the first {records.settings.early} epochs: {series('early_f_p', '.1%')}",
                all(beyond.values())),
        Finding("Later the corrupt ones take over",
                f"f_c in the last epoch: {series('last_epoch_f_c', '.1%')}",
                min(at("last_epoch_f_c").values()) > 0.5),
        Finding("Pristine examples are learnt before corrupt ones",
                "; ".join(f"{v}: half by epoch {p:.1f} and {c:.1f}"
                          for v, (p, c) in zip(records.variants, learnt, strict=True)),
                all(2 * pristine < corrupt for pristine, corrupt in learnt)),
    ]  # fmt: skip
    return Summary([Table(["labels", *columns], rows)], findings)


def plot(records: Records, figure) -> None:
    row = figure.subplots(1, len(records.variants), sharey=True, squeeze=False)[0]
    for axes, variant in zip(row, records.variants, strict=True):
        curves = [result["curves"] for result in records.results(variant)]
        over_seeds = {key: images.seed_mean([c[key] for c in curves]) for key in curves[0]}
        epochs = curves[0]["epoch"]
        axes.fill_between(epochs, over_seeds["null_low"], over_seeds["null_high"], color="C0",
                          alpha=0.2, label="f_p if tags meant nothing, 95%")  # fmt: skip
        axes.plot(epochs, over_seeds["f_p"], color="C0", label="f_p, pristine")
        axes.plot(epochs, over_seeds["f_c"], color="C3", label="f_c, corrupt")
        images.share_axis(axes, variant, ylabel="share of the gradient")
    axes.legend()


EXPERIMENT = Experiment(
    name="attribution",
    title="Whom the gradients serve",
    paper="Chatterjee 2020, arXiv 2002.10657",
    full=Settings(Training(images=2000, epochs=200, learning_rate=0.03)),
    quick=Settings(
        Training(images=500, epochs=60, learning_rate=0.1, batch_size=50), rates=(0.5,), early=10
    ),
    variants=lambda settings: [f"{rate:.0%} noise" for rate in settings.rates],
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=2,
    images=True,
    size=(12, 4.2),
)
