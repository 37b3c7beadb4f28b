"""Factors of convolutions: a linear layer of the windows that positions see."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from htv.groups import GroupedRows, segment_sum, to_device_async
from htv.ops import limits
from htv.ops.factors.base import Factors
from htv.ops.factors.linear import LinearFactors
from htv.ops.reference import compute_dtype


class ConvFactors(Factors):
    """Convolution weight of shape (O, C / conv_groups, *kernel), any number of spatial dims.

    The S samples are sorted by group, and group e owns samples bounds[e]:bounds[e + 1]. Every
    position of the output is a row of a linear layer whose input is the window of x seen from
    there: L rows for each sample.
    """

    sized = True

    def facts(self) -> tuple:
        return self.x.shape, self.grad_output.shape, self.kernel, self.geometry.groups, self.x.dtype

    def __init__(
        self,
        x: Tensor,
        grad_output: Tensor,
        kernel: tuple[int, ...],
        geometry: ConvGeometry,
        grouped_rows: GroupedRows,
    ):
        """x: (S, C, *space) and grad_output: (S, O, *out_space), same dtype, their samples where
        `grouped_rows` says.
        """
        self.x, self.grad_output, self.bounds = (
            grouped_rows.front(x),
            grouped_rows.front(grad_output),
            grouped_rows.offsets,
        )
        self.kernel, self.geometry = kernel, geometry
        self.shape = (grad_output.shape[1], x.shape[1] // geometry.groups, *kernel)
        self.count, self.device, self.dtype = grouped_rows.count, x.device, compute_dtype(x.dtype)
        weights = grouped_rows.groups.weights
        if weights is not None:  # the one place where they enter
            each = to_device_async(
                torch.repeat_interleave(weights, self.bounds.diff()).to(self.dtype), x.device
            )
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
        """Whether a convolution that takes samples for groups is the fastest way to their
        contributions (measured).
        """
        return self.positions >= 64 and self.device.type == "cpu"

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        for groups, part in self._segments(rows):
            self._write_segment(
                groups, part, columns, out[:, part.start - rows.start : part.stop - rows.start]
            )

    def _segments(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Split a range of output channels into whole groups of the convolution, all at once, and
        parts of one group.

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
        x = self.x.unflatten(1, (self.geometry.groups, self.shape[1]))[
            :, groups, columns
        ]  # (S, n, c, *space)
        grad_output = self.grad_output[:, rows].unflatten(
            1, (x.shape[1], -1)
        )  # (S, n, r, *out_space)
        folds = x.shape[1] > 1 or self.folds_well
        windows = 0 if folds else self.positions * x.shape[2] * math.prod(self.kernel)
        per_sample = (
            max(x[:1].numel(), grad_output[:1].numel(), out[:1].numel(), windows)
            * out.element_size()
        )
        step = max(1, limits.SCRATCH_BYTES // per_sample)
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

        x:            (S * L, taps * c), the windows of the block's c input channels; overwritten by
                      the next.
        grad_output:  (S * L, r), of its r output channels.

        Both are bounded by WINDOW_BYTES, as long as `fits_linear`.
        """
        taps, width, rows = math.prod(self.kernel), self.shape[1], len(self.x) * self.positions
        if rows == 0:
            return
        affordable = limits.WINDOW_BYTES // (rows * self.x.element_size())
        channels = min(width, max(1, _rounded(affordable, (192, 48)) // taps))
        channels = -(-width // -(-width // channels))  # blocks of about the same size
        height = min(self.outputs, max(64, _rounded(affordable, (64,))))
        windows = self.x.new_empty(rows * taps * channels)
        tops = (
            range(first, first + self.outputs, height)
            for first in range(0, self.shape[0], self.outputs)
        )
        for top in itertools.chain.from_iterable(tops):
            group = top // self.outputs
            block = slice(top, min(top + height, (group + 1) * self.outputs))
            grad_output = (
                self.grad_output[:, block].flatten(2).transpose(1, 2).reshape(rows, -1).contiguous()
            )
            for left in range(0, width, channels):
                columns = slice(left, min(left + channels, width))
                seen = slice(group * width + columns.start, group * width + columns.stop)
                yield block, columns, self._windows(self.x[:, seen], windows), grad_output

    @property
    def fits_linear(self) -> bool:
        """Whether `as_linear` stays in bounds with blocks wide enough to be worth it."""
        least = min(48, self.shape[1] * math.prod(self.kernel))
        rows = len(self.x) * self.positions
        return (
            rows * max(least, math.prod(self.kernel)) * self.x.element_size() <= limits.WINDOW_BYTES
        )

    def _windows(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(S * L, taps * c): the windows of x (S, c, *space), if wanted written to the start of a
        flat tensor.
        """
        x, geometry = (
            x.movedim(1, -1),
            self.geometry,
        )  # channels last, so that copies are of long runs
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
        found, step = (
            [],
            max(1, limits.WINDOW_BYTES // max(1, most * inputs * self.x.element_size())),
        )
        for start in range(0, self.count, step):
            bounds = self.bounds[start : start + step + 1]
            samples = slice(*bounds[[0, -1]].tolist())
            x, grad_output = (
                self._windows(self.x[samples]),
                self.grad_output[samples].flatten(2).transpose(1, 2),
            )
            rows = LinearFactors(
                x, grad_output.flatten(0, 1), (bounds - bounds[0]) * self.positions
            )
            found.append(rows.squared_norms())
        return torch.cat(found)

    def projections(self, direction: Tensor) -> Tensor:
        """As those of a linear layer: one forward of the convolution, with the direction for its
        weight.
        """
        geometry, none = self.geometry, [0] * len(self.kernel)
        each = torch.zeros(len(self.x), dtype=torch.float64, device=self.device)
        if len(self.x):
            forward = torch.ops.aten.convolution(
                self.x.to(self.dtype), direction, None, geometry.stride, geometry.padding,
                geometry.dilation, False, none, geometry.groups,
            )  # fmt: skip
            each = (forward * self.grad_output).flatten(1).sum(dim=1, dtype=torch.float64)
        return segment_sum(each, self.bounds)

    def contribution(self, group: int) -> Tensor:
        samples = slice(*self.bounds[group : group + 2].tolist())
        x, grad_output = self.x[samples].to(self.dtype), self.grad_output[samples].to(self.dtype)
        return self._weight_grad(x, grad_output, self.geometry.groups)

    def total(self) -> Tensor:
        return self._weight_grad(self.x, self.grad_output, self.geometry.groups)

    def total_of(self, groups: slice) -> Tensor:
        samples = slice(*self.bounds[[groups.start, groups.stop]].tolist())
        x, grad_output = self.x[samples], self.grad_output[samples]
        return self._weight_grad(x, grad_output, self.geometry.groups)

    def _weight_grad(self, x: Tensor, grad_output: Tensor, groups: int) -> Tensor:
        geometry = self.geometry
        weight = x.new_empty(
            grad_output.shape[1], x.shape[1] // groups, *self.kernel
        )  # only its shape counts
        if len(x) == 0:
            return weight.zero_()
        _, grad, _ = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0] * len(self.kernel), groups, [False, True, False],
        )  # fmt: skip
        return grad


def _rounded(size: int, steps: tuple[int, ...]) -> int:
    """The largest multiple of one of these steps, the first that fits, in a size; the size itself
    below them all.
    """
    return next((size // step * step for step in steps if size >= step), size)


class ConvGeometry:
    """Stride, (symmetric) padding and dilation per spatial dim, and the number of convolution
    groups.
    """

    def __init__(self, stride, padding, dilation, groups: int, dims: int):
        self.stride, self.padding, self.dilation = (
            _per_dim(v, dims) for v in (stride, padding, dilation)
        )
        self.groups = groups

    @staticmethod
    def of(stride, padding, dilation, groups: int, dims: int) -> ConvGeometry:
        """One for all uses that are alike."""
        try:
            return _geometry(stride, padding, dilation, groups, dims)
        except TypeError:  # lists, which cannot be looked up
            steps = (v if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
            return _geometry(*steps, groups, dims)


_geometry = functools.lru_cache(maxsize=256)(ConvGeometry)


def _per_dim(value, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
