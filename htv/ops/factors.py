"""What determines the contributions of every group to one parameter, without storing them.

Each kind of factors can write the contributions of a box of coordinates (a range of dim 0 by a range of dim 1 of the
parameter, all of its further dims), give those of one group, and, where a layer allows it cheaply, their plain sum. Any
rule then works for any layer: see `htv.ops.aggregate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.groups import Voters
from htv.ops.reference import compute_dtype

SCRATCH_BYTES = 4 << 20  # what a slice of contributions, and a slice's operands, may take
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

    def squared_norms(self) -> Tensor | None:
        """(E,) float64, ||c_e||^2, where that is cheaper than all of c_e; else None."""
        return None


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
        return self.values.flatten(1).double().square().sum(dim=1)


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
        starts = torch.stack([part.bounds[:-1] for part in parts])
        ahead = torch.tensor([0, *(len(part.x) for part in parts[:-1])]).cumsum(0)
        bounds = torch.cat([sizes.new_zeros(1), sizes.sum(dim=0).cumsum(0)])
        # Row j of the result is row `first + j` of all parts' rows one after another, piece by piece.
        lengths = sizes.t().flatten()
        first = (starts + ahead[:, None]).t().flatten() - (lengths.cumsum(0) - lengths)
        order = torch.repeat_interleave(first, lengths) + torch.arange(int(bounds[-1]))
        order = order.to(parts[0].device)
        x, grad_output = (torch.cat(rows)[order] for rows in ([p.x for p in parts], [p.grad_output for p in parts]))
        return LinearFactors(x, grad_output, bounds)

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

    def squared_norms(self) -> Tensor | None:
        """By Gram matrices, sum_rs (g_r . g_s) (x_r . x_s), where a group has few rows."""
        sizes = self.bounds.diff()
        most = int(sizes.max())
        outputs, inputs = self.shape
        if most * (outputs + inputs) > outputs * inputs:
            return None
        found = torch.empty(self.count, dtype=torch.float64, device=self.device)
        step = max(1, SCRATCH_BYTES // (8 * most * (most + outputs + inputs)))
        uniform = bool((sizes == most).all())
        for start in range(0, self.count, step if uniform else 1):
            stop = min(self.count, start + step) if uniform else start + 1
            rows = slice(int(self.bounds[start]), int(self.bounds[stop]))
            grams = [t[rows].double().reshape(stop - start, -1, t.shape[1]) for t in (self.grad_output, self.x)]
            grams = [torch.bmm(t, t.transpose(1, 2)) for t in grams]
            found[start:stop] = (grams[0] * grams[1]).sum(dim=(1, 2)).clamp(min=0)
        return found


class ConvFactors(Factors):
    """Convolution weight of shape (O, C / conv_groups, *kernel), any number of spatial dims.

    For one kernel tap, the contribution of an example is a product of its output gradient with a strided view of its
    padded input.
    """

    def __init__(self, x: Tensor, grad_output: Tensor, kernel: tuple[int, ...], geometry: ConvGeometry, voters: Voters):
        """x: (S, C, *space) and grad_output: (S, O, *out_space), same dtype, their samples where `voters` says."""
        self.x, self.grad_output, self.kernel, self.geometry, self.voters = x, grad_output, kernel, geometry, voters
        self.shape = (grad_output.shape[1], x.shape[1] // geometry.groups, *kernel)
        self.count, self.device, self.dtype = voters.count, x.device, compute_dtype(x.dtype)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        for index, part in self._conv_groups(rows):
            self._write_conv_group(index, part, columns, out[:, part.start - rows.start : part.stop - rows.start])

    def _conv_groups(self, rows: slice) -> Iterator[tuple[int, slice]]:
        """Split a range of output channels at the borders of the convolution's groups."""
        size = self.shape[0] // self.geometry.groups
        for index in range(rows.start // size, (rows.stop - 1) // size + 1):
            yield index, slice(max(rows.start, index * size), min(rows.stop, (index + 1) * size))

    def _write_conv_group(self, index: int, rows: slice, columns: slice, out: Tensor) -> None:
        """out: (E, r, c, *kernel)."""
        first = index * self.shape[1]
        x = self.padded(slice(first + columns.start, first + columns.stop))
        grad_output = self.grad_output[:, rows].to(self.dtype).flatten(2)  # (S, r, L)
        for tap in self.taps():
            product = torch.bmm(grad_output, self.seen_by(tap, x).flatten(2).transpose(1, 2))  # (S, r, c)
            out[(slice(None),) * 3 + tap] = self.voters.along(product)

    def taps(self) -> Iterator[tuple[int, ...]]:
        """The kernel's positions, in order."""
        return itertools.product(*(range(k) for k in self.kernel))

    def padded(self, channels: slice) -> Tensor:
        """Some channels of the input in `dtype`, with the convolution's zero padding."""
        x = self.x[:, channels].to(self.dtype)
        return F.pad(x, [amount for amount in reversed(self.geometry.padding) for _ in range(2)])

    def seen_by(self, tap: tuple[int, ...], x: Tensor) -> Tensor:
        """(S, c, *out_space): what one position of the kernel sees of a padded input; a view."""
        steps = zip(tap, self.geometry.dilation, self.geometry.stride, self.grad_output.shape[2:], strict=True)
        for dim, (k, dilation, stride, length) in enumerate(steps, start=2):
            x = x.narrow(dim, k * dilation, (length - 1) * stride + 1)
            x = x[(slice(None),) * dim + (slice(None, None, stride),)]
        return x

    def one(self, group: int) -> Tensor:
        order, (start, end) = self.voters.order, self.voters.offsets[group : group + 2].tolist()
        samples = slice(start, end) if order is None else order[start:end].to(self.device)
        grad = self._weight_grad(self.x[samples].to(self.dtype), self.grad_output[samples].to(self.dtype))
        weights = self.voters.groups.weights
        return grad if weights is None else grad * weights[group].item()

    def total(self) -> Tensor:
        if self.voters.groups.weights is None:
            return self._weight_grad(self.x, self.grad_output)
        return sum(self.one(e) for e in range(self.count))

    def _weight_grad(self, x: Tensor, grad_output: Tensor) -> Tensor:
        geometry = self.geometry
        weight = x.new_empty(self.shape)  # only its shape counts
        _, grad, _ = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, geometry.stride, geometry.padding, geometry.dilation,
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

    def __init__(
        self, ids: Tensor, grad_output: Tensor, bounds: Tensor, num_embeddings: int, padding_idx: int | None = None
    ):
        """ids: (R,) integers; grad_output: (R, D); group e owns rows bounds[e]:bounds[e + 1]."""
        voter = torch.repeat_interleave(bounds.diff()).to(ids.device)
        if padding_idx is not None:
            kept = ids != padding_idx
            ids, voter, grad_output = ids[kept], voter[kept], grad_output[kept]
        self._init(ids, voter, grad_output, num_embeddings, len(bounds) - 1)

    def _init(self, tokens: Tensor, voter: Tensor, grad_output: Tensor, num_embeddings: int, count: int) -> None:
        """Occurrences sorted by token, so that a range of rows is a range of occurrences."""
        self.tokens, order = tokens.sort(stable=True)
        self.voter, self.grad_output = voter[order], grad_output[order]
        self.count, self.device, self.dtype = count, grad_output.device, compute_dtype(grad_output.dtype)
        self.shape = (num_embeddings, grad_output.shape[1])

    def touched(self) -> Tensor:
        """The sorted ids of all rows with an occurrence; every other row has only zero contributions."""
        return self.tokens.unique()

    def compact(self, tokens: Tensor) -> EmbeddingFactors:
        """The same factors for the table made of the rows `tokens` alone (sorted, a superset of `touched`)."""
        small = object.__new__(EmbeddingFactors)
        small._init(torch.searchsorted(tokens, self.tokens), self.voter, self.grad_output, len(tokens), self.count)
        return small

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        first, last = torch.searchsorted(self.tokens, self.tokens.new_tensor([rows.start, rows.stop])).tolist()
        slot = self.voter[first:last] * (rows.stop - rows.start) + (self.tokens[first:last] - rows.start)
        grad_output = self.grad_output[first:last, columns].to(self.dtype)
        # index_put_ sorts to accumulate, so there are no atomics on CUDA either.
        out.zero_().flatten(0, 1).index_put_((slot,), grad_output, accumulate=True)

    def one(self, group: int) -> Tensor:
        mine = self.voter == group
        return self._sum(self.grad_output[mine].to(self.dtype), self.tokens[mine])

    def total(self) -> Tensor:
        return self._sum(self.grad_output, self.tokens)

    def _sum(self, grad_output: Tensor, tokens: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad_output, tokens, self.shape[0], -1, False)


class BilinearFactors(Factors):
    """c_e = sum over e's rows r of grad_output[r, :, None, None] * left[r, None, :, None] * right[r, None, None, :]."""

    def __init__(self, left: Tensor, right: Tensor, grad_output: Tensor, bounds: Tensor):
        """left: (R, I), right: (R, J), grad_output: (R, O), the same dtype; group e owns rows bounds[e]:bounds[e + 1]."""
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

    @staticmethod
    def of(inner: Factors, view: View, parameter: Tensor) -> Factors:
        """Factors of the parameter; those of the view itself where it shows all of a parameter as it is or transposed."""
        if view == (tuple(parameter.shape), parameter.stride(), 0):
            return inner
        whole = (tuple(parameter.shape)[::-1], parameter.stride()[::-1], 0)
        if view == whole and isinstance(inner, LinearFactors):
            return inner.transposed()
        return ViewFactors(inner, view, parameter)

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
    "StackedFactors",
    "ViewFactors",
    "two_dims",
]
