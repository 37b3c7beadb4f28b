"""Factors of tensors computed from parameters, as factors of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from htv.ops import limits
from htv.ops.factors.base import Factors, two_dims
from htv.ops.factors.linear import LinearFactors


class GroupwiseFactors(Factors):
    """Contributions to a tensor computed from the parameter, pulled back one group at a time."""

    scratch = limits.GROUPWISE_BYTES

    def __init__(self, inner: Factors, pull_back: Callable[[Tensor], Tensor], parameter: Tensor):
        """pull_back: a linear map from tensors of the inner factors' shape to tensors of the
        parameter's.
        """
        self.inner, self.pull_back = inner, pull_back
        self.shape, self.count, self.device, self.dtype = (
            tuple(parameter.shape),
            inner.count,
            inner.device,
            inner.dtype,
        )

    def fill_block(self, rows: slice, columns: slice, out: Tensor) -> None:
        for e in range(self.count):
            out[e] = self.contribution(e).reshape(*two_dims(self.shape), *self.shape[2:])[
                rows, columns
            ]

    def contribution(self, group: int) -> Tensor:
        return self.pull_back(self.inner.contribution(group)).to(self.dtype)

    def total(self) -> Tensor:
        return self.pull_back(self.inner.total())

    def total_of(self, groups: slice) -> Tensor:
        return self.pull_back(self.inner.total_of(groups))


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
        """Factors of the parameter; those of the view itself if it is the whole parameter, perhaps
        transposed.
        """
        if view == (tuple(parameter.shape), parameter.stride(), 0):
            return inner
        whole = (tuple(parameter.shape)[::-1], parameter.stride()[::-1], 0)
        if view == whole and isinstance(inner, LinearFactors):
            return inner.transposed()
        return ViewFactors(inner, view, parameter)

    def squared_norms(self) -> Tensor:
        return self.inner.squared_norms()

    def projections(self, direction: Tensor) -> Tensor:
        whole = torch.empty_like(
            self._like, device=direction.device, dtype=direction.dtype
        )  # laid out as it is
        return self.inner.projections(self.shown(whole.copy_(direction)))

    def placed(self, value: Tensor) -> Tensor:
        """A tensor of the view's size at its place among zeros, in the parameter's shape."""
        whole = torch.zeros_like(self._like, device=value.device, dtype=value.dtype)
        self.shown(whole).copy_(value)
        return whole

    def shown(self, whole: Tensor) -> Tensor:
        """What the view shows of a tensor laid out as the parameter is."""
        return whole.as_strided(*self.view)
