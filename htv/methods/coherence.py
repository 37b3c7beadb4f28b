"""Coherent gradients: how far the examples of a data set agree, and the rules that suppress what
few of them ask for.

Chatterjee 2020, "Coherent gradients", arXiv 2002.10657; Zielinski, Krishnan, Chatterjee 2020, "Weak
and strong gradient directions", arXiv 2003.07422; Chatterjee & Zielinski 2020, on m-coherence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from htv.attach import attach, served_parameters
from htv.ops.agreement import squared_norms
from htv.ops.factors import Factors
from htv.rules import Mean, Median, MedianOfMeans, Rule, WinsorizedMean

__all__ = [
    "M3",
    "Coherence",
    "ModelCoherence",
    "generalisation_bound",
    "measure_coherence",
    "winsorized",
]

Batch = TypeVar("Batch")

M3 = MedianOfMeans(3)  # of a shuffled minibatch: its thirds vote, coordinate by coordinate


def winsorized(percentile: float) -> Rule:
    """Make the rule of winsorized gradient descent: clip coordinates to their c-th percentiles.

    percentile:  c in [0, 50], for the c-th and the (100 - c)-th. 0 is `Mean()`, 50 is `Median()`;
                 in between, percentiles are values of the batch (nearest rank, no interpolation):
                 ``round(c / 100 * (E - 1))`` values per side, resolved when E is known. For 100
                 examples c clips to the (c + 1)-th smallest and largest; for 32, c = 1 changes
                 nothing.

    Ranks exactly between two values go to the even one on both sides, so that the rule stays odd.
    (NumPy's percentiles would, for an even number of examples, take one value more on one side.)

    Returns an `htv.Rule`. Raises TypeError or ValueError for anything else than a number in
    [0, 50].

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> htv.methods.winsorized(0), htv.methods.winsorized(10), htv.methods.winsorized(50)
    (Mean(), WinsorizedMean(winsorize=0.1), Median(interpolation='midpoint'))
    """
    if isinstance(percentile, bool) or not isinstance(percentile, Real):
        raise TypeError(f"percentile must be a number in [0, 50], got {percentile!r}")
    if not 0 <= percentile <= 50:  # also catches NaN
        raise ValueError(
            f"percentile must lie in [0, 50], got {percentile!r}: 0 is the mean, 50 the median"
        )
    if percentile == 0:
        return Mean()
    return Median() if percentile == 50 else WinsorizedMean(percentile / 100)


@dataclass(frozen=True)
class Coherence:
    """Tell how far m gradients g_1, ..., g_m agree, by two sums over examples and coordinates.

    count:         m.
    total_energy:  ||sum_i g_i||^2.
    energy:        sum_i ||g_i||^2.

    Chatterjee and Zielinski 2020, "Making coherence out of nothing at all", arXiv 2008.01217.

    >>> grads = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> orthogonal = htv.methods.Coherence.of(grads)
    >>> orthogonal.m_coherence, orthogonal.alpha
    (1.0, 0.5)
    """

    count: int
    total_energy: float
    energy: float

    @staticmethod
    def of(grads: Tensor) -> Coherence:
        """Compute the coherence of stacked gradients.

        grads:  (m, *shape), m >= 1; ValueError otherwise.
        """
        if grads.dim() < 1 or len(grads) == 0:
            raise ValueError(
                f"grads must have shape (m, *shape) with m >= 1, got {tuple(grads.shape)}"
            )
        wide = grads.reshape(len(grads), -1).double()
        return Coherence(
            len(wide), wide.sum(dim=0).square().sum().item(), wide.square().sum().item()
        )

    @property
    def m_coherence(self) -> float:
        """``m * alpha``: 1 for orthogonal gradients of equal norm, m for identical ones, NaN if all
        are zero.
        """
        return self.total_energy / self.energy if self.energy else math.nan

    @property
    def alpha(self) -> float:
        """``||E g||^2 / E ||g||^2`` in [0, 1], as two examples drawn with replacement agree."""
        return self.m_coherence / self.count

    def of_minibatches(self, size: int) -> float:
        """Return the alpha that means of several, independently drawn gradients have.
        It is higher, and says more about `size` than about the data: coherence is of examples.

        size:  how many gradients a mean is of; ValueError below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        return size * self.alpha / (1 + (size - 1) * self.alpha)

    def __add__(self, other: Coherence) -> Coherence:
        """Of the same examples over the coordinates of both: alphas averaged by energy."""
        if not isinstance(other, Coherence):
            return NotImplemented
        if self.count != other.count:
            raise ValueError(
                f"both must be of the same examples, got {self.count} and {other.count}"
            )
        return Coherence(
            self.count, self.total_energy + other.total_energy, self.energy + other.energy
        )


@dataclass(frozen=True)
class ModelCoherence:
    """Hold the `Coherence` of a model's per-example gradients over a data set.

    parameters:  by parameter name; tied ones under their first.

    >>> one = htv.methods.Coherence(count=2, total_energy=2.0, energy=2.0)
    >>> found = htv.methods.ModelCoherence({"0.weight": one, "0.bias": one})
    >>> found.layers, found.total.energy
    ({'0': Coherence(count=2, total_energy=4.0, energy=4.0)}, 4.0)
    """

    parameters: dict[str, Coherence]

    @property
    def layers(self) -> dict[str, Coherence]:
        """By the module that owns the parameters: weight and bias together."""
        found: dict[str, Coherence] = {}
        for name, coherence in self.parameters.items():
            owner = name.rpartition(".")[0]
            found[owner] = found[owner] + coherence if owner in found else coherence
        return found

    @property
    def total(self) -> Coherence:
        """Over all coordinates of the model."""
        first, *others = self.parameters.values()
        return sum(others, first)


class _Sums:
    """What one pass over a data set adds up: per parameter one vector and one number."""

    def __init__(self, named: dict[str, nn.Parameter]):
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in named.items()}
        self.vectors = {
            name: torch.zeros_like(p, dtype=wide[name], requires_grad=False)
            for name, p in named.items()
        }
        self.energies = dict.fromkeys(named, 0.0)
        self.examples = 0
        self.seen: set[str] = set()

    def see(self, name: str, parts: list[Factors]) -> None:
        norms = squared_norms(parts)
        if len(norms) != self.voters:
            raise ValueError(
                f"losses returned {self.voters} losses, but parameter {name!r} saw {len(norms)} "
                "examples: it must return one loss per example of the batch"
            )
        self.energies[name] += norms.sum().item()
        self.seen.add(name)

    def add(self, losses: Tensor, named: dict[str, nn.Parameter]) -> None:
        self.voters = len(losses)
        grads = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
        for vector, grad in zip(self.vectors.values(), grads, strict=True):
            if grad is not None:
                vector += grad
        self.examples += len(losses)
        if not self.seen:
            raise ValueError(
                "losses did not run `model`: none of its parameters took part in what it "
                "returned. Where model is a copy, losses must run the copy"
            )


def measure_coherence(
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Callable[[Batch], Tensor],
    exclude: tuple[str, ...] | list[str] | str = (),
) -> ModelCoherence:
    """Measure the m-coherence of the per-example gradients of a whole data set, in one pass.

    Takes one forward and backward per batch, norms from the factors, and one vector of the model's
    size; no example's gradient is formed. `.grad` stays as it is. How the data set is cut into
    batches does not matter.

    model:    not attached; for one that is, pass ``copy.deepcopy(model)``. Put it into the mode to
              measure in: BatchNorm in train mode is refused, for it couples the examples.
    batches:  anything to iterate over, for example a DataLoader.
    losses:   called with each batch; runs the model and returns its losses, one per example, (N,):
              not their mean. For cross-entropy, pass reduction="none".
    exclude:  parameters to leave out, as for `htv.attach`.

    Returns a `ModelCoherence`: per parameter, per layer and over all. Raises ValueError if there is
    no batch, if what `losses` returns is not one loss per example, or if it did not run this model;
    what `htv.attach` refuses is refused.

    Chatterjee and Zielinski 2020, "Making coherence out of nothing at all", arXiv 2008.01217.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> losses = lambda x: model(x).squeeze(1)
    >>> htv.methods.measure_coherence(model, [torch.eye(2)], losses).total
    Coherence(count=2, total_energy=2.0, energy=2.0)
    """
    with attach(model, Mean(), exclude=exclude) as handle:
        named = served_parameters(handle)
        if not named:
            raise ValueError("model has no parameter to measure: all are frozen or excluded")
        sums = _Sums(named)
        with torch.enable_grad(), handle.examined(sums.see):
            for batch in batches:
                sums.add(per_example(losses(batch)), named)
    if not sums.examples:
        raise ValueError("batches is empty: there is no example to measure")
    return ModelCoherence(
        {
            name: Coherence(
                sums.examples, vector.double().square().sum().item(), sums.energies[name]
            )
            for name, vector in sums.vectors.items()
        }
    )


def per_example(losses: Tensor) -> Tensor:
    """The losses; ValueError unless they are (N,)."""
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        got = (
            f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        )
        raise ValueError(
            f"losses must return one loss per example, shape (N,), got {got}: pass "
            'reduction="none" to the criterion'
        )
    return losses


def generalisation_bound(
    alphas: Sequence[float],
    learning_rates: Sequence[float],
    lipschitz: float,
    smoothness: float,
    examples: int,
) -> float:
    """Bound the expected gap between test and training loss after T steps of gradient descent.

    ``L^2 / m * sum_t [prod_{k > t} (1 + eta_k beta)] eta_t sqrt(2 (1 - alpha(w_{t-1})))``

    alphas:          (T,) alpha in [0, 1] of the weights before each step (not m-coherence:
                     `Coherence.alpha`).
    learning_rates:  (T,) eta_t.
    lipschitz:       L, of the loss in the weights.
    smoothness:      beta, the Lipschitz constant of its gradient.
    examples:        m.

    Returns a float, infinite where the product overflows. Raises ValueError for anything out of
    range.

    Chatterjee and Zielinski 2022, "On the generalization mystery in deep learning",
    arXiv 2203.10036.

    >>> bound = htv.methods.generalisation_bound([0.5], [0.1], 1.0, 1.0, examples=10)
    >>> round(bound, 4)
    0.01
    """
    alpha, eta = (
        torch.as_tensor(values, dtype=torch.float64) for values in (alphas, learning_rates)
    )
    if alpha.dim() != 1 or alpha.shape != eta.shape:
        raise ValueError(
            "alphas and learning_rates must be two sequences of one length, got "
            f"{tuple(alpha.shape)} and {tuple(eta.shape)}"
        )
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError(
            "alphas must lie in [0, 1]: alpha is m-coherence divided by the number of examples"
        )
    for name, value in {"lipschitz": lipschitz, "smoothness": smoothness}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if not bool(((eta >= 0) & (eta < math.inf)).all()):
        raise ValueError("learning_rates must be finite and not negative")
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples!r}")
    growth = torch.log1p(eta * smoothness)
    later = growth.sum() - growth.cumsum(0)
    steps = (
        later + (eta * (2 * (1 - alpha)).sqrt()).log()
    ).exp()  # a step of 0 is 0, however large what follows
    return (lipschitz**2 / examples * steps.sum()).item()
