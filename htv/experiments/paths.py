"""What lies between a model that relies on a cue and others: straight and curved paths, on every
counterfactual set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from htv.data import Dataset
from htv.experiments import cues
from htv.experiments.cues import CueTask, CueTraining, Shuffled
from htv.experiments.experiment import (
    Experiment,
    Finding,
    Progress,
    Records,
    Summary,
    Table,
    spread,
)
from htv.experiments.images import seed_mean
from htv.methods import (
    NAIVE_RATES,
    LinearPath,
    QuadraticBezier,
    WeightPath,
    evaluate_along,
    fine_tune,
    match_permutations,
    train_curve,
)

SETS = cues.SETS
OTHER_SEED = 1000  # apart from all others


@dataclass(frozen=True)
class Settings:
    """proportion:   of the training images of each class with their cue.
    tuning, epochs:  of connectivity-based, and of naive fine-tuning.
    curve_epochs:    of the middle of a quadratic path, on the data with the cue.
    points:          of a path that are looked at.
    tolerance:       a higher barrier, in units of the loss, disconnects.
    """

    training: CueTraining = CueTraining(test_images=1000)
    tuning: cues.CBFTuning = cues.CBFTuning()
    proportion: float = 0.9
    epochs: int = 40
    curve_epochs: int = 5
    curve_rate: float = 0.02
    points: int = 21
    tolerance: float = 0.1


Other = Callable[[nn.Module, CueTask, Settings, int], nn.Module]


def _independent(part: str) -> Other:
    def train(relying, task, settings, seed):
        return cues.trained(task, getattr(task, part), settings.training, seed + OTHER_SEED)

    return train


def _naive(size: str) -> Other:
    def tune(relying, task, settings, seed):
        network = copy.deepcopy(relying)
        fine_tune(
            network,
            Shuffled(task.clean, settings.training.batch_size, seed),
            settings.epochs,
            NAIVE_RATES[size],
        )
        return network

    return tune


def _connectivity(relying, task, settings, seed):
    network = copy.deepcopy(relying)
    cues.connectivity_based(network, task, settings.tuning, settings.training.batch_size, seed)
    return network


NO_CUE, CUE, SMALL, MEDIUM, CBFT = (
    "one without cue",
    "another with cue",
    "naive S of it",
    "naive M of it",
    "CBFT of it",
)
OTHERS: dict[str, Other] = {
    NO_CUE: _independent("without_cue"),
    CUE: _independent("with_cue"),
    SMALL: _naive("S"),
    MEDIUM: _naive("M"),
    CBFT: _connectivity,
}
MATCHED = ", matched"


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    task = cues.make_task(data, settings.training, settings.proportion, seed)
    relying = cues.trained(task, task.with_cue, settings.training, seed)
    progress(0.2, "the model with the cue is trained")
    other = OTHERS[variant](relying, task, settings, seed)
    progress(0.4, "and the other one")
    ends = {"": other}
    if variant in (NO_CUE, CUE):
        images = task.with_cue[0][: settings.training.test_images]
        ends[MATCHED] = match_permutations(
            relying, other, [(part,) for part in images.split(500)]
        ).model
    paths: dict[str, WeightPath] = {}
    for name, end in ends.items():
        paths[f"linear{name}"] = LinearPath(relying, end)
        paths[f"quadratic{name}"] = _curve(relying, end, task, settings, seed)
    result = {f"{name} at its end": share for name, share in cues.accuracies(other, task).items()}
    for done, (name, path) in enumerate(paths.items(), start=1):
        tests = {
            of: list(zip(*(part.split(500) for part in test), strict=True))
            for of, test in task.tests.items()
        }
        profile = evaluate_along(path, relying, tests, settings.points)
        result |= {_key(name, of): found.height for of, found in profile.barriers.items()}
        result[name] = {of: losses.tolist() for of, losses in profile.losses.items()}
        result["t"] = profile.t.tolist()
        progress(
            0.4 + 0.6 * done / len(paths), f"{name}: barrier {result[_key(name, 'C')]:.2f} on C"
        )
    return result


def _curve(
    start: nn.Module, end: nn.Module, task: CueTask, settings: Settings, seed: int
) -> QuadraticBezier:
    """Whose middle is trained on the data with the cue."""
    path = QuadraticBezier(start, end)
    optimizer = torch.optim.SGD(path.parameters(), settings.curve_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.curve_epochs)
    train_curve(
        path, start, Shuffled(task.with_cue, settings.training.batch_size, seed), optimizer,
        epochs=settings.curve_epochs, generator=torch.Generator().manual_seed(seed),
        scheduler=schedule,
    )  # fmt: skip
    return path


def _key(path: str, of: str) -> str:
    return f"{path}: barrier on {of}"


def _paths(records: Records, variant: str) -> list[str]:
    return [name for name, value in records.results(variant)[0].items() if isinstance(value, dict)]


def summarise(records: Records) -> Summary:
    rows = [
        [variant, path, *(spread(records.values(variant, _key(path, of)), ".2f") for of in SETS)]
        for variant in records.variants
        for path in _paths(records, variant)
    ]
    title = (
        "Barriers between a model with the cue and others: the largest excess of the loss over the "
        "chord"
    )
    ends = [
        [variant, *(spread(records.values(variant, f"{of} at its end")) for of in SETS)]
        for variant in records.variants
    ]
    return Summary(
        [Table(["the other", "path", *SETS], rows, title),
         Table(["the other", *SETS], ends, "Accuracy of the others")],
        _findings(records),
    )  # fmt: skip


def _findings(records: Records) -> list[Finding]:
    tolerance = records.settings.tolerance
    at = lambda variant, path: {of: records.mean(variant, _key(path, of)) for of in SETS}
    told = lambda barriers: ", ".join(f"{of} {height:.2f}" for of, height in barriers.items())
    linear, matched = at(NO_CUE, "linear"), at(NO_CUE, f"linear{MATCHED}")
    curves = {name: at(NO_CUE, name) for name in ("quadratic", f"quadratic{MATCHED}")}
    same, same_matched = at(CUE, "linear"), at(CUE, f"linear{MATCHED}")
    naive = {variant: at(variant, "linear") for variant in (SMALL, MEDIUM)}
    kept = {variant: records.mean(variant, "RI at its end") for variant in naive}
    tuned = at(CBFT, "linear")
    fitted = {name: barriers["C"] for name, barriers in curves.items()}
    return [
        Finding(
            "Models with and without the cue have a barrier between them on the straight path, "
            "even after matching",
            f"on C {linear['C']:.2f}, matched {matched['C']:.2f}; on NC {linear['NC']:.2f}, "
            f"matched {matched['NC']:.2f}",
            min(barriers[of] for barriers in (linear, matched) for of in ("C", "NC")) > tolerance,
        ),
        Finding(
            "A quadratic path that is trained on the data with the cue connects them there",
            ", ".join(f"{name} {height:.2f}" for name, height in fitted.items()),
            max(fitted.values()) <= tolerance,
        ),
        Finding(
            "But not under every intervention: somewhere it has a barrier",
            "; ".join(f"{name}: {told(barriers)}" for name, barriers in curves.items()),
            all(max(barriers.values()) > tolerance for barriers in curves.values()),
        ),
        Finding(
            "Two models that both rely on the cue come closer by matching",
            f"on C {same['C']:.2f}, matched {same_matched['C']:.2f}",
            same_matched["C"] < 0.8 * same["C"],
        ),
        Finding(
            "Naive fine-tuning with a small or medium learning rate stays linearly connected, and "
            "keeps the cue",
            "; ".join(f"{variant}: {told(naive[variant])}, RI {kept[variant]:.1%}"
                      for variant in naive),
            all(max(naive[variant]["C"], naive[variant]["NC"]) <= tolerance and kept[variant] > 0.5
                for variant in naive),
        ),
        Finding(
            "CBFT puts a barrier on the straight path, on data with the cue", told(tuned),
            tuned["C"] > 0.5
        ),
    ]  # fmt: skip


def plot(records: Records, figure) -> None:
    grid = figure.subplots(len(records.variants), len(SETS), squeeze=False, sharex=True)
    for row, variant in zip(grid, records.variants, strict=True):
        results = records.results(variant)
        for axes, of in zip(row, SETS, strict=True):
            for name in _paths(records, variant):
                losses = seed_mean([result[name][of] for result in results])
                style = {
                    "color": "C0" if name.startswith("linear") else "C1",
                    "linestyle": "--" if MATCHED in name else "-",
                }
                axes.plot(results[0]["t"], losses, label=name, **style)
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{variant}, {of}", fontsize=9)
        row[0].set_ylabel("loss")
    for axes in grid[-1]:
        axes.set_xlabel("t")
    grid[0][0].legend(fontsize=8, loc="upper right")
    figure.set_layout_engine("constrained")


EXPERIMENT = Experiment(
    name="paths",
    title="Between a model that relies on a cue and others",
    paper="Lubana et al. 2023, arXiv 2211.08422",
    full=Settings(),
    quick=Settings(
        CueTraining(test_images=200, clean=0.1, epochs=12, batch_size=50),
        cues.CBFTuning(epochs=6),
        epochs=15,
        curve_epochs=4,
        points=6,
    ),
    variants=lambda settings: list(OTHERS),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    needs=("scipy",),
    size=(13, 14),
)
