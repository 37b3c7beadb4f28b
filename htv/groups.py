"""How the rows of a batch map to groups, the units that vote.

A *unit* is one index of a batch's leading dimensions: by default dim 0 holds the examples and every example is its own
group. `Groups` assigns units to groups, whatever follows the leading dimensions (time, space) belonging to its unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignment of the units of one batch to E groups. Made by `each`, `by_id` and `packed`; every group has rows.

    lead:     the shape of the leading dimensions that hold the units, (N,) or (1, N).
    offsets:  (E + 1,) int64 on the CPU; once units are put in `order`, group e owns units offsets[e]:offsets[e + 1].
    order:    (N,) int64, the units sorted by group, or None where they already are.
    keys:     (E,) the caller's ids, or None where groups are numbered as they come; of packed sequences, the numbers of
              those with rows, or None where all have some.
    """

    lead: tuple[int, ...]
    offsets: Tensor
    order: Tensor | None = None
    keys: Tensor | None = None

    @staticmethod
    def each(num_units: int) -> Groups:
        """Every unit of dim 0 is a group of its own."""
        if num_units < 1:
            raise ValueError("the batch is empty: its dim 0 has size 0, and no group can vote (skip the step)")
        return Groups((num_units,), torch.arange(num_units + 1))

    @staticmethod
    def by_id(ids: Tensor | list[int], num_units: int) -> Groups:
        """Units with equal ids vote together. ids: (N,) integers, any values, any order."""
        ids = torch.as_tensor(ids)
        if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise ValueError(
                f"groups must be a 1-D tensor of integer ids, got shape {tuple(ids.shape)} and dtype {ids.dtype}"
            )
        if len(ids) != num_units:
            raise ValueError(
                f"groups has {len(ids)} ids but dim 0 of the batch has size {num_units}: pass one id per example"
            )
        if num_units < 1:
            raise ValueError("groups is empty: no group can vote (skip the step)")
        keys, inverse, sizes = ids.unique(return_inverse=True, return_counts=True)
        order = None if bool((inverse[1:] >= inverse[:-1]).all()) else inverse.argsort(stable=True)
        return Groups((num_units,), _offsets(sizes), order, keys.cpu())

    @staticmethod
    def packed(cu_seqlens: Tensor | list[int], lead: tuple[int, ...]) -> Groups:
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
        num_units = math.prod(lead)
        sizes = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != num_units or bool((sizes < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of packed rows, {num_units}; it goes from "
                f"{int(bounds[0])} to {int(bounds[-1])}" + (" and falls in between" if bool((sizes < 0).any()) else "")
            )
        voting = (sizes > 0).nonzero().flatten()
        if len(voting) == 0:
            raise ValueError("cu_seqlens holds no rows: no group can vote (skip the step)")
        return Groups(lead, _offsets(sizes[voting]), keys=voting if len(voting) < len(sizes) else None)

    @property
    def count(self) -> int:
        """E, the number of groups."""
        return len(self.offsets) - 1

    @property
    def num_units(self) -> int:
        return math.prod(self.lead)

    def same_voters(self, other: Groups) -> bool:
        """Whether group e of both stands for the same voter, so that contributions may be added group by group."""
        if self.keys is None or other.keys is None:
            return self.keys is other.keys and self.count == other.count
        return torch.equal(self.keys, other.keys)

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor's leading dimensions are this batch's."""
        return tuple(tensor.shape[: len(self.lead)]) == self.lead

    def units(self, tensor: Tensor) -> Tensor:
        """(*lead, *rest) -> (N, *rest), in the caller's order."""
        return tensor.reshape(self.num_units, *tensor.shape[len(self.lead) :])

    def sorted_units(self, tensor: Tensor) -> Tensor:
        """(*lead, *rest) -> (N, *rest), in the order of the groups."""
        units = self.units(tensor)
        return units if self.order is None else units.index_select(0, self.order.to(units.device))

    def sum_units(self, tensor: Tensor) -> Tensor:
        """(*lead, *rest) -> (E, *rest), summed within each group; deterministic, no atomics."""
        units = self.sorted_units(tensor)
        return units if self.count == self.num_units else segment_sum(units, self.offsets)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """(R, *rest) -> (E, *rest): sums of the rows offsets[e]:offsets[e + 1]."""
    sizes = offsets.diff()
    if bool((sizes == sizes[0]).all()):
        return values.reshape(len(sizes), int(sizes[0]), *values.shape[1:]).sum(dim=1)
    flat = values.reshape(len(values), -1)  # segment_reduce wants its data contiguous and is fastest in 2-D
    summed = torch.segment_reduce(flat.contiguous(), "sum", offsets=offsets.to(values.device), axis=0, initial=0)
    return summed.reshape(len(sizes), *values.shape[1:])


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).long().cpu()
