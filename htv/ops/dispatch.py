"""Which path serves what, and how much work it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from htv.ops import backend, blocks, sparse, statistics
from htv.ops.factors import (
    BilinearFactors,
    ConvFactors,
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.rules import OPEN, Mean, Rule

MANY = 1 << 30  # groups: which statistic a rule names does not depend on how many there are
# per group of a convolution: below, without a kernel of its own, groups are sliced, folded into one
FEW_OUTPUTS = 16


def path(kind: type[Factors] | Factors, rule: Rule, device: torch.device) -> str:
    """How a parameter with one use of this kind is served, and by which backend where one is
    chosen.

    kind: factors, or their class, which stands for sizes that are not extreme (a convolution that
    is not depthwise). Returns "plain sum", "stacked (...)", "fused (...)", "sliced (...)",
    "sparse", "sparse (...)", "sparse, sliced (...)" or "by group"; of a class of linear layers both
    ways, where one row per group is served otherwise than many. A rule of the user's own stands in
    the place of the backend: "sliced (reduce)".
    """
    if type(rule) is Mean:
        return "plain sum"
    name = statistics.resolve(rule, MANY).name
    found = _path(kind, name, device)
    if isinstance(kind, type) and issubclass(kind, LinearFactors):
        one_row = _path(_OneRow, name, device)
        return found if one_row == found else f"{found}; one row per group: {one_row}"
    return found


def _streams(name: str) -> bool:
    return name != OPEN and statistics.of(name).streams


class _OneRow(LinearFactors):
    """Stands for linear layers whose groups have one row each."""


def _path(kind: type[Factors] | Factors, name: str, device: torch.device) -> str:
    style, _, by = route(kind, name, device)
    if style == "fused":
        return f"fused ({by})"
    if style == "by group":
        return style
    if style == "sparse" and name != OPEN:
        by = server("embedding", kind, name, device)
        if by != "reference" or _streams(name):
            return "sparse" if by == "reference" else f"sparse ({by})"
    by = name if name == OPEN else server("stacked", kind, name, device)
    return f"{'sparse, sliced' if style == 'sparse' else style} ({by})"


def server(op: str, part: type[Factors] | Factors, name: str, device: torch.device) -> str:
    """The backend that serves an op for factors such as these; a class stands for float32 and many
    rows per group.
    """
    if isinstance(part, ViewFactors):
        part = part.inner
    if isinstance(part, type):
        return backend.choose(
            backend.Problem(op, name, device, longest=1 if part is _OneRow else None)
        )
    longest = (
        part.longest if device.type == "cuda" and isinstance(part, LinearFactors) else None
    )  # no matter elsewhere
    return backend.choose(backend.Problem(op, name, device, part.dtype, longest))


class Route(NamedTuple):
    """How the contributions of one use are gone through.

    style:       "fused", "sparse" (pairs of token and group), "stacked", "sliced" (boxes of
                 coordinates) or "by group" (one whole contribution at a time).
    op, server:  of the fused style, the op and the backend that serves it.
    """

    style: str
    op: str = ""
    server: str = ""


_STACKED, _SPARSE, _SLICED, _BY_GROUP = map(Route, ("stacked", "sparse", "sliced", "by group"))


def route(part: type[Factors] | Factors, name: str, device: torch.device, of: str = "") -> Route:
    """The route of one use for a statistic of this name. part: as `path` takes it.

    of:  "_summary" for what is known of contributions in the place of their statistic.
    """
    if isinstance(part, ViewFactors):
        return route(part.inner, name, device, of)
    kind = part if isinstance(part, type) else type(part)
    if name == OPEN:
        return _SPARSE if issubclass(kind, EmbeddingFactors) else _SLICED
    if issubclass(kind, ConvFactors):
        return _conv_route(part, name, device, of)
    if issubclass(kind, LinearFactors):
        by = server(f"linear{of}", part, name, device)
        return _SLICED if by == "reference" else Route("fused", f"linear{of}", by)
    if issubclass(kind, StackedFactors):
        return _STACKED
    if issubclass(kind, EmbeddingFactors):
        return _SPARSE
    return _BY_GROUP if issubclass(kind, GroupwiseFactors) and _streams(name) else _SLICED


def _conv_route(
    part: type[ConvFactors] | ConvFactors, name: str, device: torch.device, of: str
) -> Route:
    by = server(f"conv{of}", part, name, device)
    if by != "reference":
        return Route("fused", f"conv{of}", by)
    sized, by = isinstance(part, ConvFactors), server(f"linear{of}", part, name, device)
    if (
        sized
        and part.geometry.groups > 1
        and part.outputs < (FEW_OUTPUTS if part.folds_well else 4)
    ):
        return _SLICED
    if not _streams(name):
        return _SLICED
    fits = by != "reference" and (not sized or part.fits_linear)
    return Route("fused", f"linear{of}", by) if fits else _BY_GROUP


def extra_work(part: Factors, rule: Rule) -> float:
    """Arithmetic of aggregating one use's contributions, in units of its plain weight gradient's:
    an estimate.

    With E groups, R rows (of a convolution: positions of all samples) and n operations per
    contribution, the plain gradient being 2 R per coordinate:

        plain sum  0
        fused      E / 2R, a comparison and a count at once; E log2(E) / 2R by order rules, in
                   registers and cache. Convolutions copy each window once per block of output
                   channels: + 1 / 2O
        sliced     E (1 + n) / 2R (bilinear: 3R): written, then n = log2(E) comparisons by order
                   rules, n = 4 by others
        by group   E (1 + n) / 2R of a convolution; a gradient pulled back for each group
                   otherwise: E
        sparse     P n / R with P pairs of token and group; order rules E (1 + n) T / R for the T
                   tokens that matter
        stacked    n, in units of summing the stored contributions
    """
    if type(rule) is Mean:
        return 0.0
    if isinstance(part, ViewFactors):
        return extra_work(part.inner, rule)
    statistic, groups = statistics.resolve(rule, part.count), part.count
    operations = 4.0 if _streams(statistic.name) else math.log2(max(2, groups))
    if isinstance(part, StackedFactors):
        return operations
    style = route(part, statistic.name, part.device).style
    if isinstance(part, EmbeddingFactors):
        rows, sizes = max(1, len(part.lookups[0])), part.pairs.touched[1]
        if _streams(statistic.name):
            return operations * len(part.pairs.tokens) / rows
        if statistic.reduce is not None:
            return groups * (1 + operations) * len(sizes) / rows
        return (
            groups
            * (1 + operations)
            * int((sizes > sparse.outvoted(statistic, groups)).sum())
            / rows
        )
    if isinstance(part, GroupwiseFactors):
        return float(groups)
    flops = {BilinearFactors: 3, ConvFactors: 2, LinearFactors: 2}.get(type(part), 2)
    rows = max(1, int((part.row_bounds if isinstance(part, ConvFactors) else part.bounds)[-1]))
    if style != "fused":
        return groups * (1 + operations) / (flops * rows)
    copies = 1 / (2 * part.outputs) if isinstance(part, ConvFactors) else 0.0
    return copies + groups * (1.0 if _streams(statistic.name) else operations) / (2 * rows)


def plan(parts: list[Factors], rule: Rule) -> tuple[str, float | None]:
    """How the recorded uses of one parameter would be served (see `path`), and the `extra_work`.

    None for what is stacked: its work is that of small vectors beside a layer's activations.
    """
    paths, work, coordinates = [], 0.0, 0
    for block in map(blocks.joined, blocks.blocks(parts)):
        mixed = len({type(part) for part in block}) > 1
        found = path(Factors if mixed else block[0], rule, block[0].device)
        paths.append(f"summed per group, then {found}" if mixed else found)
        for part in block:
            if not isinstance(part, StackedFactors):
                work += extra_work(part, rule) * math.prod(part.shape)
                coordinates += math.prod(part.shape)
    return ", ".join(dict.fromkeys(paths)), work / coordinates if coordinates else None
