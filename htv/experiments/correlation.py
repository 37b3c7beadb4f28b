"""What a mask lets through: gradients of the mechanism alone and of the shortcut alone, against the
masked gradient.
"""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import htv
from htv import methods
from htv.data import Environments
from htv.experiments import spirals
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table
from htv.rules import Rule

RULES = {"and-mask": htv.AndMask, "xor-mask": htv.XorMask}
POINTS = {"untrained": None, "learning": 0.6}  # the test accuracy at which to look


@dataclass(frozen=True)
class Settings:
    training: spirals.Settings = spirals.Settings()
    taus: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def run_one(settings: Settings, variant: str, seed: int, data, progress) -> dict:
    """Correlations over all weights, for both masks and every tau, at one point of training with
    the AND-mask.
    """
    result = {}

    def observe(epoch: int, network: nn.Module, problem: Environments) -> bool:
        learnt = spirals.accuracy(network, problem.test_x, problem.test_y)
        progress(epoch / settings.training.epochs, f"test {learnt:.1%}")
        if (
            POINTS[variant] is not None
            and learnt < POINTS[variant]
            and epoch < settings.training.epochs
        ):
            return True
        result.update(
            epoch=epoch,
            test=learnt,
            **correlations(copy.deepcopy(network), problem, settings.taus, seed),
        )
        return False

    spirals.train(settings.training, "and-mask", seed, observe)
    return result


def correlations(
    network: nn.Module, problem: Environments, taus: tuple[float, ...], seed: int
) -> dict[str, list[float]]:
    """Of either mask, by tau: the correlation with the plain gradients on inputs whose other half
    tells nothing.

    Under the keys "MASK mechanism" and "MASK shortcut"; "MASK left" is the share of weights that
    have a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    mechanism_only, shortcut_only = problem.x.clone(), problem.x.clone()
    noise = mechanism_only[..., problem.shortcut]
    mechanism_only[..., problem.shortcut] = torch.randn(noise.shape, generator=generator)
    shuffled = torch.randperm(problem.y.numel(), generator=generator)
    points = problem.x[..., ~problem.shortcut].flatten(0, 1)[shuffled]
    shortcut_only[..., ~problem.shortcut] = points.view(*problem.y.shape, -1)
    parts = {"mechanism": mechanism_only, "shortcut": shortcut_only}
    plain = {name: gradient(network, x, problem.y, htv.Mean()) for name, x in parts.items()}
    found = {}
    for mask, rule in RULES.items():
        masked = [gradient(network, problem.x, problem.y, rule(tau)) for tau in taus]
        for name, alone in plain.items():
            found[f"{mask} {name}"] = [correlation(grad, alone) for grad in masked]
        found[f"{mask} left"] = [(grad != 0).double().mean().item() for grad in masked]
    return found


def gradient(network: nn.Module, x: Tensor, y: Tensor, rule: Rule) -> Tensor:
    """(P,): the network's gradient with the environments voting. x: (E, N, features), y: (E, N)."""
    ids = torch.arange(len(x)).repeat_interleave(x.shape[1])
    with htv.attach(network, rule) as handle:
        with methods.environment_groups(handle, ids, len(x)):
            loss = spirals.each_loss(network(x.flatten(0, 1)), y.flatten()).mean()
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two vectors; NaN if nothing is left of one."""
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()


def _mean(records: Records, variant: str, key: str, index: int) -> float:
    values = [
        result[key][index] for result in records.results(variant) if result[key][index] is not None
    ]
    return statistics.fmean(values) if values else float("nan")


def summarise(records: Records) -> Summary:
    taus = records.settings.taus
    tables = []
    for point in records.variants:
        rows = []
        for name in ("mechanism", "shortcut"):
            for mask in RULES:
                found = (
                    _mean(records, point, f"{mask} {name}", index) for index in range(len(taus))
                )
                rows.append(
                    [name, mask, *("-" if math.isnan(value) else f"{value:.2f}" for value in found)]
                )
        learnt = f"{point} network, test accuracy {records.mean(point, 'test'):.0%}"
        title = f"Correlation with the gradient of mechanism or shortcut alone, by tau; {learnt}:"
        tables.append(Table(["of", "mask", *(f"{tau:g}" for tau in taus)], rows, title))
    ends = lambda key: (
        _mean(records, "learning", key, 0),
        _mean(records, "learning", key, len(taus) - 1),
    )
    (low, high), (before, after) = ends("and-mask mechanism"), ends("and-mask shortcut")
    xor = _mean(records, "learning", "xor-mask mechanism", len(taus) - 1)
    findings = [
        Finding(
            "With tau from 0 to 1 the mechanism's correlation rises",
            f"{low:.2f} to {high:.2f}",
            high > low + 0.1,
        ),
        Finding("and the shortcuts' falls", f"{before:.2f} to {after:.2f}", after < before - 0.1),
        Finding(
            "What the XOR-mask keeps is worse",
            f"{xor:.2f} for the mechanism at tau = 1",
            xor < high,
        ),
    ]
    return Summary(tables, findings)


def plot(records: Records, figure) -> None:
    panels = figure.subplots(1, len(records.variants), sharey=True)
    taus = records.settings.taus
    for axes, point in zip(panels, records.variants, strict=True):
        for color, mask in zip(("C0", "C1"), RULES, strict=True):
            for style, name in (("-", "mechanism"), ("--", "shortcut")):
                values = [
                    _mean(records, point, f"{mask} {name}", index) for index in range(len(taus))
                ]
                axes.plot(taus, values, style, color=color, marker=".", label=f"{mask}, {name}")
        axes.set(title=f"{point} network", xlabel="tau")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="correlation with the gradient of one part")
    panels[0].legend(fontsize="small")


EXPERIMENT = Experiment(
    name="correlation",
    title="What a mask lets through of mechanism and shortcut",
    paper="Parascandolo et al. 2020, arXiv 2009.00329",
    full=Settings(),
    quick=Settings(
        replace(spirals.EXPERIMENT.quick, variants=()), taus=(0.0, 0.25, 0.5, 0.75, 1.0)
    ),
    variants=lambda settings: list(POINTS),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=10,
)
