"""Which examples a training step serves: shares of the gradient by tag, and when each example was
learnt.

Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from htv.attach import Handle
from htv.errors import described
from htv.methods.batches import require_ids
from htv.ops.agreement import projections
from htv.ops.factors import Factors

__all__ = [
    "Attribution",
    "Influence",
    "LearntTracker",
    "StepShares",
    "adjusted_overfit",
    "proper_accuracy",
]


@dataclass(frozen=True)
class StepShares:
    """Hold how one minibatch gradient g divides into the parts of pristine and corrupt examples.

    g_p and g_c are the sums of the gradients of the batch's pristine and corrupt examples.

    pristine:  f_p = <g, g_p> / <g, g>; NaN where g is zero.
    corrupt:   f_c, likewise; f_p + f_c = 1.
    null:      (low, high), the central 95% of f_p where tags are permuted over the data set.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> htv.methods.StepShares(pristine=0.9, corrupt=0.1, null=(0.4, 0.6)).pristine
    0.9
    """

    pristine: float
    corrupt: float
    null: tuple[float, float]


@dataclass(frozen=True)
class Influence:
    """Hold whose loss a training run lowered: sums over its steps, per example.

    A step of learning rate eta lowers the loss by about eta <g_t, g_t>; i_p and i_c tell for whom.

    pristine:  i_p = sum_t <g_t, g_t^p> / number of pristine examples.
    corrupt:   i_c, likewise.
    null:      (low, high), the central 95% of i_p where tags are permuted.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> htv.methods.Influence(pristine=2.0, corrupt=0.5, null=(0.8, 1.2)).corrupt
    0.5
    """

    pristine: float
    corrupt: float
    null: tuple[float, float]


class Attribution:
    """Measure the shares of pristine and corrupt examples in every gradient of a training run.

    g_t is the plain gradient of the batch whatever the rule, and its inner products with each
    example's part come from what backward records anyway (about one more forward): memory is one
    number per example of the data set and a null tag per permutation. Use `htv.Mean()` for plain
    training.

    handle:        of an attached model, whose examples vote one by one.
    corrupt:       (N,) bool, by example of the data set.
    permutations:  how many null worlds; each is one permutation of the tags for the whole run.
    seed:          of the permutations.

    Its attributes: `steps`, the `StepShares` of every step; `scores`, (N,) float64,
    sum_t <g_t, g_t^e> of each example e, in units of the loss as it was backpropagated.

    Raises ValueError for tags of another shape or dtype, and for permutations below 1.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x, y = torch.ones(3, 1), torch.tensor([[1.0], [1.0], [-1.0]])
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> with htv.attach(model, htv.Mean()) as handle:
    ...     corrupt = torch.tensor([False, False, True])
    ...     attribution = htv.methods.Attribution(handle, corrupt)
    ...     with attribution.step(ids=torch.arange(3)):
    ...         (model(x) - y).square().sum().backward()
    >>> attribution.steps[0].pristine, attribution.steps[0].corrupt
    (2.0, -1.0)
    """

    def __init__(self, handle: Handle, corrupt: Tensor, permutations: int = 100, seed: int = 0):
        tags = isinstance(corrupt, Tensor) and corrupt.dim() == 1 and corrupt.dtype == torch.bool
        if not tags or len(corrupt) == 0:
            raise ValueError(
                "corrupt must be a boolean tensor of shape (N,), one tag per example of the data "
                f"set; got {described(corrupt)}"
            )
        if permutations < 1:
            raise ValueError(f"permutations must be at least 1, got {permutations}")
        self.handle, self.corrupt = handle, corrupt.cpu()
        generator = torch.Generator().manual_seed(seed)
        worlds = [
            self.corrupt[torch.randperm(len(corrupt), generator=generator)]
            for _ in range(permutations)
        ]
        self._null = torch.stack(worlds)  # (permutations, N)
        self.scores = torch.zeros(len(corrupt), dtype=torch.float64)
        self.steps: list[StepShares] = []

    @contextmanager
    def step(self, ids: Tensor) -> Iterator[None]:
        """Observe the one backward that runs inside the block.

        Forward and backward of one batch go inside, where each example votes for itself:
        `handle.groups` is refused.

        ids:  (B,) integers in [0, N), the batch's examples in order.

        Raises ValueError for other ids, and RuntimeError for no backward or a second one.
        """
        ids = require_ids(ids, len(self.corrupt))
        products = torch.zeros(len(ids), dtype=torch.float64)
        seen: set[str] = set()

        def see(name: str, parts: list[Factors]) -> None:
            if name in seen:
                raise RuntimeError(
                    f"step() takes one backward, but parameter {name!r} had two: one block per "
                    "backward"
                )
            seen.add(name)
            total = reduce(operator.add, (part.total().to(part.dtype) for part in parts))
            products.add_(projections(parts, total).cpu())

        every = torch.arange(
            len(ids)
        )  # groups given inside are refused: ids name examples in their order
        with self.handle.groups(every), self.handle.examined(see):
            yield
        if not seen:
            raise RuntimeError(
                "step() saw no gradient: run the model's forward and backward inside the block"
            )
        self._note(ids, products)

    def _note(self, ids: Tensor, products: Tensor) -> None:
        """products: (B,), <g, g_e>."""
        whole, corrupt = products.sum(), self.corrupt[ids]
        shares = products[~corrupt].sum() / whole, products[corrupt].sum() / whole
        f_p, f_c = (share.item() if whole else math.nan for share in shares)
        worlds = (~self._null[:, ids]).double() @ products
        self.steps.append(StepShares(f_p, f_c, _central(worlds / whole)))
        self.scores.index_add_(0, ids, products)

    def influence(self) -> Influence:
        """Return the `Influence` of the steps so far; NaN for a tag no example has."""
        pristine = ~self.corrupt
        i_p, i_c = (self.scores[tag].mean().item() for tag in (pristine, self.corrupt))
        return Influence(i_p, i_c, _central((~self._null).double() @ self.scores / pristine.sum()))


def _central(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


class LearntTracker:
    """Record when each example of a data set was learnt, from repeated looks at who is correct.

    examples:  N, how many there are; ValueError below 1.

    Its attributes: `first`, (N,) int64, the step of the first look at which the example was
    correct, -1 if none was; `last`, (N,) int64, the step of the look since which it has been
    correct at every one, -1 if it is not correct now.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> tracker, everyone = htv.methods.LearntTracker(3), torch.arange(3)
    >>> tracker.update(10, everyone, torch.tensor([True, True, False]))
    >>> tracker.update(20, everyone, torch.tensor([True, False, False]))
    >>> tracker.first, tracker.last
    (tensor([10, 10, -1]), tensor([10, -1, -1]))
    """

    def __init__(self, examples: int):
        if examples < 1:
            raise ValueError(f"examples must be at least 1, got {examples}")
        self.first, self.last = (torch.full((examples,), -1, dtype=torch.int64) for _ in range(2))
        self._step = -1

    def update(self, step: int, ids: Tensor, correct: Tensor) -> None:
        """Note a look at some examples; those not looked at stay as they are.

        step:     how many steps were made, never fewer than before.
        ids:      (B,) integers in [0, N).
        correct:  (B,) bool, in their order.

        Raises ValueError for anything else.
        """
        if step < max(self._step, 0):
            raise ValueError(
                f"step must not be negative nor go back, got {step} after {self._step}"
            )
        if not isinstance(correct, Tensor) or correct.dim() != 1 or correct.dtype != torch.bool:
            raise ValueError(f"correct must be a boolean tensor, (B,); got {described(correct)}")
        ids, correct = require_ids(ids, len(self.first), len(correct)), correct.cpu()
        self._step = step
        now, wrong = ids[correct], ids[~correct]
        self.first[now] = torch.where(self.first[now] < 0, step, self.first[now])
        self.last[now] = torch.where(self.last[now] < 0, step, self.last[now])
        self.last[wrong] = -1


def proper_accuracy(
    accuracy: float, rate: float, num_classes: int = 10, kind: str = "uniform"
) -> float:
    """Compute the training accuracy, under label noise, of a classifier that memorises none of it.

    That is one that predicts the true label as often as on clean data.

    accuracy:     on clean (validation) data, in [0, 1].
    rate:         of label noise, in [0, 1].
    num_classes:  at least 2.
    kind:         as for `htv.data.label_noise`: "uniform" labels are right by chance in one of
                  num_classes cases; "other" ones only where the classifier errs. "permuted" ones
                  are like uniform ones where classes are balanced.

    Returns a share in [0, 1]. Raises ValueError for anything out of range.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> htv.methods.proper_accuracy(accuracy=0.9, rate=0.5)
    0.5
    """
    for name, value in {"accuracy": accuracy, "rate": rate}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if kind not in ("uniform", "permuted", "other"):
        raise ValueError(f"kind must be 'uniform', 'permuted' or 'other', got {kind!r}")
    by_chance = (1 - accuracy) / (num_classes - 1) if kind == "other" else 1 / num_classes
    return rate * by_chance + (1 - rate) * accuracy


def adjusted_overfit(
    train_accuracy: float,
    accuracy: float,
    rate: float,
    num_classes: int = 10,
    kind: str = "uniform",
) -> float:
    """Compute how far training accuracy exceeds `proper_accuracy`: what was memorised of the noise.

    train_accuracy:  on the noisy training labels, in [0, 1].
    accuracy:        on clean data, in [0, 1].
    rate:            of label noise, in [0, 1].
    num_classes:     at least 2.
    kind:            of noise, as for `proper_accuracy`.

    Returns the difference. Raises ValueError for anything out of range.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> round(htv.methods.adjusted_overfit(train_accuracy=0.8, accuracy=0.9, rate=0.5), 4)
    0.3
    """
    if not 0 <= train_accuracy <= 1:
        raise ValueError(f"train_accuracy must lie in [0, 1], got {train_accuracy!r}")
    return train_accuracy - proper_accuracy(accuracy, rate, num_classes, kind)
