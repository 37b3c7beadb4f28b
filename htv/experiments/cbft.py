"""Out of a shortcut by fine-tuning: connectivity-based, its ablations, and what it is compared
with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from htv.data import Dataset
from htv.demo.training import aggregating
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
from htv.methods import NAIVE_RATES, fine_tune, reset_parameters, retrain_last_layer
from htv.rules import AndMask, Rule

SETS = cues.SETS
BEFORE = "before fine-tuning"


@dataclass(frozen=True)
class Settings:
    """epochs: of the baselines, over the clean images. CBFT has its own in `cues.CBFTuning`."""

    training: CueTraining = CueTraining()
    tuning: cues.CBFTuning = cues.CBFTuning()
    epochs: int = 40
    scratch_rate: float = 0.05
    proportions: tuple[float, ...] = (0.6, 0.8, 0.9)


Method = Callable[[nn.Module, CueTask, Settings, int], None]


def _naive(size: str) -> Method:
    def tune(network, task, settings, seed):
        fine_tune(network, _clean(task, settings, seed), settings.epochs, NAIVE_RATES[size])

    return tune


def _last_layer(network, task, settings, seed):
    retrain_last_layer(network, _clean(task, settings, seed), settings.epochs)


def _last_layer_first(network, task, settings, seed):
    _last_layer(network, task, settings, seed)
    fine_tune(network, _clean(task, settings, seed), settings.epochs)


def _scratch(network, task, settings, seed):
    fine_tune(
        reset_parameters(network),
        _clean(task, settings, seed),
        settings.epochs,
        settings.scratch_rate,
    )


def _connectivity(rule: Rule | None = None, **options) -> Method:
    def tune(network, task, settings, seed):
        with aggregating(network, rule):
            cues.connectivity_based(
                network, task, settings.tuning, settings.training.batch_size, seed, **options
            )

    return tune


METHODS: dict[str, Method] = {
    BEFORE: lambda network, task, settings, seed: None,
    **{f"naive, {size} ({rate:g})": _naive(size) for size, rate in NAIVE_RATES.items()},
    "LLRT": _last_layer,
    "LPFT": _last_layer_first,
    "from scratch": _scratch,
    "CBFT": _connectivity(),
    "CBFT without barrier": _connectivity(terms=("cross_entropy", "invariance")),
    "CBFT without invariance": _connectivity(terms=("barrier", "cross_entropy")),
    "CBFT, one step of the sum": _connectivity(alternate=False),
    "CBFT under AndMask(0.05)": _connectivity(rule=AndMask(0.05)),
}
NAIVE_S, NAIVE_M, NAIVE_L = list(METHODS)[1:4]


def variants(settings: Settings) -> list[str]:
    return [_name(proportion) for proportion in settings.proportions]


def _name(proportion: float) -> str:
    return f"{proportion:.0%} cue"


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    proportion = float(variant.removesuffix("% cue")) / 100
    task = cues.make_task(data, settings.training, proportion, seed)
    relying = cues.trained(task, task.with_cue, settings.training, seed)
    result = {}
    for done, (name, tune) in enumerate(METHODS.items(), start=1):
        network = copy.deepcopy(relying)
        with cues.seeded(seed):
            tune(network, task, settings, seed)
        found = cues.accuracies(network, task)
        result |= {_key(name, of): value for of, value in found.items()}
        progress(done / len(METHODS), f"{name}: NC {found['NC']:.0%}, RI {found['RI']:.0%}")
    return result


def _clean(task: CueTask, settings: Settings, seed: int) -> Shuffled:
    return Shuffled(task.clean, settings.training.batch_size, seed)


def _key(method: str, of: str) -> str:
    return f"{method}: {of}"


def _findings(records: Records, variant: str) -> list[Finding]:
    at = lambda method: {of: records.mean(variant, _key(method, of)) for of in SETS}
    told = lambda method: ", ".join(f"{of} {share:.1%}" for of, share in at(method).items())
    before, small, medium = at(BEFORE), at(NAIVE_S), at(NAIVE_M)
    cbft, no_barrier, no_invariance = (
        at(name) for name in ("CBFT", "CBFT without barrier", "CBFT without invariance")
    )
    without_image = cbft["NC"], cbft["C"], cbft["RC"]
    others = {name: at(name)["RI"] for name in ("LLRT", "LPFT")}
    chance = records.chance
    return [
        Finding(
            f"{variant}: the model relies on the cue, and naive fine-tuning with a small learning "
            "rate keeps it so: RI stays above half, RC far below NC",
            f"before: {told(BEFORE)}; S: {told(NAIVE_S)}",
            before["RI"] > 0.5 and small["RI"] > 0.5 and small["RC"] < small["NC"] - 0.2,
        ),
        Finding(
            f"{variant}: so does a medium one: RI stays far above chance",
            f"M: {told(NAIVE_M)}",
            medium["RI"] > chance + 0.25 and medium["RC"] < medium["NC"] - 0.1,
        ),
        Finding(
            f"{variant}: CBFT has NC, C and RC within 5 points of each other",
            told("CBFT"),
            max(without_image) - min(without_image) <= 0.05,
        ),
        Finding(
            f"{variant}: and RI near chance", f"{cbft['RI']:.1%}", abs(cbft["RI"] - chance) <= 0.05
        ),
        Finding(
            f"{variant}: last-layer retraining, alone or before fine-tuning, leaves the cue in: RI "
            "above chance",
            "RI: " + ", ".join(f"{name} {share:.1%}" for name, share in others.items()),
            min(others.values()) > chance + 0.1,
        ),
        Finding(
            f"{variant}: without the barrier the cue stays, in part at least: C above NC",
            told("CBFT without barrier"),
            no_barrier["C"] > no_barrier["NC"] + 0.05,
        ),
        Finding(
            f"{variant}: without the invariance the model may turn against the cue: C below NC",
            told("CBFT without invariance"),
            no_invariance["C"] < no_invariance["NC"] - 0.02,
        ),
    ]


def summarise(records: Records) -> Summary:
    tables = [
        Table(
            ["method", *SETS],
            [
                [name, *(spread(records.values(variant, _key(name, of))) for of in SETS)]
                for name in METHODS
            ],
            f"Accuracy on the counterfactual test sets, {variant} in training",
        )
        for variant in records.variants
    ]
    return Summary(
        tables, [finding for variant in records.variants for finding in _findings(records, variant)]
    )


def plot(records: Records, figure) -> None:
    from matplotlib.ticker import PercentFormatter

    columns = figure.subplots(1, len(records.variants), sharey=True, squeeze=False)[0]
    for axes, variant in zip(columns, records.variants, strict=True):
        for row, of in enumerate(SETS):
            shares = [records.mean(variant, _key(name, of)) for name in METHODS]
            axes.barh(
                [place + 0.2 * row for place in range(len(METHODS))], shares, height=0.2, label=of
            )
        axes.axvline(records.chance, color="grey", linestyle=":")
        axes.set(title=variant, xlabel="accuracy", xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    columns[0].set_yticks([place + 0.3 for place in range(len(METHODS))], list(METHODS))
    columns[0].invert_yaxis()
    figure.set_layout_engine("constrained")
    figure.legend(
        *columns[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(SETS)
    )


EXPERIMENT = Experiment(
    name="cbft",
    title="Fine-tuning a model out of a shortcut",
    paper="Lubana et al. 2023, arXiv 2211.08422",
    full=Settings(),
    quick=Settings(
        CueTraining(test_images=300, clean=0.1, epochs=12, batch_size=50),
        cues.CBFTuning(epochs=8, learning_rate=0.05),
        epochs=15,
        proportions=(0.9,),
    ),
    variants=variants,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    size=(13, 6),
)
