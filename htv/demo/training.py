"""One network trained by one rule on noisy labels, observed after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.attach import attach
from htv.data import Dataset, label_noise
from htv.rules import Rule


@dataclass(frozen=True)
class Setup:
    """What all variants share. Wide enough to learn every wrong label by heart, given plain
    gradients.
    """

    epochs: int = 50
    seed: int = 0
    device: str = "cpu"
    noise: float = 0.25
    width: int = 512
    batch_size: int = 64
    learning_rate: float = 1.5e-3  # of AdamW, falling to 0 along a cosine
    weight_decay: float = 0.01  # decoupled: it also shrinks weights whose gradient is masked


@dataclass(frozen=True, eq=False)
class Task:
    """Standardised images on the device: x (N, pixels), true and noisy labels (N,), which are wrong
    (N,) bool.
    """

    x: Tensor
    true: Tensor
    noisy: Tensor
    wrong: Tensor
    test_x: Tensor
    test_labels: Tensor
    num_classes: int


def make_task(data: Dataset, setup: Setup) -> Task:
    """Wrong labels on the training part only, pixels standardised."""
    noisy, wrong = label_noise(data.train_labels, setup.noise, data.num_classes, setup.seed)
    return standardised(data, noisy, wrong, setup.device)


def standardised(data: Dataset, noisy: Tensor, wrong: Tensor, device: str = "cpu") -> Task:
    """Pixels standardised by the training part's mean and deviation, one row per image.

    Centred pixels matter to rules that look at signs and ranks: with mostly-zero inputs most
    contributions to the first layer are exactly 0, which counts against agreement and makes most
    medians 0.
    """
    mean, deviation = data.train_images.mean(), data.train_images.std().clamp(min=1e-6)

    def pixels(images: Tensor) -> Tensor:
        return ((images - mean) / deviation).flatten(1)

    tensors = (
        pixels(data.train_images),
        data.train_labels,
        noisy,
        wrong,
        pixels(data.test_images),
        data.test_labels,
    )
    return Task(*(tensor.to(device) for tensor in tensors), data.num_classes)


def make_network(pixels: int, num_classes: int, setup: Setup) -> nn.Sequential:
    """pixels - width - width - classes with GELU; the same weights for the same seed, on every
    device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        network = nn.Sequential(
            nn.Linear(pixels, setup.width), nn.GELU(),
            nn.Linear(setup.width, setup.width), nn.GELU(),
            nn.Linear(setup.width, num_classes),
        )  # fmt: skip
    return network.to(setup.device)


def make_optimizer(network: nn.Module, setup: Setup) -> torch.optim.Optimizer:
    """Return AdamW as one kernel per step: the steps of its default on CPUs take the square roots
    of a masked gradient's moments, exact zeros, several times slower than those of other numbers.
    """
    return torch.optim.AdamW(
        network.parameters(), lr=setup.learning_rate, weight_decay=setup.weight_decay, fused=True
    )


def aggregating(network: nn.Module, rule: Rule | None):
    """The two lines that htv adds to a training script: attach, and detach when the block ends."""
    return nullcontext() if rule is None else attach(network, rule)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    """One ordinary training step; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(network(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    task: Task, rule: Rule | None, setup: Setup, on_epoch: Callable[[dict], None]
) -> list[dict]:
    """Train from the seed's weights in the seed's batch order; the record of every epoch, also
    given to `on_epoch`.

    An incomplete last batch is dropped, so that the same number of examples votes at every step.
    """
    network = make_network(task.x.shape[1], task.num_classes, setup)
    optimizer = make_optimizer(network, setup)
    batches = len(task.x) // setup.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setup.epochs * batches)
    order = torch.Generator().manual_seed(setup.seed)
    records = []
    with aggregating(network, rule):
        for epoch in range(1, setup.epochs + 1):
            start = time.perf_counter()
            shuffled = torch.randperm(len(task.x), generator=order).to(setup.device)
            losses = []
            for batch in shuffled[: batches * setup.batch_size].split(setup.batch_size):
                losses.append(step(network, optimizer, task.x[batch], task.noisy[batch]))
                schedule.step()
            loss = torch.stack(losses).mean().item()
            seconds = time.perf_counter() - start
            records.append(
                {"epoch": epoch, "loss": loss, "seconds": seconds, **observe(network, task)}
            )
            on_epoch(records[-1])
    return records


@torch.no_grad()
def observe(network: nn.Module, task: Task) -> dict[str, float]:
    """Shares in [0, 1].

    train_accuracy   of the training images, as labelled
    test_accuracy    of the untouched test images
    memorised        of the wrongly labelled images, predicted as their wrong label
    recovered        of the wrongly labelled images, predicted as what they truly show
    clean_accuracy   of the correctly labelled training images
    """
    predicted, tested = (torch.cat([network(part).argmax(dim=1) for part in x.split(1024)])
                         for x in (task.x, task.test_x))  # fmt: skip

    def share(hits: Tensor) -> float:
        return hits.double().mean().item() if len(hits) else 0.0

    return {
        "train_accuracy": share(predicted == task.noisy),
        "test_accuracy": share(tested == task.test_labels),
        "memorised": share((predicted == task.noisy)[task.wrong]),
        "recovered": share((predicted == task.true)[task.wrong]),
        "clean_accuracy": share((predicted == task.true)[~task.wrong]),
    }
