"""Which hidden units a network can permute, found by following them through one forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from htv.errors import UnsupportedError
from htv.methods.connectivity.permutations import (
    Observed,
    PermutationSpec,
    UnitAxis,
    Units,
    blocks_of,
    carried_axes,
    channel_dim,
    consumed_axes,
    is_norm,
    produced_axes,
)

__all__ = ["trace_permutations"]

# Element by element, or by whole rows of units (softmax): a permutation of units goes through.
ELEMENTWISE_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid,
    nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid, nn.Threshold,
    nn.RReLU, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.PReLU,
)  # fmt: skip
ELEMENTWISE = frozenset(
    """relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh softplus softsign hardtanh
    hardsigmoid hardswish hardshrink softshrink tanhshrink logsigmoid threshold rrelu softmax
    log_softmax softmin dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    stochastic_depth add iadd sub isub mul imul truediv itruediv div neg pow square sqrt rsqrt exp
    log log1p expm1 abs erf sin cos clamp clamp_min clamp_max maximum minimum where lerp gt ge lt le
    eq ne logical_not logical_and logical_or isnan nan_to_num masked_fill contiguous clone detach to
    float double half bfloat16 type type_as""".split()
)
# One channel at a time, over the dims behind it.
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d,
    nn.LPPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
    nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
SPATIAL = frozenset(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d interpolate pad""".split()
)
# Only move elements: run on the numbers of the units, they tell where these go.
MOVING_MODULES = (nn.Flatten, nn.Unflatten)
MOVING = frozenset(
    """flatten unflatten view reshape permute transpose swapaxes swapdims movedim moveaxis t squeeze
    unsqueeze getitem expand expand_as repeat narrow select flip roll chunk split unbind
    contiguous""".split()
)
REDUCTIONS = frozenset("mean sum amax amin".split())
# Nothing of the values but their shape.
SHAPES = frozenset(
    "size dim ndimension numel getattr".split()
)  # getattr of x.T is a tensor, and refused


@dataclass(frozen=True)
class _Place:
    """Where units lie in a value: along `dim`, at (outer, size, inner), where inner follows from
    the dim's length.
    """

    dim: int
    units: int
    outer: int = 1


@dataclass
class _Set:
    """Units found so far.

    axes:           (tensor, dim) -> outer.
    norms, layers:  what could be observed: (module, dim, outer, length) of outputs.
    """

    size: int
    name: str
    axes: dict[tuple[str, int], int] = field(default_factory=dict)
    norms: dict[tuple[str, int, int, int], None] = field(default_factory=dict)
    layers: dict[tuple[str, int, int, int], None] = field(default_factory=dict)
    blocks: int = 1
    pinned: str | None = None
    refused: str | None = None


class _Refusal(Exception):
    """Units cannot be followed through an operation."""


@torch.no_grad()
def trace_permutations(
    model: nn.Module, example: Tensor, *, on_unsupported: str = "error"
) -> PermutationSpec:
    """Follow every layer's output channels through one forward to the layers that take them.

    Served are linear, convolutional (transposed, depthwise) layers and embeddings, batch, layer,
    group, instance and RMS normalisations, elementwise operations with each other and with
    parameters, pooling, padding, flattening and anything else that only moves elements, means and
    sums. What is added or multiplied is permuted together, so residual streams become one set of
    units. Units that meet the network's inputs or outputs are pinned. Under a GroupNorm, its groups
    are permuted as wholes, and channels within them.

    model:           one that `torch.fx` can trace: no control flow that depends on values. It is
                     not changed; a copy runs in eval mode.
    example:         an input of the model, (N, ...); N of two or more is best.
    on_unsupported:  what to do with units that reach an operation that is not known to keep them
                     apart (attention, concatenation, channel shuffles, convolutions in groups of
                     several channels): "error", or "pinned" to leave them as they are and match the
                     rest.

    Returns a `PermutationSpec`. Raises UnsupportedError naming the layer or operation; the remedy
    is `PermutationSpec.from_layers`.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> spec = htv.methods.trace_permutations(model, torch.randn(2, 3))
    >>> [(units.name, units.size) for units in spec.units]
    [('0', 4)]
    """
    if on_unsupported not in ("error", "pinned"):
        raise ValueError(f"on_unsupported must be 'error' or 'pinned', got {on_unsupported!r}")
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise UnsupportedError(
            f"torch.fx cannot trace the model ({type(error).__name__}: {error}): list its units "
            "by hand with PermutationSpec.from_layers"
        ) from error
    follower = _Follower(graph, model)
    parameter = next(model.parameters(), example)
    follower.run(example.to(parameter.device))
    follower.require_all_reached(model)
    return follower.spec(on_unsupported)


class _Follower(fx.Interpreter):
    """Runs the graph, and notes for every value where units lie in it."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module):
        super().__init__(graph, garbage_collect_values=False)
        self.places: dict[fx.Node, Any] = {}
        self.sets: list[_Set] = []
        self.parent: list[int] = []
        self.owner: dict[tuple[str, int], int] = {}
        self.reached: set[int] = set()
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.canonical = {id(tensor): name for name, tensor in tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.frozen = self._new(0, "inputs")  # what no permutation reaches
        self.sets[self.frozen].pinned = "it meets what is not permuted, such as the network's input"

    # Sets of units

    def _new(self, size: int, name: str) -> int:
        self.sets.append(_Set(size, name))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def _root(self, units: int) -> int:
        while self.parent[units] != units:
            units = self.parent[units]
        return units

    def _set(self, units: int) -> _Set:
        return self.sets[self._root(units)]

    def _join(self, a: int, b: int) -> None:
        a, b = sorted((self._root(a), self._root(b)))
        if a == b:
            return
        first, second = self.sets[a], self.sets[b]
        self.parent[b] = a
        if self.frozen not in (a, b):
            self._unite(first, second)
        first.pinned, first.refused = first.pinned or second.pinned, first.refused or second.refused
        for kept, more in ((first.norms, second.norms), (first.layers, second.layers)):
            kept.update(more)
        first.axes.update(second.axes)

    @staticmethod
    def _unite(first: _Set, second: _Set) -> None:
        """Make the first one's units those of both: of two sizes, the pieces that hold whole units
        of each.
        """
        if 1 not in (first.blocks, second.blocks) and first.blocks != second.blocks:
            first.refused = (
                first.refused
                or f"GroupNorms of {first.blocks} and {second.blocks} groups in one place"
            )
        first.size, first.blocks = (
            math.gcd(first.size, second.size),
            max(first.blocks, second.blocks),
        )

    def _pin(self, units: int, reason: str) -> None:
        found = self._set(units)
        found.pinned = found.pinned or reason

    def _hold(self, tensor: Tensor | None, dim: int, units: int, outer: int = 1) -> None:
        """Units lie along a dim of a parameter or buffer."""
        if tensor is None:
            return
        if id(tensor) not in self.canonical:
            raise _Refusal("a layer whose weight is computed from other parameters")
        key = (self.canonical[id(tensor)], dim)
        if key in self.owner:
            known = self._set(self.owner[key])
            if key in known.axes and known.axes[key] != outer and units != self.frozen:
                known.refused = known.refused or f"they lie in {key[0]!r} in two ways"
            self._join(self.owner[key], units)
        else:
            self.owner[key] = units
        self._set(units).axes.setdefault(key, outer)

    def _freeze(self, tensor: Any, but: int | None = None) -> None:
        """No units lie along any dim of a parameter or buffer, but along one."""
        if id(tensor) in self.canonical:
            for dim in range(tensor.dim()):
                if dim != but:
                    self._hold(tensor, dim, self.frozen)

    # One operation at a time

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        try:
            self.places[node] = self._follow(node, result)
        except _Refusal as refusal:
            for place in self._tracked(node):
                found = self._set(place.units)
                found.refused = found.refused or (None if found.pinned else str(refusal))
            for parameter in self._parameters(node):
                self._freeze(parameter)
            self.places[node] = None
        return result

    def _parameters(self, node: fx.Node) -> list[Tensor]:
        """Those of the module that is called, and those given to the operation by name."""
        given = [self.env[source] for source in node.all_input_nodes if source.op == "get_attr"]
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return given + list(module.parameters() if module is not None else ())

    def _tracked(self, node: fx.Node) -> list[_Place]:
        found = []
        for source in node.all_input_nodes:
            place = self.places.get(source)
            if isinstance(place, tuple):
                found += [p for p in place if p is not None]
            elif place:
                found.append(place)
        return found

    def _follow(self, node: fx.Node, result: Any) -> Any:
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            self.reached.add(id(result))
            return None
        if node.op == "output":
            for place in self._tracked(node):
                self._pin(place.units, "they are outputs of the network")
            for parameter in self._parameters(node):
                self._freeze(parameter)
            return None
        if node.op == "call_module":
            return self._through_module(node, result)
        name = str(node.target)
        if node.op != "call_method":
            name = getattr(node.target, "__name__", name)
        return self._through_function(node, name.rstrip("_"), result)

    def _through_function(self, node: fx.Node, name: str, result: Any) -> Any:
        if name in ELEMENTWISE and isinstance(result, Tensor):
            return self._elementwise(node, result)
        for parameter in self._parameters(node):
            self._freeze(parameter)
        tracked = self._tracked(node)
        if not tracked or (name in SHAPES and not isinstance(result, Tensor)):
            return None
        source: Any = node.args[0] if node.args else None
        place = self.places.get(source) if isinstance(source, fx.Node) else None
        if isinstance(place, tuple) and name == "getitem":
            index: Any = node.args[1]
            return place[index]
        if not isinstance(place, _Place) or len(tracked) > 1:
            raise _Refusal(f"operation {name!r} ({node.name})")
        x = self.env[source]
        if name in SPATIAL:
            return self._spatial(node.name, name, place, x, result)
        if name in REDUCTIONS:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return self._reduced(place, x, *args[1:], **kwargs)
        if name in MOVING:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            call: Any = getattr(torch.Tensor, name) if node.op == "call_method" else node.target
            return self._moved(
                f"operation {name!r} ({node.name})",
                place,
                x,
                lambda t: call(t, *args[1:], **kwargs),
            )
        raise _Refusal(f"operation {name!r} ({node.name})")

    def _through_module(self, node: fx.Node, result: Any) -> Any:
        name, module = str(node.target), self.module.get_submodule(str(node.target))
        self.reached.update(id(p) for p in module.parameters())
        groups = f" of {module.groups} groups" if getattr(module, "groups", 1) > 1 else ""
        where = f"layer {name!r}, a {type(module).__name__}{groups}"
        source: Any = node.args[0] if node.args else next(iter(node.kwargs.values()))
        place, x = self.places.get(source), self.env.get(source, source)
        if isinstance(place, tuple) or len(self._tracked(node)) > (place is not None):
            raise _Refusal(where)
        if isinstance(module, _ConvNd) and result.dim() != len(module.kernel_size) + 2:
            raise ValueError(
                f"example must hold a batch in dim 0, but {where}, got one of shape "
                f"{tuple(x.shape)}"
            )
        if produced_axes(module):
            self._consume(module, place, x, where)
            return self._produce(module, name, result)
        if carried_axes(module) or is_norm(module):
            return self._carry(module, name, place, x, where)
        if place is None:
            for parameter in self._parameters(node):
                self._freeze(parameter)
            return None
        if isinstance(module, ELEMENTWISE_MODULES):
            return place
        if isinstance(module, SPATIAL_MODULES):
            return self._spatial(where, where, place, x, result)
        if isinstance(module, MOVING_MODULES):
            return self._moved(where, place, x, module)
        raise _Refusal(where)

    def _consume(self, module: nn.Module, place: _Place | None, x: Tensor, where: str) -> None:
        for tensor, dim in consumed_axes(module):
            weight = getattr(module, tensor)
            if place is None:
                self._hold(weight, dim, self.frozen)
                continue
            if place.dim != channel_dim(module) % x.dim():
                raise _Refusal(f"{where}, over another dim than theirs")
            self._hold(weight, dim, place.units, place.outer)

    def _produce(self, module: nn.Module, name: str, result: Tensor) -> _Place | None:
        (tensor, dim), *_ = axes = produced_axes(module)
        weight = getattr(module, tensor)
        if weight.shape[dim] == 1:
            return None  # nothing to permute
        key = (self.canonical.get(id(weight), name), dim)
        units = self.owner[key] if key in self.owner else self._new(weight.shape[dim], name)
        for tensor, dim in axes:
            self._hold(getattr(module, tensor, None), dim, units)
        self._set(units).layers[name, channel_dim(module), 1, weight.shape[dim]] = None
        return _Place(channel_dim(module) % result.dim(), units)

    def _carry(
        self, module: nn.Module, name: str, place: _Place | None, x: Tensor, where: str
    ) -> _Place | None:
        if place is None:
            for tensor, dim in carried_axes(module):
                self._hold(getattr(module, tensor, None), dim, self.frozen)
            return None
        shape = getattr(module, "normalized_shape", None)
        offset = (
            x.dim() - len(shape) if shape else channel_dim(module)
        )  # where the parameters' first dim is in x
        inside = place.dim >= offset if shape else place.dim == offset
        if not inside and not shape:
            raise _Refusal(f"{where}, over another dim than theirs")
        self._respect_blocks(module, place, where)
        if not inside:
            return place
        for tensor, _ in carried_axes(module):
            dim = place.dim - offset if shape else 0
            self._hold(getattr(module, tensor, None), dim, place.units, place.outer)
        if is_norm(module):
            self._set(place.units).norms[
                name, place.dim - x.dim(), place.outer, x.shape[place.dim]
            ] = None
        return place

    def _respect_blocks(self, module: nn.Module, place: _Place, where: str) -> None:
        blocks, found = blocks_of(module), self._set(place.units)
        if blocks == 1:
            return
        if place.outer != 1 or found.blocks not in (1, blocks):
            raise _Refusal(f"{where} of {blocks} groups, which cut across others")
        found.blocks = blocks

    def _spatial(self, node: str, name: str, place: _Place, x: Tensor, result: Any) -> _Place:
        same = (
            isinstance(result, Tensor)
            and result.dim() == x.dim()
            and result.shape[place.dim] == x.shape[place.dim]
        )
        if place.dim != 1 or x.dim() < 3 or not same:
            raise _Refusal(f"operation {name!r} ({node}), over another dim than theirs")
        return place

    def _reduced(
        self, place: _Place, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> _Place | None:
        if dim is None or dim == ():
            dims: Iterable[int] = range(x.dim())
        elif isinstance(dim, int):
            dims = [dim]
        else:
            dims = dim
        gone = sorted(d % x.dim() for d in dims)
        if place.dim in gone:
            return None  # a sum over units is the same in any order
        return (
            place if keepdim else replace(place, dim=place.dim - sum(d < place.dim for d in gone))
        )

    def _numbers(self, place: _Place, x: Tensor) -> Tensor:
        """At every element of x, the number of its unit."""
        size = self._set(place.units).size
        inner = x.shape[place.dim] // (place.outer * size)
        along = torch.arange(size).view(1, -1, 1).expand(place.outer, -1, inner).reshape(-1)
        return (
            along.view([-1 if d == place.dim else 1 for d in range(x.dim())])
            .expand(x.shape)
            .clone()
        )

    def _moved(self, where: str, place: _Place, x: Tensor, call: Any) -> Any:
        try:
            moved = call(self._numbers(place, x))
        except Exception as error:  # a view as another dtype, say
            raise _Refusal(f"{where} ({error})") from error
        if isinstance(moved, tuple | list):
            return tuple(self._found(where, place, part) for part in moved)
        return self._found(where, place, moved)

    def _found(self, where: str, place: _Place, numbers: Tensor) -> _Place:
        """Along which dim the units lie now."""
        size = self._set(place.units).size
        for dim in range(numbers.dim()):
            along = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if along.shape[1] == 0 or len(along) % size or not (along == along[:, :1]).all():
                continue
            along = along[:, 0]
            inner = int((along != along[0]).long().argmax()) or len(
                along
            )  # until the second unit comes
            if len(along) % (size * inner):
                continue
            outer = len(along) // (size * inner)
            pattern = torch.arange(size).view(1, -1, 1).expand(outer, -1, inner)
            if torch.equal(along.view(outer, size, inner), pattern):
                return replace(place, dim=dim, outer=outer)
        raise _Refusal(f"{where}, which spreads units over several dims or leaves some out")

    def _elementwise(self, node: fx.Node, result: Tensor) -> _Place | None:
        tensors = [
            source for source in node.all_input_nodes if isinstance(self.env[source], Tensor)
        ]
        aligned: dict[fx.Node, _Place] = {}
        for source in tensors:
            place = self.places.get(source)
            if isinstance(place, tuple):
                raise _Refusal(f"operation {node.name!r}")
            if place is not None and self.env[source].shape[place.dim] > 1:
                aligned[source] = replace(
                    place, dim=place.dim + result.dim() - self.env[source].dim()
                )
        for source in tensors:
            if source.op == "get_attr":
                tied = next((p.dim - result.dim() for p in aligned.values()), None)
                self._freeze(
                    self.env[source], None if tied is None else tied + self.env[source].dim()
                )
        if not aligned:
            return None
        first, *others = aligned.values()
        for other in others:
            if (
                replace(other, units=first.units) != first
            ):  # of one length, as they are not broadcast
                raise _Refusal(
                    f"operation {node.name!r}, where units of two layers lie along different dims"
                )
            self._join(first.units, other.units)
        for source in tensors:
            if source not in aligned:
                self._meet(source, first, result)
        return first

    def _meet(self, source: fx.Node, place: _Place, result: Tensor) -> None:
        """An operand without units: a parameter that gets them, one number for all of them, or
        something that pins.
        """
        tensor = self.env[source]
        dim = place.dim - (result.dim() - tensor.dim())
        if dim < 0 or tensor.shape[dim] == 1:
            return
        if source.op == "get_attr" and id(tensor) in self.canonical:
            self._hold(tensor, dim, place.units, place.outer)
        else:
            self._pin(place.units, f"they meet {source.name!r}, which is not permuted")

    # What was found

    def require_all_reached(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if id(parameter) not in self.reached:
                owner = name.rpartition(".")[0]
                kind = type(model.get_submodule(owner)).__name__
                raise UnsupportedError(
                    f"layer {owner!r}, a {kind}, was not reached by the forward, so what it would "
                    "need permuted is not known: list the units by hand with "
                    "PermutationSpec.from_layers(..., leave=)"
                )

    def spec(self, on_unsupported: str) -> PermutationSpec:
        units: list[Units] = []
        pinned: dict[str, str] = {}
        for index, found in enumerate(self.sets):
            if index != self.frozen and self._root(index) == self.frozen:
                pinned[found.name] = self._set(self.frozen).pinned or ""
            if self._root(index) != index or index == self.frozen or not found.axes:
                continue
            if found.size % found.blocks:
                found.refused = (
                    found.refused
                    or f"a GroupNorm of {found.blocks} groups, which cut across others"
                )
            if found.refused and on_unsupported == "error":
                raise UnsupportedError(
                    f"units of layer {found.name!r} cannot be followed through {found.refused}. "
                    "Remedy: list the units by hand with PermutationSpec.from_layers, or leave "
                    "these as they are with on_unsupported='pinned'"
                )
            if found.size == 1:
                found.pinned = (
                    found.pinned or "units of other layers that meet them leave no two to exchange"
                )
            if found.pinned or found.refused:
                pinned[found.name] = found.pinned or ""
                if found.refused:
                    pinned[found.name] = f"not followed through {found.refused}"
                continue
            units.append(self._finished(found))
        return PermutationSpec(tuple(units), pinned)

    def _finished(self, found: _Set) -> Units:
        axes = []
        for (name, dim), outer in found.axes.items():
            axes.append(UnitAxis(name, dim, outer, self.shapes[name][dim] // (outer * found.size)))
        observed = (Observed(module, dim, outer, length // (outer * found.size))
                    for module, dim, outer, length in found.norms or found.layers)  # fmt: skip
        return Units(found.name, found.size, tuple(axes), tuple(observed), found.blocks)
