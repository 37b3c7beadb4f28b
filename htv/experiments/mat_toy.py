"""A shortcut that fails a minority: what a linear classifier learns by heart, and what with
held-out predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from htv.data import Grouped, flipped_shortcut
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table, spread
from htv.methods import Batches, Draw, MemorizationAwareLoss, Twins, group_accuracy

PURE, PLAIN = "ERM, no noise", "ERM"


@dataclass(frozen=True)
class Settings:
    epochs: int = 1000  # of full batches
    learning_rate: float = 0.01
    learning_rate_pure: float = 0.03  # without noise
    noise: float = 0.5
    temperatures: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    looks: int = 100


def variants(settings: Settings) -> list[str]:
    return [PURE, PLAIN, *map(_mat, settings.temperatures)]


def _mat(temperature: float) -> str:
    return f"MAT, T = {temperature:g}"


def run_one(settings: Settings, variant: str, seed: int, data, progress) -> dict:
    if variant in (PURE, PLAIN):
        noise, rate = (
            (0.0, settings.learning_rate_pure)
            if variant == PURE
            else (settings.noise, settings.learning_rate)
        )
        problem = flipped_shortcut(noise, seed=seed)
        return fit(
            settings,
            problem,
            rate,
            seed,
            lambda logits: F.cross_entropy(logits, problem.train.y),
            progress,
        )
    problem = flipped_shortcut(settings.noise, seed=seed)
    temperature = float(variant.removeprefix("MAT, T = "))
    draw, labels = held_out(settings, seed)
    criterion, ids = (
        MemorizationAwareLoss(draw.held_out, draw.targets, temperature=temperature),
        torch.arange(len(labels)),
    )
    train, shift = problem.train, criterion.shift(ids, draw.targets)
    own, flipped = shift.gather(1, train.y[:, None])[:, 0], labels != train.y
    found = {}
    for name, part in (("majority", ~train.minority), ("minority", train.minority)):
        found |= {
            f"{name}_shift": own[part].mean().item(),
            f"{name}_flipped": flipped[part].double().mean().item(),
        }
    loss = lambda logits: criterion(logits, train.y, ids)
    return {**found, **fit(settings, problem, settings.learning_rate, seed, loss, progress)}


def linear(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 2, bias=False)


def sgd(rate: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@lru_cache(maxsize=1)
def held_out(settings: Settings, seed: int) -> tuple[Draw, Tensor]:
    """XRM's draw, and the labels it ends with; all temperatures of a seed share it."""
    train = flipped_shortcut(settings.noise, seed=seed).train
    twins = Twins(lambda: linear(train.x.shape[1]), train.y, sgd(settings.learning_rate), seed=seed)
    for _ in range(settings.epochs):
        twins.step(train.x, torch.arange(len(train)))
    return twins.draw(Batches(TensorDataset(train.x, train.y), 1, len(train))), twins.labels


def fit(settings: Settings, problem: Grouped, rate: float, seed: int, loss, progress) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = linear(problem.train.x.shape[1])
    optimizer, curve = sgd(rate)(model.parameters()), []
    every = max(1, settings.epochs // settings.looks)
    for epoch in range(settings.epochs + 1):
        if epoch % every == 0 or epoch == settings.epochs:
            curve.append([epoch, *accuracies(model, problem)])
            progress(epoch / settings.epochs, f"minority {curve[-1][2]:.1%}")
        if epoch < settings.epochs:
            optimizer.zero_grad()
            loss(model(problem.train.x)).backward()
            optimizer.step()
    return {"majority": curve[-1][1], "minority": curve[-1][2], "curve": curve}


@torch.no_grad()
def accuracies(model: nn.Module, problem: Grouped) -> tuple[float, ...]:
    """Of the test part's majority and minority."""
    correct = model(problem.test.x).argmax(dim=1) == problem.test.y
    return group_accuracy(correct, problem.test.minority.long(), 2).accuracies


def _at(records: Records, variant: str, share: float) -> float:
    """Minority accuracy after this share of the epochs, averaged over seeds."""
    epoch = share * records.settings.epochs
    looks = [
        min(result["curve"], key=lambda look: abs(look[0] - epoch))
        for result in records.results(variant)
    ]
    return sum(look[2] for look in looks) / len(looks)


def summarise(records: Records) -> Summary:
    rows = []
    for variant in records.variants:
        row = [variant, *(spread(records.values(variant, key)) for key in ("majority", "minority"))]
        told = ("majority_shift", "minority_shift") if variant.startswith("MAT") else ()
        rows.append(
            row + ([spread(records.values(variant, key), ".2f") for key in told] or ["", ""])
        )
    head = [
        "training",
        "test accuracy, majority",
        "minority",
        "mean shift of the class, majority",
        "minority",
    ]
    close = lambda here, paper: abs(here - paper) <= 0.05
    pure, plain = records.mean(PURE, "minority"), records.mean(PLAIN, "minority")
    findings = [
        Finding("Without noise ERM gets the minority right: 1.0", f"{pure:.3f}", close(pure, 1.0)),
        Finding(
            "but late: 0 after 5% of the epochs, .72 after 20%",
            f"{_at(records, PURE, 0.05):.3f} and {_at(records, PURE, 0.2):.3f}",
            _at(records, PURE, 0.05) < 0.05 and 0.5 < _at(records, PURE, 0.2) < 0.95,
        ),
        Finding(
            "With noise it learns the minority by heart: .144 on test",
            f"{plain:.3f}",
            close(plain, 0.144),
        ),
    ]
    mats = [variant for variant in records.variants if variant.startswith("MAT")]
    for variant in mats:
        majority, minority = (records.mean(variant, key) for key in ("majority", "minority"))
        paper = (0.988, 0.884) if float(variant.removeprefix("MAT, T = ")) == 1 else (0.986, 0.898)
        findings.append(
            Finding(
                f"{variant}: {paper[0]} of the majority, {paper[1]} of the minority",
                f"{majority:.3f}, {minority:.3f}",
                close(majority, paper[0]) and close(minority, paper[1]),
            )
        )
    flipped = [records.mean(mats[0], f"{name}_flipped") for name in ("minority", "majority")]
    shifts = [records.mean(mats[0], f"{name}_shift") for name in ("majority", "minority")]
    return Summary(
        [Table(head, rows)],
        [
            *findings,
            Finding(
                "XRM overwrites the labels of all of the minority and of none of the majority",
                f"{flipped[0]:.1%} and {flipped[1]:.1%}",
                flipped[0] > 0.99 and flipped[1] < 0.01,
            ),
            Finding(
                "The shift of an example's class is -.10 for the majority and -2.3 for the "
                "minority",
                f"{shifts[0]:.2f} and {shifts[1]:.2f} ({mats[0]})",
                close(shifts[0], -0.1) and close(shifts[1], -2.3),
            ),
        ],
    )


def plot(records: Records, figure) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, name in zip(panels, (1, 2), ("majority", "minority"), strict=True):
        for index, variant in enumerate(records.variants):
            runs = torch.tensor(
                [result["curve"] for result in records.results(variant)]
            )  # (seeds, looks, 3)
            axes.plot(
                runs[0, :, 0], runs[..., column].mean(dim=0), color=f"C{index}", label=variant
            )
        axes.set(title=f"{name}, test", xlabel="epoch", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy")
    panels[1].legend(fontsize="small")


EXPERIMENT = Experiment(
    name="mat-toy",
    title="A shortcut that fails a minority",
    paper="Bayat et al. 2024, arXiv 2412.07684",
    full=Settings(),
    quick=Settings(
        epochs=400, learning_rate=0.025, learning_rate_pure=0.075, temperatures=(0.01,), looks=20
    ),
    variants=variants,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
)
