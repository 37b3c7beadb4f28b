"""Curves through weight space: a few control points, and coefficients that say how much of each is
at t.

Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs", arXiv
1802.10026.
"""

from __future__ import annotations

import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from htv.methods.connectivity.layout import Layout, template_of

__all__ = ["Bezier", "LinearPath", "WeightPath", "PolygonalChain", "PathProbe", "QuadraticBezier"]

Weights = nn.Module | Mapping[str, Tensor]
Middle = int | Sequence[Weights]


class WeightPath(nn.Module, ABC):
    """Lead from one model to another through weight space: gamma(t) = sum_k c_k(t) theta_k.

    gamma(0) = start, gamma(1) = end, and the coefficients sum to one. A path owns copies of its
    control points theta_0 = start, ..., theta_n = end, each held in one flat tensor per dtype,
    device and kind (trained parameters; frozen ones and buffers). Three ways to a point of it:

    - ``probe = path.probe(model)``, ``probe.move(t)``: gamma(t) written in place into a copy of the
      model, by lerps of flat tensors. `PathProbe.pull_back` takes gradients to the control points.
    - ``path(t)``: a state for `torch.func.functional_call`, differentiable in the control points
      and in t.
    - ``path.state_at(t)``: a plain state dict.

    What of a model lies on the path: its parameters, frozen ones too, and the persistent
    floating-point buffers that differ between the control points (BatchNorm's running statistics;
    see `reestimate_batchnorm`). Buffers that are equal everywhere are left alone, so that masks of
    infinities stay what they are. `num_batches_tracked` is that of start; any other integer buffer
    must be equal at all points.

    This is the base of the kinds of paths: a subclass says what the coefficients are.

    start:    a model or a state dict; it is copied.
    end:      another of the same architecture; it is copied.
    middle:   the control points in between: models or state dicts, or their number. A number puts
              them evenly on the chord, where every kind of path is at first the linear one.
    model:    a model of the architecture, needed if all the points are state dicts: it tells
              parameters from buffers, which are frozen and which are tied, and where the path lies:
              on its devices. Default: the first model among the points.
    trained:  indices of the control points with gradients. Default: those in between.

    Raises TypeError or ValueError, naming the first key at which the architectures differ.

    Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    arXiv 1802.10026.

    >>> start, end = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    >>> isinstance(htv.methods.LinearPath(start, end), htv.methods.WeightPath)
    True
    """

    points: Sequence[nn.ParameterList]  # in an nn.ModuleList

    def __init__(
        self,
        start: Weights,
        end: Weights,
        middle: Middle = 0,
        *,
        model: nn.Module | None = None,
        trained: Iterable[int] | None = None,
    ):
        super().__init__()
        named = {"start": start, **_named_middle(middle), "end": end}
        self.layout = Layout.of(template_of(named, model))
        states = {name: self.layout.read(name, weights) for name, weights in named.items()}
        self.layout, constants = self.layout.with_buffers(states)
        self._constant_names = list(constants)
        for index, value in enumerate(constants.values()):
            self.register_buffer(f"constant_{index}", value.detach().clone(), persistent=False)
        flats = [self.layout.flatten(state) for state in states.values()]
        if isinstance(middle, int):
            flats[1:1] = [
                _on_chord(flats[0], flats[-1], k / (middle + 1)) for k in range(1, middle + 1)
            ]
        indices = _trained_indices(trained, len(flats))
        self.points = nn.ModuleList(  # type: ignore[assignment]
            self._as_parameters(flat, k in indices) for k, flat in enumerate(flats)
        )

    def _as_parameters(self, flats: list[Tensor], trained: bool) -> nn.ParameterList:
        groups = zip(flats, self.layout.groups, strict=True)
        return nn.ParameterList(
            nn.Parameter(flat, requires_grad=trained and group.trained) for flat, group in groups
        )

    def extra_repr(self) -> str:
        """Return what the module's repr says of its control points."""
        return f"{len(self.points)} points of {sum(p.numel() for p in self.points[0])} coordinates"

    @property
    def trained(self) -> list[int]:
        """Indices of the control points with gradients."""
        return [k for k, point in enumerate(self.points) if any(p.requires_grad for p in point)]

    @abstractmethod
    def _coefficients(self, t: Tensor) -> Tensor:
        """(T,) -> (T, n + 1), differentiable."""

    def coefficients(self, t: float | Tensor, extrapolate: bool = False) -> Tensor:
        """Return how much of every control point is at t, differentiable in t.

        t:            a number, or (T,).
        extrapolate:  whether t may leave [0, 1].

        Returns (n + 1,) float64 for one t, (T, n + 1) for several. Raises ValueError for a t that
        is not finite, or outside [0, 1] without `extrapolate`.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        if t.dim() > 1:
            raise ValueError(f"t must be a number or have shape (T,), got shape {tuple(t.shape)}")
        if not t.isfinite().all():
            raise ValueError(f"t must be finite, got {t.tolist()}")
        if not extrapolate and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(
                f"t must lie in [0, 1], got {t.tolist()}: pass extrapolate=True to leave the "
                "path's ends"
            )
        found = self._coefficients(t.reshape(-1))
        return found.reshape(*t.shape, len(self.points))

    def forward(self, t: float | Tensor, extrapolate: bool = False) -> dict[str, Tensor]:
        """Return gamma(t) as a state for `torch.func.functional_call`, tied names once.

        Gradients flow to the trained control points, each times its coefficient (2t(1 - t) for the
        middle of a quadratic one), and to t if it is a tensor that requires them. For t of shape
        (T,), tensors have T in dim 0: a stack for `torch.func.vmap`.

        t:            a number, or (T,).
        extrapolate:  whether t may leave [0, 1].
        """
        coefficients = self.coefficients(t, extrapolate)
        mixed = [_mix(list(points), coefficients) for points in zip(*self.points, strict=True)]
        state = self.layout.views(mixed)
        for name, value in self._constants().items():
            state[name] = value.expand(
                (*coefficients.shape[:-1], *value.shape)
            ).clone()  # a forward may count in it
        return state

    @torch.no_grad()
    def write(self, t: float, out: list[Tensor], extrapolate: bool = False) -> list[float]:
        """Write gamma(t) into flat tensors; returns the coefficients.

        t:            a number.
        out:          flat tensors, one per group of the layout.
        extrapolate:  whether t may leave [0, 1].
        """
        coefficients = self.coefficients(t, extrapolate).tolist()
        for flat, points in zip(out, zip(*self.points, strict=True), strict=True):
            _combine(list(points), coefficients, flat)
        return coefficients

    @torch.no_grad()
    def state_at(self, t: float, extrapolate: bool = False) -> dict[str, Tensor]:
        """Return gamma(t) as a state dict for `load_state_dict`, under all names of tied tensors.

        t:            a number.
        extrapolate:  whether t may leave [0, 1].
        """
        flats = [torch.empty_like(flat) for flat in self.points[0]]
        self.write(t, flats, extrapolate)
        return self._complete(flats)

    @torch.no_grad()
    def control_state(self, index: int) -> dict[str, Tensor]:
        """Return a control point as a state dict, copied.

        index:  0 is start, -1 is end.
        """
        return self._complete([flat.detach().clone() for flat in self.points[index]])

    def probe(self, model: nn.Module) -> PathProbe:
        """Return a copy of a model, to be moved along the path.

        model:  of the path's architecture; ValueError for another.
        """
        return PathProbe(self, model)

    def _constants(self) -> dict[str, Tensor]:
        return {
            name: getattr(self, f"constant_{index}")
            for index, name in enumerate(self._constant_names)
        }

    def _complete(self, flats: list[Tensor]) -> dict[str, Tensor]:
        state = self.layout.views(flats)
        state.update((name, value.clone()) for name, value in self._constants().items())
        return {name: state[canonical] for name, canonical in self.layout.names.items()}


class LinearPath(WeightPath):
    """Lead straight from one model to another: gamma(t) = (1 - t) start + t end.

    start:    a model or a state dict; it is copied.
    end:      another of the same architecture; it is copied.
    model:    a model of the architecture, needed if both are state dicts.
    trained:  indices of the control points with gradients, 0 for start and 1 for end. Default:
              none.

    Raises what `WeightPath` does.

    >>> start, end = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = start.weight.data.fill_(1.0), end.weight.data.fill_(3.0)
    >>> htv.methods.LinearPath(start, end).state_at(0.25)["weight"]
    tensor([[1.5000]])
    """

    def __init__(self, start: Weights, end: Weights, *, model: nn.Module | None = None,
                 trained: Iterable[int] | None = None):  # fmt: skip
        super().__init__(start, end, model=model, trained=trained)

    def _coefficients(self, t: Tensor) -> Tensor:
        return torch.stack([1 - t, t], dim=1)


class Bezier(WeightPath):
    """Lead by a Bezier curve: gamma(t) = sum_k C(n, k) (1 - t)^(n - k) t^k theta_k.

    start:    a model or a state dict; it is copied.
    end:      another of the same architecture; it is copied.
    middle:   the control points in between, or their number.
    model:    a model of the architecture, needed if all points are state dicts.
    trained:  indices of the control points with gradients. Default: those in between.

    Raises what `WeightPath` does.

    Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    arXiv 1802.10026.

    >>> path = htv.methods.Bezier(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), middle=2)
    >>> path.coefficients(0.5)
    tensor([0.1250, 0.3750, 0.3750, 0.1250], dtype=torch.float64)
    """

    def __init__(self, start: Weights, end: Weights, middle: Middle = 1, *,
                 model: nn.Module | None = None, trained: Iterable[int] | None = None):  # fmt: skip
        super().__init__(start, end, middle, model=model, trained=trained)

    def _coefficients(self, t: Tensor) -> Tensor:
        n = len(self.points) - 1
        return torch.stack(
            [math.comb(n, k) * (1 - t) ** (n - k) * t**k for k in range(n + 1)], dim=1
        )


class QuadraticBezier(Bezier):
    """Lead by a quadratic curve: gamma(t) = (1 - t)^2 start + 2t(1 - t) middle + t^2 end.

    start:    a model or a state dict; it is copied.
    end:      another of the same architecture; it is copied.
    middle:   a third one. Default: the middle of the chord.
    model:    a model of the architecture, needed if all points are state dicts.
    trained:  indices of the control points with gradients. Default: the middle, 1.

    Raises what `WeightPath` does.

    Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    arXiv 1802.10026.

    >>> path = htv.methods.QuadraticBezier(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> path.coefficients(0.5), path.trained
    (tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64), [1])
    """

    def __init__(self, start: Weights, end: Weights, middle: Weights | None = None, *,
                 model: nn.Module | None = None, trained: Iterable[int] | None = None):  # fmt: skip
        super().__init__(
            start, end, 1 if middle is None else [middle], model=model, trained=trained
        )


class PolygonalChain(WeightPath):
    """Lead straight from each control point to the next, in equal times.

    Beyond the ends it goes on along the outer segments.

    start:    a model or a state dict; it is copied.
    end:      another of the same architecture; it is copied.
    middle:   the control points in between, or their number.
    model:    a model of the architecture, needed if all points are state dicts.
    trained:  indices of the control points with gradients. Default: those in between.

    Raises what `WeightPath` does.

    Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    arXiv 1802.10026.

    >>> path = htv.methods.PolygonalChain(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> path.coefficients(0.75)
    tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, start: Weights, end: Weights, middle: Middle = 1, *,
                 model: nn.Module | None = None, trained: Iterable[int] | None = None):  # fmt: skip
        super().__init__(start, end, middle, model=model, trained=trained)

    def _coefficients(self, t: Tensor) -> Tensor:
        n = len(self.points) - 1
        segment = (n * t.detach()).floor().clamp(0, n - 1)
        within = (n * t - segment).unsqueeze(1)
        first = nn.functional.one_hot(segment.long(), n + 1).to(t.dtype)
        return first * (1 - within) + first.roll(1, dims=1) * within


class PathProbe:
    """Move a copy of a model along a path: its parameters are views of flat tensors.

    Its attribute `model` is the copy, at t = 0 until it is moved. Its parameters stay the same
    objects: attach htv to it, or optimizers, as to any other.

    path:   see `WeightPath`.
    model:  of its architecture; not changed. ValueError for another.

    >>> start, end = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = start.weight.data.fill_(1.0), end.weight.data.fill_(3.0)
    >>> probe = htv.methods.LinearPath(start, end, trained=[1]).probe(start)
    >>> probe.move(0.25)(torch.ones(1, 1)).sum().backward()
    >>> probe.pull_back()
    >>> [point.grad for point in probe.path.parameters()]
    [None, tensor([0.2500])]
    """

    def __init__(self, path: WeightPath, model: nn.Module):
        self.path = path
        path.layout.check("model", model)
        self.model = copy.deepcopy(model)
        self._flats = [torch.empty_like(flat, requires_grad=False) for flat in path.points[0]]
        self.coefficients = path.write(0.0, self._flats)
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._moved = [
            (tensors[name], view) for name, view in path.layout.views(self._flats).items()
        ]
        for tensor, view in self._moved:
            tensor.data = view
        for group in path.layout.groups:
            for entry in group.entries:
                if isinstance(tensors[entry.name], nn.Parameter):
                    tensors[entry.name].requires_grad_(group.trained)
        with torch.no_grad():
            for name, value in path._constants().items():
                tensors[name].data = value.clone()
        self._parameters = [
            [tensors[entry.name] for entry in group.entries] for group in path.layout.groups
        ]

    def move(self, t: float, extrapolate: bool = False) -> nn.Module:
        """Overwrite the weights with gamma(t), and return the model. Its gradients are dropped.

        A backward through a forward of before raises, as after any other change in place.

        t:            a number.
        extrapolate:  whether t may leave [0, 1].
        """
        self.coefficients = self.path.write(t, self._flats, extrapolate)
        torch.autograd.graph.increment_version([tensor for tensor, _ in self._moved])
        self.model.zero_grad(set_to_none=True)
        return self.model

    @torch.no_grad()
    def pull_back(self) -> None:
        """Add the model's gradients to `.grad` of the trained control points, by the chain rule.

        Each gets them times its coefficient at t, whatever is in `.grad` of the model's parameters:
        plain gradients, or those of one of htv's rules. The model's own are dropped. Raises
        RuntimeError if there is none, or no trained point.
        """
        if not self.path.trained:
            raise RuntimeError(
                "the path has no trained control point: pass trained=, or give it a middle"
            )
        if all(p.grad is None for group in self._parameters for p in group):
            raise RuntimeError(
                "no parameter of the probe has a gradient: call move(t), and backward() on a loss "
                "of it"
            )
        for index, (parameters, group) in enumerate(
            zip(self._parameters, self.path.layout.groups, strict=True)
        ):
            trained = [(point[index], c)
                       for point, c in zip(self.path.points, self.coefficients, strict=True)
                       if point[index].requires_grad]  # fmt: skip
            if not group.trained or not trained:
                continue
            gradient = torch.cat([_flat_gradient(p) for p in parameters])
            *others, last = trained
            for point, coefficient in others:
                _add_gradient(point, gradient, coefficient)
            _add_gradient(last[0], gradient, last[1], may_keep=True)
        self.model.zero_grad(set_to_none=True)


def _named_middle(middle: Middle) -> dict[str, Weights]:
    if isinstance(middle, bool) or (isinstance(middle, int) and middle < 0):
        raise ValueError(
            f"middle must be the number of control points in between, or these; got {middle!r}"
        )
    if isinstance(middle, int):
        return {}
    if isinstance(middle, nn.Module | Mapping) or not isinstance(middle, Sequence):
        raise TypeError(
            "middle must be a list of models or state dicts, or their number; got "
            f"{type(middle).__name__}: put a single one into a list"
        )
    return {f"middle[{k}]": weights for k, weights in enumerate(middle)}


def _trained_indices(trained: Iterable[int] | None, points: int) -> set[int]:
    if trained is None:
        return set(range(1, points - 1))
    indices = list(trained)
    outside = [k for k in indices if not -points <= k < points]
    if outside:
        raise ValueError(
            f"trained names control points {outside}, but the path has {points}: 0 is start, -1 is "
            "end"
        )
    return {k % points for k in indices}


def _on_chord(start: list[Tensor], end: list[Tensor], t: float) -> list[Tensor]:
    return [torch.lerp(a, b, t) for a, b in zip(start, end, strict=True)]


def _mix(points: list[Tensor], coefficients: Tensor) -> Tensor:
    """sum_k c_k theta_k, differentiable: (P,) for coefficients (n + 1,), (T, P) for (T, n + 1)."""
    wide = torch.promote_types(points[0].dtype, torch.float32)
    real = wide if not wide.is_complex else wide.to_real()
    columns = coefficients.to(points[0].device, real).unsqueeze(-1).unbind(-2)
    parts = (c * point.to(wide) for c, point in zip(columns, points, strict=True))
    return reduce(operator.add, parts).to(points[0].dtype)


def _combine(points: list[Tensor], coefficients: list[float], out: Tensor) -> None:
    """out = sum_k c_k theta_k, in one pass for every point but the first.

    A lerp after the other, as measured on a CPU of two cores: 3.5 ms for two points of 11 million
    float32 and 5.8 ms for three, where `torch._foreach_lerp_` over 62 tensors takes 5.3 with its
    copy and a matrix-vector product 7.1 for three. Points with coefficient zero are not read: an
    end of the path is that end bit for bit.
    """
    used = [(c, point) for c, point in zip(coefficients, points, strict=True) if c != 0]
    if len(used) > 2 and (
        out.dtype in (torch.float16, torch.bfloat16) or any(c < 0 for c, _ in used)
    ):
        # Partial results would be rounded to half precision, or partial sums of coefficients may
        # vanish.
        wide = torch.promote_types(out.dtype, torch.float32)
        total = torch.zeros_like(out, dtype=wide)
        for c, point in used:
            total.add_(point, alpha=c)
        out.copy_(total)
        return
    share, mixed = used[0]
    if len(used) == 1:
        out.copy_(mixed)
    for c, point in used[1:]:
        share += c
        mixed = torch.lerp(mixed, point, c / share, out=out)


def _add_gradient(
    point: nn.Parameter, gradient: Tensor, coefficient: float, may_keep: bool = False
) -> None:
    if point.grad is not None:
        point.grad.add_(gradient, alpha=coefficient)
    else:
        point.grad = gradient.mul_(coefficient) if may_keep else gradient * coefficient


def _flat_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return parameter.new_zeros(1).expand(parameter.numel())
    return (
        parameter.grad.to_dense().reshape(-1)
        if parameter.grad.is_sparse
        else parameter.grad.reshape(-1)
    )
