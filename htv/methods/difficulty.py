"""Easy and hard examples: what a network learns in its first two epochs, and the rest."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.errors import described

__all__ = ["disjoint_subsets", "easy_examples"]


def easy_examples(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    epochs: int = 2,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    seed: int = 0,
) -> Tensor:
    """Find which examples a copy of a model classifies correctly after a short training.

    Trained by SGD with momentum .9, without weight decay or augmentation; the rest of the examples
    are the hard ones.

    model:          not trained itself; pass one with fresh weights.
    x:              (N, ...) inputs, on the model's device.
    labels:         (N,) int64.
    epochs:         how many.
    learning_rate:  of SGD.
    batch_size:     how many examples a step takes.
    seed:           of the batches.

    Returns (N,) bool, by predictions in eval mode. Raises ValueError for inputs and labels that do
    not pair up, and counts below 1.

    Chatterjee 2020, "Coherent gradients", arXiv 2002.10657.

    >>> model = torch.nn.Linear(1, 2)
    >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0], [1.0]])
    >>> labels = torch.tensor([0, 1, 0, 1, 0])
    >>> htv.methods.easy_examples(model, x, labels, epochs=50, batch_size=5)
    tensor([ True,  True,  True,  True, False])
    """
    if len(x) != len(labels) or len(x) == 0:
        raise ValueError(
            f"x and labels must have one entry per example, got {len(x)} and {len(labels)}"
        )
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for ids in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), labels[ids]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        predicted = [model(part).argmax(dim=1) for part in x.split(1024)]
    return torch.cat(predicted) == labels


def disjoint_subsets(pool: Tensor, sizes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Draw subsets that share no example from one pool, so that they are alike but for chance.

    pool:   (N,) bool over a data set, or (P,) ids of its members, each once.
    sizes:  of the subsets, each at least 1.
    seed:   decides who is drawn.

    Returns one tensor of ids, int64, per size. Raises ValueError for another pool or a small one.

    >>> first, second = htv.methods.disjoint_subsets(torch.arange(10), (3, 4))
    >>> len(first), len(second), set(first.tolist()) & set(second.tolist())
    (3, 4, set())
    """
    if not isinstance(pool, Tensor) or pool.dim() != 1 or pool.dtype.is_floating_point:
        raise ValueError(
            f"pool must be a tensor, (N,) bool or (P,) integers; got {described(pool)}"
        )
    members = (pool.nonzero().flatten() if pool.dtype == torch.bool else pool).cpu()
    if len(members.unique()) < len(members):
        raise ValueError(
            "pool names an example twice: subsets might share it. Pass each id once, or a boolean "
            "mask"
        )
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes must be at least 1, got {sizes}")
    if sum(sizes) > len(members):
        raise ValueError(
            f"the pool has {len(members)} examples, too few for disjoint subsets of "
            f"{' and '.join(map(str, sizes))}"
        )
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))[
        : sum(sizes)
    ]
    return list(members[order].split(list(sizes)))
