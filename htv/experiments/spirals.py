"""Spirals beside an easier shortcut in every environment: which methods learn the spirals?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import htv
from htv import methods
from htv.data import Environments, spirals
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table, spread

# Every method, and by how much its term is multiplied where it has one.
METHODS = {
    "and-mask": 1.0,
    "adam": 0.0,
    "dropout": 0.5,
    "l1": 1e-4,
    "l2": 1e-3,
    "batch norm": 0.0,
    "irm": 10.0,
    "iga": 10.0,
    "fishr": 100.0,
    "dann": 1.0,
    "group dro": 0.1,
}


@dataclass(frozen=True)
class Settings:
    environments: int = 20
    per_environment: int = 1024
    shortcut_dims: int = 32
    batch: int = 256  # of each environment
    epochs: int = 240
    width: int = 256
    learning_rate: float = 1e-2  # a tenth of it in the last quarter
    weight_decay: float = 1e-4  # L2, added to what the mask has left of the gradient
    tau: float = 1.0
    variants: tuple[str, ...] = tuple(METHODS)


class Network(nn.Module):
    """Three hidden layers; the last one's features are what DANN's adversary sees and Fishr's head
    takes.
    """

    def __init__(self, inputs: int, width: int, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for size in (inputs, width, width):
            layers.append(nn.Linear(size, width))
            layers += [nn.BatchNorm1d(width)] if batch_norm else []
            layers.append(nn.LeakyReLU())
            layers += [nn.Dropout(dropout)] if dropout else []
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.constant_(module.bias, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def each_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")


class Method:
    """What is trained, and the loss of a joined batch."""

    def __init__(self, name: str, settings: Settings, inputs: int):
        self.name, self.strength, self.count = name, METHODS[name], settings.environments
        dropout = self.strength if name == "dropout" else 0.0
        self.network = Network(inputs, settings.width, dropout, name == "batch norm")
        self.extra = nn.Module()
        if name == "dann":
            self.extra = methods.DomainAdversary(settings.width, self.count, strength=self.strength)
        elif name == "group dro":
            self.extra = methods.GroupDRO(self.count, self.strength)
        rule = htv.AndMask(settings.tau, rescale=True)
        self.handle = htv.attach(self.network, rule) if name == "and-mask" else None

    def loss(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        voting = (
            methods.environment_groups(self.handle, ids, self.count)
            if self.handle
            else nullcontext()
        )
        with voting:
            features = self.network.features(x) if not self.handle else None
            outputs = self.network(x) if self.handle else self.network.head(features)
        losses = each_loss(outputs, y)
        if self.name == "group dro":
            return self.extra(methods.environment_means(losses, ids, self.count))
        terms = {
            "l1": lambda: methods.l1_penalty(self.network.parameters()),
            "l2": lambda: methods.l2_penalty(self.network.parameters()),
            "iga": lambda: methods.iga_penalty(self.risks(x, y, ids), self.network.parameters()),
            "irm": lambda: methods.irm_penalty(outputs, y, ids, self.count, each_loss),
            "fishr": lambda: methods.fishr_penalty(features, outputs, losses, ids, self.count),
            "dann": lambda: self.extra(features, ids) / self.strength,
        }
        term = terms.get(self.name)
        return losses.mean() + (self.strength * term() if term else 0.0)

    def risks(self, x: Tensor, y: Tensor, ids: Tensor) -> list[Tensor]:
        """Of every environment, each with a graph of its own: E gradients of one would take E times
        as long.
        """
        parts = [ids == e for e in range(self.count)]
        return [each_loss(self.network(x[part]), y[part]).mean() for part in parts]


def train(
    settings: Settings,
    variant: str,
    seed: int,
    observe: Callable[[int, nn.Module, Environments], bool],
) -> None:
    """Train by a method; observe(epoch, network, problem) after every epoch, from 0 on, says
    whether to go on.
    """
    problem = spirals(
        settings.environments,
        settings.per_environment,
        shortcut_dims=settings.shortcut_dims,
        seed=seed,
    )
    with torch.random.fork_rng(devices=[]):  # initial weights, dropout
        torch.manual_seed(seed)
        method = Method(variant, settings, problem.x.shape[-1])
        optimizer = torch.optim.Adam(
            [*method.network.parameters(), *method.extra.parameters()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3 * settings.epochs // 4])
        order = torch.Generator().manual_seed(seed)
        for epoch in range(settings.epochs):
            if not observe(epoch, method.network, problem):
                return
            for (x, y), ids in methods.environment_batches(loaders(problem, settings.batch, order)):
                optimizer.zero_grad()
                method.loss(x, y, ids).backward()
                optimizer.step()
            schedule.step()
        observe(settings.epochs, method.network, problem)


def run_one(settings: Settings, variant: str, seed: int, data, progress) -> dict:
    curve = []

    def observe(epoch: int, network: nn.Module, problem: Environments) -> bool:
        if epoch % max(1, settings.epochs // 50) == 0 or epoch == settings.epochs:
            seen = accuracy(network, problem.x.flatten(0, 1), problem.y.flatten())
            curve.append([epoch, seen, accuracy(network, problem.test_x, problem.test_y)])
            progress(epoch / settings.epochs, f"train {seen:.1%}, test {curve[-1][2]:.1%}")
        return True

    train(settings, variant, seed, observe)
    return {"train": curve[-1][1], "test": curve[-1][2], "curve": curve}


def loaders(problem: Environments, batch: int, order: torch.Generator) -> list:
    """One epoch of batches (x, y) for each environment, in a new order; an incomplete last batch is
    dropped.
    """
    environments = []
    for x, y in zip(problem.x, problem.y, strict=True):
        shuffled = torch.randperm(len(x), generator=order)[: len(x) // batch * batch]
        environments.append([(x[index], y[index]) for index in shuffled.split(batch)])
    return environments


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    network.eval()
    right = (network(x)[:, 0] > 0) == (y > 0.5)
    network.train()
    return right.double().mean().item()


def summarise(records: Records) -> Summary:
    rows = [
        [variant, spread(records.values(variant, "train")), spread(records.values(variant, "test"))]
        for variant in records.variants
    ]
    others = {v: records.mean(v, "test") for v in records.variants if v != "and-mask"}
    findings = []
    if "and-mask" in records.variants:
        ours = records.mean("and-mask", "test")
        findings.append(Finding("The AND-mask nears 100% on test", f"{ours:.1%}", ours > 0.95))
    if others:
        best = max(others, key=others.get)
        findings.append(
            Finding(
                "All others stay near 50%",
                f"at most {others[best]:.1%} ({best})",
                others[best] < 0.6,
            )
        )
        fits = {v: records.mean(v, "train") for v in others}
        worst = min(fits, key=fits.get)
        findings.append(
            Finding(
                "though they fit the training part",
                f"at least {fits[worst]:.1%} ({worst})",
                fits[worst] > 0.95,
            )
        )
    return Summary([Table(["method", "training accuracy", "test accuracy"], rows)], findings)


def plot(records: Records, figure) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for index, variant in enumerate(records.variants):
        runs = torch.tensor(
            [result["curve"] for result in records.results(variant)]
        )  # (seeds, epochs, 3)
        epochs = runs[0, :, 0]
        for axes, column in zip(panels, (1, 2), strict=True):
            ours = variant == "and-mask"
            color = "black" if ours else f"C{index - 1}"
            axes.plot(
                epochs,
                runs[..., column].mean(dim=0),
                color=color,
                label=variant,
                linewidth=2 if ours else 1,
            )
    for axes, title in zip(panels, ("training part", "test part: no shortcut works"), strict=True):
        axes.set(title=title, xlabel="epoch", ylim=(0.45, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy")
    panels[1].legend(fontsize="small", ncols=2)


EXPERIMENT = Experiment(
    name="spirals",
    title="Spirals with a shortcut in every environment",
    paper="Parascandolo et al. 2020, arXiv 2009.00329",
    full=Settings(),
    quick=Settings(
        environments=16, shortcut_dims=16, epochs=110, variants=("and-mask", "adam", "irm")
    ),
    variants=lambda settings: settings.variants,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
)
