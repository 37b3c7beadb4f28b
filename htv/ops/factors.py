"""What determines the contributions of every group to one parameter, without storing them.

Each kind of factors can write the contributions of a box of coordinates (a range of dim 0 by a range of dim 1 of the
parameter, all of its further dims) and, where a layer allows it cheaply, their plain sum. Any rule then works for any
layer: see `htv.ops.aggregate`.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.groups import Groups
from htv.ops.reference import compute_dtype

SCRATCH_BYTES = 4 << 20  # what a slice of contributions, and a slice's operands, may take


class Factors:
    """Contributions c_e of E groups to one parameter.

    shape:  the parameter's shape; `box` ranges over its first two dims (a missing one counts as size 1).
    dtype:  the type contributions are computed in: float32 for half-precision factors.
    """

    shape: tuple[int, ...]
    groups: Groups
    dtype: torch.dtype
    device: torch.device

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write the contributions of a box of coordinates. out: (E, r, c, *shape[2:]) in `dtype`, contiguous."""
        raise TypeError(f"{type(self).__name__} does not define write()")

    def total(self) -> Tensor:
        """The plain sum over groups, (*shape): what autograd would compute."""
        raise TypeError(f"{type(self).__name__} does not define total()")


class StackedFactors(Factors):
    """Contributions that are stored: small beside the activations they come from (biases, norms, positions)."""

    def __init__(self, values: Tensor, groups: Groups):
        """values: (E, *shape), one contribution per group."""
        self.values, self.groups = values, groups
        self.shape, self.device, self.dtype = tuple(values.shape[1:]), values.device, compute_dtype(values.dtype)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        values = self.values.reshape(len(self.values), *two_dims(self.shape), *self.shape[2:])
        out.copy_(values[:, rows, columns])

    def total(self) -> Tensor:
        return self.values.sum(dim=0)


class LinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None] * x[r, None, :], shape (O, I)."""

    def __init__(self, x: Tensor, grad_output: Tensor, groups: Groups):
        """x: (*lead, *rest, I); grad_output: (*lead, *rest, O), the same dtype."""
        x, grad_output = groups.sorted_units(x), groups.sorted_units(grad_output)
        rows_per_unit = math.prod(x.shape[1:-1])
        self.offsets = groups.offsets * rows_per_unit
        self.x = x.reshape(len(x) * rows_per_unit, x.shape[-1])
        self.grad_output = grad_output.reshape(len(x) * rows_per_unit, grad_output.shape[-1])
        self.groups, self.device, self.dtype = groups, x.device, compute_dtype(x.dtype)
        self.shape = (self.grad_output.shape[1], self.x.shape[1])

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        x = self.x[:, columns].to(self.dtype)
        grad_output = self.grad_output[:, rows].to(self.dtype)
        sizes = self.offsets.diff()
        if bool((sizes == sizes[0]).all()):
            x, grad_output = (t.reshape(len(sizes), int(sizes[0]), t.shape[1]) for t in (x, grad_output))
            if x.shape[1] == 1:  # one row per group: an outer product
                torch.mul(grad_output.transpose(1, 2), x, out=out)
            else:
                torch.bmm(grad_output.transpose(1, 2), x, out=out)
            return
        bounds = self.offsets.tolist()
        for e, (start, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(grad_output[start:end].t(), x[start:end], out=out[e])

    def total(self) -> Tensor:
        return self.grad_output.t() @ self.x


class ConvFactors(Factors):
    """Convolution weight of shape (O, C / conv_groups, *kernel), any number of spatial dims.

    For one kernel tap, the contribution of an example is a product of its output gradient with a strided view of its
    padded input, so no im2col copy is formed.
    """

    def __init__(self, x: Tensor, grad_output: Tensor, kernel: tuple[int, ...], geometry: ConvGeometry, groups: Groups):
        """x: (N, C, *space) and grad_output: (N, O, *out_space), same dtype."""
        self.x, self.grad_output, self.kernel, self.geometry, self.groups = x, grad_output, kernel, geometry, groups
        self.shape = (grad_output.shape[1], x.shape[1] // geometry.groups, *kernel)
        self.device, self.dtype = x.device, compute_dtype(x.dtype)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        for index, part in self._conv_groups(rows):
            self._write_conv_group(index, part, columns, out[:, part.start - rows.start : part.stop - rows.start])

    def _conv_groups(self, rows: slice):
        """Split a range of output channels at the borders of the convolution's groups."""
        size = self.shape[0] // self.geometry.groups
        for index in range(rows.start // size, (rows.stop - 1) // size + 1):
            yield index, slice(max(rows.start, index * size), min(rows.stop, (index + 1) * size))

    def _write_conv_group(self, index: int, rows: slice, columns: slice, out: Tensor) -> None:
        """out: (E, r, c, *kernel)."""
        first = index * self.shape[1]
        x = self.x[:, first + columns.start : first + columns.stop].to(self.dtype)
        x = F.pad(x, [amount for amount in reversed(self.geometry.padding) for _ in range(2)])
        grad_output = self.grad_output[:, rows].to(self.dtype).flatten(2)  # (N, r, L)
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            view = x
            steps = zip(tap, self.geometry.dilation, self.geometry.stride, self.grad_output.shape[2:], strict=True)
            for dim, (k, dilation, stride, length) in enumerate(steps, start=2):
                view = view.narrow(dim, k * dilation, (length - 1) * stride + 1)
                view = view[(slice(None),) * dim + (slice(None, None, stride),)]
            product = torch.bmm(grad_output, view.flatten(2).transpose(1, 2))  # (N, r, c)
            out[(slice(None),) * 3 + tap] = self.groups.sum_units(product)

    def total(self) -> Tensor:
        geometry = self.geometry
        weight = self.x.new_empty(self.shape)  # only its shape counts
        _, grad, _ = torch.ops.aten.convolution_backward(
            self.grad_output, self.x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0] * len(self.kernel), geometry.groups, [False, True, False],
        )  # fmt: skip
        return grad


class ConvGeometry:
    """Stride, (symmetric) padding and dilation per spatial dim, and the number of convolution groups."""

    def __init__(self, stride, padding, dilation, groups: int, dims: int):
        self.stride, self.padding, self.dilation = (_per_dim(v, dims) for v in (stride, padding, dilation))
        self.groups = groups


def _per_dim(value, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


class EmbeddingFactors(Factors):
    """Embedding table of shape (V, D): the contribution of a group to row v sums its output gradients at token v."""

    def __init__(self, ids: Tensor, grad_output: Tensor, num_embeddings: int, padding_idx: int | None, groups: Groups):
        """ids: (*lead, *rest) integers; grad_output: (*lead, *rest, D)."""
        units = groups.sorted_units(ids)
        per_unit = math.prod(units.shape[1:])
        voter = torch.repeat_interleave(groups.offsets.diff() * per_unit).to(ids.device)
        self._init(
            units.flatten(),
            voter,
            groups.sorted_units(grad_output).reshape(len(voter), grad_output.shape[-1]),
            num_embeddings,
            groups,
        )
        if padding_idx is not None:
            kept = self.tokens != padding_idx
            self.tokens, self.voter, self.grad_output = self.tokens[kept], self.voter[kept], self.grad_output[kept]

    def _init(self, tokens: Tensor, voter: Tensor, grad_output: Tensor, num_embeddings: int, groups: Groups) -> None:
        """Occurrences sorted by token, so that a range of rows is a range of occurrences."""
        self.tokens, order = tokens.sort(stable=True)
        self.voter, self.grad_output = voter[order], grad_output[order]
        self.groups, self.device, self.dtype = groups, grad_output.device, compute_dtype(grad_output.dtype)
        self.shape = (num_embeddings, grad_output.shape[1])

    def touched(self) -> Tensor:
        """The sorted ids of all rows with an occurrence; every other row has only zero contributions."""
        return self.tokens.unique()

    def compact(self, tokens: Tensor) -> EmbeddingFactors:
        """The same factors for the table made of the rows `tokens` alone (sorted, a superset of `touched`)."""
        small = object.__new__(EmbeddingFactors)
        small._init(torch.searchsorted(tokens, self.tokens), self.voter, self.grad_output, len(tokens), self.groups)
        return small

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        first, last = torch.searchsorted(self.tokens, self.tokens.new_tensor([rows.start, rows.stop])).tolist()
        slot = self.voter[first:last] * (rows.stop - rows.start) + (self.tokens[first:last] - rows.start)
        grad_output = self.grad_output[first:last, columns].to(self.dtype)
        # index_put_ sorts to accumulate, so there are no atomics on CUDA either.
        out.zero_().flatten(0, 1).index_put_((slot,), grad_output, accumulate=True)

    def total(self) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(self.grad_output, self.tokens, self.shape[0], -1, False)


def two_dims(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of the first two dims of a parameter, a missing one counting as 1."""
    padded = (*shape, 1, 1)
    return padded[0], padded[1]


__all__ = [
    "ConvFactors",
    "ConvGeometry",
    "EmbeddingFactors",
    "Factors",
    "LinearFactors",
    "StackedFactors",
    "two_dims",
]
