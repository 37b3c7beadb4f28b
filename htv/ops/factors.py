"""What determines the contributions of every group to one parameter, without storing them.

Each kind of factors can write the contributions of a box of coordinates (a range of dim 0 by a range of dim 1 of the
parameter, all of its further dims), give those of one group, and, where a layer allows it cheaply, their plain sum. Any
rule then works for any layer: see `htv.ops.aggregate`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.groups import Voters, moved, segment_sum
from htv.ops.reference import compute_dtype

SCRATCH_BYTES = 4 << 20  # what a slice of contributions, and a slice's operands, may take
WINDOW_BYTES = 8 << 20  # what the windows of a convolution's input may take, and the gradients beside them
GROUPWISE_BYTES = 64 << 20  # the same where every slice costs a pass over all groups


class Factors:
    """Contributions c_e of E groups to one parameter.

    shape:    the parameter's shape; `box` ranges over its first two dims (a missing one counts as size 1).
    count:    E.
    dtype:    the type contributions are computed in: float32 for half-precision factors.
    scratch:  bytes a slice of contributions may take.
    """

    shape: tuple[int, ...]
    count: int
    dtype: torch.dtype
    device: torch.device
    scratch = SCRATCH_BYTES

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write the contributions of a box of coordinates. out: (E, r, c, *shape[2:]) in `dtype`, contiguous."""
        raise TypeError(f"{type(self).__name__} does not define write()")

    def one(self, group: int) -> Tensor:
        """The contribution of one group, (*shape) in `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define one()")

    def total(self) -> Tensor:
        """The plain sum over groups, (*shape): what autograd would compute."""
        raise TypeError(f"{type(self).__name__} does not define total()")

    def squared_norms(self) -> Tensor:
        """(E,) float64, ||c_e||^2."""
        found = [self.one(e).double().square().sum() for e in range(self.count)]
        return torch.stack(found)

    def projections(self, direction: Tensor) -> Tensor:
        """(E,) float64, the inner products <c_e, direction>. direction: (*shape) in `dtype`."""
        found = [(self.one(e) * direction).sum(dtype=torch.float64) for e in range(self.count)]
        return torch.stack(found)


class StackedFactors(Factors):
    """Contributions that are stored: small beside the activations they come from (biases, norms, positions)."""

    def __init__(self, values: Tensor):
        """values: (E, *shape), one contribution per group."""
        self.values, self.count = values, len(values)
        self.shape, self.device, self.dtype = tuple(values.shape[1:]), values.device, compute_dtype(values.dtype)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        values = self.values.reshape(len(self.values), *two_dims(self.shape), *self.shape[2:])
        out.copy_(values[:, rows, columns])

    def one(self, group: int) -> Tensor:
        return self.values[group].to(self.dtype)

    def total(self) -> Tensor:
        return self.values.sum(dim=0)

    def squared_norms(self) -> Tensor:
        return self.values.reshape(self.count, -1).double().square().sum(dim=1)

    def projections(self, direction: Tensor) -> Tensor:
        return self.values.reshape(self.count, -1).double() @ direction.double().flatten()


class LinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None] * x[r, None, :], shape (O, I)."""

    def __init__(self, x: Tensor, grad_output: Tensor, bounds: Tensor):
        """x: (R, I) and grad_output: (R, O), the same dtype; group e owns rows bounds[e]:bounds[e + 1]."""
        self.x, self.grad_output, self.bounds, self.count = x, grad_output, bounds, len(bounds) - 1
        self.device, self.dtype = x.device, compute_dtype(x.dtype)
        self.shape = (grad_output.shape[1], x.shape[1])

    @staticmethod
    def joined(parts: list[LinearFactors]) -> LinearFactors:
        """The sum of several factors of one shape, as one of more rows per group."""
        sizes = torch.stack([part.bounds.diff() for part in parts])  # (parts, E)
        bounds = torch.cat([sizes.new_zeros(1), sizes.sum(dim=0).cumsum(0)])
        begins = bounds[:-1] + sizes.cumsum(0) - sizes  # where each part's rows of each group go
        rows = int(bounds[-1])
        x, grad_output = (t.new_empty(rows, t.shape[1]) for t in (parts[0].x, parts[0].grad_output))
        for part, begin, size in zip(parts, begins, sizes, strict=True):
            to = torch.repeat_interleave(begin - part.bounds[:-1], size) + torch.arange(len(part.x))
            to = moved(to, x.device)
            x.index_copy_(0, to, part.x)
            grad_output.index_copy_(0, to, part.grad_output)
        return LinearFactors(x, grad_output, bounds)

    @functools.cached_property
    def longest(self) -> int:
        """The most rows that a group has; where it is one, contributions are outer products."""
        return int(self.bounds.diff().max())

    def transposed(self) -> LinearFactors:
        """Factors of the transposed parameter."""
        return LinearFactors(self.grad_output, self.x, self.bounds)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        x = self.x[:, columns].to(self.dtype)
        grad_output = self.grad_output[:, rows].to(self.dtype)
        sizes = self.bounds.diff()
        if bool((sizes == sizes[0]).all()):
            x, grad_output = (t.reshape(len(sizes), int(sizes[0]), t.shape[1]) for t in (x, grad_output))
            if x.shape[1] == 1:  # one row per group: an outer product
                torch.mul(grad_output.transpose(1, 2), x, out=out)
            else:
                torch.bmm(grad_output.transpose(1, 2), x, out=out)
            return
        for e, (start, end) in enumerate(itertools.pairwise(self.bounds.tolist())):
            torch.mm(grad_output[start:end].t(), x[start:end], out=out[e])

    def one(self, group: int) -> Tensor:
        rows = slice(*self.bounds[group : group + 2].tolist())
        return self.grad_output[rows].to(self.dtype).t() @ self.x[rows].to(self.dtype)

    def total(self) -> Tensor:
        return self.grad_output.t() @ self.x

    def squared_norms(self) -> Tensor:
        """By Gram matrices, sum_rs (g_r . g_s) (x_r . x_s), where a group has few rows."""
        sizes = self.bounds.diff()
        most = int(sizes.max())
        outputs, inputs = self.shape
        if most * (outputs + inputs) > outputs * inputs:
            return super().squared_norms()
        found = torch.empty(self.count, dtype=torch.float64, device=self.device)
        step = max(1, SCRATCH_BYTES // (8 * max(1, most) * (most + outputs + inputs)))
        uniform = bool((sizes == most).all())
        for start in range(0, self.count, step if uniform else 1):
            stop = min(self.count, start + step) if uniform else start + 1
            rows = slice(int(self.bounds[start]), int(self.bounds[stop]))
            size = (rows.stop - rows.start) // (stop - start)
            grams = [t[rows].double().reshape(stop - start, size, t.shape[1]) for t in (self.grad_output, self.x)]
            grams = [torch.bmm(t, t.transpose(1, 2)) for t in grams]
            found[start:stop] = (grams[0] * grams[1]).sum(dim=(1, 2)).clamp(min=0)
        return found

    def projections(self, direction: Tensor) -> Tensor:
        """A row's is g_r . (direction x_r): one forward of the layer, with the direction for its weight."""
        forward = self.x.to(self.dtype) @ direction.t()
        return segment_sum((forward * self.grad_output).sum(dim=1, dtype=torch.float64), self.bounds)


class ConvFactors(Factors):
    """Convolution weight of shape (O, C / conv_groups, *kernel), any number of spatial dims.

    The S samples are sorted by group, and group e owns samples bounds[e]:bounds[e + 1]. Every position of the output is
    a row of a linear layer whose input is the window of x seen from there: L rows for each sample.
    """

    def __init__(self, x: Tensor, grad_output: Tensor, kernel: tuple[int, ...], geometry: ConvGeometry, voters: Voters):
        """x: (S, C, *space) and grad_output: (S, O, *out_space), same dtype, their samples where `voters` says."""
        self.x, self.grad_output, self.bounds = voters.front(x), voters.front(grad_output), voters.offsets
        self.kernel, self.geometry = kernel, geometry
        self.shape = (grad_output.shape[1], x.shape[1] // geometry.groups, *kernel)
        self.count, self.device, self.dtype = voters.count, x.device, compute_dtype(x.dtype)
        weights = voters.groups.weights
        if weights is not None:  # the one place where they enter
            each = moved(torch.repeat_interleave(weights, self.bounds.diff()).to(self.dtype), x.device)
            self.x = self.x.to(self.dtype)
            self.grad_output = self.grad_output * each.reshape(-1, *(1,) * (grad_output.dim() - 1))

    @property
    def positions(self) -> int:
        """L."""
        return math.prod(self.grad_output.shape[2:])

    @property
    def row_bounds(self) -> Tensor:
        """(E + 1,): `bounds` of the S * L rows."""
        return self.bounds * self.positions

    @property
    def outputs(self) -> int:
        """Output channels of one group of the convolution."""
        return self.shape[0] // self.geometry.groups

    @property
    def folds_well(self) -> bool:
        """Whether a convolution that takes samples for groups is the fastest way to their contributions (measured)."""
        return self.positions >= 64 and self.device.type == "cpu"

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        for groups, part in self._segments(rows):
            self._write_segment(groups, part, columns, out[:, part.start - rows.start : part.stop - rows.start])

    def _segments(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Split a range of output channels into whole groups of the convolution, all at once, and parts of one group.

        Yields (groups, output channels).
        """
        size, start = self.outputs, rows.start
        while start < rows.stop:
            first, offset = divmod(start, size)
            whole = 0 if offset else (rows.stop - start) // size
            stop = start + whole * size if whole else min(rows.stop, (first + 1) * size)
            yield slice(first, first + max(1, whole)), slice(start, stop)
            start = stop

    def _write_segment(self, groups: slice, rows: slice, columns: slice, out: Tensor) -> None:
        """out: (E, r, c, *kernel), some samples at a time."""
        x = self.x.unflatten(1, (self.geometry.groups, self.shape[1]))[:, groups, columns]  # (S, n, c, *space)
        grad_output = self.grad_output[:, rows].unflatten(1, (x.shape[1], -1))  # (S, n, r, *out_space)
        folds = x.shape[1] > 1 or self.folds_well
        windows = 0 if folds else self.positions * x.shape[2] * math.prod(self.kernel)
        per_sample = max(x[:1].numel(), grad_output[:1].numel(), out[:1].numel(), windows) * out.element_size()
        step = max(1, SCRATCH_BYTES // per_sample)
        contributions = self._folded if folds else self._by_windows
        bounds, out = self.bounds, out.zero_()
        for start in range(0, len(x), step):
            stop = min(start + step, len(x))
            first = int(torch.searchsorted(bounds, start, right=True)) - 1
            last = int(torch.searchsorted(bounds, stop))
            mine = bounds[first : last + 1].clamp(start, stop) - start
            samples = slice(start, stop)
            found = contributions(x[samples].to(self.dtype), grad_output[samples].to(self.dtype))
            out[first:last] += segment_sum(found.reshape(stop - start, *out.shape[1:]), mine)

    def _folded(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """(S, n * r, c, *kernel): each sample as groups of one convolution.

        x: (S, n, c, *space), grad_output: (S, n, r, *out_space).
        """
        samples, n = x.shape[:2]
        x, grad_output = (t.reshape(1, -1, *t.shape[3:]) for t in (x, grad_output))
        return self._weight_grad(x, grad_output, samples * n)

    def _by_windows(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """The same for n = 1 by products with the windows."""
        windows = self._windows(x[:, 0]).unflatten(0, (len(x), self.positions))
        found = torch.bmm(grad_output[:, 0].flatten(2), windows)
        return self.from_linear(found.flatten(0, 1)).unflatten(0, (len(x), -1))

    def as_linear(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """The weight in blocks, each that of a linear layer: (rows, columns, x, grad_output).

        x:            (S * L, taps * c), the windows of the block's c input channels; overwritten by the next.
        grad_output:  (S * L, r), of its r output channels.

        Both are bounded by WINDOW_BYTES, as long as `fits_linear`.
        """
        taps, width, rows = math.prod(self.kernel), self.shape[1], len(self.x) * self.positions
        if rows == 0:
            return
        affordable = WINDOW_BYTES // (rows * self.x.element_size())
        channels = min(width, max(1, _rounded(affordable, (192, 48)) // taps))
        channels = -(-width // -(-width // channels))  # blocks of about the same size
        height = min(self.outputs, max(64, _rounded(affordable, (64,))))
        windows = self.x.new_empty(rows * taps * channels)
        tops = (range(first, first + self.outputs, height) for first in range(0, self.shape[0], self.outputs))
        for top in itertools.chain.from_iterable(tops):
            group = top // self.outputs
            block = slice(top, min(top + height, (group + 1) * self.outputs))
            grad_output = self.grad_output[:, block].flatten(2).transpose(1, 2).reshape(rows, -1).contiguous()
            for left in range(0, width, channels):
                columns = slice(left, min(left + channels, width))
                seen = slice(group * width + columns.start, group * width + columns.stop)
                yield block, columns, self._windows(self.x[:, seen], windows), grad_output

    @property
    def fits_linear(self) -> bool:
        """Whether `as_linear` stays in bounds with blocks wide enough to be worth it."""
        least = min(48, self.shape[1] * math.prod(self.kernel))
        rows = len(self.x) * self.positions
        return rows * max(least, math.prod(self.kernel)) * self.x.element_size() <= WINDOW_BYTES

    def _windows(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(S * L, taps * c): the windows of x (S, c, *space), if wanted written to the start of a flat tensor."""
        x, geometry = x.movedim(1, -1), self.geometry  # channels last, so that copies are of long runs
        if any(geometry.padding):
            sizes = [n + 2 * p for n, p in zip(x.shape[1:-1], geometry.padding, strict=True)]
            inner = [slice(p, p + n) for n, p in zip(x.shape[1:-1], geometry.padding, strict=True)]
            padded = x.new_zeros(len(x), *sizes, x.shape[-1])
            padded[(slice(None), *inner)] = x
            x = padded
        elif math.prod(self.kernel) > 1:
            x = x.contiguous()
        own, (first, *steps, last) = self.grad_output.shape[2:], x.stride()
        seen = x.as_strided(
            (len(x), *own, *self.kernel, x.shape[-1]),
            (
                first,
                *(step * n for step, n in zip(steps, geometry.stride, strict=True)),
                *(step * n for step, n in zip(steps, geometry.dilation, strict=True)),
                last,
            ),
            x.storage_offset(),
        )
        flat = x.new_empty(seen.numel()) if out is None else out[: seen.numel()]
        flat.view(seen.shape).copy_(seen)
        return flat.view(len(x) * self.positions, math.prod(self.kernel) * x.shape[-1])

    def from_linear(self, value: Tensor) -> Tensor:
        """A block's values (r, taps * c) as (r, c, *kernel)."""
        return value.unflatten(1, (*self.kernel, -1)).movedim(-1, 1)

    def squared_norms(self) -> Tensor:
        """As those of a linear layer, where that is cheaper."""
        inputs = self.shape[1] * math.prod(self.kernel)
        most = int(self.bounds.diff().max()) * self.positions
        if self.geometry.groups > 1 or most * (self.shape[0] + inputs) > self.shape[0] * inputs:
            return super().squared_norms()
        found, step = [], max(1, WINDOW_BYTES // max(1, most * inputs * self.x.element_size()))
        for start in range(0, self.count, step):
            bounds = self.bounds[start : start + step + 1]
            samples = slice(*bounds[[0, -1]].tolist())
            x, grad_output = self._windows(self.x[samples]), self.grad_output[samples].flatten(2).transpose(1, 2)
            rows = LinearFactors(x, grad_output.flatten(0, 1), (bounds - bounds[0]) * self.positions)
            found.append(rows.squared_norms())
        return torch.cat(found)

    def projections(self, direction: Tensor) -> Tensor:
        """As those of a linear layer: one forward of the convolution, with the direction for its weight."""
        geometry, none = self.geometry, [0] * len(self.kernel)
        each = torch.zeros(len(self.x), dtype=torch.float64, device=self.device)
        if len(self.x):
            forward = torch.ops.aten.convolution(
                self.x.to(self.dtype), direction, None, geometry.stride, geometry.padding, geometry.dilation,
                False, none, geometry.groups,
            )  # fmt: skip
            each = (forward * self.grad_output).flatten(1).sum(dim=1, dtype=torch.float64)
        return segment_sum(each, self.bounds)

    def one(self, group: int) -> Tensor:
        samples = slice(*self.bounds[group : group + 2].tolist())
        x, grad_output = self.x[samples].to(self.dtype), self.grad_output[samples].to(self.dtype)
        return self._weight_grad(x, grad_output, self.geometry.groups)

    def total(self) -> Tensor:
        return self._weight_grad(self.x, self.grad_output, self.geometry.groups)

    def _weight_grad(self, x: Tensor, grad_output: Tensor, groups: int) -> Tensor:
        geometry = self.geometry
        weight = x.new_empty(grad_output.shape[1], x.shape[1] // groups, *self.kernel)  # only its shape counts
        if len(x) == 0:
            return weight.zero_()
        _, grad, _ = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0] * len(self.kernel), groups, [False, True, False],
        )  # fmt: skip
        return grad


def _rounded(size: int, steps: tuple[int, ...]) -> int:
    """The largest multiple of one of these steps, the first that fits, in a size; the size itself below them all."""
    return next((size // step * step for step in steps if size >= step), size)


class ConvGeometry:
    """Stride, (symmetric) padding and dilation per spatial dim, and the number of convolution groups."""

    def __init__(self, stride, padding, dilation, groups: int, dims: int):
        self.stride, self.padding, self.dilation = (_per_dim(v, dims) for v in (stride, padding, dilation))
        self.groups = groups

    @staticmethod
    def of(stride, padding, dilation, groups: int, dims: int) -> ConvGeometry:
        """One for all uses that are alike."""
        steps = (v if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
        return _geometry(*steps, groups, dims)


_geometry = functools.lru_cache(maxsize=256)(ConvGeometry)


def _per_dim(value, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


class EmbeddingFactors(Factors):
    """Embedding table of shape (V, D): the contribution of a group to row v sums its output gradients at token v."""

    def __init__(
        self, ids: Tensor, grad_output: Tensor, bounds: Tensor, num_embeddings: int, padding_idx: int | None = None
    ):
        """ids: (R,) integers; grad_output: (R, D); group e owns rows bounds[e]:bounds[e + 1].

        Rows of `padding_idx` get the id -1 and take no part; `padded` says whether there may be any.
        """
        if ids.device.type == "cpu":
            voter = torch.repeat_interleave(bounds.diff())
        else:
            rows = torch.arange(len(ids), device=ids.device)
            voter = torch.bucketize(rows, moved(bounds[1:-1], ids.device), right=True)
        if padding_idx is not None:
            ids = ids.masked_fill(ids == padding_idx, -1)
        self._init(ids, voter, grad_output, num_embeddings, len(bounds) - 1)
        self.padded = padding_idx is not None

    def _init(self, ids: Tensor, voter: Tensor, grad_output: Tensor, num_embeddings: int, count: int) -> None:
        self.ids, self.voter, self.grad_output, self.padded = ids, voter, grad_output, False
        self.count, self.device, self.dtype = count, grad_output.device, compute_dtype(grad_output.dtype)
        self.shape = (num_embeddings, grad_output.shape[1])

    @staticmethod
    def joined(parts: list[EmbeddingFactors]) -> EmbeddingFactors:
        """The sum of several factors of one table."""
        whole = object.__new__(EmbeddingFactors)
        ids, voter, grads = (torch.cat(t) for t in zip(*((p.ids, p.voter, p.grad_output) for p in parts), strict=True))
        whole._init(ids, voter, grads, parts[0].shape[0], parts[0].count)
        whole.padded = any(part.padded for part in parts)
        return whole

    @functools.cached_property
    def lookups(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, voter and grad_output without those of `padding_idx`. How many there are is read from the device."""
        if not self.padded:
            return self.ids, self.voter, self.grad_output
        kept = (self.ids >= 0).nonzero().flatten()
        return tuple(t.index_select(0, kept) for t in (self.ids, self.voter, self.grad_output))

    @functools.cached_property
    def pairs(self) -> Pairs:
        """What is not zero: the contributions of a group to the row of a token it has."""
        ids, voter, grad_output = self.lookups
        key, order = (ids.long() * self.count + voter).sort(stable=True)
        key, sizes = key.unique_consecutive(return_counts=True)
        values = grad_output[order].to(self.dtype)
        values = segment_sum(values, _offsets(sizes)) if len(key) < len(order) else values
        return Pairs(key // self.count, key % self.count, values)

    def compact(self, tokens: Tensor) -> EmbeddingFactors:
        """Factors of the table made of the rows `tokens` alone (sorted)."""
        pairs, place = self.pairs, torch.searchsorted(tokens, self.pairs.tokens)
        kept = (tokens[place.clamp(max=len(tokens) - 1)] == pairs.tokens).nonzero().flatten()
        small = object.__new__(EmbeddingFactors)
        small._init(place[kept], pairs.voter[kept], pairs.values[kept], len(tokens), self.count)
        small.pairs = Pairs(small.ids, small.voter, small.grad_output)
        return small

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        pairs = self.pairs
        first, last = torch.searchsorted(pairs.tokens, pairs.tokens.new_tensor([rows.start, rows.stop])).tolist()
        slot = pairs.voter[first:last] * (rows.stop - rows.start) + (pairs.tokens[first:last] - rows.start)
        out.zero_().flatten(0, 1)[slot] = pairs.values[first:last, columns]

    def one(self, group: int) -> Tensor:
        mine = (self.pairs.voter == group).nonzero().flatten()
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        whole[self.pairs.tokens[mine]] = self.pairs.values[mine]
        return whole

    def total(self) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(self.grad_output, self.ids, self.shape[0], -1, False)

    def squared_norms(self) -> Tensor:
        voter, order = self.pairs.voter.sort(stable=True)
        norms = self.pairs.values.double().square().sum(dim=1)[order]
        return segment_sum(norms, _offsets(voter.bincount(minlength=self.count)))

    def projections(self, direction: Tensor) -> Tensor:
        ids, voter, grad_output = self.lookups
        each = (grad_output * direction[ids]).sum(dim=1, dtype=torch.float64)
        voter, order = voter.sort(stable=True)
        return segment_sum(each[order], _offsets(voter.bincount(minlength=self.count)))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Contributions to an embedding table by (token, group), sorted by both; every other contribution is zero.

    tokens and voter: (P,) int64, no pair twice; values: (P, D).
    """

    tokens: Tensor
    voter: Tensor
    values: Tensor

    @functools.cached_property
    def touched(self) -> tuple[Tensor, Tensor]:
        """The tokens that any group has, sorted, and how many groups have each."""
        return self.tokens.unique_consecutive(return_counts=True)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).cpu()


class BilinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None, None] * left[r, None, :, None] * right[r, None, None, :]."""

    def __init__(self, left: Tensor, right: Tensor, grad_output: Tensor, bounds: Tensor):
        """left: (R, I), right: (R, J), grad_output: (R, O), one dtype; group e owns rows bounds[e]:bounds[e + 1]."""
        self.left, self.right, self.grad_output, self.bounds = left, right, grad_output, bounds
        self.shape = (grad_output.shape[1], left.shape[1], right.shape[1])
        self.count, self.device, self.dtype = len(bounds) - 1, left.device, compute_dtype(left.dtype)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        for e, (start, end) in enumerate(itertools.pairwise(self.bounds.tolist())):
            out[e] = self._sum(slice(start, end), rows, columns)

    def one(self, group: int) -> Tensor:
        return self._sum(slice(*self.bounds[group : group + 2].tolist()), slice(None), slice(None))

    def total(self) -> Tensor:
        return self._sum(slice(None), slice(None), slice(None)).to(self.left.dtype)

    def _sum(self, of: slice, rows: slice, columns: slice) -> Tensor:
        factors = self.grad_output[of, rows], self.left[of, columns], self.right[of]
        return torch.einsum("ro,ri,rj->oij", *(t.to(self.dtype) for t in factors))


class GroupwiseFactors(Factors):
    """Contributions to a tensor computed from the parameter, pulled back to it one group at a time."""

    scratch = GROUPWISE_BYTES

    def __init__(self, inner: Factors, pull_back: Callable[[Tensor], Tensor], parameter: Tensor):
        """pull_back: a linear map from tensors of the inner factors' shape to tensors of the parameter's."""
        self.inner, self.pull_back = inner, pull_back
        self.shape, self.count, self.device, self.dtype = tuple(parameter.shape), inner.count, inner.device, inner.dtype

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        for e in range(self.count):
            out[e] = self.one(e).reshape(*two_dims(self.shape), *self.shape[2:])[rows, columns]

    def one(self, group: int) -> Tensor:
        return self.pull_back(self.inner.one(group)).to(self.dtype)

    def total(self) -> Tensor:
        return self.pull_back(self.inner.total())


View = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset into the dense parameter


class ViewFactors(GroupwiseFactors):
    """Contributions to a view of a parameter that shows no element twice; all others are zero.

    view:   its size, stride and offset.
    inner:  the factors of the view, a tensor of that size.
    """

    def __init__(self, inner: Factors, view: View, parameter: Tensor):
        super().__init__(inner, self.placed, parameter)
        self.view, self._like = view, torch.empty_like(parameter, device="meta")
        self.strides = self._like.stride()  # of the parameter

    @staticmethod
    def of(inner: Factors, view: View, parameter: Tensor) -> Factors:
        """Factors of the parameter; those of the view itself if it is the whole parameter, perhaps transposed."""
        if view == (tuple(parameter.shape), parameter.stride(), 0):
            return inner
        whole = (tuple(parameter.shape)[::-1], parameter.stride()[::-1], 0)
        if view == whole and isinstance(inner, LinearFactors):
            return inner.transposed()
        return ViewFactors(inner, view, parameter)

    def squared_norms(self) -> Tensor:
        return self.inner.squared_norms()

    def projections(self, direction: Tensor) -> Tensor:
        whole = torch.empty_like(self._like, device=direction.device, dtype=direction.dtype)  # laid out as it is
        return self.inner.projections(self.shown(whole.copy_(direction)))

    def placed(self, value: Tensor) -> Tensor:
        """A tensor of the view's size at its place among zeros, in the parameter's shape."""
        whole = torch.zeros_like(self._like, device=value.device, dtype=value.dtype)
        self.shown(whole).copy_(value)
        return whole

    def shown(self, whole: Tensor) -> Tensor:
        """What the view shows of a tensor laid out as the parameter is."""
        return whole.as_strided(*self.view)


def two_dims(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of the first two dims of a parameter, a missing one counting as 1."""
    padded = (*shape, 1, 1)
    return padded[0], padded[1]


__all__ = [
    "BilinearFactors",
    "ConvFactors",
    "ConvGeometry",
    "EmbeddingFactors",
    "Factors",
    "GroupwiseFactors",
    "LinearFactors",
    "Pairs",
    "StackedFactors",
    "ViewFactors",
    "two_dims",
]
