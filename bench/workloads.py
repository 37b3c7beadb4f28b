"""What is measured: each workload names its variants and prepares a step of any of them.

    NAME           one forward and backward of a model; `plain` is the unit
    scaling-...    the same for one MLP whose batch, width or rows per example grow
    stacked-E      one statistic of (E, coordinates) float32; a copy of the same bytes is the unit

A variant is a rule, or METHOD:RULE for the same gradients by a method of `htv.bench.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import htv
from htv.bench import baselines, models
from htv.ops.functional import apply_rule
from htv.rules import Rule
from htv.tools.timing import Step

TAU = 0.4
RULES = ("plain", "mean", "and-mask", "median", "winsorized")
PEERS = (
    *(f"{method}:{rule}" for rule in ("and-mask", "median") for method in baselines.METHODS),
    "vmap:winsorized",
)


@dataclass(frozen=True)
class TrainingStep:
    """A model, a batch, and how many values winsorized means clip per side.

    axis: (what grows, its value) in a workload that shows scaling.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    winsorize: int
    peers: tuple[str, ...] = PEERS
    axis: tuple[str, int] | None = None

    kind = "step"
    unit = "plain"

    @property
    def variants(self) -> tuple[str, ...]:
        """Plain first, then the rules by htv, then the baselines."""
        return RULES + self.peers

    @property
    def patience(self) -> float:
        """Which share of the time of a workload it is worth."""
        return 1.0 if self.axis is None else 0.1

    def rules(self) -> dict[str, Rule | None]:
        """Plain training first."""
        rules = (
            None,
            htv.Mean(),
            htv.AndMask(TAU),
            htv.Median(),
            htv.WinsorizedMean(self.winsorize),
        )
        return dict(zip(RULES, rules, strict=True))

    def prepare(self, variant: str) -> Step:
        """One forward and backward, with gradients aggregated as `variant` says."""
        method, _, rule = variant.rpartition(":")
        if not method:
            return self.step(self.rules()[rule])
        model, x, targets = self._seeded()
        # torch.median, what others take, is the lower of the two middle values
        wanted = htv.Median("lower") if rule == "median" else self.rules()[rule]
        return baselines.step(method, model, x, targets, wanted)

    def step(self, rule: Rule | None) -> Step:
        """One forward and backward of a freshly seeded model, attached to `rule` unless that is
        None.
        """
        model, x, targets = self._seeded()
        criterion = nn.CrossEntropyLoss()
        handle = None if rule is None else htv.attach(model, rule)
        forward = self.called(model)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            baselines.loss(forward, criterion, x, targets).backward()

        run.handle = handle  # attached as long as the step lives
        return run

    def called(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is called for the model's forward: itself."""
        return model

    def materialised_bytes(self) -> int:
        """Of all examples' gradients."""
        model, x, _ = self._seeded()
        return 4 * len(x) * sum(p.numel() for p in model.parameters())

    def facts(self) -> dict[str, object]:
        model, x, targets = self._seeded()
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "input": list(x.shape),
            "targets": list(targets.shape),
            "winsorize": self.winsorize,
        }
        return facts if self.axis is None else facts | {"axis": self.axis[0], "value": self.axis[1]}

    def _seeded(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        return self.model(), *self.batch()


@dataclass(frozen=True)
class Stacked:
    """Statistics of (groups, coordinates) float32."""

    groups: int
    coordinates: int
    device: str = "cpu"

    kind = "stacked"
    unit = "copy"
    patience = 0.25

    @property
    def name(self) -> str:
        return f"stacked-{self.groups}"

    @property
    def winsorize(self) -> int:
        """Values per side that winsorized and trimmed means clip or drop."""
        return max(1, min(8, self.groups // 4))

    @property
    def variants(self) -> tuple[str, ...]:
        """The copy first, then the rules by htv, then torch's own."""
        return ("copy", *self.rules(), "torch:mean", "torch:median", "torch:sort")

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(variant for variant in self.variants if variant.startswith("torch:"))

    def rules(self) -> dict[str, Rule]:
        return {
            "mean": htv.Mean(),
            "and-mask": htv.AndMask(TAU),
            "median": htv.Median(),
            "winsorized": htv.WinsorizedMean(self.winsorize),
            "trimmed": htv.TrimmedMean(self.winsorize),
        }

    def prepare(self, variant: str) -> Step:
        grads = _normal(self.groups, self.coordinates, self.device)
        if variant == "copy":
            out = torch.empty_like(grads)
            return lambda: out.copy_(grads)
        if variant.startswith("torch:"):
            function = getattr(torch, variant.removeprefix("torch:"))
            return lambda: function(grads, dim=0)
        rule = self.rules()[variant]
        return lambda: apply_rule(grads, rule)

    def materialised_bytes(self) -> int:
        """Of the most that the baselines allocate: values and indices, before and after a sort."""
        return 4 * 4 * self.groups * self.coordinates

    def moved_bytes(self, variant: str) -> int:
        """What has to be read and written at least."""
        written = self.groups if variant in ("copy", "torch:sort") else 1
        return 4 * (self.groups + written) * self.coordinates

    def facts(self) -> dict[str, object]:
        return {"groups": self.groups, "coordinates": self.coordinates, "winsorize": self.winsorize}


Workload = TrainingStep | Stacked


@lru_cache(maxsize=1)  # all variants look at the same values
def _normal(groups: int, coordinates: int, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(groups, coordinates, device=device)


def _mlp(activation: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: models.mlp((784, 1024, 1024, 10), activation, norm=False)


def _images(count: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(count, *shape), torch.randint(0, 10, (count,)))


def _scaling(
    what: str, value: int, groups: int = 64, width: int = 512, rows: int = 1
) -> TrainingStep:
    """Three square linear layers with GELU between them, (groups, rows, width); as many classes as
    inputs.
    """
    shape = (groups,) if rows == 1 else (groups, rows)
    return TrainingStep(
        f"scaling-{what}-{value}",
        lambda: models.mlp((width,) * 4, nn.GELU, norm=False),
        lambda: (torch.randn(*shape, width), torch.randint(0, width, shape)),
        winsorize=1,
        peers=(),
        axis=(what, value),
    )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        TrainingStep("mlp-relu", _mlp(nn.ReLU), _images(256, 784), winsorize=8),
        TrainingStep("mlp-gelu", _mlp(nn.GELU), _images(256, 784), winsorize=8),
        TrainingStep(
            "transformer",
            lambda: models.transformer(1000, 256, heads=4, layers=4),
            lambda: (torch.randint(0, 1000, (16, 128)), torch.randint(0, 1000, (16, 128))),
            winsorize=1,
        ),
        TrainingStep(
            "resnet18",
            lambda: models.ResNet18(width=64, classes=10, norm_groups=8),
            _images(32, 3, 64, 64),
            winsorize=8,
        ),
        TrainingStep(
            "llama-block",  # its output stands for the logits of 1024 classes
            lambda: models.LlamaBlock(1024, heads=16, hidden=2816),
            lambda: (torch.randn(4, 512, 1024), torch.randint(0, 1024, (4, 512))),
            winsorize=1,
        ),
        TrainingStep(
            "convnext-stage",
            lambda: models.ConvNeXtStage(192, 384, blocks=3, classes=10),
            _images(32, 192, 28, 28),
            winsorize=8,
        ),
        *(Stacked(groups, 1 << 22) for groups in (3, 8, 32)),
        *(Stacked(groups, (1 << 26) // groups) for groups in (128, 512)),
        *(_scaling("groups", groups, groups=groups) for groups in (16, 64, 256, 1024)),
        *(_scaling("width", width, width=width) for width in (256, 512, 1024, 2048)),
        *(_scaling("rows", rows, groups=16, rows=rows) for rows in (1, 4, 16, 64, 256)),
    )
}

# An MLP of the size of those in reinforcement learning: what a step costs are its calls. For
# `htv.bench.breakdown`; on a full run its milliseconds would show nothing.
POLICY = TrainingStep(
    "policy",
    lambda: models.mlp((8, 64, 64, 2), nn.Tanh, norm=False),
    lambda: (torch.randn(64, 8), torch.randint(0, 2, (64,))),
    winsorize=1,
    peers=(),
)

QUICK = ("mlp-relu", "stacked-3")  # what a first look looks at


def selected(names: list[str] | None) -> list[Workload]:
    """Those named, or whose name begins with one of `names` and a hyphen; all for None. ValueError
    for others.
    """
    chosen: dict[str, Workload] = {}
    for wanted in names or list(WORKLOADS):
        found = {
            name: w
            for name, w in WORKLOADS.items()
            if name == wanted or name.startswith(f"{wanted}-")
        }
        if not found:
            raise ValueError(
                f"unknown workload {wanted!r}, use {', '.join(WORKLOADS)}, or how several of them "
                "begin"
            )
        chosen |= found
    return list(chosen.values())


def checked_variants(workloads: list[Workload], names: list[str] | None) -> list[str] | None:
    """`names`, all of which some workload has; ValueError for others."""
    known = list(dict.fromkeys(variant for workload in workloads for variant in workload.variants))
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown variant {name!r}, use {', '.join(known)}")
    return names
