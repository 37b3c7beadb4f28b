"""m-coherence of per-example gradients through training, for real labels and for random ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from htv.data import Dataset
from htv.demo.training import observe
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
from htv.methods import measure_coherence

NOISE = {"real labels": 0.0, "random labels": 1.0}


@dataclass(frozen=True)
class Settings:
    training: Training
    network: str = "mlp"
    early: float = 0.05  # the share of the epochs that counts as early


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    training = settings.training
    task = images.make_task(data, training, NOISE[variant], seed)
    network = images.make_network(settings.network, data, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate)
    layers: list[dict[str, float]] = []

    def look() -> dict:
        batches = torch.arange(len(task.x)).split(500)
        losses = lambda ids: F.cross_entropy(
            network(task.x[ids]), task.noisy[ids], reduction="none"
        )
        found = measure_coherence(network, batches, losses)
        layers.append({name: coherence.m_coherence for name, coherence in found.layers.items()})
        return {
            "m_coherence": found.total.m_coherence,
            "alpha": found.total.alpha,
            **observe(network, task),
        }

    curves = images.fit(network, task, optimizer, training, seed, progress, look=look)
    by_layer = {name: [at[name] for at in layers] for name in layers[0]}
    values = curves["m_coherence"]
    early = [
        v
        for v, epoch in zip(values, curves["epoch"], strict=True)
        if epoch <= settings.early * training.epochs
    ]
    peak = max(range(len(values)), key=values.__getitem__)
    numbers = {
        "start": values[0],
        "early": max(early),
        "peak": values[peak],
        "peak_epoch": curves["epoch"][peak],
    }
    return {
        **numbers,
        **images.last(curves),
        "examples": len(task.x),
        "curves": curves,
        "layers": by_layer,
    }


def summarise(records: Records) -> Summary:
    columns = {"before training": "start", "highest early": "early", "highest": "peak",
               "at epoch": "peak_epoch", "at the end": "m_coherence"}  # fmt: skip
    rows = [
        [v, *(spread(records.values(v, key), ".4g") for key in columns.values()),
         spread(records.values(v, "train_accuracy"))]
        for v in records.variants
    ]  # fmt: skip
    examples = records.runs[0]["result"]["examples"]
    real, random = (
        {key: records.mean(v, key) for key in (*columns.values(), "train_accuracy")} for v in NOISE
    )
    findings = [
        Finding(
            "Real labels: coherence is high early, orders of magnitude above that of random ones",
            f"up to {real['early']:.3g} of at most {examples} within the first "
            f"{records.settings.early:.0%} of the epochs, {real['peak']:.3g} at epoch "
            f"{real['peak_epoch']:.0f}; random labels: {random['early']:.2g} early",
            real["early"] > 10 * random["early"],
        ),
        Finding(
            "and falls to about 1 when the training examples are fitted",
            f"{real['m_coherence']:.2g} at {real['train_accuracy']:.1%} training accuracy",
            real["m_coherence"] < 0.1 * real["peak"] and real["m_coherence"] < 5,
        ),
        Finding(
            "Random labels: coherence starts near 1",
            f"{random['start']:.2g} before training, where real labels have {real['start']:.2g}",
            random["start"] < 5 and random["start"] < 0.2 * real["start"],
        ),
        Finding(
            "rises well into training, and then falls",
            f"up to {random['peak']:.3g} at epoch {random['peak_epoch']:.0f}, "
            f"{random['m_coherence']:.2g} at the end, at {random['train_accuracy']:.1%} training "
            "accuracy",
            random["peak_epoch"] > records.settings.early * records.settings.training.epochs
            and random["peak"] > 3 * max(random["start"], random["m_coherence"]),
        ),
    ]
    head = ["labels", *columns, "training accuracy"]
    return Summary([Table(head, rows, f"m-coherence of {examples} examples")], findings)


def plot(records: Records, figure) -> None:
    whole, *others = figure.subplots(1, 3)
    for variant, color in zip(records.variants, ("C0", "C3"), strict=True):
        for index, result in enumerate(records.results(variant)):
            whole.plot(result["curves"]["epoch"], result["curves"]["m_coherence"], color=color,
                       label=None if index else variant)  # fmt: skip
    whole.set(title="whole network", ylabel="m-coherence")
    for axes, variant in zip(others, records.variants, strict=True):
        result = records.results(variant)[0]
        for name, values in result["layers"].items():
            axes.plot(result["curves"]["epoch"], values, label=f"layer {name}")
        axes.set(title=f"by layer, {variant}, first seed")
    for axes in (whole, *others):
        axes.set(xlabel="epoch", yscale="log")
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend()


EXPERIMENT = Experiment(
    name="coherence",
    title="m-coherence through training",
    paper="Chatterjee & Zielinski 2020, on m-coherence",
    full=Settings(
        Training(images=2000, epochs=200, learning_rate=0.1, test_images=2000, looks=100)
    ),
    quick=Settings(
        Training(
            images=300, epochs=100, learning_rate=0.1, batch_size=50, test_images=300, looks=50
        )
    ),
    variants=lambda settings: list(NOISE),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    size=(13, 4.2),
)
