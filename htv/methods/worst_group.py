"""How well the worst-off group is served, and ways to serve groups that a plain mean forgets.

Groups are true ones or inferred (`Draw.groups`): (N,) int64 ids from 0 to G - 1. A method is a way
to draw batches, a loss, or both:

| method | batches drawn by | loss |
|---|---|---|
| ERM | shuffling | the mean |
| RWG | `weighted_sampler(group_weights(groups))` | the mean |
| SUBG | shuffling `balanced_subset(groups)` | the mean |
| JTT | `weighted_sampler(upweighted(wrong, factor))`, wrong after a short training | the mean |
| GroupDRO | any, better RWG's | `GroupDRO(G)` of `environment_means(..., absent="zero")` |
| IRM | any, better RWG's | the mean + `irm_penalty` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GroupAccuracy",
    "balanced_subset",
    "group_accuracy",
    "group_weights",
    "select_model",
    "upweighted",
    "weighted_sampler",
]


@dataclass(frozen=True)
class GroupAccuracy:
    """Hold accuracies by group.

    accuracies:  one number per group, in [0, 1]; NaN for a group without examples.
    sizes:       how many examples each has.

    >>> look = htv.methods.GroupAccuracy(accuracies=(0.9, 0.5), sizes=(3, 1))
    >>> look.worst, round(look.average, 4)
    (0.5, 0.8)
    """

    accuracies: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def worst(self) -> float:
        """The lowest accuracy of a group that has examples."""
        return min(
            accuracy for accuracy, size in zip(self.accuracies, self.sizes, strict=True) if size
        )

    @property
    def average(self) -> float:
        """Over the examples as they are."""
        return self.weighted(self.sizes)

    def weighted(self, sizes: Sequence[int]) -> float:
        """Return the mean over groups weighted by sizes, such as those of the training part.

        sizes:  one number per group.

        Raises ValueError where a group that counts has no examples here.
        """
        if len(sizes) != len(self.sizes):
            raise ValueError(f"sizes must name {len(self.sizes)} groups, got {len(sizes)}")
        empty = [
            g
            for g, (size, own) in enumerate(zip(sizes, self.sizes, strict=True))
            if size and not own
        ]
        if empty:
            raise ValueError(
                f"groups {empty} have training examples, but none here: their accuracy is not known"
            )
        pairs = [(a, size) for a, size in zip(self.accuracies, sizes, strict=True) if size]
        if not pairs:
            raise ValueError("sizes are all 0: there is no group to average over")
        return sum(accuracy * size for accuracy, size in pairs) / sum(size for _, size in pairs)


def group_accuracy(correct: Tensor, groups: Tensor, num_groups: int) -> GroupAccuracy:
    """Compute accuracies by group.

    correct:     (N,) bool, at least one example.
    groups:      (N,) int64 in [0, num_groups).
    num_groups:  G.

    Returns a `GroupAccuracy`. Raises ValueError for anything else.

    >>> correct, groups = torch.tensor([True, True, False]), torch.tensor([0, 0, 1])
    >>> htv.methods.group_accuracy(correct, groups, num_groups=2)
    GroupAccuracy(accuracies=(1.0, 0.0), sizes=(2, 1))
    """
    _check_groups(groups, num_groups)
    if correct.shape != groups.shape or correct.dtype != torch.bool or len(correct) == 0:
        raise ValueError(
            f"correct must be boolean, one for each of {len(groups)} groups, and at least one; got "
            f"{tuple(correct.shape)}, {correct.dtype}"
        )
    sizes = torch.bincount(groups, minlength=num_groups).tolist()
    hits = torch.bincount(groups[correct], minlength=num_groups).tolist()
    accuracies = (hit / size if size else math.nan for hit, size in zip(hits, sizes, strict=True))
    return GroupAccuracy(tuple(accuracies), tuple(sizes))


def select_model(
    history: Sequence[GroupAccuracy], by: str = "worst", sizes: Sequence[int] | None = None
) -> int:
    """Choose the best look of a training run.

    history:  a `GroupAccuracy` of validation examples for each look, by true or inferred groups.
    by:       "worst", or "average", which is weighted by `sizes` where given.
    sizes:    one number per group, such as those of the training part.

    Returns its index; of equal ones the first. Raises ValueError for no looks and another `by`.

    >>> looks = [htv.methods.GroupAccuracy((1.0, a), sizes=(2, 2)) for a in (0.5, 1.0, 0.0)]
    >>> htv.methods.select_model(looks)
    1
    """
    if not history:
        raise ValueError("history is empty: there is no model to select")
    if by not in ("worst", "average"):
        raise ValueError(f"by must be 'worst' or 'average', got {by!r}")
    if by == "worst":
        scores = [look.worst for look in history]
    else:
        scores = [look.average if sizes is None else look.weighted(sizes) for look in history]
    return scores.index(max(scores))


def group_weights(groups: Tensor) -> Tensor:
    """Weight examples so that groups are drawn equally often: RWG.

    groups:  (N,) int64, none negative; ValueError otherwise.

    Returns (N,) float64, one over the size of the example's group.

    Idrissi et al. 2021, "Simple data balancing achieves competitive worst-group-accuracy",
    arXiv 2110.14503.

    >>> htv.methods.group_weights(torch.tensor([0, 0, 1]))
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    _check_groups(groups)
    return 1 / torch.bincount(groups).double()[groups]


def balanced_subset(groups: Tensor, seed: int = 0) -> Tensor:
    """Draw as many examples of every group as the smallest has, without replacement: SUBG.

    Groups that no example is in do not count.

    groups:  (N,) int64, none negative; ValueError otherwise.
    seed:    decides which.

    Returns ids, ascending, int64.

    Idrissi et al. 2021, "Simple data balancing achieves competitive worst-group-accuracy",
    arXiv 2110.14503.

    >>> groups = torch.tensor([0, 0, 0, 1, 1])
    >>> groups[htv.methods.balanced_subset(groups)]
    tensor([0, 0, 1, 1])
    """
    _check_groups(groups)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    rank = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[rank < sizes[sizes > 0].min()].sort().values


def upweighted(wrong: Tensor, factor: float) -> Tensor:
    """Weight examples by whether a first, short training erred on them: JTT.

    wrong:   (N,) bool.
    factor:  > 0, the weight where it erred; elsewhere it is 1.

    Returns (N,) float64. Raises ValueError for anything else.

    Liu et al. 2021, "Just train twice", arXiv 2107.09044.

    >>> htv.methods.upweighted(torch.tensor([False, True]), factor=20)
    tensor([ 1., 20.], dtype=torch.float64)
    """
    if wrong.dim() != 1 or wrong.dtype != torch.bool:
        raise ValueError(f"wrong must be (N,) boolean, got {tuple(wrong.shape)}, {wrong.dtype}")
    if not factor > 0:
        raise ValueError(f"factor must be above 0, got {factor!r}")
    return torch.where(wrong, float(factor), 1.0).double()


def weighted_sampler(
    weights: Tensor, count: int | None = None
) -> Callable[[torch.Generator], Tensor]:
    """Make a sampler for `Batches` that draws ids with replacement, in proportion to weights.

    weights:  (N,), none negative, not all 0; ValueError otherwise.
    count:    how many an epoch draws. Default: N.

    Returns a function of a generator.

    >>> sampler = htv.methods.weighted_sampler(torch.tensor([0.0, 1.0]))
    >>> sampler(torch.Generator().manual_seed(0))
    tensor([1, 1])
    """
    if weights.dim() != 1 or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise ValueError("weights must be (N,), none negative, and not all 0")
    weights, count = weights.detach().cpu().double(), len(weights) if count is None else count
    return lambda generator: torch.multinomial(
        weights, count, replacement=True, generator=generator
    )


def _check_groups(groups: Tensor, num_groups: int | None = None) -> None:
    if groups.dim() != 1 or groups.dtype != torch.int64 or len(groups) == 0:
        raise ValueError(
            f"groups must be (N,) int64 with at least one example, got {tuple(groups.shape)}, "
            f"{groups.dtype}"
        )
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or (num_groups is not None and high >= num_groups):
        within = "" if num_groups is None else f" and be below num_groups={num_groups}"
        raise ValueError(f"groups must not be negative{within}, got values from {low} to {high}")
