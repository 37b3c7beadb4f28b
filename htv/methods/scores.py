"""Which examples are learnt by heart: scores from many networks trained on subsets, and a proxy
from one network.

Feldman and Zhang 2020, "What neural networks memorize and why", arXiv 2008.03703.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.attach import attach, served_parameters
from htv.methods.coherence import per_example
from htv.methods.ensemble import Ensemble
from htv.ops.agreement import squared_norms
from htv.ops.factors import Factors
from htv.rules import Mean

__all__ = ["SubsetScores", "squared_gradient_norms", "train_on_subsets"]

Batch = TypeVar("Batch")


class SubsetScores:
    """Estimate memorisation and influence from networks each trained on a random subset.

    memorisation of i:    P[i correct | i in the subset] - P[i correct | i not in it]
    influence of i on t:  P[t correct | i in the subset] - P[t correct | i not in it], t a test
                          example

    Counts add up, so that more networks can be added at any time; memory is one (T, N) matrix of
    counts. `models` is how many networks have been added.

    examples:       N, at least 1.
    test_examples:  T.

    Raises ValueError for other numbers.

    Feldman and Zhang 2020, "What neural networks memorize and why", arXiv 2008.03703.

    >>> scores = htv.methods.SubsetScores(examples=2)
    >>> members = torch.tensor([[True, False], [False, True]])
    >>> correct = torch.tensor([[True, True], [False, True]])
    >>> scores.add(members, correct)
    >>> scores.memorisation()
    tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(self, examples: int, test_examples: int = 0):
        if examples < 1 or test_examples < 0:
            raise ValueError(
                f"examples must be at least 1, test_examples at least 0; got {examples}, "
                f"{test_examples}"
            )
        self.models = 0
        self._in, self._hits, self._hits_in = (
            torch.zeros(examples, dtype=torch.float64) for _ in range(3)
        )
        self._test_hits = torch.zeros(test_examples, dtype=torch.float64)
        self._test_hits_in = torch.zeros(
            test_examples, examples
        )  # float32 counts are exact up to 2^24

    def add(self, members: Tensor, correct: Tensor, test_correct: Tensor | None = None) -> None:
        """Count M more networks.

        members:       (M, N) bool, who was trained on.
        correct:       (M, N) bool, which training examples each classifies correctly.
        test_correct:  (M, T) bool, which test examples. Default: for T = 0.

        Raises ValueError for other shapes and dtypes.
        """
        examples, tests = len(self._in), len(self._test_hits)
        if test_correct is None:
            test_correct = members.new_zeros(len(members), 0)
        for name, value, width in (("members", members, examples), ("correct", correct, examples),
                                   ("test_correct", test_correct, tests)):  # fmt: skip
            if value.dtype != torch.bool or value.shape != (len(members), width):
                raise ValueError(
                    f"{name} must be boolean ({len(members)}, {width}), one row per network; got "
                    f"{tuple(value.shape)}, {value.dtype}"
                )
        members, correct, test_correct = members.cpu(), correct.cpu(), test_correct.cpu()
        self.models += len(members)
        self._in += members.sum(dim=0)
        self._hits += correct.sum(dim=0)
        self._hits_in += (members & correct).sum(dim=0)
        self._test_hits += test_correct.sum(dim=0)
        self._test_hits_in += test_correct.float().mT @ members.float()

    def memorisation(self) -> Tensor:
        """Return (N,) float64 in [-1, 1]; NaN for examples in all subsets, or in none."""
        return self._hits_in / self._in - (self._hits - self._hits_in) / (self.models - self._in)

    def influence(self) -> Tensor:
        """Return (T, N) float64 in [-1, 1]; NaN for examples in all subsets, or in none."""
        within = self._test_hits_in.double()
        return within / self._in - (self._test_hits[:, None] - within) / (self.models - self._in)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, copied."""
        return _copied(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts of another.

        state:  what its `state_dict` returned.

        Raises ValueError, before any change, for other numbers of examples.
        """
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.shape != state[name].shape:
                raise ValueError(
                    f"the state is of other sizes: {name[1:]} is {tuple(state[name].shape)} there"
                )
        vars(self).update(_copied(state))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


def train_on_subsets(
    scores: SubsetScores,
    factory: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    models: int,
    epochs: int,
    batch_size: int,
    share: float = 0.7,
    seed: int = 0,
    stacked: bool = True,
) -> None:
    """Train more networks, side by side, each on a subset of its own, and add them to the scores.

    Network number m of a seed is always the same but for rounding, however many are trained at a
    time: call it again to go on. Those with dropout are not: it draws from torch's own generator.

    scores:      a `SubsetScores`.
    factory:     () -> network that takes x, returns logits (B, K).
    train:       (x, targets), (N, ...) and (N,) int64, on the networks' device.
    test:        (x, targets), (T, ...) and (T,) int64, or None.
    optimizer:   parameters -> optimizer, of all networks.
    models:      how many to train. Choose it by memory, which their parameters, inputs and
                 activations take at once.
    epochs:      how many passes each makes over its subset.
    batch_size:  how many examples a step takes.
    share:       of the examples in each subset, drawn without replacement.
    seed:        of subsets, batches and initial weights.
    stacked:     one forward for all, by `torch.func.vmap`, as for `Twins`; on a CPU it pays for
                 many small networks, which spend their time between operations.

    Raises ValueError, before any training, for examples other than those that scores was made for.

    Feldman and Zhang 2020, "What neural networks memorize and why", arXiv 2008.03703.

    >>> scores = htv.methods.SubsetScores(examples=4)
    >>> train = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    >>> optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    >>> htv.methods.train_on_subsets(scores, lambda: torch.nn.Linear(3, 2), train, None, optimizer,
    ...                              models=3, epochs=1, batch_size=2)
    >>> scores.models
    3
    """
    _check_part("train", train, len(scores._in))
    _check_part("test", test, len(scores._test_hits))
    (x, targets), size = train, round(share * len(train[0]))
    if not 0 < size < len(x):
        raise ValueError(
            f"share must leave examples inside and outside of a subset; {share!r} of {len(x)} is "
            f"{size}"
        )
    if models < 1 or epochs < 1 or batch_size < 1:
        raise ValueError(
            f"models, epochs and batch_size must be at least 1, got {models}, {epochs}, "
            f"{batch_size}"
        )
    generators = [
        torch.Generator().manual_seed(seed * 1_000_003 + scores.models + m) for m in range(models)
    ]
    ids = torch.stack(
        [torch.randperm(len(x), generator=generator)[:size] for generator in generators]
    )
    nets = []
    for generator in generators:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            nets.append(factory())
    ensemble = Ensemble(nets, stacked)
    steps = optimizer(ensemble.parameters())
    for _ in range(epochs):
        order = torch.stack([torch.randperm(size, generator=generator) for generator in generators])
        for batch in ids.gather(1, order).to(x.device).split(batch_size, dim=1):
            logits = ensemble(x[batch], training=True, own=True)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets[batch].flatten(), reduction="sum"
            )
            steps.zero_grad()
            (losses / batch.shape[1]).backward()  # a network's mean reaches that network alone
            steps.step()
    members = torch.zeros(models, len(x), dtype=torch.bool).scatter_(1, ids, True)
    scores.add(
        members, _correct(ensemble, x, targets), None if test is None else _correct(ensemble, *test)
    )


def _check_part(name: str, part: tuple[Tensor, Tensor] | None, count: int) -> None:
    x, targets = ((), ()) if part is None else part
    if not len(x) == len(targets) == count:
        raise ValueError(
            f"{name} must hold the {count} examples that scores was made for, got {len(x)} inputs "
            f"and {len(targets)} targets"
        )


@torch.no_grad()
def _correct(ensemble: Ensemble, x: Tensor, targets: Tensor) -> Tensor:
    said = [ensemble(part, training=False).argmax(dim=2) for part in x.split(1024)]
    return torch.cat(said, dim=1) == targets


def squared_gradient_norms(
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Callable[[Batch], Tensor],
    exclude: tuple[str, ...] | list[str] | str = (),
) -> Tensor:
    """Compute the squared norm of every example's gradient, in the order of the batches.

    One forward and backward per batch. Norms come from the factors: ``|x|^2 |g|^2`` of a linear
    layer, by Gram matrices over the positions where it has several; no example's gradient is
    formed.

    model:    not attached, as for `measure_coherence`.
    batches:  anything to iterate over.
    losses:   called with each batch; runs the model and returns its losses, one per example, (N,).
    exclude:  parameters that do not count, as for `htv.attach`.

    Returns (N,) float64. Raises what `measure_coherence` does.

    Feldman and Zhang 2020, "What neural networks memorize and why", arXiv 2008.03703.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> losses = lambda x: model(x).squeeze(1)
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> htv.methods.squared_gradient_norms(model, [x], losses)
    tensor([ 1., 25.], dtype=torch.float64)
    """
    found: list[Tensor] = []
    with attach(model, Mean(), exclude=exclude) as handle:
        parameters = list(served_parameters(handle).values())
        if not parameters:
            raise ValueError("model has no parameter to measure: all are frozen or excluded")

        def see(name: str, parts: list[Factors]) -> None:
            norms = squared_norms(parts).cpu()
            if len(norms) != len(found[-1]):
                raise ValueError(
                    f"losses returned {len(found[-1])} losses, but parameter {name!r} saw "
                    f"{len(norms)} examples: it must return one loss per example of the batch"
                )
            found[-1] += norms

        with torch.enable_grad(), handle.examined(see):
            for batch in batches:
                each = per_example(losses(batch))
                found.append(torch.zeros(len(each), dtype=torch.float64))
                torch.autograd.grad(each.sum(), parameters, allow_unused=True)
    if not found:
        raise ValueError("batches is empty: there is no example to measure")
    return torch.cat(found)
