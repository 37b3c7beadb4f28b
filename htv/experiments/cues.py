"""What the experiments on images with cues share: a model that relies on a box, and ways to
fine-tune it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from htv.data import BoxCue, Dataset, add_cue, counterfactuals, fine_tuning_parts
from htv.data.cues import COUNTERFACTUALS, Part
from htv.methods import CBFT, fine_tune

SETS = COUNTERFACTUALS
RED = (1.0, 0.0, 0.0)  # shows on grey objects as well as on their background


@dataclass(frozen=True)
class CueTraining:
    """How the first model is trained, and what there is for fine-tuning it.

    images, test_images:  at most so many, drawn by the seed.
    clean:                share of the training images that fine-tuning gets without cue; the others
                          come with it.
    """

    images: int = 10_000
    test_images: int = 2000
    clean: float = 0.05
    epochs: int = 10
    learning_rate: float = 0.05
    batch_size: int = 100


@dataclass(frozen=True)
class CBFTuning:
    """Of connectivity-based fine-tuning.

    epochs:   over the images with the cue; the clean ones are gone through again and again
              meanwhile. The first epoch is without the invariance loss.
    """

    epochs: int = 8
    learning_rate: float = 0.02
    barrier: float = 1.0


class Shuffled:
    """Shuffled anew every time it is gone through, in the seed's order; an incomplete last batch is
    dropped.
    """

    def __init__(self, part: Part, batch_size: int, seed: int):
        self.x, self.y = part
        self.batch_size = min(batch_size, len(self.y))
        self._order = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.y) // self.batch_size

    def __iter__(self) -> Iterator[Part]:
        order = torch.randperm(len(self.y), generator=self._order)
        for ids in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self.x[ids], self.y[ids]


@dataclass(frozen=True, eq=False)
class CueTask:
    """Standardised images (N, 3, height, width) and labels: as trained on, without cue, for
    fine-tuning, for test.
    """

    with_cue: Part
    without_cue: Part
    clean: Part
    plentiful: Part
    tests: dict[str, Part]
    num_classes: int


def make_task(data: Dataset, training: CueTraining, proportion: float, seed: int) -> CueTask:
    """A red box on a share of the training images of each class tells it; the four test sets are
    the same for all.
    """
    data = data.subset(training.images, seed).test_subset(training.test_images, seed)
    cue = BoxCue(color=RED)
    mean, deviation = data.train_images.mean(), data.train_images.std().clamp(min=1e-6)
    ready = lambda part: ((part[0] - mean) / deviation, part[1])
    count = len(data.train_labels)
    with_cue, without = (
        (add_cue(data, cue, share, seed).train_images, data.train_labels)
        for share in (proportion, 0.0)
    )
    clean, plentiful = fine_tuning_parts(
        data, cue, max(data.num_classes, round(training.clean * count)), seed=seed
    )
    tests = {name: ready(part) for name, part in counterfactuals(data, cue, seed).items()}
    return CueTask(
        ready(with_cue), ready(without), ready(clean), ready(plentiful), tests, data.num_classes
    )


def make_network(task: CueTask, seed: int) -> nn.Sequential:
    """Three convolutions of stride 2 and a hidden layer of 64; one seed, the same weights."""
    _, channels, height, width = task.with_cue[0].shape
    sides = [(side + 7) // 8 for side in (height, width)]  # halved three times, rounding up
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * sides[0] * sides[1], 64), nn.ReLU(),
            nn.Linear(64, task.num_classes),
        )  # fmt: skip


def trained(task: CueTask, part: Part, training: CueTraining, seed: int) -> nn.Sequential:
    """A network trained on a part of the task."""
    network = make_network(task, seed)
    batches = Shuffled(part, training.batch_size, seed)
    fine_tune(network, batches, training.epochs, training.learning_rate)
    return network


def connectivity_based(
    network: nn.Module, task: CueTask, tuning: CBFTuning, batch_size: int, seed: int, **options
) -> None:
    """Fine-tune it by `CBFT`, which takes the options; the learning rate falls along a cosine."""
    plentiful = Shuffled(task.plentiful, batch_size, seed)
    clean = itertools.chain.from_iterable(itertools.repeat(Shuffled(task.clean, batch_size, seed)))
    optimizer = torch.optim.SGD(
        network.parameters(), tuning.learning_rate, momentum=0.9, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuning.epochs * len(plentiful))
    cbft = CBFT(network, optimizer, task.num_classes, barrier=tuning.barrier,
                warm_up=len(plentiful), seed=seed, **options)  # fmt: skip
    for _ in range(tuning.epochs):
        for with_cue in plentiful:
            cbft.step(next(clean), with_cue)
            schedule.step()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global generator starts from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def accuracies(network: nn.Module, task: CueTask) -> dict[str, float]:
    """By test set."""
    return {
        name: (network(x).argmax(dim=1) == y).double().mean().item()
        for name, (x, y) in task.tests.items()
    }
