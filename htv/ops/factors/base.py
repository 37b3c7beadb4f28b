"""What every kind of factors can tell, and contributions that are stored as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from htv.ops import limits
from htv.ops.reference import HALF


class Factors:
    """Contributions c_e of E groups to one parameter.

    shape:    the parameter's shape; `box` ranges over its first two dims (a missing one counts as
              size 1).
    count:    E.
    dtype:    the type contributions are computed in: float32 for half-precision factors.
    scratch:  bytes a slice of contributions may take.
    sized:    whether the way contributions are best gone through depends on `facts`.
    """

    shape: tuple[int, ...]
    count: int
    dtype: torch.dtype
    device: torch.device
    scratch = limits.SCRATCH_BYTES
    sized = False

    def facts(self) -> tuple:
        """Return what decides the way they are gone through, beside kind, dtype and device."""
        return ()

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write the contributions of a box of coordinates. out: (E, r, c, *shape[2:]) in `dtype`,
        contiguous.
        """
        raise TypeError(f"{type(self).__name__} does not define write()")

    def contribution(self, group: int) -> Tensor:
        """The contribution of one group, (*shape) in `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define one()")

    def total(self) -> Tensor:
        """The plain sum over groups, (*shape): what autograd would compute."""
        raise TypeError(f"{type(self).__name__} does not define total()")

    def total_of(self, groups: slice) -> Tensor:
        """The same over some consecutive groups, at least one, in the type of `total` or `dtype`.

        groups:  from a first to the one behind the last; without a step.
        """
        start, stop = groups.start, groups.stop
        first = self.contribution(start)
        return sum((self.contribution(e) for e in range(start + 1, stop)), first)

    def squared_norms(self) -> Tensor:
        """(E,) float64, ||c_e||^2."""
        found = [self.contribution(e).double().square().sum() for e in range(self.count)]
        return torch.stack(found)

    def projections(self, direction: Tensor) -> Tensor:
        """(E,) float64, the inner products <c_e, direction>. direction: (*shape) in `dtype`."""
        found = [
            (self.contribution(e) * direction).sum(dtype=torch.float64) for e in range(self.count)
        ]
        return torch.stack(found)


class StackedFactors(Factors):
    """Contributions that are stored: small beside the activations they come from (biases, norms,
    positions).
    """

    def __init__(self, values: Tensor):
        """values: (E, *shape), one contribution per group."""
        self.values, self.count = values, values.shape[0]
        self.shape, self.device = tuple(values.shape[1:]), values.device
        # As `compute_dtype` says; these are made too often to ask it.
        self.dtype = torch.float32 if values.dtype in HALF else values.dtype

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        values = self.values.reshape(len(self.values), *two_dims(self.shape), *self.shape[2:])
        out.copy_(values[:, rows, columns])

    def contribution(self, group: int) -> Tensor:
        return self.values[group].to(self.dtype)

    def total(self) -> Tensor:
        return self.values.sum(dim=0)

    def total_of(self, groups: slice) -> Tensor:
        return self.values[groups].sum(dim=0)

    def squared_norms(self) -> Tensor:
        return self.values.reshape(self.count, -1).double().square().sum(dim=1)

    def projections(self, direction: Tensor) -> Tensor:
        return self.values.reshape(self.count, -1).double() @ direction.double().flatten()


def two_dims(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of the first two dims of a parameter, a missing one counting as 1."""
    padded = (*shape, 1, 1)
    return padded[0], padded[1]
