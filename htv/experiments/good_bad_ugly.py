"""Noisy labels learnt by heart: what else tells points apart decides whether the curve is kept,
lost or bent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.data import clean_curve, noisy_curve
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table, spread

PAPER = {"good": 0.0019, "bad": 0.0186, "ugly": 0.0074}


@dataclass(frozen=True)
class Settings:
    good: float = 1e-4  # the deviation of the inputs that tell points apart
    bad: float = 1e-3
    ugly: float = 0.0
    width: int = 300
    learning_rate: float = 1e-3  # of Adam
    loss: float = 1e-6  # to train down to
    steps: int = 30000  # at most
    within: float = 1.2  # the curve is compared on |x| <= within


def run_one(settings: Settings, variant: str, seed: int, data, progress) -> dict:
    x, y = noisy_curve(getattr(settings, variant), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], settings.width), nn.Tanh(),
            nn.Linear(settings.width, settings.width), nn.Tanh(),
            nn.Linear(settings.width, 1),
        )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    for step in range(settings.steps + 1):
        loss = F.mse_loss(network(x), y)
        if loss.item() < settings.loss or step == settings.steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            progress(step / settings.steps, f"loss {loss.item():.1e}")
    grid = torch.linspace(-1.5, 1.5, 301)
    curve = predicted(network, grid, x.shape[1])
    inside = grid.abs() <= settings.within
    return {
        "steps": step,
        "loss": loss.item(),
        "error": F.mse_loss(curve[inside], clean_curve(grid[inside])).item(),
        "grid": grid.tolist(),
        "curve": curve.tolist(),
        "points": [x[:, 0].tolist(), y[:, 0].tolist()],
    }


@torch.no_grad()
def predicted(network: nn.Module, grid: Tensor, inputs: int) -> Tensor:
    """At new points, which no identifier belongs to: zeros stand for it."""
    x = torch.zeros(len(grid), inputs)
    x[:, 0] = grid
    return network(x)[:, 0]


def summarise(records: Records) -> Summary:
    rows, errors = [], {}
    for variant in PAPER:
        errors[variant] = records.mean(variant, "error")
        rows.append(
            [
                variant,
                f"{getattr(records.settings, variant):g}",
                spread(records.values(variant, "loss"), ".1e"),
                spread(records.values(variant, "steps"), ".0f"),
                spread(records.values(variant, "error"), ".4f"),
            ]
        )
    head = [
        "",
        "deviation of identifiers",
        "training loss",
        "steps",
        "error against the clean curve",
    ]
    here = lambda *names: ", ".join(f"{name} {errors[name]:.4f}" for name in names)
    learnt = max(records.mean(variant, "loss") for variant in PAPER)
    findings = [
        Finding(
            f"All learn the noisy labels: loss below {records.settings.loss:g}",
            f"at most {learnt:.1e}",
            learnt <= records.settings.loss,
        ),
        Finding(
            "Bad memorisation loses the curve, good keeps it: .0186 and .0019",
            here("bad", "good"),
            errors["bad"] > 2 * errors["good"],
        ),
        Finding("and more than ugly: .0074", here("bad", "ugly"), errors["bad"] > errors["ugly"]),
        Finding(
            "Good memorisation keeps it better than ugly",
            here("good", "ugly"),
            errors["good"] < errors["ugly"],
        ),
    ]
    return Summary([Table(head, rows)], findings)


def plot(records: Records, figure) -> None:
    panels = figure.subplots(1, len(PAPER), sharey=True)
    for axes, variant in zip(panels, PAPER, strict=True):
        result = records.results(variant)[0]
        axes.plot(
            result["grid"],
            clean_curve(torch.tensor(result["grid"])),
            color="grey",
            label="clean curve",
        )
        axes.plot(result["grid"], result["curve"], color="C0", label="learnt")
        axes.plot(*result["points"], "o", color="C3", markersize=4, label="noisy labels")
        axes.set(
            title=f"{variant}: error {records.mean(variant, 'error'):.4f}",
            xlabel="x",
            ylim=(-0.8, 0.8),
        )
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")


EXPERIMENT = Experiment(
    name="good-bad-ugly",
    title="Good, bad and ugly memorisation",
    paper="Bayat et al. 2024, arXiv 2412.07684",
    full=Settings(),
    quick=Settings(loss=3e-3),
    variants=lambda settings: list(PAPER),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=10,
)
