"""Losses along a path, barriers on it, and which interventions models are invariant to.

Lubana, Bigelow, Dick, Krueger, Tanaka 2023, "Mechanistic mode connectivity", arXiv 2211.08422.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.methods.connectivity.layout import template_of
from htv.methods.connectivity.paths import LinearPath, WeightPath, Weights
from htv.methods.connectivity.samplers import path_grid
from htv.methods.connectivity.statistics import (
    batchnorms,
    inputs_of,
    reestimate_batchnorm,
    require_repeatable,
)

__all__ = [
    "Barrier",
    "Invariance",
    "MechanisticSimilarity",
    "PathProfile",
    "barrier",
    "evaluate_along",
    "mechanistic_similarity",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]
Statistics = Iterable[Any] | Literal["interpolated"] | None


@dataclass(frozen=True)
class Barrier:
    """Hold the largest excess of a loss over the chord between its values at the ends of a path.

    height:  at least 0, the excess at the ends; NaN if a loss is.
    t:       where that is.
    loss:    the loss there.

    >>> htv.methods.barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 4.0, 3.0]))
    Barrier(height=2.0, t=0.5, loss=4.0)
    """

    height: float
    t: float
    loss: float


@dataclass(frozen=True, eq=False)
class PathProfile:
    """Hold the losses and accuracies along a path that `evaluate_along` found.

    t:           (T,) float64.
    losses:      by data set, (T,) float64.
    accuracies:  by data set, (T,) float64 in [0, 1]; NaN where the targets are no classes.

    >>> t, losses = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 4.0, 3.0])
    >>> htv.methods.PathProfile(t, {"test": losses}, {}).barriers
    {'test': Barrier(height=2.0, t=0.5, loss=4.0)}
    """

    t: Tensor
    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]

    @property
    def barriers(self) -> dict[str, Barrier]:
        """By data set. Raises ValueError if the ends of the path were not looked at."""
        return {name: barrier(self.t, losses) for name, losses in self.losses.items()}


def barrier(t: Tensor, losses: Tensor) -> Barrier:
    """Find the largest loss(t) - ((1 - t) loss(0) + t loss(1)) over the points given.

    t:       (T,), among them 0 and 1.
    losses:  (T,).

    Returns a `Barrier`. Raises ValueError for other shapes and a path without its ends.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> found = htv.methods.barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 4.0, 3.0]))
    >>> found.height, found.t
    (2.0, 0.5)
    """
    t, losses = (torch.as_tensor(values, dtype=torch.float64) for values in (t, losses))
    if t.dim() != 1 or t.shape != losses.shape:
        raise ValueError(
            f"t and losses must both be (T,), got shapes {tuple(t.shape)} and {tuple(losses.shape)}"
        )
    if not ((t == 0).any() and (t == 1).any()):
        raise ValueError(
            "t must hold both ends of the path, 0 and 1: a barrier is what exceeds the chord "
            "between them"
        )
    inside = (t >= 0) & (t <= 1)
    t, losses = t[inside], losses[inside]
    first, last = losses[t == 0][0], losses[t == 1][0]
    excess = losses - torch.lerp(first, last, t)
    height, index = excess.max(dim=0)
    return Barrier(height.item(), t[index].item(), losses[index].item())


def evaluate_along(
    path: WeightPath,
    model: nn.Module,
    datasets: Mapping[str, Iterable[Any]],
    points: int | Sequence[float] | Tensor = 21,
    *,
    bn_data: Statistics = None,
    criterion: Criterion = F.cross_entropy,
    forward: Forward | None = None,
    extrapolate: bool = False,
) -> PathProfile:
    """Compute loss and accuracy at points of a path, on several data sets, in eval mode.

    path:         see `WeightPath`.
    model:        of its architecture. Not changed: a copy is moved.
    datasets:     by name, batches ``(x, y)``: a list or a DataLoader, which is gone through once
                  per point.
    points:       how many, evenly spaced with both ends, or the values of t.
    bn_data:      batches to re-estimate BatchNorm's running statistics from at every point, the
                  ends included; needed if the model has any. "interpolated" takes those on the path
                  instead, which are of no network: interior points then look worse than they are.
    criterion:    (outputs, targets) -> the mean loss of a batch.
    forward:      (model, batch) -> outputs, for batches that are not ``(x, ...)``; the targets are
                  ``batch[1]``.
    extrapolate:  whether t may leave [0, 1].

    Returns a `PathProfile`. Raises ValueError for a data set without examples, missing bn_data, a
    model of another architecture or a bad t.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> start, end = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = start.weight.data.fill_(-1.0), end.weight.data.fill_(1.0)
    >>> path = htv.methods.LinearPath(start, end)
    >>> data = {"train": [(torch.ones(1, 1), torch.ones(1, 1))]}
    >>> criterion = torch.nn.functional.mse_loss
    >>> htv.methods.evaluate_along(path, start, data, points=3, criterion=criterion).losses
    {'train': tensor([4., 1., 0.], dtype=torch.float64)}
    """
    if not datasets:
        raise ValueError("datasets is empty: give at least one, such as {'test': loader}")
    for name, data in datasets.items():
        require_repeatable(f"datasets[{name!r}]", data)
    t = (
        path_grid(points)
        if isinstance(points, int)
        else torch.as_tensor(points, dtype=torch.float64)
    )
    if t.dim() != 1 or len(t) == 0:
        raise ValueError(
            f"points must be a number of points or values of t, got shape {tuple(t.shape)}"
        )
    path.coefficients(t, extrapolate)  # before any work
    probe = path.probe(model)
    probe.model.eval()
    statistics = _checked_statistics(probe.model, bn_data)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in datasets}
    for value in t.tolist():
        probe.move(value, extrapolate)
        if statistics is not None:
            reestimate_batchnorm(probe.model, statistics, forward=forward)
        for name, data in datasets.items():
            found[name].append(_evaluate(probe.model, name, data, criterion, forward))
    columns = {
        name: torch.tensor(rows, dtype=torch.float64).unbind(1) for name, rows in found.items()
    }
    return PathProfile(
        t, {name: c[0] for name, c in columns.items()}, {name: c[1] for name, c in columns.items()}
    )


def _checked_statistics(model: nn.Module, bn_data: Statistics) -> Iterable[Any] | None:
    """The batches to re-estimate statistics from; None if they are not to be."""
    if isinstance(bn_data, str):
        if bn_data != "interpolated":
            raise ValueError(f"bn_data must be batches, None or 'interpolated', got {bn_data!r}")
        return None
    found = batchnorms(model)
    if bn_data is None:
        if found:
            name, module = next(iter(found.items()))
            raise ValueError(
                f"{type(module).__name__} {name!r} has running statistics, which hold for no "
                "interior point of a path: pass bn_data=, training batches to re-estimate them "
                "from (or 'interpolated' to go without)"
            )
        return None
    require_repeatable("bn_data", bn_data)
    return bn_data if found else None


@torch.no_grad()
def _evaluate(
    model: nn.Module, name: str, data: Iterable[Any], criterion: Criterion, forward: Forward | None
) -> tuple[float, float]:
    """Mean loss and accuracy over a data set; one synchronisation."""
    loss: float | Tensor = 0.0
    right: float | Tensor = 0.0
    examples = classified = 0
    for batch in data:
        outputs = model(inputs_of(model, batch)) if forward is None else forward(model, batch)
        targets = batch[1].to(outputs.device)
        size = len(targets)
        if size == 0:
            continue
        loss = loss + criterion(outputs, targets).double() * size
        examples += size
        if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1:
            right = right + (outputs.argmax(1) == targets).sum()
            classified += targets.numel()
    if not examples:
        raise ValueError(f"datasets[{name!r}] gives no examples")
    return float(loss) / examples, float(right) / classified if classified else float("nan")


@dataclass(frozen=True)
class Invariance:
    """Hold the losses of two models under one intervention, and whether each is invariant to it.

    losses:     on the intervened data set, of the first and the second model.
    changes:    these minus the models' losses on the base data set.
    invariant:  whether |change| <= tolerance.

    >>> htv.methods.Invariance(losses=(0.5, 0.1), changes=(0.4, 0.0), invariant=(False, True))
    Invariance(losses=(0.5, 0.1), changes=(0.4, 0.0), invariant=(False, True))
    """

    losses: tuple[float, float]
    changes: tuple[float, float]
    invariant: tuple[bool, bool]


@dataclass(frozen=True, eq=False)
class MechanisticSimilarity:
    """Hold what `mechanistic_similarity` found of two models.

    tolerance:      in units of the loss.
    base:           the name of the data set without intervention.
    interventions:  by data set, an `Invariance`; all but the base.
    profiles:       by path, a `PathProfile`: the losses along it on every data set.

    >>> one = htv.methods.Invariance(losses=(0.5, 0.1), changes=(0.4, 0.0), invariant=(False, True))
    >>> found = htv.methods.MechanisticSimilarity(0.1, "D", {"flipped": one}, {})
    >>> found.similar, found.differing
    (False, ['flipped'])
    """

    tolerance: float
    base: str
    interventions: dict[str, Invariance]
    profiles: dict[str, PathProfile]

    @property
    def differing(self) -> list[str]:
        """The interventions that exactly one of the models is invariant to."""
        return [
            name for name, found in self.interventions.items() if len(set(found.invariant)) == 2
        ]

    @property
    def similar(self) -> bool:
        """Whether both are invariant to the same of these interventions."""
        return not self.differing

    @property
    def barriers(self) -> dict[str, dict[str, Barrier]]:
        """By path and data set."""
        return {name: profile.barriers for name, profile in self.profiles.items()}

    @property
    def connected(self) -> dict[str, bool]:
        """By path, whether no barrier is above the tolerance: on the base (mode connected) and
        under every intervention (mechanistically connected, with respect to these).
        """
        return {
            path: all(found.height <= self.tolerance for found in barriers.values())
            for path, barriers in self.barriers.items()
        }


def mechanistic_similarity(
    first: Weights,
    second: Weights,
    datasets: Mapping[str, Iterable[Any]],
    base: str,
    *,
    tolerance: float,
    paths: Mapping[str, WeightPath] | None = None,
    model: nn.Module | None = None,
    points: int = 11,
    bn_data: Statistics = None,
    criterion: Criterion = F.cross_entropy,
    forward: Forward | None = None,
) -> MechanisticSimilarity:
    """Tell whether two models are invariant to the same interventions, and what lies between them.

    A model is invariant to an intervention A on the process behind the data D where its loss on
    A(D), in the mean over what A may set, is its loss on D. Models are mechanistically similar
    where they share these interventions. Only the interventions given are looked at. That models
    without a linear path between them rely on different mechanisms, up to permutations of units,
    is a conjecture; no barrier here proves it.

    first:      a model or a state dict.
    second:     another of the same architecture.
    datasets:   by name, D and its counterfactuals, as for `evaluate_along`. A loader that draws the
                value of the intervention anew for every example is the mean over its values.
    base:       which of them is D.
    tolerance:  how large a difference of losses counts as none.
    paths:      by name, beside "linear", which is always looked at; from `first` to `second`.
    model:      of the architecture, needed if both are state dicts.
    points:     how many points of each path, ends included.
    bn_data:    as for `evaluate_along`.
    criterion:  likewise.
    forward:    likewise.

    Returns a `MechanisticSimilarity`. Raises ValueError for a base that is no data set, none beside
    it, or a path between other models, and as `evaluate_along` does.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> first, second = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    >>> _ = first.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    >>> _ = second.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
    >>> y = torch.ones(1, 1)
    >>> data = {"D": [(torch.tensor([[1.0, 1.0]]), y)], "no cue": [(torch.tensor([[1.0, 0.0]]), y)]}
    >>> found = htv.methods.mechanistic_similarity(first, second, data, base="D", tolerance=0.1,
    ...                                            criterion=torch.nn.functional.mse_loss)
    >>> found.differing, found.interventions["no cue"].changes
    (['no cue'], (0.0, 1.0))
    """
    if base not in datasets:
        raise ValueError(f"base={base!r} is not among the data sets {list(datasets)}")
    if len(datasets) < 2:
        raise ValueError("datasets holds no intervention beside the base")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    template = template_of({"first": first, "second": second}, model)
    every = {"linear": LinearPath(first, second, model=model), **(paths or {})}
    for name, path in every.items():
        _require_same_ends(name, path, every["linear"])
    profiles = {
        name: evaluate_along(
            path, template, datasets, points, bn_data=bn_data, criterion=criterion, forward=forward
        )
        for name, path in every.items()
    }  # fmt: skip
    ends = {
        name: (losses[0].item(), losses[-1].item())
        for name, losses in profiles["linear"].losses.items()
    }
    interventions = {}
    for name, losses in ends.items():
        if name != base:
            changes = losses[0] - ends[base][0], losses[1] - ends[base][1]
            invariant = abs(changes[0]) <= tolerance, abs(changes[1]) <= tolerance
            interventions[name] = Invariance(losses, changes, invariant)
    return MechanisticSimilarity(tolerance, base, interventions, profiles)


def _require_same_ends(name: str, path: WeightPath, linear: WeightPath) -> None:
    """By parameters: running statistics may have been estimated anew meanwhile."""
    for index, end, role in ((0, "start", "first"), (-1, "end", "second")):
        theirs, ours = path.control_state(index), linear.control_state(index)
        for key in linear.layout.parameters:
            if key not in theirs or not torch.equal(theirs[key].to(ours[key].device), ours[key]):
                raise ValueError(
                    f"paths[{name!r}] does not lead from first to second: its {end} has another "
                    f"{key!r} than {role}"
                )
