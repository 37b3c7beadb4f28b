"""A data set read in batches by example id, and a table by example id: rows stay with their
examples in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from htv.errors import described

__all__ = ["Batches", "ExampleTable"]

Sampler = Callable[[torch.Generator], Iterable[int] | Tensor]
Batch = tuple[Any, Tensor, Tensor]  # x, y, ids


class MapDataset(Protocol):
    """What a map-style data set is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Draw the batches of a whole training run, of which step t is always the same.

    So training can go on where it stopped.

    dataset:     map-style, of ``(x, y)`` or ``(x, y, id)``. Without ids, an example's id is its
                 index; given ones must name each of the N examples once, 0 to N - 1. What a random
                 augmentation draws is not repeated.
    epochs:      how many.
    batch_size:  the last batch of an epoch may be smaller.
    sampler:     called with a generator that depends on seed and epoch alone, gives the indices of
                 one epoch: some, all, or with repetitions. By default all, shuffled. For example
                 ``lambda generator: torch.multinomial(weights, 1000, generator=generator)``.
    seed:        decides the order.
    device:      where x goes; y and ids stay on the CPU.

    Raises TypeError for a data set that is not map-style, ValueError for an empty one and for
    epochs or batch_size below 1.

    >>> x, y = torch.arange(3.0), torch.tensor([0, 1, 0])
    >>> data = torch.utils.data.TensorDataset(x, y)
    >>> batches = htv.methods.Batches(data, epochs=1, batch_size=2)
    >>> [(x.tolist(), ids.tolist()) for x, y, ids in batches.from_step(1)]
    [([1.0], [1])]
    """

    dataset: MapDataset
    epochs: int
    batch_size: int
    sampler: Sampler | None = None
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise TypeError(
                "dataset must be map-style, with len() and [index]; got "
                f"{type(self.dataset).__name__}"
            )
        if len(self.dataset) == 0:
            raise ValueError("dataset is empty")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}"
            )

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield (x, y, ids) of every step from one on: y and ids are (B,) int64.

        step:  the first one, counted from 0 over all epochs.
        """
        for epoch in range(self.epochs):
            parts = self._order(epoch).split(self.batch_size)
            for part in parts[step:]:
                yield self.read(part)
            step = max(0, step - len(parts))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield (x, y, ids) of the steps of one epoch.

        epoch:  counted from 0.
        """
        for part in self._order(epoch).split(self.batch_size):
            yield self.read(part)

    def in_order(self) -> Iterator[Batch]:
        """Yield (x, y, ids) of every example once, in the order of the data set."""
        for part in torch.arange(len(self.dataset)).split(self.batch_size):
            yield self.read(part)

    def read(self, indices: Tensor) -> Batch:
        """Return (x, y, ids) of some examples of the data set.

        indices:  (B,) int64.

        Raises ValueError if the data set does not give (x, y) or (x, y, id).
        """
        if (
            type(self.dataset) is TensorDataset
        ):  # one lookup instead of one per example; a subclass may augment
            parts: Any = tuple(tensor[indices] for tensor in self.dataset.tensors)
        else:
            parts = default_collate([self.dataset[index] for index in indices.tolist()])
        if len(parts) not in (2, 3):
            raise ValueError(f"dataset must give (x, y) or (x, y, id), got {len(parts)} values")
        x, y, ids = parts if len(parts) == 3 else (*parts, indices)
        return _moved(x, self.device), torch.as_tensor(y).cpu(), torch.as_tensor(ids).cpu()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.sampler is None:
            return torch.randperm(len(self.dataset), generator=generator)
        drawn = self.sampler(generator)
        order = (
            drawn.cpu().long()
            if isinstance(drawn, Tensor)
            else torch.tensor(list(drawn), dtype=torch.int64)
        )
        if order.dim() != 1 or len(order) == 0:
            raise ValueError(
                f"sampler must give the indices of one epoch, got shape {tuple(order.shape)}"
            )
        return order


class ExampleTable:
    """Collect one row for each of N examples, in any order: rows go by id, never by position.

    examples:  N; ValueError below 1.

    >>> table = htv.methods.ExampleTable(2)
    >>> table.write(torch.tensor([1]), torch.tensor([[0.1, 0.9]]))
    >>> table.write(torch.tensor([0]), torch.tensor([[0.8, 0.2]]))
    >>> table.complete()
    tensor([[0.8000, 0.2000],
            [0.1000, 0.9000]])
    """

    def __init__(self, examples: int):
        if examples < 1:
            raise ValueError(f"examples must be at least 1, got {examples}")
        self._rows: Tensor | None = None
        self._written = torch.zeros(examples, dtype=torch.bool)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Write the rows of a batch, drawn in any way: shuffled, weighted, with repetitions.

        ids:   (B,) integers in [0, N); of one that repeats the last row counts.
        rows:  (B, *rest), the same rest each time.

        Raises ValueError for anything else.
        """
        ids = require_ids(ids, len(self._written), len(rows))
        rows = rows.detach().cpu()
        if self._rows is None:
            self._rows = rows.new_zeros(len(self._written), *rows.shape[1:])
        if rows.shape[1:] != self._rows.shape[1:]:
            raise ValueError(
                f"rows must be (B, *{tuple(self._rows.shape[1:])}) as before, got "
                f"{tuple(rows.shape)}"
            )
        last = last_of_each(ids)
        self._rows[ids[last]] = rows[last]
        self._written[ids] = True

    def complete(self) -> Tensor:
        """Return (N, *rest) by id, on the CPU. Raises ValueError naming ids without a row."""
        missing = (~self._written).nonzero().flatten().tolist()
        if missing or self._rows is None:
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise ValueError(
                f"{len(missing)} of {len(self._written)} examples have no row, ids {named}: write "
                "them too"
            )
        return self._rows


def require_ids(ids: Tensor, examples: int, rows: int | None = None) -> Tensor:
    """ids as (B,) int64 on the CPU; ValueError unless they are integers in [0, examples), `rows` of
    them if told.
    """
    if (
        not isinstance(ids, Tensor)
        or ids.dim() != 1
        or ids.dtype.is_floating_point
        or ids.dtype == torch.bool
    ):
        raise ValueError(
            "ids must be a tensor of integers, (B,), the id of every example of the batch; got "
            f"{described(ids)}"
        )
    if rows is not None and len(ids) != rows:
        raise ValueError(
            f"ids names {len(ids)} examples, but the batch holds {rows}: they must pair up"
        )
    ids = ids.cpu().long()
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < examples):
        raise ValueError(
            f"ids must lie in [0, {examples}), got values from {int(ids.min())} to {int(ids.max())}"
        )
    return ids


def last_of_each(ids: Tensor) -> Tensor:
    """The positions at which each id of (B,) stands last, in the order of the ids."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    return order[ends]


def _moved(x: Any, device: str | torch.device) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), x)
