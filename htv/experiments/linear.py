"""Four linear environments: features of their own explain each at once, a weaker one explains all
of them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import nn

import htv
from htv.data import linear_environments
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table

RULES = {"mean": htv.Mean(), "and-mask": htv.AndMask(1.0), "geometric mean": htv.GeometricMean(1.0)}


@dataclass(frozen=True)
class Settings:
    steps: int = 1000
    learning_rate: float = 0.3
    decay: float = 0.9995  # of the learning rate, every step
    weight_decay: float = 0.01
    initial: float = 0.1  # standard deviation of the initial weights


def run_one(settings: Settings, variant: str, seed: int, data, progress) -> dict:
    x, y = linear_environments()
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(x.shape[1], 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(settings.initial * torch.randn(model.weight.shape, generator=generator))
    # SGD adds the decay to what the mask has left of the gradient: masked weights shrink too.
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, settings.decay)
    curve = []
    with htv.attach(model, RULES[variant]):  # one example per environment: each is a group
        for step in range(settings.steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean() / 2
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 9:
                curve.append([step + 1, *model.weight[0].tolist()])
                progress((step + 1) / settings.steps, f"loss {loss.item():.2g}")
    weights = model.weight.detach()[0]
    shared_only = x[0].clone()
    shared_only[:-1] = 0  # an environment without the features of the known ones
    return {
        "weights": weights.tolist(),
        "loss": loss.item(),
        "new_environment": ((shared_only @ weights - 1).square() / 2).item(),
        "curve": curve,
    }


def _weights(records: Records, variant: str) -> tuple[float, float]:
    """The mean weight of the environments' own features, and of the shared one."""
    weights = [result["weights"] for result in records.results(variant)]
    return statistics.fmean(w for row in weights for w in row[:-1]), statistics.fmean(
        row[-1] for row in weights
    )


def summarise(records: Records) -> Summary:
    rows = []
    for variant in records.variants:
        own, shared = _weights(records, variant)
        rows.append([variant, f"{own:.3f}", f"{shared:.3f}", f"{records.mean(variant, 'loss'):.2g}",
                     f"{records.mean(variant, 'new_environment'):.2g}"])  # fmt: skip
    head = [
        "gradient",
        "weights of own features",
        "weight of the shared one",
        "training loss",
        "loss without own features",
    ]
    findings = []
    own, shared = _weights(records, "mean")
    findings.append(
        Finding(
            "The mean learns the features of the environments: weights near [.32 x 4, .13]",
            f"[{own:.3f} x 4, {shared:.3f}]",
            abs(own - 0.319) < 0.005 and abs(shared - 0.126) < 0.01,
        )
    )
    for variant in ("and-mask", "geometric mean"):
        own, shared = _weights(records, variant)
        findings.append(
            Finding(
                f"The {variant} learns the shared one alone: weights near [0 x 4, 2.8 to 3.0]",
                f"[{own:.3f} x 4, {shared:.2f}]",
                abs(own) < 0.02 and 2.75 < shared < 3.05,
            )
        )
    return Summary([Table(head, rows)], findings)


def plot(records: Records, figure) -> None:
    panels = figure.subplots(1, len(records.variants), sharey=True)
    for axes, variant in zip(panels, records.variants, strict=True):
        for result in records.results(variant):
            steps, *weights = zip(*result["curve"], strict=True)
            for index, values in enumerate(weights):
                shared = index == len(weights) - 1
                axes.plot(steps, values, color="C1" if shared else "C0", alpha=1 if shared else 0.5)
        axes.set(title=variant, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="weight")
    panels[0].plot([], [], color="C1", label="of the shared feature")
    panels[0].plot([], [], color="C0", alpha=0.5, label="of an environment's own")
    panels[0].legend()


EXPERIMENT = Experiment(
    name="linear",
    title="Four linear environments",
    paper="Parascandolo et al. 2020, arXiv 2009.00329",
    full=Settings(),
    quick=Settings(),
    variants=lambda settings: list(RULES),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
)
