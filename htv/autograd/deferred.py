"""Factors of a use met while a compiled backward is traced: they are made when that runs, and who
votes is known.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from htv.errors import UnsupportedError
from htv.groups import GroupedRows, Groups
from htv.ops.factors import Factors, StackedFactors


class DeferredFactors(Factors):
    """make(voters, *tensors), with the voters and the values of the tensors that a run of the
    backward has.

    make:     holds no tensors.
    grouped_rows:   while tracing: every index of the batch's dim by itself.
    tensors:  while tracing.
    """

    def __init__(
        self,
        make: Callable[..., Factors],
        grouped_rows: GroupedRows,
        tensors: tuple[Tensor, ...],
        steps=(),
    ):
        self.make, self.grouped_rows, self.tensors, self._steps = make, grouped_rows, tensors, steps

    def then(self, step: Callable[[Factors, Tensor], Factors]) -> DeferredFactors:
        """Return what a function, which holds no tensors, makes of these and the parameter."""
        return DeferredFactors(self.make, self.grouped_rows, self.tensors, (*self._steps, step))

    def stacked_now(self, name: str) -> Tensor:
        """(S, *shape): the contributions of every index, while tracing; where they are few enough
        to be stacked.

        name: the parameter's, for the refusal.
        """
        factors = self.make(self.grouped_rows, *self.tensors)
        if not isinstance(factors, StackedFactors) or self._steps or self.grouped_rows.rows_vote:
            raise deferred_refusal(name)
        return factors.values

    def recipe(self) -> Callable[[Groups, Tensor, list[Tensor]], Factors]:
        """Makes the factors, given who votes, the parameter and the values of the tensors; holds no
        tensors.
        """
        make, layout, steps = self.make, self.grouped_rows.layout, self._steps

        def run(groups: Groups, parameter: Tensor, tensors: list[Tensor]) -> Factors:
            factors = make(groups.grouped_rows(layout), *tensors)
            for step in steps:
                factors = step(factors, parameter)
            return factors

        return run


def deferred_refusal(name: str) -> UnsupportedError:
    """For a parameter's use whose contributions must go back through a graph that a compiled
    backward has not.
    """
    return UnsupportedError(
        f"parameter {name!r} is used by a layer, or row by row, through a tensor computed from it "
        "(a weight norm, a merged or scaled weight): torch.compile serves computed tensors in "
        "elementwise operations alone. Remedy: run this model without torch.compile, or "
        f"exclude={name!r}"
    )
