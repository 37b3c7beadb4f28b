"""What invariant learning is compared with: penalties, weights and an adversary around the plain
mean of gradients.

They train without `htv.attach`: their losses already tell environments apart. `ids` (N,) int64
holds the environment of every example, 0 to E - 1, each present
(`htv.methods.require_environments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.methods.environments import require_environments

__all__ = [
    "DomainAdversary",
    "GroupDRO",
    "environment_means",
    "fishr_penalty",
    "iga_penalty",
    "irm_penalty",
    "l1_penalty",
    "l2_penalty",
    "reverse_gradient",
]


def environment_means(
    values: Tensor, ids: Tensor, num_environments: int, absent: str = "error"
) -> Tensor:
    """Compute the mean of each environment's examples, differentiable.

    values:            (N, *rest).
    ids:               (N,) integers in [0, E), the environment of every example.
    num_environments:  E.
    absent:            what becomes of environments without examples in the batch: "error", or
                       "zero", their mean.

    Returns (E, *rest). Raises ValueError for ids that do not fit.

    >>> htv.methods.environment_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    tensor([2., 5.])
    """
    require_environments(ids, num_environments, absent)
    if len(values) != len(ids):
        raise ValueError(f"values hold {len(values)} examples, ids {len(ids)}: they must pair up")
    members = F.one_hot(ids.long(), num_environments).to(values)
    shares = members / members.sum(dim=0).clamp(min=1)
    means: Tensor = torch.tensordot(shares, values, dims=([0], [0]))
    return means


def l1_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Sum the absolute values of parameters.

    parameters:  tensors, at least one; ValueError otherwise.

    Returns a scalar with a graph.

    >>> htv.methods.l1_penalty([torch.tensor([1.0, -2.0]), torch.tensor([3.0])])
    tensor(6.)
    """
    return torch.stack([p.abs().sum() for p in _given(parameters)]).sum()


def l2_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Sum the squares of parameters.

    parameters:  tensors, at least one; ValueError otherwise.

    Returns a scalar with a graph.

    >>> htv.methods.l2_penalty([torch.tensor([1.0, -2.0]), torch.tensor([3.0])])
    tensor(14.)
    """
    return torch.stack([p.square().sum() for p in _given(parameters)]).sum()


def irm_penalty(
    outputs: Tensor,
    targets: Tensor,
    ids: Tensor,
    num_environments: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    absent: str = "error",
) -> Tensor:
    """Average the squared slope of every environment's loss along the scale of the outputs: IRMv1.

    outputs:           (N, *), with a graph.
    targets:           (N, *).
    ids:               (N,) integers in [0, E), the environment of every example.
    num_environments:  E.
    loss:              (outputs, targets) -> (N,), one value per example: pass reduction="none".
    absent:            as for `environment_means`; environments that are absent count as having no
                       slope.

    Returns a scalar with a graph. Raises ValueError for ids and losses that do not fit.

    Arjovsky et al. 2019, "Invariant risk minimization", arXiv 1907.02893.

    >>> outputs = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> loss = lambda outputs, targets: (outputs - targets).square()
    >>> ids = torch.tensor([0, 1])
    >>> htv.methods.irm_penalty(outputs, torch.tensor([1.0, 0.0]), ids, 2, loss).item()
    2.0
    """
    require_environments(ids, num_environments, absent)
    scales = outputs.new_ones(num_environments, requires_grad=True)
    scaled = outputs * scales[ids.long()].reshape(-1, *(1,) * (outputs.dim() - 1))
    risks = environment_means(_each(loss(scaled, targets), ids), ids, num_environments, absent)
    (slopes,) = torch.autograd.grad(
        risks.sum(), scales, create_graph=True
    )  # a risk has one scale only
    return slopes.square().mean()


def iga_penalty(risks: Tensor | Sequence[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Compute the variance of the environments' gradients, summed over coordinates.

    This is inter-environmental gradient alignment. It costs E backwards that keep their graph: give
    a list of risks, each from a forward of its own, and together they take about one backward of
    all.

    risks:       (E,) the environments' losses, E >= 2, with a graph back to the parameters.
    parameters:  tensors, at least one.

    Returns a scalar with a graph. Raises ValueError for fewer environments and no parameters.

    Koyama and Yamaguchi 2020, "When is invariance useful in an out-of-distribution generalization
    problem?", arXiv 2008.01883.

    >>> weight = torch.tensor([1.0], requires_grad=True)
    >>> risks = [weight.square().sum(), 3 * weight.sum()]
    >>> htv.methods.iga_penalty(risks, [weight]).item()
    0.25
    """
    risks = list(risks)
    if len(risks) < 2:
        raise ValueError(
            f"risks must be of at least 2 environments for gradients to differ, got {len(risks)}"
        )
    parameters = [p for p in _given(parameters) if p.requires_grad]
    grads = [
        torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)
        for risk in risks
    ]
    stacks = [torch.stack(stack) for stack in zip(*grads, strict=True)]
    return torch.stack([(s - s.mean(dim=0)).square().mean(dim=0).sum() for s in stacks]).sum()


def fishr_penalty(
    features: Tensor, outputs: Tensor, losses: Tensor, ids: Tensor, num_environments: int
) -> Tensor:
    """Compare the variances of the head's per-example gradients between environments: Fishr.

    The gradients (N, O, F + 1), bias included, are not formed: the squares of rank-one matrices
    have rank one.

    features:          (N, F) that enter the linear head.
    outputs:           (N, O) of the head, with a graph.
    losses:            (N,) of the examples, each a function of its own row of outputs.
    ids:               (N,) integers in [0, E), the environment of every example.
    num_environments:  E.

    Returns a scalar with a graph, the squared distance of the environments' variances from their
    mean. Raises ValueError for ids and losses that do not fit.

    Rame et al. 2021, "Fishr", arXiv 2109.02934.

    >>> features, head = torch.tensor([[1.0], [2.0], [1.0], [1.0]]), torch.nn.Linear(1, 1)
    >>> outputs = head(features)
    >>> losses = outputs.squeeze(1)
    >>> htv.methods.fishr_penalty(features, outputs, losses, torch.tensor([0, 0, 1, 1]), 2).item()
    0.015625
    """
    (errors,) = torch.autograd.grad(_each(losses, ids).sum(), outputs, create_graph=True)
    inputs = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    found = []
    require_environments(ids, num_environments)
    for e in range(num_environments):
        error, x = errors[ids == e], inputs[ids == e]
        found.append(error.square().mT @ x.square() / len(x) - (error.mT @ x / len(x)).square())
    variances = torch.stack(found)
    return (variances - variances.mean(dim=0)).square().sum(dim=(1, 2)).mean()


class _Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return x itself, whose gradient comes back multiplied by ``-strength``.

    x:         any tensor.
    strength:  of the reversal.

    Ganin et al. 2016, "Domain-adversarial training of neural networks", arXiv 1505.07818.

    >>> x = torch.ones(1, requires_grad=True)
    >>> htv.methods.reverse_gradient(x, strength=2.0).sum().backward()
    >>> x.grad
    tensor([-2.])
    """
    result: Tensor = _Reversed.apply(x, strength)  # type: ignore[no-untyped-call]
    return result


class DomainAdversary(nn.Module):
    """Guess the environment from features that are trained to give nothing away: DANN.

    Its loss is added to the task's: ``loss + adversary(features, ids)``. The adversary descends it,
    the features climb.

    num_features:      F.
    num_environments:  E.
    hidden:            the width of its hidden layer.
    strength:          how strongly the features climb.

    Ganin et al. 2016, "Domain-adversarial training of neural networks", arXiv 1505.07818.

    >>> adversary = htv.methods.DomainAdversary(num_features=4, num_environments=2)
    >>> adversary(torch.zeros(3, 4), torch.tensor([0, 1, 1])).shape
    torch.Size([])
    """

    def __init__(
        self, num_features: int, num_environments: int, hidden: int = 64, strength: float = 1.0
    ):
        super().__init__()
        self.strength = strength
        self.guess = nn.Sequential(
            nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_environments)
        )

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the cross-entropy of the guesses, a scalar.

        features:  (N, F).
        ids:       (N,) int64 in [0, E), the environment of every example.
        """
        return F.cross_entropy(self.guess(reverse_gradient(features, self.strength)), ids)


class GroupDRO(nn.Module):
    """Weight environments by how hard they are: a weight grows as ``exp(step_size * risk)``.

    ``dro(risks)`` updates the weights, a buffer, and returns the weighted sum of risks. The weights
    stay in float32 at least, also in a module that is cast to half precision, where they would not
    move.

    num_environments:  E, at least 1.
    step_size:         > 0, how fast weights grow.

    Raises ValueError for anything else.

    Sagawa et al. 2019, "Distributionally robust neural networks", arXiv 1911.08731.

    >>> dro = htv.methods.GroupDRO(num_environments=2, step_size=1.0)
    >>> round(dro(torch.tensor([0.0, 1.0])).item(), 4)
    0.7311
    """

    weights: Tensor

    def __init__(self, num_environments: int, step_size: float = 0.01):
        super().__init__()
        if num_environments < 1:
            raise ValueError(f"num_environments must be at least 1, got {num_environments}")
        if not step_size > 0:
            raise ValueError(f"step_size must be above 0, got {step_size!r}")
        self.step_size = step_size
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer(
            "weights", torch.full((num_environments,), 1 / num_environments, dtype=wide)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupDRO:
        before = self.weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.weights.dtype).bits < 32:
            self.weights = before.to(self.weights.device)
        return self

    def forward(self, risks: Tensor) -> Tensor:
        """Update the weights; returns the weighted sum of risks, a scalar.

        risks:  (E,) the environments' losses; ValueError for another shape.
        """
        if risks.shape != self.weights.shape:
            raise ValueError(
                f"risks must be {tuple(self.weights.shape)}, one per environment, got "
                f"{tuple(risks.shape)}"
            )
        with torch.no_grad():
            wide = risks.to(torch.promote_types(risks.dtype, torch.float32))
            self.weights.copy_((self.weights.log() + self.step_size * wide).softmax(dim=0))
        return self.weights.to(risks.dtype, copy=True) @ risks


def _given(parameters: Iterable[Tensor]) -> list[Tensor]:
    parameters = list(parameters)
    if not parameters:
        raise ValueError(
            "parameters is empty: model.parameters() can be gone through once, call it anew every "
            "step"
        )
    return parameters


def _each(losses: Tensor, ids: Tensor) -> Tensor:
    if losses.shape != ids.shape:
        raise ValueError(
            f"the loss must be one value per example, {tuple(ids.shape)}, got "
            f"{tuple(losses.shape)}: use reduction='none' and mean over all other dims"
        )
    return losses
