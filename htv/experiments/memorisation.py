"""Real labels, random ones, and a quarter of noise, learnt under AND-masks over single examples."""

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
from htv.rules import AndMask

NOISE = {"real": 0.0, "random": 1.0, "25% noise": 0.25}


@dataclass(frozen=True)
class Settings:
    training: Training
    networks: tuple[str, ...] = ("mlp", "convnet")
    taus: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def variants(settings: Settings) -> list[str]:
    return [
        _name(network, labels, tau)
        for network in settings.networks
        for labels in NOISE
        for tau in settings.taus
    ]


def _name(network: str, labels: str, tau: float) -> str:
    return f"{network}, {labels}, tau {tau:g}"


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    kind, labels, tau = variant.split(", ")
    training, tau = settings.training, float(tau.removeprefix("tau "))
    task = images.make_task(data, training, NOISE[labels], seed)
    network = images.make_network(kind, data, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate)
    curves = images.fit(
        network, task, optimizer, training, seed, progress, rule=AndMask(tau) if tau else None
    )
    return {**images.last(curves), "best_test": max(curves["test_accuracy"]), "curves": curves}


def _table(records: Records, network: str) -> Table:
    taus = records.settings.taus
    columns = {
        "real: train": ("real", "train_accuracy"),
        "real: test": ("real", "test_accuracy"),
        "random: train": ("random", "train_accuracy"),
        "25% noise: test": ("25% noise", "test_accuracy"),
        "25% noise: best test on the way": ("25% noise", "best_test"),
        "25% noise: wrong labels learnt": ("25% noise", "memorised"),
    }
    rows = [
        [
            f"{tau:g}",
            *(spread(records.values(_name(network, of, tau), key)) for of, key in columns.values()),
        ]
        for tau in taus
    ]
    return Table(["tau", *columns], rows, f"Accuracy at the end, {network}")


def _findings(records: Records, network: str) -> list[Finding]:
    taus = records.settings.taus
    at = lambda labels, tau, key: records.mean(_name(network, labels, tau), key)
    fall = {
        tau: at("random", 0.0, "train_accuracy") - at("random", tau, "train_accuracy")
        for tau in taus
    }
    price = {
        tau: at("real", 0.0, "test_accuracy") - at("real", tau, "test_accuracy") for tau in taus
    }
    gap = {
        tau: at("real", tau, "train_accuracy") - at("real", tau, "test_accuracy") for tau in taus
    }
    apart = max(taus, key=lambda tau: fall[tau] - price[tau])
    high = taus[-2]
    best = max(taus[1:], key=lambda tau: at("25% noise", tau, "test_accuracy"))
    learnt, kept = at("25% noise", best, "memorised"), at("25% noise", best, "test_accuracy")
    dropped, plain_dropped = (at("25% noise", tau, "best_test")
                              - at("25% noise", tau, "test_accuracy")
                              for tau in (best, 0.0))  # fmt: skip
    return [
        Finding(
            f"{network}: small tau makes the training accuracy on random labels collapse, and "
            "hardly touches real ones",
            f"tau {apart:g}: random {at('random', 0.0, 'train_accuracy'):.1%} to "
            f"{at('random', apart, 'train_accuracy'):.1%} (training), real "
            f"{at('real', 0.0, 'test_accuracy'):.1%} to {at('real', apart, 'test_accuracy'):.1%} "
            "(test)",
            fall[apart] > 0.3 and price[apart] < 0.1,
        ),
        Finding(
            f"{network}: training and test accuracy meet at high tau, to two points or a quarter "
            "of their gap",
            f"gap {gap[0.0]:.1%} at tau 0, {gap[high]:.1%} at tau {high:g}",
            gap[high] < max(0.25 * gap[0.0], 0.02),
        ),
        Finding(
            f"{network}: under 25% noise, at the best tau, wrong labels are learnt no more often "
            "than by chance",
            f"tau {best:g}: {learnt:.1%}; plain: {at('25% noise', 0.0, 'memorised'):.1%}",
            learnt <= records.chance,
        ),
        Finding(
            f"{network}: and test accuracy does not rise and then fall",
            f"tau {best:g}: ends at {kept:.1%}, {dropped:.1%} below its best; plain: "
            f"{plain_dropped:.1%} below",
            dropped < 0.03,
        ),
    ]


def summarise(records: Records) -> Summary:
    networks = records.settings.networks
    findings = [finding for network in networks for finding in _findings(records, network)]
    return Summary([_table(records, network) for network in networks], findings)


def plot(records: Records, figure) -> None:
    settings = records.settings
    rows = figure.subplots(len(settings.networks), 2, squeeze=False)
    position = range(len(settings.taus))
    for (left, right), network in zip(rows, settings.networks, strict=True):
        for labels, color in zip(("real", "random"), ("C0", "C3"), strict=True):
            for key, style in {"train_accuracy": "-", "test_accuracy": "--"}.items():
                values = [records.mean(_name(network, labels, tau), key) for tau in settings.taus]
                left.plot(position, values, style, color=color, marker="o",
                          label=f"{labels}, {key.removesuffix('_accuracy')}")  # fmt: skip
        images.share_axis(left, f"{network}: at the end", "tau")
        left.set_xticks(position, [f"{tau:g}" for tau in settings.taus])
        left.legend()
        for index, tau in enumerate(settings.taus[:4]):
            curves = [
                result["curves"] for result in records.results(_name(network, "25% noise", tau))
            ]
            for key, style in {"test_accuracy": "-", "memorised": ":"}.items():
                right.plot(curves[0]["epoch"], images.seed_mean([c[key] for c in curves]), style,
                           color=f"C{index}",
                           label=f"tau {tau:g}" if style == "-" else None)  # fmt: skip
        images.share_axis(right, f"{network}, 25% noise: test; dotted: wrong labels")
        right.legend()


EXPERIMENT = Experiment(
    name="memorisation",
    title="Learning by heart under AND-masks",
    paper="Parascandolo et al. 2020, arXiv 2009.00329",
    full=Settings(
        Training(
            images=2000, epochs=80, learning_rate=1e-3, batch_size=80, test_images=2000, cosine=True
        )
    ),
    quick=Settings(
        Training(
            images=320, epochs=12, learning_rate=2e-3, batch_size=80, test_images=300, looks=6
        ),
        taus=(0.0, 0.1, 0.4, 0.6),
    ),
    variants=variants,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=1,
    images=True,
    size=(11, 8),
)
