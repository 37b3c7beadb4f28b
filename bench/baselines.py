"""The statistics as others compute them: form the gradients of all examples, then reduce them over
dim 0.

A method is a function (model, criterion, x, targets) -> (() -> iterator of (parameter, its (E,
*shape) contributions)), where the contributions of a parameter sum to its plain gradient. Each lets
go of what it has handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.func import vmap as torch_vmap

from htv.rules import Rule
from htv.tools.timing import Step

Contributions = Callable[[], Iterator[tuple[nn.Parameter, Tensor]]]


def loss(
    model: Callable[[Tensor], Tensor], criterion: nn.Module, x: Tensor, targets: Tensor
) -> Tensor:
    """The mean over examples, and over tokens where each has several."""
    return criterion(model(x).flatten(0, -2), targets.flatten())


def loop(model: nn.Module, criterion: nn.Module, x: Tensor, targets: Tensor) -> Contributions:
    """One backward per example."""
    parameters = list(model.parameters())

    def contributions():
        examples = [
            torch.autograd.grad(
                loss(model, criterion, x[e : e + 1], targets[e : e + 1]) / len(x), parameters
            )
            for e in range(len(x))
        ]
        by_parameter = [list(grads) for grads in zip(*examples, strict=True)]
        del examples
        for parameter in parameters:
            yield parameter, torch.stack(by_parameter.pop(0))

    return contributions


def vmap(model: nn.Module, criterion: nn.Module, x: Tensor, targets: Tensor) -> Contributions:
    """torch.func: vmap(grad)."""

    def example_loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (x[None],))
        return criterion(output.flatten(0, -2), target[None].flatten()) / len(targets)

    def contributions():
        detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
        grads = torch_vmap(grad(example_loss), in_dims=(None, 0, 0))(detached, x, targets)
        for name, parameter in model.named_parameters():
            yield parameter, grads.pop(name)

    return contributions


def opacus(model: nn.Module, criterion: nn.Module, x: Tensor, targets: Tensor) -> Contributions:
    """Opacus' hooks."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")  # of a mean: leave its scale alone

    def contributions():
        wrapped.zero_grad(set_to_none=True)
        loss(wrapped, criterion, x, targets).backward()
        for parameter in model.parameters():
            grads, parameter.grad_sample = parameter.grad_sample, None
            yield parameter, grads

    return contributions


def backpack(model: nn.Module, criterion: nn.Module, x: Tensor, targets: Tensor) -> Contributions:
    """BackPACK's BatchGrad."""
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import BatchGrad

    model, criterion = extend(model), extend(criterion)

    def contributions():
        model.zero_grad(set_to_none=True)
        with recording(BatchGrad()):
            loss(model, criterion, x, targets).backward()
        for parameter in model.parameters():
            grads = parameter.grad_batch
            del parameter.grad_batch
            yield parameter, grads

    return contributions


METHODS = {"loop": loop, "vmap": vmap, "opacus": opacus, "backpack": backpack}
DISTRIBUTIONS = {"opacus": "opacus", "backpack": "backpack-for-pytorch"}  # of the extra `peers`


def step(
    method: str,
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    rule: Rule,
    criterion: nn.Module | None = None,
) -> Step:
    """Forward, backward and aggregation by `method`: the same `.grad` as with `rule` attached, up
    to rounding.

    x: (E, ...); targets: (E,) or (E, T). RuntimeError where the method's library is not installed.
    """
    try:
        contributions = METHODS[method](model, criterion or nn.CrossEntropyLoss(), x, targets)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"not installed (pip install {DISTRIBUTIONS.get(method)}): {error}"
        ) from error

    def run() -> None:
        for parameter, grads in contributions():
            with torch.no_grad():
                parameter.grad = len(grads) * reduce(grads, rule)

    return run


def reduce(grads: Tensor, rule: Rule) -> Tensor:
    """The statistic of (E, *shape) over dim 0, as one would write it by hand."""
    groups, statistic = len(grads), rule.statistic(len(grads))
    count = statistic.count
    if statistic.name == "and_mask":
        return torch.where(grads.sign().sum(dim=0).abs() >= count, grads.mean(dim=0), 0)
    if statistic.name == "median" and count == -1:  # the lower of two
        return grads.median(dim=0).values
    if statistic.name == "median_of_means":
        grads, groups = (
            torch.stack([bucket.mean(dim=0) for bucket in grads.tensor_split(count)]),
            count,
        )
    ranked = grads.sort(dim=0).values
    if statistic.name == "trimmed_mean":
        return ranked[count : groups - count].mean(dim=0)
    if statistic.name == "winsorized_mean":
        return ranked.clamp_(ranked[count].clone(), ranked[groups - 1 - count].clone()).mean(dim=0)
    if (statistic.name, count) == ("median", 0) or statistic.name == "median_of_means":
        return (ranked[(groups - 1) // 2] + ranked[groups // 2]) / 2
    raise ValueError(f"{rule} has no twin by hand here")
