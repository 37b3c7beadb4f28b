"""What is measured: models with a batch in the sizes of docs/performance.md, and the rules beside plain training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import htv
import models
from htv.rules import Rule


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and how many values winsorized means clip per side."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    winsorize: int

    def rules(self) -> dict[str, Rule | None]:
        """Plain training first."""
        return {
            "plain": None,
            "mean": htv.Mean(),
            "and_mask": htv.AndMask(0.4),
            "median": htv.Median(),
            "winsorized_mean": htv.WinsorizedMean(self.winsorize),
        }

    def step(self, rule: Rule | None) -> Callable[[], None]:
        """One forward and backward of a freshly seeded model, attached to `rule` unless that is None."""
        torch.manual_seed(0)
        model, (x, targets) = self.model(), self.batch()
        handle = None if rule is None else htv.attach(model, rule)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            logits = model(x)
            F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()

        run.handle = handle  # attached as long as the step lives
        return run


def _mlp(activation: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: models.mlp((784, 1024, 1024, 10), activation, norm=False)


def _images(count: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(count, *shape), torch.randint(0, 10, (count,)))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp-relu", _mlp(nn.ReLU), _images(256, 784), winsorize=8),
        Workload("mlp-gelu", _mlp(nn.GELU), _images(256, 784), winsorize=8),
        Workload(
            "transformer",
            lambda: models.LanguageModel(1000, 256, heads=4, layers=4, context=128, expansion=4, tied=False),
            lambda: (torch.randint(0, 1000, (16, 128)), torch.randint(0, 1000, (16, 128))),
            winsorize=1,
        ),
        Workload(
            "resnet18",
            lambda: models.ResNet18(width=64, classes=10, norm_groups=8),
            _images(32, 3, 64, 64),
            winsorize=8,
        ),
    )
}
