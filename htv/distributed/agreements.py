"""How far the contributions of all ranks agree: what `Handle.stats` tells where they vote together.

All of it follows from sums over coordinates. Those of votes and of sums are taken where the ranks
have exchanged both anyway; what a rank has of its own is summed by one small all-reduce when they
meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from htv.engine.parameter import TrackedParameter
from htv.ops.agreement import Agreement, AgreementSums

__all__ = ["SharedAgreements"]


class SharedAgreements:
    """Gathers what is known of agreement in one round.

    tracked:  all served parameters, in an order that is the same on all ranks.
    """

    def __init__(self, tracked: Sequence[TrackedParameter]):
        self._tracked = list(tracked)
        self._met: set[TrackedParameter] = set()
        self._parts: dict[TrackedParameter, list[AgreementSums]] = {t: [] for t in tracked}
        self._whole: dict[TrackedParameter, list[AgreementSums]] = {t: [] for t in tracked}

    def meet(self, tracked: TrackedParameter) -> None:
        """Note that the ranks meet over a parameter in this round."""
        self._met.add(tracked)

    def add(self, tracked: TrackedParameter, sums: AgreementSums) -> None:
        """Take what this rank has of its own, or of its share of coordinates: ranks' add up."""
        self._parts[tracked].append(sums)

    def add_whole(self, tracked: TrackedParameter, sums: AgreementSums) -> None:
        """Take what every rank has of all of them."""
        self._whole[tracked].append(sums)

    def parts(self, device: torch.device) -> Tensor:
        """Return (parameters, 4) of what is to be summed over ranks, in place, on a device."""
        numbers = [[0.0] * 4 for _ in self._tracked]
        places, tensors = [], []
        for i, tracked in enumerate(self._tracked):
            for sums in self._parts[tracked]:
                for j, value in enumerate(_fields(sums)):
                    if isinstance(value, Tensor):
                        places.append(4 * i + j)
                        tensors.append(value.to(device, torch.float64))
                    else:
                        numbers[i][j] += value
        found = torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, 4)
        if tensors:
            index = torch.tensor(places, device=device)
            found.view(-1).index_add_(0, index, torch.stack(tensors))
        return found

    def tell(self, summed: Tensor, count: int) -> None:
        """Let parameters tell how far the contributions of `count` groups agree.

        summed:  what `parts` returned, summed over ranks by the time somebody asks.
        """
        for row, tracked in zip(summed, self._tracked, strict=True):
            if tracked in self._met:
                coordinates = tracked.parameter.numel()
                whole = self._whole[tracked]  # may be about to come, as `summed`
                tracked.measured = partial(_agreement, row, whole, count, coordinates)


def _agreement(
    row: Tensor, whole: Sequence[AgreementSums], count: int, coordinates: int
) -> Agreement:
    """What follows from what was summed over ranks and what is of all of them."""
    rows = [row.tolist(), *([float(value) for value in _fields(sums)] for sums in whole)]
    totals = [sum(values) for values in zip(*rows, strict=True)]
    return AgreementSums(*totals).agreement(count, coordinates)


def _fields(sums: AgreementSums) -> tuple[float | Tensor, ...]:
    return sums.agreeing, sums.kept, sums.total_energy, sums.energy
