"""Who votes: how the units of a batch map to groups, and where the units are in a tensor.

A *unit* is one index of the batch's dim: by default dim 0 of the model's input holds the examples, and every example
is its own group. `Groups` assigns units to groups, once per forward. `Place` says where the units are in one tensor of
that forward, `Voters` is both together: what a layer needs to tell its rows apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Groups", "Place", "Voters", "moved"]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the N units are in one tensor: along `dim`, each of its indices belonging to one unit.

    outer, times:  the dim holds outer * N * times indices, and index i belongs to unit (i // times) % N, as after
                   merging the batch's dim with one before and one behind it.
    units:         (size of the dim,) int64, the unit of every index, where they follow no such pattern (rows that were
                   selected or permuted); outer and times mean nothing then.
    guess:         what was taken for the batch's by its size alone, or "": a place that disagrees with a sure one is an
                   error then.
    """

    dim: int
    outer: int = 1
    times: int = 1
    units: Tensor | None = None
    guess: str = ""

    def at(self, dim: int) -> Place:
        return self if dim == self.dim else Place(dim, self.outer, self.times, self.units, self.guess)

    def size(self, num_units: int) -> int:
        return self.outer * num_units * self.times if self.units is None else self.units.shape[0]

    def index(self, num_units: int) -> Tensor:
        """(size of the dim,) int64: the unit of every index."""
        if self.units is not None:
            return self.units
        return (torch.arange(self.size(num_units)) // self.times) % num_units

    def same(self, other: Place, num_units: int) -> bool:
        """Whether every index of two tensors that are alike but for this belongs to the same unit."""
        if self is other:
            return True
        if self.dim != other.dim or self.size(num_units) != other.size(num_units):
            return False
        if self.units is None and other.units is None:
            return (self.outer, self.times) == (other.outer, other.times) or num_units == 1
        if self.units is other.units:
            return True
        return torch.equal(self.index(num_units).cpu(), other.index(num_units).cpu())


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignment of the N units of one batch to E groups. Made by `each`, `by_id` and `packed`; every group has units.

    num_units:  N.
    offsets:    (E + 1,) int64 on the CPU; once units are put in `order`, group e owns units offsets[e]:offsets[e + 1].
    order:      (N,) int64 on the CPU, the units sorted by group, or None where they already are.
    keys:       (E,) the caller's ids, or None where groups are numbered as they come; of packed sequences, the numbers
                of those with rows, or None where all have some.
    named:      whether the keys are ids the caller gave.
    home:       where the units are in the model's inputs.
    weights:    (E,) float64, what each group's contributions are multiplied by, or None for 1.
    rows_vote:  every row a layer sees is a group of its own, whatever its unit.
    voting:     with rows_vote: (N, T) bool on the CPU, the rows of each unit that vote, or None for all.
    """

    num_units: int
    offsets: Tensor
    order: Tensor | None = None
    keys: Tensor | None = None
    named: bool = False
    home: Place = Place(0)
    weights: Tensor | None = None
    rows_vote: bool = False
    voting: Tensor | None = None

    @staticmethod
    def each(num_units: int, dim: int = 0) -> Groups:
        """Every unit is a group of its own."""
        if num_units < 1:
            raise ValueError(f"the batch is empty: its dim {dim} has size 0, and no group can vote (skip the step)")
        return Groups(num_units, torch.arange(num_units + 1), home=Place(dim))

    @staticmethod
    def by_id(ids: Tensor | list[int], num_units: int, dim: int = 0, weight: str = "size") -> Groups:
        """Units with equal ids vote together.

        ids:     (N,) integers, any values, any order.
        weight:  "size": contributions count as they come, so a group counts by its size; "equal": every group counts as
                 if it had N / E units, so that its mean counts once.
        """
        ids = torch.as_tensor(ids).cpu()  # at once: how many groups there are decides shapes
        if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise ValueError(
                f"groups must be a 1-D tensor of integer ids, got shape {tuple(ids.shape)} and dtype {ids.dtype}"
            )
        if len(ids) != num_units:
            raise ValueError(
                f"groups has {len(ids)} ids but dim {dim} of the batch has size {num_units}: pass one id per example"
            )
        if num_units < 1:
            raise ValueError("groups is empty: no group can vote (skip the step)")
        keys, inverse, sizes = ids.unique(return_inverse=True, return_counts=True)
        order = None if bool((inverse[1:] >= inverse[:-1]).all()) else inverse.argsort(stable=True)
        weights = None if weight == "size" else num_units / (len(sizes) * sizes.double())
        return Groups(num_units, _offsets(sizes), order, keys, True, Place(dim), weights)

    @staticmethod
    def packed(cu_seqlens: Tensor | list[int], num_units: int, dim: int = 0, weight: str = "size") -> Groups:
        """Consecutive units vote together: sequence e owns units cu_seqlens[e]:cu_seqlens[e + 1].

        cu_seqlens: integers from 0 up to the number of units, as variable-length attention takes them; a sequence of
        length 0 does not vote.
        """
        bounds = torch.as_tensor(cu_seqlens).cpu()
        if bounds.dim() != 1 or len(bounds) < 2 or bounds.dtype.is_floating_point or bounds.dtype == torch.bool:
            raise ValueError(
                "cu_seqlens must be a 1-D integer tensor of at least two bounds, "
                f"got shape {tuple(bounds.shape)} and dtype {bounds.dtype}"
            )
        bounds = bounds.long()
        sizes = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != num_units or bool((sizes < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of packed rows, {num_units}; it goes from "
                f"{int(bounds[0])} to {int(bounds[-1])}" + (" and falls in between" if bool((sizes < 0).any()) else "")
            )
        voting = (sizes > 0).nonzero().flatten()
        if len(voting) == 0:
            raise ValueError("cu_seqlens holds no rows: no group can vote (skip the step)")
        keys = voting if len(voting) < len(sizes) else None
        weights = None if weight == "size" else num_units / (len(voting) * sizes[voting].double())
        return Groups(num_units, _offsets(sizes[voting]), keys=keys, home=Place(dim), weights=weights)

    @staticmethod
    def each_row(num_units: int, dim: int = 0, voting: Tensor | None = None) -> Groups:
        """Every row a layer sees votes by itself. voting: (N, T) bool, False where a row (padding) has no vote."""
        if voting is not None and (voting.dim() != 2 or voting.dtype != torch.bool or len(voting) != num_units):
            raise ValueError(
                f"mask must be a boolean tensor of shape ({num_units}, T), True where a token votes; got shape "
                f"{tuple(voting.shape)} and dtype {voting.dtype}"
            )
        voting = None if voting is None else voting.cpu()
        if voting is not None and not bool(voting.any()):
            raise ValueError("mask lets no token vote (skip the step)")
        return replace(Groups.each(num_units, dim), rows_vote=True, voting=voting)

    @property
    def count(self) -> int:
        """E, the number of groups, where rows do not vote by themselves."""
        return self.offsets.shape[0] - 1

    def voters_told(self) -> str:
        """Who votes, for messages."""
        if self.rows_vote:
            return f"every token of {self.num_units} examples"
        return f"{self.count} group{'s' * (self.count != 1)} of {self.num_units} examples"

    def same_voters(self, other: Groups) -> bool:
        """Whether group e of both stands for the same voter, so that contributions may be added group by group."""
        if self is other:
            return True
        if self.rows_vote != other.rows_vote:
            return False
        if self.rows_vote:
            same_mask = self.voting is other.voting or (
                self.voting is not None and other.voting is not None and torch.equal(self.voting, other.voting)
            )
            return same_mask and self.num_units == other.num_units
        if self.keys is None or other.keys is None:
            return self.keys is other.keys and self.count == other.count
        return torch.equal(self.keys, other.keys)

    def fits(self, tensor: Tensor, place: Place | None = None) -> bool:
        """Whether a tensor has the size of a place, the home by default, where the batch would be."""
        place = self.home if place is None else place
        return tensor.dim() > place.dim and tensor.shape[place.dim] == place.size(self.num_units)

    def voters(self, place: Place) -> Voters:
        """Who votes with the indices of a tensor that has the units there."""
        return Voters(self, place)

    def members(self) -> Tensor:
        """(N,) int64: the group of every unit."""
        groups = torch.repeat_interleave(torch.arange(self.count), self.offsets.diff())
        return groups if self.order is None else torch.empty_like(groups).index_copy_(0, self.order, groups)


class Voters:
    """Who votes with which indices of one tensor's batch dim: `groups` at a `place`.

    dim:      the batch's dim, that of the `place`.
    order:    (S,) int64 on the CPU, the dim's indices sorted by group, or None where they are.
    offsets:  (E + 1,) int64 on the CPU; in that order group e owns indices offsets[e]:offsets[e + 1], perhaps none.
    """

    def __init__(self, groups: Groups, place: Place):
        self.groups, self.place, self.dim = groups, place, place.dim
        self._scaled: dict[int, Tensor] = {}
        self._orders: dict[torch.device, Tensor] = {}
        if place.units is None and place.outer == 1 and groups.order is None:
            self.order = None
            self.offsets = groups.offsets if place.times == 1 else groups.offsets * place.times
            return
        members = groups.members()[place.index(groups.num_units).cpu()]
        self.offsets = _offsets(members.bincount(minlength=groups.count))
        order = members.argsort(stable=True)
        self.order = None if torch.equal(order, torch.arange(len(order))) else order

    def all_alike(self) -> Voters:
        """The same without weights and with a vote for every row: for plain sums."""
        groups = self.groups
        if groups.weights is None and groups.voting is None:
            return self
        return replace(groups, weights=None, voting=None).voters(self.place)

    @property
    def rows_vote(self) -> bool:
        return self.groups.rows_vote

    @property
    def count(self) -> int:
        """E, where rows do not vote by themselves."""
        return self.groups.count

    def front(self, tensor: Tensor) -> Tensor:
        """(..., S, ...) -> (S, ...), indices sorted by group."""
        tensor = tensor.movedim(self.dim, 0) if self.dim else tensor
        if self.order is None:
            return tensor
        return tensor.index_select(0, self._order_on(self.order, tensor.device))

    def rows(self, tensor: Tensor, features: int = 1) -> Tensor:
        """(..., S, ..., *features) -> (R, *features), the rows of each group together."""
        front = self.front(tensor)
        lead = front.dim() - features
        rows = front if lead == 1 else front.reshape(math.prod(front.shape[:lead]), *front.shape[lead:])
        voting = self.groups.voting
        if voting is None:
            return rows
        if len(rows) != voting.numel() or bool((self.offsets.diff() != self.offsets[1]).any()):
            raise ValueError(
                f"tokens(mask) has {voting.shape[1]} tokens for each of {len(voting)} examples, but a layer saw an "
                f"input of shape {tuple(tensor.shape)}, whose rows are not these tokens. Remedy: exclude its parameters"
            )
        return rows.index_select(0, moved(voting.flatten().nonzero().flatten(), rows.device))

    def grad_rows(self, grad: Tensor, features: int = 1) -> tuple[Tensor, Tensor]:
        """`rows` of an output's gradient, multiplied by the weights of their groups; and their `bounds`."""
        rows = self.rows(grad, features)
        bounds, weights = self.bounds(rows), self.groups.weights
        if weights is not None:
            rows = rows * _as_column(torch.repeat_interleave(weights, bounds.diff()), rows)
        return rows, bounds

    def bounds(self, rows: Tensor) -> Tensor:
        """(E + 1,) int64 on the CPU: group e owns rows bounds[e]:bounds[e + 1] of what `rows` returned."""
        if self.rows_vote:
            return torch.arange(len(rows) + 1)
        times = rows.shape[0] // self._indices if self._indices else 1
        if times not in self._scaled:
            self._scaled[times] = self.offsets if times == 1 else self.offsets * times
        return self._scaled[times]

    def sums(self, tensor: Tensor, features: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """(..., S, ..., *features) -> (E, *features): sums over each group's rows; deterministic, no atomics."""
        if self.rows_vote:
            return self.rows(tensor, features).to(dtype)
        front = tensor.movedim(self.dim, 0) if self.dim else tensor
        if front.dim() > 1 + features:
            front = front.sum(dim=tuple(range(1, front.dim() - features)), dtype=dtype)
        return self.along(front if dtype in (None, front.dtype) else front.to(dtype), dim=0)

    def along(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """(..., S, ...) -> (E, ...): sums over each group's indices, weighted; all other dims stay."""
        dim = self.dim if dim is None else dim
        front = tensor.movedim(dim, 0) if dim else tensor
        if self.order is not None:
            front = front.index_select(0, self._order_on(self.order, front.device))
        summed = front if self._singles and front.shape[0] == self.count else segment_sum(front, self.offsets)
        weights = self.groups.weights
        return summed if weights is None else summed * _as_column(weights, summed)

    def _order_on(self, order: Tensor, device: torch.device) -> Tensor:
        if device not in self._orders:
            self._orders[device] = moved(order, device)
        return self._orders[device]

    @cached_property
    def _indices(self) -> int:
        """S."""
        return int(self.offsets[-1])

    @cached_property
    def _singles(self) -> bool:
        """Whether each of the E groups has one index."""
        return bool((self.offsets.diff() == 1).all())


MOST_CAPTURED = 4096  # values that a CUDA graph writes one by one


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it.

    While a CUDA graph is captured, values are written there one by one: a copy would be replayed from memory that is no
    longer theirs. RuntimeError for more than `MOST_CAPTURED` of them.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        if tensor.numel() > MOST_CAPTURED:
            raise RuntimeError(
                f"a CUDA graph cannot capture who votes with {tensor.numel()} values in no regular order: let every "
                "example vote by itself, or sort the batch by group"
            )
        values = [torch.full((), value, device=device, dtype=tensor.dtype) for value in tensor.flatten().tolist()]
        return torch.stack(values).reshape(tensor.shape) if values else tensor.new_empty(tensor.shape, device=device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _as_column(values: Tensor, beside: Tensor) -> Tensor:
    return moved(values.to(beside.dtype), beside.device).reshape(-1, *(1,) * (beside.dim() - 1))


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """(R, *rest) -> (E, *rest): sums of the rows offsets[e]:offsets[e + 1]."""
    sizes = offsets.diff()
    if bool((sizes == sizes[0]).all()):
        return values.reshape(len(sizes), int(sizes[0]), *values.shape[1:]).sum(dim=1)
    flat = values.reshape(len(values), math.prod(values.shape[1:])).contiguous()
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        ids = torch.repeat_interleave(sizes)  # what embeddings do to sum rows by id beats segment_reduce
        summed: Tensor = torch.ops.aten.embedding_dense_backward(flat, ids, len(sizes), -1, False)
    else:
        summed = torch.segment_reduce(flat, "sum", offsets=moved(offsets, values.device), axis=0, initial=0)
    return summed.reshape(len(sizes), *values.shape[1:])


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).long().cpu()
