"""Training with environments: who votes is where an example comes from.

handle = htv.attach(model, htv.AndMask(1.0))
for (x, y), ids in environment_batches(loaders):
    optimizer.zero_grad()
    with environment_groups(handle, ids, len(loaders)):
        loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from htv.attach import Handle
from htv.errors import described

__all__ = ["environment_batches", "environment_groups", "join_environments", "require_environments"]


def join_environments(batches: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Put one batch of every environment one behind the other.

    batches:  for each of E environments its tensors, (N_e, ...) each, such as ``(x, y)``.

    Returns the joined tensors, (N, ...) each, and ids (N,) int64 on the first tensor's device: the
    environment of every example. Raises ValueError for no environments, one without examples, what
    is no tuple of tensors, or tensors that do not pair up.

    >>> joined, ids = htv.methods.join_environments([(torch.zeros(2, 3),), (torch.zeros(1, 3),)])
    >>> joined[0].shape, ids
    (torch.Size([3, 3]), tensor([0, 0, 1]))
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: give one batch for each environment")
    for index, batch in enumerate(batches):
        parts = (
            batch if isinstance(batch, tuple | list) else ()
        )  # a tensor would fall apart into its examples
        if not parts or not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
            raise ValueError(
                f"batches[{index}] must be a tuple of tensors with the examples in dim 0, (x, y)"
            )
        sizes = {len(part) for part in batch}
        if len(sizes) > 1:
            raise ValueError(
                f"the tensors of batches[{index}] hold {sorted(sizes)} examples: they must pair up"
            )
        if sizes == {0}:
            raise ValueError(
                f"environment {index} has no examples in this batch: its vote would be lost. Skip "
                "the batch"
            )
        if len(batch) != len(batches[0]):
            raise ValueError(
                f"batches[{index}] holds {len(batch)} tensors, batches[0] {len(batches[0])}"
            )
        for part, first in zip(batch, batches[0], strict=True):
            if part.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"examples of batches[{index}] have shape {tuple(part.shape[1:])}, those of "
                    f"batches[0] {tuple(first.shape[1:])}"
                )
    counts = torch.tensor([len(batch[0]) for batch in batches])
    ids = torch.repeat_interleave(torch.arange(len(batches)), counts).to(batches[0][0].device)
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True)), ids


def environment_batches(
    loaders: Sequence[Iterable[Sequence[Tensor]]],
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Draw a batch from every environment at a time; ends with the shortest loader.

    loaders:  one per environment, each giving batches ``(x, y, ...)``.

    Yields what `join_environments` returns. Raises ValueError where a loader gives nothing at all.

    >>> loaders = [[(torch.zeros(2),), (torch.zeros(2),)], [(torch.ones(1),)]]
    >>> [ids.tolist() for joined, ids in htv.methods.environment_batches(loaders)]
    [[0, 0, 1]]
    """
    loaders = list(loaders)
    if not loaders:
        raise ValueError("loaders is empty: give one for each environment")
    iterators = [iter(loader) for loader in loaders]
    first = True
    while True:
        batches = []
        for index, iterator in enumerate(iterators):
            batch = next(iterator, None)
            if batch is None:
                if first:
                    raise ValueError(
                        f"loaders[{index}] gives no batch: environment {index} is empty"
                    )
                return
            batches.append(batch)
        first = False
        yield join_environments(batches)


def require_environments(ids: Tensor, num_environments: int, absent: str = "error") -> None:
    """Raise ValueError unless every environment 0, ..., E - 1 is in the batch, and nothing else.

    ids:               (N,) integers, the environment of every example.
    num_environments:  E.
    absent:            "zero" lets environments be absent from the batch, "error" does not.

    >>> htv.methods.require_environments(torch.tensor([0, 1, 1]), 2)
    >>> htv.methods.require_environments(torch.tensor([0, 0, 2]), 3)
    Traceback (most recent call last):
        ...
    ValueError: environments [1] are missing from the batch: ...
    """
    if absent not in ("error", "zero"):
        raise ValueError(f"absent must be 'error' or 'zero', got {absent!r}")
    if (
        not isinstance(ids, Tensor)
        or ids.dim() != 1
        or ids.dtype.is_floating_point
        or ids.dtype == torch.bool
    ):
        raise ValueError(f"ids must be a tensor of integers, (N,), got {described(ids)}")
    if num_environments < 1:
        raise ValueError(f"num_environments must be at least 1, got {num_environments}")
    if absent == "error" and len(ids) < num_environments:
        raise ValueError(
            f"{len(ids)} examples cannot hold {num_environments} environments: take a larger "
            "batch, with at least one example of each"
        )
    if len(ids) == 0:
        raise ValueError("ids is empty: a batch needs at least one example")
    if int(ids.min()) < 0 or int(ids.max()) >= num_environments:
        raise ValueError(
            f"ids must lie in [0, {num_environments}), got values from {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    missing = (ids.bincount(minlength=num_environments) == 0).nonzero().flatten().tolist()
    if missing and absent == "error":
        raise ValueError(
            f"environments {missing} are missing from the batch: the others would agree without "
            "them. Draw from every environment, as environment_batches does"
        )


@contextmanager
def environment_groups(handle: Handle, ids: Tensor, num_environments: int) -> Iterator[None]:
    """Let environments vote inside the block, all of which must be in the batch.

    Each environment is a group, and the mean over its examples counts once, however many they are:
    ``handle.groups(ids, weight="equal")``. Without the check a missing environment would go
    unnoticed: agreement is asked of those that are there.

    handle:            what `htv.attach` returned.
    ids:               (N,) integers, the environment of every example.
    num_environments:  E.

    Raises ValueError where an environment is missing.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0], [-1.0]])
    >>> with htv.attach(model, htv.AndMask(1.0)) as handle:
    ...     with htv.methods.environment_groups(handle, torch.tensor([0, 0, 1]), 2):
    ...         model(x).sum().backward()
    >>> model.weight.grad
    tensor([[0.]])
    """
    require_environments(ids, num_environments)
    with handle.groups(ids, weight="equal"):
        yield
