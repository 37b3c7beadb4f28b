"""Who votes: how the examples of a batch map to groups, and where the examples are in a tensor.

An *example* is one index of the batch's dim: by default dim 0 of the model's input holds the
examples, and every example is its own group. `Groups` assigns examples to groups, once per forward.
`BatchLayout` says where the examples are in one tensor of that forward, `GroupedRows` is both
together: what a layer needs to tell its rows apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Groups", "BatchLayout", "GroupedRows", "to_device_async"]


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Tells where the N examples are in one tensor: along `dim`, each of its indices belonging to
    one example.

    outer, times:  the dim holds outer * N * times indices, and index i belongs to example
                   (i // times) % N, as after merging the batch's dim with one before and one behind
                   it.
    examples:      (size of the dim,) int64, the example of every index, where they follow no such
                   pattern (rows that were selected or permuted); outer and times mean nothing then.
    guess:         what was taken for the batch's by its size alone, or "": a place that disagrees
                   with a sure one is an error then.
    """

    dim: int
    outer: int = 1
    times: int = 1
    examples: Tensor | None = None
    guess: str = ""

    is_the_one: ClassVar[bool] = False  # set on the one object that stands for all equal places

    def at(self, dim: int) -> BatchLayout:
        return (
            self
            if dim == self.dim
            else BatchLayout(dim, self.outer, self.times, self.examples, self.guess)
        )

    def size(self, batch_size: int) -> int:
        return (
            self.outer * batch_size * self.times
            if self.examples is None
            else self.examples.shape[0]
        )

    def index(self, batch_size: int) -> Tensor:
        """Return the example of every index, (size of the dim,) int64, of `batch_size` examples."""
        if self.examples is not None:
            return self.examples
        return (torch.arange(self.size(batch_size)) // self.times) % batch_size

    def same(self, other: BatchLayout, batch_size: int, kin: Tensor | None = None) -> bool:
        """Tell whether every index of two tensors that are alike but for this belongs to the same
        example, if one has the batch here and one at `other`, of `batch_size` examples; or, given
        `kin` (`Groups.kin`), to examples of the same group.
        """
        if self is other:
            return True
        if self.dim != other.dim or self.size(batch_size) != other.size(batch_size):
            return False
        if self.examples is None and other.examples is None:
            return (self.outer, self.times) == (other.outer, other.times) or batch_size == 1
        if self.examples is other.examples:
            return True
        mine, others = self.index(batch_size).cpu(), other.index(batch_size).cpu()
        return torch.equal(mine, others) if kin is None else torch.equal(kin[mine], kin[others])


@dataclass(frozen=True, eq=False)
class Groups:
    """Assigns the N examples of one batch to E groups. Made by `each`, `by_id` and `packed`; every
    group has examples, but for those that only the `count` of `by_id` speaks of.

    batch_size:    N.
    offsets:       (E + 1,) int64 on the CPU; once examples are put in `order`, group e owns
                   examples offsets[e]:offsets[e + 1].
    order:         (N,) int64 on the CPU, the examples sorted by group, or None where they already
                   are.
    keys:          (E,) the caller's ids, or None where groups are numbered as they come; of packed
                   sequences, the numbers of those with rows, or None where all have some.
    named:         whether the keys are ids the caller gave.
    input_layout:  where the examples are in the model's inputs.
    weights:       (E,) float64, what each group's contributions are multiplied by, or None for 1.
    rows_vote:     every row a layer sees is a group of its own, whatever its example.
    voting:        with rows_vote: (N, T) bool on the CPU, the rows of each example that vote, or
                   None for all.
    rows:          with rows_vote: how many rows the batch may have, empty where that is not known.
    """

    batch_size: int
    offsets: Tensor
    order: Tensor | None = None
    keys: Tensor | None = None
    named: bool = False
    input_layout: BatchLayout = BatchLayout(0)
    weights: Tensor | None = None
    rows_vote: bool = False
    voting: Tensor | None = None
    rows: tuple[int, ...] = ()

    @staticmethod
    def each(batch_size: int, dim: int = 0) -> Groups:
        """Let each of `batch_size` examples, along `dim` of the inputs, be a group of its own."""
        if batch_size < 1:
            raise ValueError(
                f"the batch is empty: its dim {dim} has size 0, and no group can vote (skip the "
                "step)"
            )
        return Groups(batch_size, torch.arange(batch_size + 1), input_layout=BatchLayout(dim))

    @staticmethod
    def by_id(
        ids: Tensor | list[int],
        batch_size: int,
        dim: int = 0,
        weight: str = "size",
        count: int | None = None,
    ) -> Groups:
        """Let examples with equal ids vote together.

        ids:         (N,) integers, any values, any order.
        batch_size:  N.
        dim:         the batch's, in the model's inputs.
        weight:      "size": contributions count as they come, so a group counts by its size;
                     "equal": every group counts as if it had N / E examples, so that its mean
                     counts once.
        count:       E, where groups without examples vote too: ids are 0 to E - 1 then.
        """
        ids = torch.as_tensor(ids).cpu()  # at once: how many groups there are decides shapes
        if (
            ids.dim() != 1
            or ids.dtype.is_floating_point
            or ids.dtype.is_complex
            or ids.dtype == torch.bool
        ):
            raise ValueError(
                f"groups must be a 1-D tensor of integer ids, got shape {tuple(ids.shape)} and "
                f"dtype {ids.dtype}"
            )
        if len(ids) != batch_size:
            raise ValueError(
                f"groups has {len(ids)} ids but dim {dim} of the batch has size {batch_size}: pass "
                "one id per example"
            )
        if batch_size < 1:
            raise ValueError("groups is empty: no group can vote (skip the step)")
        if count is None:
            keys, inverse, sizes = ids.unique(return_inverse=True, return_counts=True)
        else:
            _check_count(count, ids, weight)
            keys, inverse = torch.arange(count), ids.long()
            sizes = inverse.bincount(minlength=count)
        order = None if bool((inverse[1:] >= inverse[:-1]).all()) else inverse.argsort(stable=True)
        weights = None if weight == "size" else batch_size / (len(sizes) * sizes.double())
        return Groups(batch_size, _offsets(sizes), order, keys, True, BatchLayout(dim), weights)

    @staticmethod
    def packed(
        cu_seqlens: Tensor | list[int], batch_size: int, dim: int = 0, weight: str = "size"
    ) -> Groups:
        """Let consecutive examples vote together: sequence e owns examples
        cu_seqlens[e]:cu_seqlens[e + 1].

        cu_seqlens:  integers from 0 up to the number of examples, as variable-length attention
                     takes them; a sequence of length 0 does not vote.
        batch_size:  how many packed rows there are, each of them an example.
        dim:         theirs, in the model's inputs.
        weight:      as for `by_id`.
        """
        bounds = torch.as_tensor(cu_seqlens).cpu()
        if (
            bounds.dim() != 1
            or len(bounds) < 2
            or bounds.dtype.is_floating_point
            or bounds.dtype == torch.bool
        ):
            raise ValueError(
                "cu_seqlens must be a 1-D integer tensor of at least two bounds, "
                f"got shape {tuple(bounds.shape)} and dtype {bounds.dtype}"
            )
        bounds = bounds.long()
        sizes = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != batch_size or bool((sizes < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of packed rows, {batch_size}; it goes "
                f"from {int(bounds[0])} to {int(bounds[-1])}"
                + (" and falls in between" if bool((sizes < 0).any()) else "")
            )
        voting = (sizes > 0).nonzero().flatten()
        if len(voting) == 0:
            raise ValueError("cu_seqlens holds no rows: no group can vote (skip the step)")
        keys = voting if len(voting) < len(sizes) else None
        weights = None if weight == "size" else batch_size / (len(voting) * sizes[voting].double())
        return Groups(
            batch_size,
            _offsets(sizes[voting]),
            keys=keys,
            input_layout=BatchLayout(dim),
            weights=weights,
        )

    @staticmethod
    def each_row(batch_size: int, dim: int = 0, voting: Tensor | None = None) -> Groups:
        """Let every row a layer sees vote by itself.

        batch_size, dim:  as for `each`.
        voting:           (N, T) bool, False where a row (padding) has no vote; None: all have one.
        """
        if voting is not None and (
            voting.dim() != 2 or voting.dtype != torch.bool or len(voting) != batch_size
        ):
            raise ValueError(
                f"mask must be a boolean tensor of shape ({batch_size}, T), True where a token "
                f"votes; got shape {tuple(voting.shape)} and dtype {voting.dtype}"
            )
        voting = None if voting is None else voting.cpu()
        if voting is not None and not bool(voting.any()):
            raise ValueError("mask lets no token vote (skip the step)")
        return replace(Groups.each(batch_size, dim), rows_vote=True, voting=voting)

    @cached_property
    def count(self) -> int:
        """Return E, the number of groups, where rows do not vote by themselves."""
        return self.offsets.shape[0] - 1

    def described(self) -> str:
        """Say who votes, for messages."""
        if self.rows_vote:
            return f"every token of {self.batch_size} examples"
        return f"{self.count} group{'s' * (self.count != 1)} of {self.batch_size} examples"

    def same_groups(self, other: Groups) -> bool:
        """Tell whether group e of this and of `other` stands for the same voter, so that
        contributions may be added group by group.
        """
        if self is other:
            return True
        if self.rows_vote != other.rows_vote:
            return False
        if self.rows_vote:
            same_mask = self.voting is other.voting or (
                self.voting is not None
                and other.voting is not None
                and torch.equal(self.voting, other.voting)
            )
            return same_mask and self.batch_size == other.batch_size
        if self.keys is None or other.keys is None:
            return self.keys is other.keys and self.count == other.count
        return torch.equal(self.keys, other.keys)

    def fits(self, tensor: Tensor, layout: BatchLayout | None = None) -> bool:
        """Tell whether `tensor` has the size of the batch at `layout`, by default where inputs have
        it.
        """
        layout = self.input_layout if layout is None else layout
        return tensor.dim() > layout.dim and tensor.shape[layout.dim] == layout.size(
            self.batch_size
        )

    def grouped_rows(self, layout: BatchLayout) -> GroupedRows:
        """Return who votes with the indices of a tensor that has the examples at `layout`."""
        return GroupedRows(self, layout)

    def members(self) -> Tensor:
        """Return the group of every example, (N,) int64; behind them, those of the examples that
        stand for groups without any, numbered from N on.
        """
        sizes = self.offsets.diff()
        groups = torch.repeat_interleave(torch.arange(self.count), sizes)
        if self.order is not None:
            groups = torch.empty_like(groups).index_copy_(0, self.order, groups)
        empty = (sizes == 0).nonzero().flatten()
        return torch.cat([groups, empty]) if len(empty) else groups

    @cached_property
    def kin(self) -> Tensor | None:
        """Return `members`, where examples need to be told apart by their groups alone; None where
        that is no other thing, as group i is example i alone.
        """
        if self.rows_vote or self.offsets is None:  # not known while torch.compile traces
            return None
        alone = self.count == self.batch_size and self.order is None
        return None if alone and bool((self.offsets.diff() == 1).all()) else self.members()

    @cached_property
    def firsts(self) -> Tensor:
        """Return an example of every group, (E,) int64: what a row that is a whole group's is
        taken for.
        """
        kin = self.members()
        found = torch.full((self.count,), len(kin))
        return found.scatter_reduce(0, kin, torch.arange(len(kin)), "amin")

    def called(self, group: int) -> str:
        """Name group number `group` for messages, by the caller's id if there is one."""
        return str(group if self.keys is None else int(self.keys[group]))

    def layout_by_ids(self, name: str, ids: Tensor, tensor: Tensor) -> BatchLayout:
        """Return where the batch is in `tensor`, an argument called `name` the rows of which
        belong to the groups `ids`, (rows,) integers. Raises ValueError for ids that are not one
        per row, or that no group has.
        """
        dim, ids = self.input_layout.dim, torch.as_tensor(ids).cpu()
        if ids.dim() != 1 or tensor.dim() <= dim or tensor.shape[dim] != len(ids):
            raise ValueError(
                f"also={{{name!r}: ...}} has ids of shape {tuple(ids.shape)} for a tensor of shape "
                f"{tuple(tensor.shape)}: pass one id per index of its dim {dim}"
            )
        keys = torch.arange(self.count) if self.keys is None else self.keys
        at = torch.searchsorted(keys, ids).clamp(max=len(keys) - 1)
        unknown = (keys[at] != ids).nonzero().flatten().tolist()
        if unknown:
            raise ValueError(
                f"also={{{name!r}: ...}} speaks of group {int(ids[unknown[0]])}, which groups() "
                "has no example of. Remedy: groups(ids, count=...) where groups without rows vote"
            )
        return BatchLayout(dim, examples=self.firsts[at])


class GroupedRows:
    """Tells who votes with which indices of one tensor's batch dim: `groups` at a `layout`.

    dim:      the batch's dim, that of the `layout`.
    order:    (S,) int64 on the CPU, the dim's indices sorted by group, or None where they are.
    offsets:  (E + 1,) int64 on the CPU; in that order group e owns indices offsets[e]:offsets[e +
              1], perhaps none.
    """

    def __init__(self, groups: Groups, layout: BatchLayout):
        self.groups, self.layout, self.dim = groups, layout, layout.dim
        self.count = 0 if groups.offsets is None else groups.offsets.shape[0] - 1  # E
        self.rows_vote = groups.rows_vote
        self._scaled: dict[int, Tensor] = {}
        self._orders: dict[torch.device, Tensor] = {}
        if layout.examples is None and layout.outer == 1 and groups.order is None:
            self.order = None
            self.offsets = groups.offsets if layout.times == 1 else groups.offsets * layout.times
            return
        members = groups.members()[layout.index(groups.batch_size).cpu()]
        self.offsets = _offsets(members.bincount(minlength=groups.count))
        order = members.argsort(stable=True)
        self.order = None if torch.equal(order, torch.arange(len(order))) else order

    def ungrouped(self) -> GroupedRows:
        """Return the same without weights and with a vote for every row: for plain sums."""
        groups = self.groups
        if groups.weights is None and groups.voting is None:
            return self
        return replace(groups, weights=None, voting=None).grouped_rows(self.layout)

    @cached_property
    def plain(self) -> bool:
        """Tell whether the batch's dim is the first, its indices are sorted by group, and all count
        alike.
        """
        groups = self.groups
        alike = groups.weights is None and groups.voting is None and not self.rows_vote
        return self.dim == 0 and self.order is None and alike

    def front(self, tensor: Tensor) -> Tensor:
        """Sort the indices of `tensor` by group: (..., S, ...) -> (S, ...)."""
        tensor = tensor.movedim(self.dim, 0) if self.dim else tensor
        if self.order is None:
            return tensor
        return tensor.index_select(0, self._order_on(self.order, tensor.device))

    def rows(self, tensor: Tensor, features: int = 1) -> Tensor:
        """Put the rows of each group of `tensor` together: (..., S, ..., *features) -> (R,
        *features), `features` being the number of those dims.
        """
        if self.plain:
            lead = tensor.ndim - features
            return (
                tensor
                if lead == 1
                else tensor.reshape(math.prod(tensor.shape[:lead]), *tensor.shape[lead:])
            )
        front = self.front(tensor)
        lead = front.dim() - features
        rows = (
            front
            if lead == 1
            else front.reshape(math.prod(front.shape[:lead]), *front.shape[lead:])
        )
        voting = self.groups.voting
        if voting is None:
            return rows
        if len(rows) != voting.numel() or bool((self.offsets.diff() != self.offsets[1]).any()):
            raise ValueError(
                f"tokens(mask) has {voting.shape[1]} tokens for each of {len(voting)} examples, "
                f"but a layer saw an input of shape {tuple(tensor.shape)}, whose rows are not "
                "these tokens. Remedy: exclude its parameters"
            )
        return rows.index_select(
            0, to_device_async(voting.flatten().nonzero().flatten(), rows.device)
        )

    def grad_rows(self, grad: Tensor, features: int = 1) -> tuple[Tensor, Tensor]:
        """Return `rows` of `grad`, an output's gradient with so many `features` dims, multiplied by
        the weights of their groups; and their `bounds`.
        """
        rows = self.rows(grad, features)
        if self.plain and rows.shape[0] == self._indices:
            return rows, self.offsets
        bounds, weights = self.bounds(rows), self.groups.weights
        if weights is not None:
            rows = rows * _as_column(torch.repeat_interleave(weights, bounds.diff()), rows)
        return rows, bounds

    def bounds(self, rows: Tensor) -> Tensor:
        """Return (E + 1,) int64 on the CPU: group e owns rows bounds[e]:bounds[e + 1] of `rows`,
        which the method of that name returned.
        """
        if self.rows_vote:
            return torch.arange(len(rows) + 1)
        times = rows.shape[0] // self._indices if self._indices else 1
        if times not in self._scaled:
            self._scaled[times] = self.offsets if times == 1 else self.offsets * times
        return self._scaled[times]

    def sums(self, tensor: Tensor, features: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Sum each group's rows of `tensor`: (..., S, ..., *features) -> (E, *features), `features`
        being the number of those dims, in `dtype` or the tensor's own. Deterministic, no atomics.
        """
        if (
            self.plain
            and self._singles
            and tensor.ndim == 1 + features
            and tensor.shape[0] == self.count
        ):
            return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)
        if self.rows_vote:
            return self.rows(tensor, features).to(dtype)
        front = tensor.movedim(self.dim, 0) if self.dim else tensor
        if front.dim() > 1 + features:
            front = front.sum(dim=tuple(range(1, front.dim() - features)), dtype=dtype)
        return self.along(front if dtype in (None, front.dtype) else front.to(dtype), dim=0)

    def along(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Sum each group's indices of `tensor` along `dim`, by default the batch's, weighted: (...,
        S, ...) -> (E, ...).
        """
        dim = self.dim if dim is None else dim
        front = tensor.movedim(dim, 0) if dim else tensor
        if self.order is not None:
            front = front.index_select(0, self._order_on(self.order, front.device))
        summed = (
            front
            if self._singles and front.shape[0] == self.count
            else segment_sum(front, self.offsets)
        )
        weights = self.groups.weights
        return summed if weights is None else summed * _as_column(weights, summed)

    def _order_on(self, order: Tensor, device: torch.device) -> Tensor:
        if device not in self._orders:
            self._orders[device] = to_device_async(order, device)
        return self._orders[device]

    @cached_property
    def _indices(self) -> int:
        """Return S."""
        return int(self.offsets[-1])

    @cached_property
    def _singles(self) -> bool:
        """Tell whether each of the E groups has one index."""
        return bool((self.offsets.diff() == 1).all())


MOST_CAPTURED = 4096  # values that a CUDA graph writes one by one


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` from the host to `device`, without waiting for it.

    While a CUDA graph is captured, values are written there one by one: a copy would be replayed
    from memory that is no longer theirs. RuntimeError for more than `MOST_CAPTURED` of them.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        if tensor.numel() > MOST_CAPTURED:
            raise RuntimeError(
                f"a CUDA graph cannot capture who votes with {tensor.numel()} values in no "
                "regular order: let every example vote by itself, or sort the batch by group"
            )
        values = [
            torch.full((), value, device=device, dtype=tensor.dtype)
            for value in tensor.flatten().tolist()
        ]
        return (
            torch.stack(values).reshape(tensor.shape)
            if values
            else tensor.new_empty(tensor.shape, device=device)
        )
    return tensor.pin_memory().to(device, non_blocking=True)


def _as_column(values: Tensor, beside: Tensor) -> Tensor:
    return to_device_async(values.to(beside.dtype), beside.device).reshape(
        -1, *(1,) * (beside.dim() - 1)
    )


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows offsets[e]:offsets[e + 1] of `values`: (R, *rest) -> (E, *rest)."""
    sizes = offsets.diff()
    if bool((sizes == sizes[0]).all()):
        return values.reshape(len(sizes), int(sizes[0]), *values.shape[1:]).sum(dim=1)
    flat = values.reshape(len(values), math.prod(values.shape[1:])).contiguous()
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        ids = torch.repeat_interleave(
            sizes
        )  # what embeddings do to sum rows by id beats segment_reduce
        summed: Tensor = torch.ops.aten.embedding_dense_backward(flat, ids, len(sizes), -1, False)
    else:
        summed = torch.segment_reduce(
            flat, "sum", offsets=to_device_async(offsets, values.device), axis=0, initial=0
        )
    return summed.reshape(len(sizes), *values.shape[1:])


def _check_count(count: int, ids: Tensor, weight: str) -> None:
    """Raise ValueError for a `count` of groups that does not go with these `ids` and `weight`."""
    if type(count) is not int or count < 1 or ids.min() < 0 or ids.max() >= count:
        raise ValueError(
            f"groups(ids, count={count!r}) takes ids from 0 to count - 1; got ids from "
            f"{int(ids.min())} to {int(ids.max())}: count is the number of groups, with those "
            "that have no rows"
        )
    if len(ids.unique()) < count and weight != "size":
        raise ValueError(
            "groups(weight='equal') scales groups by their size, and one has no rows: leave it "
            "out of ids and count, or use weight='size'"
        )
    if len(ids) == 1 and count > 1:
        raise ValueError(
            f"groups(ids, count={count}) with a batch of one row: which rows belong to the groups "
            "without any cannot be told. Remedy: leave these groups out of the batch"
        )


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).long().cpu()
