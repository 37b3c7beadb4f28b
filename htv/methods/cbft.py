"""Connectivity-based fine-tuning: out of a mechanism, not only out of a minimum.

A model that relies on a cue is fine-tuned on a few clean examples and many with the cue. What is
connected with the old model by a straight path of low loss shares its mechanism, so a barrier is
put on the path; and features are to be the same with and without the cue.

Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.methods.connectivity import sample_clipped_normal

__all__ = ["CBFT", "barrier_loss", "head_of", "head_inputs", "invariance_loss"]

Batch = tuple[Tensor, Tensor]
TERMS = ("barrier", "cross_entropy", "invariance")


def barrier_loss(logits: Tensor, targets: Tensor, barrier: float = 1.0) -> Tensor:
    """Compute ``|barrier - cross-entropy|``: how far the batch's mean loss is from a wanted one.
    Its gradient is that of the cross-entropy, downwards where the loss is above the barrier and
    upwards below it.

    logits:   (N, K), as for `torch.nn.functional.cross_entropy`.
    targets:  (N,) int64.
    barrier:  the loss to be reached.

    Returns a scalar. Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> htv.methods.barrier_loss(torch.zeros(1, 2), torch.tensor([0]), barrier=1.0)
    tensor(0.3069)
    """
    return (barrier - F.cross_entropy(logits, targets)).abs()


def invariance_loss(
    features: Tensor, labels: Tensor, other_features: Tensor, other_labels: Tensor, num_classes: int
) -> Tensor:
    """Compare the directions of two batches' class means: squared distances, summed, divided by K.

    features:        (N, D), without the cue.
    labels:          (N,) int64 in [0, K).
    other_features:  (M, D), with the cue.
    other_labels:    (M,) int64 in [0, K).
    num_classes:     K.

    A class that is missing from either batch, or whose features are all zero in one, has no
    direction there and is skipped: it adds 0, with no gradient. No value is read from a GPU. Half
    precision is accumulated in float32, under autocast too.

    Returns a scalar. Raises ValueError for features of different sizes, and on the CPU for labels
    that are outside.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> labels = torch.tensor([0, 1])
    >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> htv.methods.invariance_loss(a, labels, b, labels, num_classes=2)
    tensor(1.)
    """
    if (
        features.dim() != 2
        or other_features.dim() != 2
        or features.shape[1] != other_features.shape[1]
    ):
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(features.shape)} and "
            f"{tuple(other_features.shape)}"
        )
    sums = (
        _class_sums(features, labels, num_classes),
        _class_sums(other_features, other_labels, num_classes),
    )
    norms = [torch.linalg.vector_norm(total, dim=1, keepdim=True) for total in sums]
    there = (norms[0] != 0) & (norms[1] != 0)  # NaN is there, and shows
    first, second = (
        total / torch.where(there, norm, 1) for total, norm in zip(sums, norms, strict=True)
    )
    return torch.where(there, first - second, 0).square().sum() / num_classes


def _class_sums(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(N, D) -> (K, D), whose directions are those of the means. As a product, it is repeatable on
    GPUs.
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be ({len(features)},), one per row of features, got {tuple(labels.shape)}"
        )
    if labels.device.type == "cpu" and not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(
            f"labels must lie in [0, num_classes) = [0, {num_classes}), got some from "
            f"{labels.min()} to {labels.max()}"
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    members = features.new_zeros(len(labels), num_classes).scatter_(1, labels[:, None], 1)
    with torch.autocast(features.device.type, enabled=False):
        return members.mT @ features


def head_of(model: nn.Module, head: str | None = None) -> nn.Module:
    """Return the module that classifies.

    model:  to look in.
    head:   its name. Default: the last Linear among the model's modules, which is what classifies
            in most.

    Raises ValueError if there is none.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> htv.methods.head_of(model)
    Linear(in_features=8, out_features=3, bias=True)
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if head is None:
        linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                "model has no Linear to take for its head: name the module that classifies with "
                "head="
            )
        return linear[-1]
    if head not in modules:
        raise ValueError(
            f"head={head!r} is no module of the model, which has {', '.join(filter(None, modules))}"
        )
    return modules[head]


@contextmanager
def head_inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters a head inside the block: the penultimate features, with their graph.

    head:  the module that classifies, such as `head_of` returns.

    Yields a list that grows by (N, D) with every call of the head.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> with htv.methods.head_inputs(model[1]) as features:
    ...     logits = model(torch.zeros(5, 2, 2))
    >>> [tuple(part.shape) for part in features]
    [(5, 4)]
    """
    seen: list[Tensor] = []
    entering = lambda module, args, kwargs: seen.append([*args, *kwargs.values()][0].flatten(1))
    hook = head.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _require_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    mine = {id(p) for p in model.parameters() if p.requires_grad}
    if not mine:
        raise ValueError("every parameter of model is frozen: there is nothing to train")
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer has no parameter of the model that is trained: make it over "
            "model.parameters()"
        )


class CBFT:
    """Fine-tune a model out of a mechanism it relies on: connectivity-based fine-tuning.

    A step descends three losses. theta_C are the weights the model has when this is made; theta
    those it has now.

    barrier        ``|barrier - CE|`` on the batch with the cue, at
                   theta_t = t theta_C + (1 - t) theta for one t per step: a barrier on the straight
                   path to the old mechanism. The chain rule's factor (1 - t) is in.
    cross_entropy  on the clean batch, at theta.
    invariance     `invariance_loss` between the penultimate features of both batches, at theta,
                   after the warm-up.

    The first is one optimizer step and the other two the next, as the authors do it;
    ``alternate=False`` makes one step of their sum. Everything goes through `model`, its `.grad`
    and the optimizer, so it composes with `htv.attach`: under a rule each of the two gradients is
    aggregated by itself, and after the warm-up the examples of both batches vote in the second.

    theta_t is written into the model for its forward and backward, and theta restored bit for bit.
    Buffers are too: BatchNorm in train mode normalises theta_t by its own batch, and theta's
    running statistics are of theta alone (of the clean batch, and after the warm-up of both
    batches, which pass the model together). In eval mode theta_t uses theta's running statistics.

    model:        gives logits (N, K). Its mode, train or eval, is left as it is.
    optimizer:    over the model's parameters; one whose step needs no closure.
    num_classes:  K, as many as logits.
    barrier:      the loss to be reached between the two.
    warm_up:      steps before the invariance loss sets in; the authors take an epoch.
    sampler:      (count, generator=...) -> (count,) values of t, such as `sample_clipped_normal`.
    head:         name of the module whose input the penultimate features are. Default: the last
                  Linear.
    terms:        which of the losses are descended, for ablations.
    alternate:    two steps, or one of the sum.
    seed:         of t.

    Raises ValueError for any of these out of place, and an optimizer that has no parameter of the
    model to train.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> cbft = htv.methods.CBFT(model, optimizer, num_classes=2, warm_up=1)
    >>> x, y = torch.ones(2, 4), torch.tensor([0, 1])
    >>> [sorted(cbft.step(clean=(x, y), with_cue=(x, y))) for _ in range(2)]
    [['barrier', 'cross_entropy'], ['barrier', 'cross_entropy', 'invariance']]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_classes: int,
        *,
        barrier: float = 1.0,
        warm_up: int = 0,
        sampler: Callable[..., Tensor] = sample_clipped_normal,
        head: str | None = None,
        terms: Iterable[str] = TERMS,
        alternate: bool = True,
        seed: int = 0,
    ):
        self.terms = tuple(terms)
        unknown = [term for term in self.terms if term not in TERMS]
        if unknown or not self.terms:
            raise ValueError(f"terms must be some of {', '.join(TERMS)}; got {terms!r}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a number of classes >= 1, got {num_classes!r}")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise ValueError(f"warm_up must be a number of steps >= 0, got {warm_up!r}")
        if not 0 < barrier < math.inf:
            raise ValueError(f"barrier must be a loss above 0, got {barrier!r}")
        _require_trained(model, optimizer)
        self.model, self.optimizer, self.num_classes = model, optimizer, num_classes
        self.barrier, self.warm_up, self.sampler, self.alternate = (
            barrier,
            warm_up,
            sampler,
            alternate,
        )
        self._head = head_of(model, head)
        self._anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self, clean: Batch, with_cue: Batch) -> dict[str, Tensor]:
        """Make one step on a batch without and one with the cue.

        clean:     (x, y), a batch without the cue.
        with_cue:  (x, y), one with it; it may differ in size.

        Returns the losses by name, detached scalars. At the first step after the warm-up
        "invariance" joins them. Raises ValueError, before the weights change, for logits that are
        not (N, K).
        """
        losses = {}
        self.optimizer.zero_grad()
        if "barrier" in self.terms:
            losses["barrier"] = self._descend_barrier(*with_cue)
            if self.alternate:
                self.optimizer.step()
                self.optimizer.zero_grad()
        here = self._descend_here(clean, with_cue)
        if here or not self.alternate:
            self.optimizer.step()
        self.steps += 1
        return losses | here

    def _descend_barrier(self, x: Tensor, y: Tensor) -> Tensor:
        t = float(self.sampler(1, generator=self._generator))
        with self._at(t):
            loss = barrier_loss(self._logits(x), y, self.barrier)
            (loss * (1 - t)).backward()  # theta_t moves by (1 - t) where theta moves by 1
        return loss.detach()

    def _descend_here(self, clean: Batch, with_cue: Batch) -> dict[str, Tensor]:
        (x, y), (cue_x, cue_y) = clean, with_cue
        losses: dict[str, Tensor] = {}
        invariant = "invariance" in self.terms and self.steps >= self.warm_up
        if not invariant and "cross_entropy" not in self.terms:
            return losses
        with head_inputs(self._head) as seen:
            logits = self._logits(torch.cat([x, cue_x]) if invariant else x)
        if "cross_entropy" in self.terms:
            losses["cross_entropy"] = F.cross_entropy(logits[: len(x)], y)
        if invariant:
            if len(seen) != 1 or len(seen[0]) != len(logits):
                raise RuntimeError(
                    "the head must see every example once in a forward: it was called "
                    f"{len(seen)} times, with {[len(part) for part in seen]} rows for "
                    f"{len(logits)} examples. Name another one with head="
                )
            features = seen[0]
            losses["invariance"] = invariance_loss(
                features[: len(x)], y, features[len(x) :], cue_y, self.num_classes
            )
        reduce(operator.add, losses.values()).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        if logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"model must give logits of shape {(len(x), self.num_classes)}, for "
                f"num_classes={self.num_classes}; got {tuple(logits.shape)}"
            )
        return logits

    @contextmanager
    def _at(self, t: float) -> Iterator[None]:
        """Inside, the model's weights are ``t theta_C + (1 - t) theta``."""
        named = list(self.model.named_parameters())
        parameters, anchors = [p for _, p in named], [self._anchor[name] for name, _ in named]
        buffers = list(self.model.buffers())
        with torch.no_grad():
            kept, kept_buffers = [p.clone() for p in parameters], [b.clone() for b in buffers]
            for p, anchor in zip(parameters, anchors, strict=True):
                p.lerp_(anchor, t)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(
                    [*parameters, *buffers], [*kept, *kept_buffers], strict=True
                ):
                    tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return theta_C, the number of steps and the state of t's generator.

        The model and the optimizer have their own.
        """
        anchor = {name: value.clone() for name, value in self._anchor.items()}
        return {"anchor": anchor, "steps": self.steps, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        state:  what its `state_dict` returned.

        Raises ValueError, before any change, for the state of another model.
        """
        if set(state) != {"anchor", "steps", "generator"}:
            raise ValueError(f"state_dict has {sorted(state)}: it is not one of CBFT's")
        shapes = [
            {name: tuple(value.shape) for name, value in of.items()}
            for of in (state["anchor"], self._anchor)
        ]
        for name in {**shapes[0], **shapes[1]}:
            theirs, mine = (found.get(name, "none") for found in shapes)
            if theirs != mine:
                raise ValueError(
                    f"state_dict is of another model: {name!r} has shape {theirs} there, {mine} "
                    "here"
                )
        self._generator.set_state(state["generator"].cpu())
        self._anchor = {
            name: state["anchor"][name].to(value, copy=True) for name, value in self._anchor.items()
        }
        self.steps = state["steps"]
