"""Held-out predictions: what networks say of examples they were not trained on.

Twins (cross-risk minimisation) train two networks, each on a random half, and let confident
mistakes of the other one overwrite labels, so that both come to rely on what most examples have in
common. `KFold` is the plain way. Pezeshki et al. 2023, "Discovering environments with XRM", arXiv
2309.16748; Bayat et al. 2024, "The pitfalls of memorization", arXiv 2412.07684.

    batches = Batches(dataset, epochs=20, batch_size=128)
    draws = []
    for seed in range(5):
        twins = Twins(factory, targets, lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        seed=seed) twins.fit(batches) draws.append(twins.draw(batches))
    held_out = best_draw(draws).held_out                # (N, K), for MemorizationAwareLoss
    groups = best_draw(draws).groups()                  # (N,), for GroupDRO and others
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htv.methods.batches import Batches, ExampleTable, last_of_each, require_ids
from htv.methods.ensemble import Ensemble

__all__ = ["Draw", "KFold", "Twins", "best_draw", "class_balanced_loss", "cross_mistakes"]

Factory = Callable[[], nn.Module]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def class_balanced_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum, over the classes present, the mean cross-entropy of their examples.

    logits:   (B, K), with a graph.
    targets:  (B,) int64 in [0, K).

    Returns a scalar.

    Pezeshki et al. 2023, "Discovering environments with XRM", arXiv 2309.16748.

    >>> htv.methods.class_balanced_loss(torch.zeros(3, 2), torch.tensor([0, 0, 1]))
    tensor(1.3863)
    """
    counts = torch.bincount(targets, minlength=logits.shape[1])
    return (F.cross_entropy(logits, targets, reduction="none") / counts[targets]).sum()


def cross_mistakes(wrong: Tensor, combine: str = "or") -> Tensor:
    """Infer one group bit of every example from the mistakes of two networks.

    wrong:    (N, 2) bool, whether each network errs.
    combine:  "or", "and" or "xor".

    Returns (N,) bool. Raises ValueError for anything else.

    Pezeshki et al. 2023, "Discovering environments with XRM", arXiv 2309.16748.

    >>> htv.methods.cross_mistakes(torch.tensor([[True, False], [False, False]]))
    tensor([ True, False])
    """
    if wrong.dim() != 2 or wrong.shape[1] != 2 or wrong.dtype != torch.bool:
        raise ValueError(f"wrong must be (N, 2) boolean, got {tuple(wrong.shape)}, {wrong.dtype}")
    ways = {"or": torch.logical_or, "and": torch.logical_and, "xor": torch.logical_xor}
    if combine not in ways:
        raise ValueError(f"combine must be 'or', 'and' or 'xor', got {combine!r}")
    return ways[combine](wrong[:, 0], wrong[:, 1])


@dataclass(frozen=True, eq=False)
class Draw:
    """Hold what finished `Twins` leave, by example id.

    targets:    (N,) int64, the labels as given.
    held_out:   (N, K), in eval mode, of the network that was not trained on the example.
    wrong:      (N, 2) bool, whether each network errs on the label as given, in eval mode.
    flip_rate:  the share of labels that had been overwritten at the end.

    Pezeshki et al. 2023, "Discovering environments with XRM", arXiv 2309.16748.

    >>> wrong = torch.tensor([[False, False], [True, True], [False, False]])
    >>> draw = htv.methods.Draw(torch.tensor([0, 0, 1]), torch.zeros(3, 2), wrong, flip_rate=0.3)
    >>> draw.groups(), draw.degenerate()
    (tensor([0, 1, 2]), [1])
    """

    targets: Tensor
    held_out: Tensor
    wrong: Tensor
    flip_rate: float

    def groups(self, combine: str = "or") -> Tensor:
        """Return (N,) int64: ``2 * target + mistake``, 2 K groups of which some may be empty.

        combine:  how the mistakes become one bit, as for `cross_mistakes`.
        """
        return 2 * self.targets + cross_mistakes(self.wrong, combine)

    def degenerate(self, combine: str = "or") -> list[int]:
        """Return the classes all of whose examples are in one group, which show no minority.
        combine:  how the mistakes become one bit, as for `cross_mistakes`.
        """
        sizes = torch.bincount(self.groups(combine), minlength=2 * self.held_out.shape[1]).reshape(
            -1, 2
        )
        return (sizes == 0).any(dim=1).nonzero().flatten().tolist()


def best_draw(draws: Iterable[Draw], combine: str = "or") -> Draw:
    """Choose the draw that overwrote most labels, of those whose classes all have both groups.

    draws:    what `Twins.draw` returned, for several seeds.
    combine:  how mistakes become one bit, as for `cross_mistakes`.

    Returns a `Draw`. Raises ValueError if every draw is degenerate, naming the classes.

    Pezeshki et al. 2023, "Discovering environments with XRM", arXiv 2309.16748.

    >>> wrong = torch.tensor([[False, False], [True, True], [False, False], [True, False]])
    >>> targets, held_out = torch.tensor([0, 0, 1, 1]), torch.zeros(4, 2)
    >>> draws = [htv.methods.Draw(targets, held_out, wrong, flip_rate) for flip_rate in (0.1, 0.3)]
    >>> htv.methods.best_draw(draws).flip_rate
    0.3
    """
    draws = list(draws)
    if not draws:
        raise ValueError("draws is empty: train at least one pair of twins")
    sound = [draw for draw in draws if not draw.degenerate(combine)]
    if not sound:
        found = "; ".join(
            f"draw {i}: classes {draw.degenerate(combine)}" for i, draw in enumerate(draws)
        )
        raise ValueError(
            f"every draw is degenerate: some class has one group only ({found}). Train longer or "
            "for a shorter time, with another learning rate, or take more draws"
        )
    return max(sound, key=lambda draw: draw.flip_rate)


class _HeldOut:
    """Networks that share their batches, each trained on some of the examples only; see `Twins` and
    `KFold`.

    held_out_by:  (N,) int64, which network is not trained on the example.
    steps:        how many have been made.
    """

    held_out_by: Tensor

    def __init__(
        self,
        count: int,
        factory: Factory,
        targets: Tensor,
        optimizer: MakeOptimizer,
        num_classes: int | None,
        schedule: MakeSchedule | None,
        seed: int,
        stacked: bool,
        device: str | torch.device,
    ):
        self.targets, self.num_classes = _checked_targets(targets, num_classes)
        self.device, self.steps = torch.device(device), 0
        self._generator = torch.Generator().manual_seed(seed)
        with self._own_randomness():
            nets = [factory().to(self.device) for _ in range(count)]
        self._nets = Ensemble(nets, stacked)
        self._optimizer = optimizer(self._nets.parameters())
        self._schedule = schedule(self._optimizer) if schedule else None

    @property
    def nets(self) -> list[nn.Module]:
        """The networks, as they are now; where stacked, copies."""
        return self._nets.each()

    @property
    def _examples(self) -> int:
        return len(self.targets)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Initial weights and dropout draw from this run's seed; torch's own generators stay as
        they are.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
            yield

    def step(self, x: Any, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """Train on one batch; returns the loss, detached.

        x:    what the networks take, on the device.
        ids:  (B,) integers, the examples' ids; they may be drawn in any way, with repetitions too.
        y:    (B,) the labels that came with x, if at hand; they must be those of the ids.

        Raises ValueError for ids and labels that do not fit, and for logits that are not (B, K).
        """
        ids = require_ids(ids, self._examples, _length(x))
        if len(ids) == 0:
            raise ValueError("ids is empty: there is nothing to train on, skip the batch")
        if y is not None and y.shape != ids.shape:
            raise ValueError(
                f"y must be {tuple(ids.shape)}, a label for each id, got {tuple(y.shape)}"
            )
        if y is not None and not torch.equal(y.cpu().long(), self.targets[ids]):
            wrong = int(ids[(y.cpu() != self.targets[ids]).nonzero()[0]])
            raise ValueError(
                f"the label of id {wrong} in the batch is not targets[{wrong}]: ids and labels "
                "disagree"
            )
        with self._own_randomness():
            loss = self._loss(x, ids)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if self._schedule:
            self._schedule.step()
        self.steps += 1
        return loss.detach()

    def fit(self, batches: Batches, max_steps: int | None = None) -> bool:
        """Train on from the current step; returns whether the batches are used up.

        batches:    of the whole data set.
        max_steps:  make at most so many more. Default: all.

        Raises ValueError for a data set of another size, and as `step` does.
        """
        if len(batches.dataset) != self._examples:
            raise ValueError(
                f"targets name {self._examples} examples, the data set holds {len(batches.dataset)}"
            )
        for done, (x, y, ids) in enumerate(batches.from_step(self.steps)):
            if done == max_steps:
                return False
            self.step(x, ids, y)
        return True

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return (M, B, K), the logits of every network in eval mode.

        x:  what the networks take, on the device.
        """
        return self._run(x, training=False)

    def held_out(self, x: Any, ids: Tensor) -> Tensor:
        """Return (B, K), in eval mode, the logits of networks that were not trained on the example.

        `held_out_by` tells which these are.

        x:    what the networks take, on the device.
        ids:  (B,) integers, the examples' ids.
        """
        return self._picked(self.predict(x), require_ids(ids, self._examples, _length(x)))

    def held_out_table(self, batches: Batches) -> Tensor:
        """Return (N, K), `held_out` of every example of the data set, by id, on the CPU.

        batches:  of the whole data set.

        Raises ValueError if some are not finite.
        """
        table = ExampleTable(self._examples)
        for x, _, ids in batches.in_order():
            table.write(ids, self.held_out(x, ids))
        return _finite(table.complete())

    def state_dict(self) -> dict[str, Any]:
        """Return everything: with a run made by the same arguments, `fit` goes on bit for bit."""
        return {
            "nets": self._nets.state(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "schedule": copy.deepcopy(self._schedule.state_dict()) if self._schedule else None,
            "stacked": self._nets.stacked,
            "generator": self._generator.get_state(),
            "steps": self.steps,
            "held_out_by": self.held_out_by.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run was, made by the same arguments.

        state:  what its `state_dict` returned.

        Raises ValueError, before any change, for the state of another kind of run.
        """
        if state.keys() != self.state_dict().keys() or len(state["nets"]) != len(self._nets):
            raise ValueError(
                f"the state is not of a {type(self).__name__} of {len(self._nets)} networks: it "
                f"has {len(state.get('nets', ()))} networks and holds {', '.join(sorted(state))}"
            )
        if state["stacked"] != self._nets.stacked:
            raise ValueError(
                f"the state is of stacked={state['stacked']}, this run of "
                f"stacked={self._nets.stacked}"
            )
        if len(state["held_out_by"]) != self._examples:
            raise ValueError(
                f"the state is of {len(state['held_out_by'])} examples, targets name "
                f"{self._examples}"
            )
        if (state["schedule"] is None) != (self._schedule is None):
            raise ValueError(
                "of the state and this run, one has a schedule of the learning rate, the other has "
                "none"
            )
        self._nets.load(state["nets"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self._schedule:
            self._schedule.load_state_dict(copy.deepcopy(state["schedule"]))
        self._generator.set_state(state["generator"])
        self.steps, self.held_out_by = state["steps"], state["held_out_by"].clone()

    def _picked(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits[
            self.held_out_by[ids].to(self.device), torch.arange(len(ids), device=self.device)
        ]

    def _run(self, x: Any, training: bool) -> Tensor:
        logits = self._nets(x, training)
        self._check_logits(logits, _length(x))
        return logits

    def _check_logits(self, logits: Tensor, rows: int) -> None:
        if logits.shape[-2:] != (rows, self.num_classes) or logits.dim() > 3:
            shape = tuple(logits.shape[1:] if logits.dim() > 2 else logits.shape)
            raise ValueError(
                f"the network returned {shape} for {rows} examples of {self.num_classes} classes: "
                f"logits must be ({rows}, {self.num_classes}); num_classes says how many"
            )

    def _loss(self, x: Any, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Twins(_HeldOut):
    """Train two networks, each on a random half, whose confident mistakes become labels.

    This is cross-risk minimisation. Every step both see the batch. Each is trained on the examples
    of its half, class by class balanced, towards labels that start as given; then the label of an
    example becomes what the network that does not hold it says, with probability
    ``(p - 1 / K) K / (K - 1)`` where p is its confidence. In the end examples of the majority have
    kept their labels, those of the minority have not. An example that is in a batch more than once
    is overwritten once.

    factory:      () -> network, called twice; takes x, returns logits (B, K).
    targets:      (N,) int64 in [0, K), the label of every example by id. Each class must be there.
    optimizer:    parameters -> optimizer, of both networks.
    num_classes:  K, by default as the targets have it.
    schedule:     optimizer -> schedule of its learning rate, by step; by default none.
    seed:         of halves, initial weights, dropout and overwriting. torch's own generators are
                  left alone.
    stacked:      one forward for both (`torch.func.vmap`): for networks without buffers and
                  dropout, and optimizers that treat each number by itself. Equal but for rounding.
                  On a CPU it pays for ten small networks and more (`KFold`), not for two.
    device:       where the networks are.

    Its attributes: `labels`, (N,) int64, as they are now; `held_out_by`, (N,) int64, which network
    is not trained on the example; `steps`, how many have been made.

    Raises ValueError for classes without examples, or what `stacked` cannot serve.

    Pezeshki et al. 2023, "Discovering environments with XRM", arXiv 2309.16748; Bayat et al. 2024,
    "The pitfalls of memorization", arXiv 2412.07684.

    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> data = torch.utils.data.TensorDataset(x, y)
    >>> batches = htv.methods.Batches(data, epochs=2, batch_size=10)
    >>> optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    >>> twins = htv.methods.Twins(lambda: torch.nn.Linear(3, 2), y, optimizer)
    >>> twins.fit(batches), twins.steps
    (True, 4)
    >>> twins.draw(batches).held_out.shape
    torch.Size([20, 2])
    """

    def __init__(
        self,
        factory: Factory,
        targets: Tensor,
        optimizer: MakeOptimizer,
        *,
        num_classes: int | None = None,
        schedule: MakeSchedule | None = None,
        seed: int = 0,
        stacked: bool = False,
        device: str | torch.device = "cpu",
    ):
        super().__init__(
            2, factory, targets, optimizer, num_classes, schedule, seed, stacked, device
        )
        self.held_out_by = torch.randint(0, 2, (self._examples,), generator=self._generator)
        self.labels = self.targets.clone()

    @property
    def flip_rate(self) -> float:
        """The share of labels that are overwritten now."""
        return (self.labels != self.targets).double().mean().item()

    def _loss(self, x: Any, ids: Tensor) -> Tensor:
        logits = self._run(x, training=True)
        by, rows = self.held_out_by[ids].to(self.device), torch.arange(len(ids), device=self.device)
        loss = class_balanced_loss(logits[1 - by, rows], self.labels[ids].to(self.device))
        self._overwrite(ids, logits[by, rows].detach())
        return loss

    def _overwrite(self, ids: Tensor, held_out: Tensor) -> None:
        last = last_of_each(ids)
        confidence, said = held_out.softmax(dim=1).max(dim=1)
        chance = 1 / self.num_classes
        flips = (confidence.cpu()[last] - chance) / (1 - chance)
        chosen = last[torch.rand(len(last), generator=self._generator) < flips]
        self.labels[ids[chosen]] = said.cpu()[chosen]

    def wrong(self, x: Any, targets: Tensor) -> Tensor:
        """Return (B, 2) bool, whether each network errs, in eval mode: for validation examples too.

        x:        what the networks take, on the device.
        targets:  (B,) int64, the classes of the examples.

        Raises ValueError for targets of another shape.
        """
        if targets.shape != (_length(x),):
            raise ValueError(
                f"targets must be ({_length(x)},), a class for each example, got "
                f"{tuple(targets.shape)}"
            )
        return _errs(self.predict(x), targets)

    def draw(self, batches: Batches) -> Draw:
        """Return the held-out logits and mistakes of every example, as a `Draw`.

        batches:  of the whole data set.

        Raises ValueError if some logits are not finite.
        """
        held_out, wrong = ExampleTable(self._examples), ExampleTable(self._examples)
        for x, _, ids in batches.in_order():
            logits = self.predict(x)
            held_out.write(ids, self._picked(logits, ids))
            wrong.write(ids, _errs(logits, self.targets[ids]))
        return Draw(self.targets, _finite(held_out.complete()), wrong.complete(), self.flip_rate)

    def state_dict(self) -> dict[str, Any]:
        """Return everything: with twins made by the same arguments, `fit` goes on bit for bit."""
        return {**super().state_dict(), "labels": self.labels.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where other twins were, made by the same arguments.

        state:  what their `state_dict` returned.

        Raises ValueError, before any change, for the state of another kind of run.
        """
        super().load_state_dict(state)
        self.labels = state["labels"].clone()


class KFold(_HeldOut):
    """Train several networks, each by cross-entropy on all examples but those of its fold.

    They are trained side by side, so that one pass over the data serves all; the folds are of equal
    size, give or take one example. A batch without an example for some network leaves it as it is;
    where stacked, its gradient is 0, and momentum and weight decay move it.

    factory:      () -> network, called for every fold; takes x, returns logits (B, K).
    targets:      (N,) int64 in [0, K), the label of every example by id. Each class must be there.
    optimizer:    parameters -> optimizer, of all networks.
    folds:        how many, from 2 to N.
    num_classes:  K, by default as the targets have it.
    schedule:     optimizer -> schedule of its learning rate, by step; by default none.
    seed:         of folds, initial weights and dropout.
    stacked:      one forward for all, as for `Twins`.
    device:       where the networks are.

    Its attributes: `held_out_by`, (N,) int64, the fold of every example; `steps`, how many have
    been made. Raises what `Twins` does.

    >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
    >>> data = torch.utils.data.TensorDataset(x, y)
    >>> batches = htv.methods.Batches(data, epochs=2, batch_size=10)
    >>> optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    >>> networks = htv.methods.KFold(lambda: torch.nn.Linear(3, 2), y, optimizer, folds=4)
    >>> networks.fit(batches), networks.held_out_table(batches).shape
    (True, torch.Size([20, 2]))
    """

    def __init__(
        self,
        factory: Factory,
        targets: Tensor,
        optimizer: MakeOptimizer,
        folds: int = 5,
        *,
        num_classes: int | None = None,
        schedule: MakeSchedule | None = None,
        seed: int = 0,
        stacked: bool = False,
        device: str | torch.device = "cpu",
    ):
        if not 2 <= folds <= len(targets):
            raise ValueError(
                f"folds must be from 2 to the number of examples, {len(targets)}; got {folds}"
            )
        super().__init__(
            folds, factory, targets, optimizer, num_classes, schedule, seed, stacked, device
        )
        self.held_out_by = torch.randperm(self._examples, generator=self._generator) % folds

    def _loss(self, x: Any, ids: Tensor) -> Tensor:
        targets, by = self.targets[ids].to(self.device), self.held_out_by[ids].to(self.device)
        if self._nets.stacked:
            logits = self._run(x, training=True)
            losses = torch.stack(
                [F.cross_entropy(rows, targets, reduction="none") for rows in logits]
            )
            holds = by != torch.arange(len(logits), device=self.device)[:, None]  # (folds, B)
            return ((losses * holds).sum(dim=1) / holds.sum(dim=1).clamp(min=1)).sum()
        parts = []
        for fold, net in enumerate(self._nets.nets):
            rows = (by != fold).nonzero().flatten()
            if len(rows):  # its own examples do not even enter the statistics of a normalisation
                logits = net.train()(pytree.tree_map_only(Tensor, lambda tensor: tensor[rows], x))
                self._check_logits(logits, len(rows))
                parts.append(F.cross_entropy(logits, targets[rows]))
        return reduce(operator.add, parts)


def _errs(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(dim=2).cpu() != targets.cpu()).T


def _checked_targets(targets: Tensor, num_classes: int | None) -> tuple[Tensor, int]:
    if (
        not isinstance(targets, Tensor)
        or targets.dim() != 1
        or targets.dtype != torch.int64
        or len(targets) == 0
    ):
        got = (
            f"{tuple(targets.shape)}, {targets.dtype}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise ValueError(f"targets must be (N,) int64, the label of every example by id; got {got}")
    targets = targets.detach().cpu()
    num_classes = int(targets.max()) + 1 if num_classes is None else num_classes
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes or num_classes < 2:
        raise ValueError(
            "targets must lie in [0, num_classes), with at least 2 classes; got values from "
            f"{int(targets.min())} to {int(targets.max())}, num_classes {num_classes}"
        )
    absent = (torch.bincount(targets, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(
            f"classes {absent} have no example to train on: number the classes that are there from "
            "0"
        )
    return targets, num_classes


def _finite(held_out: Tensor) -> Tensor:
    bad = (~held_out.isfinite().all(dim=1)).sum()
    if bad:
        raise ValueError(
            f"the held-out logits of {int(bad)} examples are not finite: training diverged, or x "
            "is not finite. Lower the learning rate"
        )
    return held_out


def _length(x: Any) -> int:
    return len(pytree.tree_leaves(x)[0])
