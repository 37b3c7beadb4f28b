"""Matching the hidden units of two networks by how alike their activations are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htv.errors import require
from htv.methods.connectivity.layout import Layout
from htv.methods.connectivity.permutations import Observed, PermutationSpec, Units, permute_model
from htv.methods.connectivity.statistics import in_eval_mode, inputs_of, require_repeatable
from htv.methods.connectivity.tracing import trace_permutations

__all__ = ["Matching", "activation_correlations", "match_permutations"]

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, eq=False)
class Matching:
    """Hold the permutations that `match_permutations` found.

    model:         a copy of the second model, its units in the order of the first one's.
    spec:          which units could be permuted.
    permutations:  by name of the units, (size,) int64: unit u of `model` was unit
                   ``permutations[name][u]``.
    before:        by name of the units, the mean correlation of units of the same index.
    after:         the same of the units as they are matched.

    >>> spec = htv.methods.PermutationSpec(units=())
    >>> htv.methods.Matching(torch.nn.Identity(), spec, {}, before={}, after={}).permutations
    {}
    """

    model: nn.Module
    spec: PermutationSpec
    permutations: dict[str, Tensor]
    before: dict[str, float]
    after: dict[str, float]


def match_permutations(
    reference: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    spec: PermutationSpec | None = None,
    *,
    forward: Forward | None = None,
) -> Matching:
    """Permute a model's hidden units so that each is most like the other model's unit in its place.

    Units are compared by the correlations of their activations over `data`, in eval mode, set of
    units by set of units; each set is assigned optimally (the sum of correlations is the largest
    possible). Sets do not depend on each other, so one pass over the data does for all layers. What
    `model` computes does not change.

    reference:  not changed.
    model:      of the same architecture; not changed.
    data:       batches of inputs ``(x, ...)``, gone through once after a look at the first one.
    spec:       which units can be permuted. Default: what `trace_permutations` finds.
    forward:    (model, batch) -> anything, for batches that are not ``(x, ...)``; needs a spec.

    Returns a `Matching`. Needs scipy (extra `methods`), and raises ImportError without it;
    ValueError if the architectures differ, there is no data, activations are not finite or the spec
    changes the function; UnsupportedError if the model cannot be traced.

    Li et al. 2015, "Convergent learning", arXiv 1511.07543.

    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(),
    ...                                    torch.nn.Linear(4, 2))
    >>> reference, x = make(), torch.randn(64, 3)
    >>> spec = htv.methods.trace_permutations(reference, x)
    >>> order = {"0": torch.tensor([2, 0, 3, 1])}
    >>> model = htv.methods.permute_model(reference, spec, order)
    >>> matching = htv.methods.match_permutations(reference, model, [(x,)])
    >>> matching.permutations["0"], torch.equal(matching.model[0].weight, reference[0].weight)
    (tensor([1, 3, 0, 2]), True)
    """
    assign = _linear_sum_assignment()
    Layout.of(reference).check("model", model)
    require_repeatable("data", data)
    first = next(iter(data), None)
    if first is None:
        raise ValueError("data gives no batch")
    if spec is None:
        if forward is not None:
            raise ValueError(
                "forward= needs a spec: make one with trace_permutations or "
                "PermutationSpec.from_layers"
            )
        spec = trace_permutations(model, inputs_of(model, first))
    spec.check(model, first, forward=forward)
    correlations = activation_correlations(reference, model, data, spec, forward=forward)
    permutations = {
        units.name: _assigned(units, correlations[units.name], assign) for units in spec.units
    }
    before = {name: found.diagonal().mean().item() for name, found in correlations.items()}
    after = {name: found[torch.arange(len(found)), permutations[name]].mean().item()
             for name, found in correlations.items()}  # fmt: skip
    return Matching(permute_model(model, spec, permutations), spec, permutations, before, after)


@torch.no_grad()
def activation_correlations(
    reference: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    spec: PermutationSpec,
    *,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Correlate every unit of one model with every unit of the other, over data, in eval mode.

    reference:  a model; its units are along dim 0 of what is returned.
    model:      of the same architecture.
    data:       batches of inputs ``(x, ...)``.
    spec:       which units are compared, and where.
    forward:    (model, batch) -> anything, for batches that are not ``(x, ...)``.

    Returns by name of the units (size, size) float64 on the CPU: means over the places where the
    units are observed. Units that are constant there have correlation 0 with all others. Of each
    batch, one matrix product per place is added up. Raises ValueError if there is no batch or
    activations are not finite.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> x = torch.randn(9, 3)
    >>> spec = htv.methods.trace_permutations(model, x)
    >>> found = htv.methods.activation_correlations(model, model, [(x,)], spec)
    >>> found["0"].diagonal().round(decimals=4)
    tensor([1., 1.], dtype=torch.float64)
    """
    places = [(units, observed) for units in spec.units for observed in units.observed]
    sums = {place: _CrossSums() for place in places}
    batches = 0
    with in_eval_mode(reference), in_eval_mode(model):
        for batch in data:
            ours, theirs = (_observe(net, places, batch, forward) for net in (reference, model))
            for units, observed in places:
                a, b = (rows[observed.module] for rows in (ours, theirs))
                if len(a) != len(b):
                    raise ValueError(
                        f"layer {observed.module!r} ran {len(a)} times in reference, {len(b)} in "
                        "model"
                    )
                for x, y in zip(a, b, strict=True):
                    sums[units, observed].add(
                        observed.rows(x, units.size), observed.rows(y, units.size)
                    )
            batches += 1
    if not batches:
        raise ValueError("data gives no batch")
    found = {}
    for units in spec.units:
        parts = [sums[units, observed].correlations() for observed in units.observed]
        found[units.name] = (
            torch.stack(parts).mean(dim=0)
            if parts
            else torch.zeros(units.size, units.size).double()
        )
        if not found[units.name].isfinite().all():
            raise ValueError(
                f"activations of units {units.name!r} are not finite: they cannot be matched"
            )
    return found


class _CrossSums:
    """Sums of products of two sets of variables, taken from the first row on so that large means
    cancel nothing.
    """

    count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows (n, size) of both."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide), y.to(device=x.device, dtype=wide)
        if len(x) == 0:
            return
        if not self.count:
            self.origin = x[0].clone(), y[0].clone()
            self.cross = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.totals = [self.cross.new_zeros(x.shape[1]) for _ in range(4)]
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.cross += x.T @ y
        for total, part in zip(
            self.totals, (x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0)), strict=True
        ):
            total += part

    def correlations(self) -> Tensor:
        if not self.count:
            raise ValueError("an observed layer gave no activations for the data")
        sum_x, sum_y, square_x, square_y = self.totals
        covariance = self.cross - torch.outer(sum_x, sum_y) / self.count
        variances = [
            square - total.square() / self.count
            for square, total in ((square_x, sum_x), (square_y, sum_y))
        ]
        norms = [
            torch.where(v <= 1e-12 * q, 0, v).sqrt()
            for v, q in zip(variances, (square_x, square_y), strict=True)
        ]
        scale = torch.outer(*norms)
        return torch.where(scale == 0, 0, covariance / scale).cpu()


def _observe(
    net: nn.Module, places: list[tuple[Units, Observed]], batch: Any, forward: Forward | None
) -> dict[str, list[Tensor]]:
    """The outputs of the observed modules, one per call."""
    names = {observed.module for _, observed in places}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with _watching(net, outputs):
        forward(net, batch) if forward else net(inputs_of(net, batch))
    return outputs


@contextmanager
def _watching(net: nn.Module, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    def keeping(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: outputs[name].append(
            output.detach().clone()
        )  # may be changed in place

    hooks = [net.get_submodule(name).register_forward_hook(keeping(name)) for name in outputs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _assigned(units: Units, correlations: Tensor, assign: Callable[..., Any]) -> Tensor:
    """The permutation of largest total correlation; blocks are assigned by what their own best
    assignments reach.
    """
    width = units.size // units.blocks
    blocks = correlations.view(units.blocks, width, units.blocks, width).transpose(1, 2)
    best = [
        [torch.as_tensor(assign(block.numpy(), maximize=True)[1]) for block in row]
        for row in blocks
    ]
    scores = [[block[torch.arange(width), order].sum().item()
               for block, order in zip(row, orders, strict=True)]
              for row, orders in zip(blocks, best, strict=True)]  # fmt: skip
    chosen = assign(scores, maximize=True)[1].tolist()
    return torch.cat([best[i][j] + j * width for i, j in enumerate(chosen)])


def _linear_sum_assignment() -> Callable[..., Any]:
    require("matching units", "methods", "scipy")
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment  # type: ignore[no-any-return]
