"""Which examples are learnt by heart: scores from many networks trained on subsets, and a proxy from one network.

Feldman and Zhang 2020, "What neural networks memorize and why", arXiv 2008.03703.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

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
    """Memorisation and influence, estimated from networks that were each trained on a random subset.

    memorisation of i:       P[i correct | i in the subset] - P[i correct | i not in it]
    influence of i on t:     P[t correct | i in the subset] - P[t correct | i not in it], t a test example

    Counts add up, so that more networks can be added at any time; memory is one (T, N) matrix of counts.

    examples, test_examples:  N and T.
    models:                   how many networks have been added.
    """

    def __init__(self, examples: int, test_examples: int = 0):
        if examples < 1 or test_examples < 0:
            raise ValueError(f"examples must be at least 1, test_examples at least 0; got {examples}, {test_examples}")
        self.models = 0
        self._in, self._hits, self._hits_in = (torch.zeros(examples, dtype=torch.float64) for _ in range(3))
        self._test_hits = torch.zeros(test_examples, dtype=torch.float64)
        self._test_hits_in = torch.zeros(test_examples, examples)  # float32 counts are exact up to 2^24

    def add(self, members: Tensor, correct: Tensor, test_correct: Tensor | None = None) -> None:
        """members: (M, N) bool, who was trained on.   correct: (M, N) bool.   test_correct: (M, T) bool."""
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
        """(N,) float64 in [-1, 1]; NaN for examples that were in all subsets, or in none."""
        return self._hits_in / self._in - (self._hits - self._hits_in) / (self.models - self._in)

    def influence(self) -> Tensor:
        """(T, N) float64 in [-1, 1]; NaN for training examples that were in all subsets, or in none."""
        within = self._test_hits_in.double()
        return within / self._in - (self._test_hits[:, None] - within) / (self.models - self._in)

    def state_dict(self) -> dict:
        return _copied(vars(self))

    def load_state_dict(self, state: dict) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.shape != state[name].shape:
                raise ValueError(f"the state is of other sizes: {name[1:]} is {tuple(state[name].shape)} there")
        vars(self).update(_copied(state))


def _copied(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


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
    """Train `models` more networks, side by side, each on a subset of its own, and add them to the scores.

    factory:      () -> network that takes x, returns logits (B, K).
    train, test:  (x, targets), (N, ...) and (N,) int64, on the networks' device; test (T, ...) may be None.
    optimizer:    parameters -> optimizer, of all networks.
    share:        of the examples in each subset, drawn without replacement.
    stacked:      as for `Ensemble`; on a CPU it pays for many small networks, which spend their time between
                  operations.

    Network number m of a seed is always the same but for rounding, however many are trained at a time: call it again to
    go on. Those with dropout are not: it draws from torch's own generator. Choose `models` by memory, which their
    parameters, inputs and activations take at once.

    Raises ValueError, before any training, for examples other than those that scores was made for.
    """
    _check_part("train", train, len(scores._in))
    _check_part("test", test, len(scores._test_hits))
    (x, targets), size = train, round(share * len(train[0]))
    if not 0 < size < len(x):
        raise ValueError(f"share must leave examples inside and outside of a subset; {share!r} of {len(x)} is {size}")
    if models < 1 or epochs < 1 or batch_size < 1:
        raise ValueError(f"models, epochs and batch_size must be at least 1, got {models}, {epochs}, {batch_size}")
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + scores.models + m) for m in range(models)]
    ids = torch.stack([torch.randperm(len(x), generator=generator)[:size] for generator in generators])
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
            losses = F.cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), reduction="sum")
            steps.zero_grad()
            (losses / batch.shape[1]).backward()  # a network's mean reaches that network alone
            steps.step()
    members = torch.zeros(models, len(x), dtype=torch.bool).scatter_(1, ids, True)
    scores.add(members, _correct(ensemble, x, targets), None if test is None else _correct(ensemble, *test))


def _check_part(name: str, part: tuple[Tensor, Tensor] | None, count: int) -> None:
    x, targets = ((), ()) if part is None else part
    if not len(x) == len(targets) == count:
        raise ValueError(
            f"{name} must hold the {count} examples that scores was made for, got {len(x)} inputs and {len(targets)} "
            "targets"
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
    """(N,) float64, the squared norm of every example's gradient, in the order of the batches.

    One forward and backward per batch. Norms come from the factors: ``|x|^2 |g|^2`` of a linear layer, by Gram matrices
    over the positions where it has several; no example's gradient is formed.

    model, batches, losses, exclude: as for `htv.methods.measure_coherence`. Excluded parameters do not count.
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
                    f"losses returned {len(found[-1])} losses, but parameter {name!r} saw {len(norms)} examples: it "
                    "must return one loss per example of the batch"
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
