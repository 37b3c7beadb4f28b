"""Who votes in a forward, as the user asked for it, before the batch is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from htv.engine import inputs
from htv.engine.inputs import Batch
from htv.errors import UnsupportedError
from htv.groups import Groups

__all__ = ["UNKNOWN", "StaticGroupSpec", "GroupSpec", "groups_of", "same_spec"]


@dataclass(frozen=True, eq=False)
class GroupSpec:
    """Holds what `Handle.groups`, `packed` or `tokens` was called with.

    kind:    "ids", "packed" or "rows".
    value:   the ids, the bounds or the mask, if one was given.
    weight:  "size" or "equal", see `Groups.by_id`.
    count:   how many groups there are, or None: those that `value` has.
    also:    ids of the rows of other arguments, by their names.
    """

    kind: str
    value: Tensor | None
    weight: str
    count: int | None = None
    also: Mapping[str, Tensor] = field(default_factory=dict)

    def size(self) -> int | None:
        """Return how many examples, or packed rows, it speaks of; None if it does not say."""
        if self.value is None:
            return None
        if self.kind == "packed":
            return int(self.value[-1]) if len(self.value) else 0
        return len(self.value)


UNKNOWN = GroupSpec("unknown", None, "size")  # who votes in a forward that left no note


def same_spec(a: GroupSpec | None, b: GroupSpec | None) -> bool:
    """Tell whether two forwards, asked for `a` and `b`, let the same groups vote."""
    if a is None or b is None:
        return a is b
    if (a.kind, a.weight, a.count, list(a.also)) != (b.kind, b.weight, b.count, list(b.also)):
        return False
    if not all(torch.equal(ids, b.also[name]) for name, ids in a.also.items()):
        return False
    if a.value is b.value:
        return True
    if a.value is None or b.value is None:
        return False
    return torch.equal(torch.as_tensor(a.value), torch.as_tensor(b.value))


def groups_of(spec: GroupSpec | None, batch: Batch, tensors: list[tuple[str, object]]) -> Groups:
    """Assign the examples of a batch to groups.

    spec:     what the user asked for, or None: every example votes by itself.
    batch:    the examples of the call.
    tensors:  (name, tensor or packed sequence) of the call's arguments.
    """
    size, dim = batch.batch_size, batch.input_layout.dim
    if spec is None:
        return Groups.each(size, dim)
    if spec.kind == "rows":
        return replace(Groups.each_row(size, dim, spec.value), rows=batch.rows())
    sequences = [t for _, t in tensors if isinstance(t, PackedSequence)]
    if spec.kind == "packed":
        if sequences:
            raise UnsupportedError(
                "packed() speaks of rows one after another, not of a PackedSequence: leave it out"
            )
        return Groups.packed(spec.value, size, dim, spec.weight)
    ids = spec.value
    if sequences and len(ids) != size:
        ids = inputs.ids_of_examples(torch.as_tensor(ids), batch)
    return Groups.by_id(ids, size, dim, spec.weight, spec.count)


def add_members(
    batch: Batch, groups: Groups, spec: GroupSpec | None, tensors: list[tuple[str, object]]
) -> None:
    """Add the arguments that `spec` has ids of their own for to the `batch`. Raises ValueError
    where there is no such tensor among the call's `tensors`, (name, value).
    """
    for name, ids in ({} if spec is None else spec.also).items():
        tensor = next((t for n, t in tensors if n == name and isinstance(t, Tensor)), None)
        if tensor is None:
            given = ", ".join(repr(n) for n, _ in tensors) or "none"
            raise ValueError(
                f"also={{{name!r}: ...}} is no tensor argument of this forward, which got {given}: "
                "name one of these"
            )
        batch.members.append((name, tensor, groups.layout_by_ids(name, ids, tensor), True))


@dataclass(frozen=True)
class StaticGroupSpec:
    """Tells who votes in a compiled forward: all about it but the values of ids, bounds or mask."""

    kind: str
    weight: str
    batch_size: int
    dim: int

    @staticmethod
    def of(kind: str, weight: str, batch: Batch, value: Tensor | None) -> StaticGroupSpec:
        """Make it of a `GroupSpec` of this `kind`, `weight` and `value`, for `batch`. Raises
        ValueError for ids that are not one per example.
        """
        if kind == "ids" and len(value) != batch.batch_size:
            raise ValueError(
                f"groups has {len(value)} ids but dim {batch.input_layout.dim} of the batch has "
                f"size {batch.batch_size}: pass one id per example"
            )
        return StaticGroupSpec(kind, weight, int(batch.batch_size), batch.input_layout.dim)

    def groups(self, value: Tensor | None) -> Groups:
        """Assign examples to groups, once `value` is known: the ids, bounds or mask."""
        if self.kind == "each":
            return Groups.each(self.batch_size, self.dim)
        if self.kind == "rows":
            return Groups.each_row(self.batch_size, self.dim, value)
        make = Groups.by_id if self.kind == "ids" else Groups.packed
        return make(value, self.batch_size, self.dim, self.weight)
