"""The usual way to a statistic of per-example gradients: form them all, (examples, parameters), then reduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from htv.rules import Rule


def materialised_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, rule: Rule
) -> None:
    """A training step by `vmap(grad)` and plain PyTorch; the same `.grad` as with htv attached, up to rounding."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (example[None],)), label[None]) / len(x)

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.grad = len(x) * reduce(per_example.pop(name), rule)
    optimizer.step()


def reduce(grads: Tensor, rule: Rule) -> Tensor:
    """The statistic of (E, *shape) over dim 0, as one would write it by hand."""
    examples, statistic = len(grads), rule.statistic(len(grads))
    count = statistic.count
    if statistic.name == "and_mask":
        return torch.where(grads.sign().sum(dim=0).abs() >= count, grads.mean(dim=0), 0)
    if statistic.name == "median_of_means":
        grads, examples = torch.stack([bucket.mean(dim=0) for bucket in grads.tensor_split(count)]), count
    ranked = grads.sort(dim=0).values
    if statistic.name == "trimmed_mean":
        return ranked[count : examples - count].mean(dim=0)
    if statistic.name == "winsorized_mean":
        return ranked.clamp_(ranked[count].clone(), ranked[examples - 1 - count].clone()).mean(dim=0)
    if statistic.name in ("median", "median_of_means"):
        return (ranked[(examples - 1) // 2] + ranked[examples // 2]) / 2
    raise ValueError(f"{rule} has no twin by hand here")
