"""Factors of linear and bilinear layers."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from htv.groups import segment_sum, to_device_async
from htv.ops import limits
from htv.ops.factors.base import Factors
from htv.ops.reference import HALF, compute_dtype


class LinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None] * x[r, None, :], shape (O, I)."""

    def __init__(self, x: Tensor, grad_output: Tensor, bounds: Tensor):
        """x: (R, I) and grad_output: (R, O), the same dtype; group e owns rows bounds[e]:bounds[e +
        1].
        """
        self.x, self.grad_output, self.bounds = x, grad_output, bounds
        self.count, self.device, self.sized = bounds.shape[0] - 1, x.device, x.is_cuda
        self.shape = (grad_output.shape[1], x.shape[1])
        # As `compute_dtype` says; these are made too often to ask it.
        self.dtype = torch.float32 if x.dtype in HALF else x.dtype

    def facts(self) -> tuple:
        return (self.longest <= 1,)

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
            to = to_device_async(to, x.device)
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

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        x = self.x[:, columns].to(self.dtype)
        grad_output = self.grad_output[:, rows].to(self.dtype)
        sizes = self.bounds.diff()
        if bool((sizes == sizes[0]).all()):
            x, grad_output = (
                t.reshape(len(sizes), int(sizes[0]), t.shape[1]) for t in (x, grad_output)
            )
            if x.shape[1] == 1:  # one row per group: an outer product
                torch.mul(grad_output.transpose(1, 2), x, out=out)
            else:
                torch.bmm(grad_output.transpose(1, 2), x, out=out)
            return
        for e, (start, end) in enumerate(itertools.pairwise(self.bounds.tolist())):
            torch.mm(grad_output[start:end].t(), x[start:end], out=out[e])

    def contribution(self, group: int) -> Tensor:
        rows = slice(*self.bounds[group : group + 2].tolist())
        return self.grad_output[rows].to(self.dtype).t() @ self.x[rows].to(self.dtype)

    def total(self) -> Tensor:
        return self.grad_output.t() @ self.x

    def total_of(self, groups: slice) -> Tensor:
        rows = slice(*self.bounds[[groups.start, groups.stop]].tolist())
        return self.grad_output[rows].t() @ self.x[rows]

    def squared_norms(self) -> Tensor:
        """By Gram matrices, sum_rs (g_r . g_s) (x_r . x_s), where a group has few rows."""
        sizes = self.bounds.diff()
        most = int(sizes.max())
        outputs, inputs = self.shape
        if most * (outputs + inputs) > outputs * inputs:
            return super().squared_norms()
        found = torch.empty(self.count, dtype=torch.float64, device=self.device)
        step = max(1, limits.SCRATCH_BYTES // (8 * max(1, most) * (most + outputs + inputs)))
        uniform = bool((sizes == most).all())
        for start in range(0, self.count, step if uniform else 1):
            stop = min(self.count, start + step) if uniform else start + 1
            rows = slice(int(self.bounds[start]), int(self.bounds[stop]))
            size = (rows.stop - rows.start) // (stop - start)
            grams = [
                t[rows].double().reshape(stop - start, size, t.shape[1])
                for t in (self.grad_output, self.x)
            ]
            grams = [torch.bmm(t, t.transpose(1, 2)) for t in grams]
            found[start:stop] = (grams[0] * grams[1]).sum(dim=(1, 2)).clamp(min=0)
        return found

    def projections(self, direction: Tensor) -> Tensor:
        """A row's is g_r . (direction x_r): one forward of the layer, with the direction for its
        weight.
        """
        forward = self.x.to(self.dtype) @ direction.t()
        return segment_sum(
            (forward * self.grad_output).sum(dim=1, dtype=torch.float64), self.bounds
        )


class BilinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None, None] * left[r, None, :, None] *
    right[r, None, None, :].
    """

    def __init__(self, left: Tensor, right: Tensor, grad_output: Tensor, bounds: Tensor):
        """left: (R, I), right: (R, J), grad_output: (R, O), one dtype; group e owns rows
        bounds[e]:bounds[e + 1].
        """
        self.left, self.right, self.grad_output, self.bounds = left, right, grad_output, bounds
        self.shape = (grad_output.shape[1], left.shape[1], right.shape[1])
        self.count, self.device, self.dtype = (
            len(bounds) - 1,
            left.device,
            compute_dtype(left.dtype),
        )

    def left_first(self) -> BilinearFactors:
        """Factors of the parameter with its first two dims exchanged, (I, O, J)."""
        return BilinearFactors(self.grad_output, self.right, self.left, self.bounds)

    def right_first(self) -> BilinearFactors:
        """Factors of the parameter with its first and last dims exchanged, (J, I, O)."""
        return BilinearFactors(self.left, self.grad_output, self.right, self.bounds)

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        for e, (start, end) in enumerate(itertools.pairwise(self.bounds.tolist())):
            out[e] = self._sum(slice(start, end), rows, columns)

    def contribution(self, group: int) -> Tensor:
        return self._sum(slice(*self.bounds[group : group + 2].tolist()), slice(None), slice(None))

    def total(self) -> Tensor:
        return self._sum(slice(None), slice(None), slice(None)).to(self.left.dtype)

    def total_of(self, groups: slice) -> Tensor:
        rows = slice(*self.bounds[[groups.start, groups.stop]].tolist())
        return self._sum(rows, slice(None), slice(None)).to(self.left.dtype)

    def _sum(self, of: slice, rows: slice, columns: slice) -> Tensor:
        factors = self.grad_output[of, rows], self.left[of, columns], self.right[of]
        return torch.einsum("ro,ri,rj->oij", *(t.to(self.dtype) for t in factors))
