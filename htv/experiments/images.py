"""What the experiments on images share: subsets with label noise, two networks, a training loop,
axes of shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from htv.data import Dataset, label_noise
from htv.data.noise import NoiseKind
from htv.demo.training import Task, aggregating, observe, standardised, step
from htv.experiments.experiment import Progress
from htv.rules import Rule


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    images, test_images:  at most so many, drawn by the seed.
    looks:                how many times in all the network is observed, evenly over the epochs.
    cosine:               whether the learning rate falls to 0 along a cosine, or stays.
    """

    images: int
    epochs: int
    learning_rate: float
    batch_size: int = 100
    test_images: int = 5000
    looks: int = 20
    cosine: bool = False


def make_task(
    data: Dataset, training: Training, rate: float, seed: int, kind: NoiseKind = "uniform"
) -> Task:
    """Some of the training images, a share `rate` of them with labels given anew, and some of the
    test images.
    """
    data = data.subset(training.images, seed).test_subset(training.test_images, seed)
    return standardised(data, *label_noise(data.train_labels, rate, data.num_classes, seed, kind))


def make_network(kind: str, data: Dataset, seed: int) -> nn.Sequential:
    """Takes rows of pixels; the same weights for the same seed.

    kind:  "mlp", three hidden layers of 256; "convnet", two convolutions with pooling and a hidden
           layer of 128.
    """
    *channels, height, width = data.train_images.shape[1:]
    channels = math.prod(channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            sizes = [channels * height * width, 256, 256, 256]
            layers = [
                layer
                for i, o in zip(sizes, sizes[1:], strict=False)
                for layer in (nn.Linear(i, o), nn.ReLU())
            ]
            return nn.Sequential(*layers, nn.Linear(256, data.num_classes))
        if kind == "convnet":
            return nn.Sequential(
                nn.Unflatten(1, (channels, height, width)),
                nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), 128), nn.ReLU(),
                nn.Linear(128, data.num_classes),
            )  # fmt: skip
    raise ValueError(f"network must be 'mlp' or 'convnet', got {kind!r}")


def epochs(examples: int, training: Training, seed: int) -> Iterator[list[Tensor]]:
    """The ids of each epoch's batches, in the seed's order; an incomplete last batch is dropped."""
    order = torch.Generator().manual_seed(seed)
    size = min(training.batch_size, examples)
    for _ in range(training.epochs):
        yield list(torch.randperm(examples, generator=order)[: examples // size * size].split(size))


def fit(
    network: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    training: Training,
    seed: int,
    progress: Progress,
    rule: Rule | None = None,
    look: Callable[[], dict] | None = None,
) -> dict[str, list]:
    """Train in the seed's order of batches.

    look:  observes the network, by default `observe`.

    Returns lists over the looks, "epoch" among them; the first is before training.
    """
    look = look or (lambda: observe(network, task))
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
        if training.cosine
        else None
    )
    due = {round(training.epochs * n / training.looks) for n in range(1, training.looks + 1)}
    records = [{"epoch": 0, **look()}]
    for epoch, batches in enumerate(epochs(len(task.x), training, seed), start=1):
        with aggregating(network, rule):
            for ids in batches:
                step(network, optimizer, task.x[ids], task.noisy[ids])
        if schedule is not None:
            schedule.step()
        if epoch in due:
            records.append({"epoch": epoch, **look()})
            told = records[-1].get("train_accuracy")
            progress(
                epoch / training.epochs, "" if told is None else f"training accuracy {told:.1%}"
            )
    return {key: [record[key] for record in records] for key in records[0]}


def last(curves: dict[str, list]) -> dict[str, float]:
    """The last value of every curve."""
    return {key: values[-1] for key, values in curves.items() if key != "epoch"}


def seed_mean(curves: list[list[float]]) -> list[float]:
    """The mean of several seeds' curves."""
    return torch.tensor(curves, dtype=torch.float64).mean(dim=0).tolist()


def share_axis(axes, title: str, xlabel: str = "epoch", ylabel: str = "accuracy") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
