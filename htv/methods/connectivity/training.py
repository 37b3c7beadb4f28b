"""Training the control points of a curve, so that the loss is low along all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from htv.methods.connectivity.along import Criterion, Forward
from htv.methods.connectivity.paths import WeightPath
from htv.methods.connectivity.samplers import sample_uniform
from htv.methods.connectivity.statistics import inputs_of, require_repeatable

__all__ = ["train_curve"]

Sampler = Callable[..., Tensor]


def train_curve(
    path: WeightPath,
    model: nn.Module,
    data: Iterable[Any],
    optimizer: Optimizer,
    *,
    epochs: int = 1,
    sampler: Sampler = sample_uniform,
    generator: Generator | None = None,
    criterion: Criterion = F.cross_entropy,
    forward: Forward | None = None,
    scheduler: Any = None,
    attach: Callable[[nn.Module], Any] | None = None,
) -> Tensor:
    """Minimise the mean loss over t of gamma(t), by one t per batch and the chain rule.

    The gradient at gamma(t) goes to the trained control points. To resume, load the state dicts of
    path, optimizer and generator, and call it again.

    path:       changed in place; its ends stay.
    model:      of its architecture; a copy is trained in train mode and thrown away, so its
                BatchNorms normalise by the batch. What they collect is lost: re-estimate when
                evaluating.
    data:       batches ``(x, y)``.
    optimizer:  over ``path.parameters()``. Points of frozen parameters have no gradients and are
                left alone.
    epochs:     how many, at least 1.
    sampler:    (count, generator=) -> t, (count,).
    generator:  of random numbers, for the sampler. Default: torch's own.
    criterion:  (outputs, targets) -> loss.
    forward:    (model, batch) -> outputs, for batches that are not ``(x, ...)``; the targets are
                ``batch[1]``.
    scheduler:  its `step()` is called after each epoch.
    attach:     what to attach to the copy, such as ``lambda model: htv.attach(model,
                htv.AndMask(0.4))``: the rule is applied at gamma(t), and its result scaled by the
                coefficients.

    Returns the losses, (steps,) float64. Raises ValueError if no control point is trained, or the
    optimizer has none of them, or there is no batch or epoch.

    Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    arXiv 1802.10026.

    >>> first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> path = htv.methods.QuadraticBezier(first, second)
    >>> data = [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> optimizer = torch.optim.SGD(path.parameters(), lr=0.1)
    >>> htv.methods.train_curve(path, first, data, optimizer, epochs=5).shape
    torch.Size([5])
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not path.trained:
        raise ValueError(
            f"no control point of {type(path).__name__} is trained: pass trained=, or give it a "
            "middle"
        )
    mine = {id(p) for p in path.parameters() if p.requires_grad}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer has no control point of the path: make it over path.parameters()"
        )
    if epochs > 1:
        require_repeatable("data", data)
    probe = path.probe(model)
    probe.model.train()
    if attach is not None:
        attach(probe.model)
    losses = []
    for _ in range(epochs):
        for batch in data:
            probe.move(sampler(1, generator=generator).item())
            outputs = (
                probe.model(inputs_of(probe.model, batch))
                if forward is None
                else forward(probe.model, batch)
            )
            loss = criterion(outputs, batch[1].to(outputs.device))
            loss.backward()
            optimizer.zero_grad(set_to_none=True)
            probe.pull_back()
            optimizer.step()
            losses.append(loss.detach())
        if scheduler is not None:
            scheduler.step()
    if not losses:
        raise ValueError("data gives no batch")
    return torch.stack(losses).double().cpu()
