"""Permutations of hidden units that leave a network's function as it is: which tensors they
permute, and doing it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from htv.methods.connectivity.statistics import inputs_of

__all__ = [
    "UnitAxis",
    "Observed",
    "PermutationSpec",
    "Units",
    "permute_model",
    "random_permutations",
]

Permutations = Mapping[str, Tensor]


@dataclass(frozen=True)
class UnitAxis:
    """Name a dim of a parameter or buffer along which hidden units lie.

    Unit u is at (o, u, i) of the dim taken as (outer, size, inner).
    tensor:  the name of the parameter or buffer.
    dim:     along which the units lie.
    outer:   how often they are there, one behind the other.
    inner:   above 1 where a convolution's channels were flattened with their pixels.

    >>> htv.methods.UnitAxis("embedding", dim=1)
    UnitAxis(tensor='embedding', dim=1, outer=1, inner=1)
    """

    tensor: str
    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Observed:
    """A module in whose output units are compared, and where they lie there; dim may count from the
    end.
    """

    module: str
    dim: int
    outer: int = 1
    inner: int = 1

    def rows(self, output: Tensor, size: int) -> Tensor:
        """(rows, size): every value that the units have in an output."""
        last = output.movedim(self.dim, -1).reshape(-1, self.outer, size, self.inner)
        return last.transpose(2, 3).reshape(-1, size)


@dataclass(frozen=True)
class Units:
    """Units of one or more layers that can only be permuted together, as residual connections tie
    them.

    name:      the first layer that has them as outputs.
    axes:      of every tensor they are permuted in.
    observed:  where to compare them: outputs of normalisations if there are any, else of the
               layers.
    blocks:    of how many contiguous blocks, such as those of a GroupNorm, each must stay together.
    """

    name: str
    size: int
    axes: tuple[UnitAxis, ...]
    observed: tuple[Observed, ...]
    blocks: int = 1


@dataclass(frozen=True)
class PermutationSpec:
    """Hold which hidden units a network can permute without changing its function.

    `trace_permutations` finds it; `from_layers` takes it by hand.

    units:   sets of units that can only be permuted together.
    pinned:  by name, units that may not be permuted, and why.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> layers = [{"name": "hidden", "producers": ["0"], "consumers": ["2"]}]
    >>> spec = htv.methods.PermutationSpec.from_layers(model, layers)
    >>> [(units.name, units.size) for units in spec.units]
    [('hidden', 4)]
    """

    units: tuple[Units, ...]
    pinned: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def from_layers(
        model: nn.Module, layers: Iterable[Mapping[str, Any]], leave: Sequence[str] = ()
    ) -> PermutationSpec:
        """Make a spec from lists of layers.

        model:   whose units they are.
        layers:  a list of ``{"name": ..., "producers": [...], "consumers": [...]}``, one per set of
                 units. Producers are the names of the layers whose outputs the units are, and of
                 everything with parameters by channel on the way: normalisations, PReLU, depthwise
                 convolutions; layers added to each other belong together. Consumers are the names
                 of the layers that take them as inputs; a linear layer of more inputs takes
                 flattened channels, each with its pixels side by side. Either may also hold a
                 `UnitAxis`, for parameters that no layer of torch owns. "observe" optionally names
                 the modules whose outputs are compared.
        leave:   names of layers, or of single parameters, that have no part in any units.

        Raises ValueError naming the layer that does not exist, does not fit, has no known place for
        its units, or is not covered. That the function is preserved is checked by `check`.
        """
        reader = _LayerReader(model)
        units = tuple(reader.read(layer) for layer in layers)
        reader.require_all_covered(leave)
        return PermutationSpec(units)

    def check(
        self,
        model: nn.Module,
        batch: Any,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Raise ValueError, naming the units, if permuting them changes what the model returns.

        The permutation tried is random, and leaves no unit in its place.

        model:    whose units they are.
        batch:    to compare the outputs for.
        forward:  (model, batch) -> outputs, for batches that are not ``(x, ...)``.
        seed:     of the permutation.
        """
        generator = torch.Generator().manual_seed(seed)
        permutations = _drawn(self, lambda count: _cycle(count, generator))
        expected = _outputs(model, batch, forward)
        if not expected.isfinite().all():
            raise ValueError(
                "the model's outputs for the batch are not finite: nothing can be compared"
            )
        if _same(expected, _outputs(permute_model(model, self, permutations), batch, forward)):
            return
        for name, permutation in permutations.items():
            if not _same(
                expected, _outputs(permute_model(model, self, {name: permutation}), batch, forward)
            ):
                raise ValueError(
                    f"permuting units {name!r} changes the model's outputs: a layer that uses "
                    "them, or a normalisation between, is missing from their producers and "
                    "consumers"
                )
        raise ValueError("permuting all units together changes the model's outputs")


def random_permutations(
    spec: PermutationSpec, generator: Generator | None = None
) -> dict[str, Tensor]:
    """Draw permutations uniformly among those that keep blocks together.

    spec:       which units can be permuted.
    generator:  of random numbers. Default: torch's own.

    Returns by name of the units (size,) int64.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> spec = htv.methods.trace_permutations(model, torch.randn(2, 3))
    >>> htv.methods.random_permutations(spec)["0"].sort().values
    tensor([0, 1, 2, 3])
    """
    return _drawn(spec, lambda count: torch.randperm(count, generator=generator))


def _drawn(spec: PermutationSpec, draw: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """By name of the units: blocks, and units within them, in the orders that `draw` gives for
    their number.
    """
    found = {}
    for units in spec.units:
        width = units.size // units.blocks
        within = torch.stack([draw(width) for _ in range(units.blocks)])
        order = draw(units.blocks)
        found[units.name] = (within + torch.arange(units.blocks)[:, None] * width)[order].flatten()
    return found


def _cycle(count: int, generator: Generator) -> Tensor:
    """A random permutation in one cycle: it leaves nothing in place, unless there is only one."""
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


@torch.no_grad()
def permute_model(model: nn.Module, spec: PermutationSpec, permutations: Permutations) -> nn.Module:
    """Copy a model with its units in another order; the function is the same.

    model:         not changed.
    spec:          which units can be permuted.
    permutations:  by name of the units, (size,) integers: unit u of the copy is the model's unit
                   ``permutation[u]``. Units without one stay.

    Returns the copy. Raises ValueError for names the spec does not have and what is no permutation,
    or breaks blocks.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> spec = htv.methods.trace_permutations(model, torch.ones(2, 1))
    >>> swapped = htv.methods.permute_model(model, spec, {"0": torch.tensor([1, 0])})
    >>> torch.equal(swapped[0].weight, model[0].weight.flip(0))
    True
    """
    unknown = [name for name in permutations if name not in {units.name for units in spec.units}]
    if unknown:
        raise ValueError(f"the spec has no units {unknown[0]!r}")
    made = copy.deepcopy(model)
    tensors = dict(made.named_parameters(remove_duplicate=False)) | dict(
        made.named_buffers(remove_duplicate=False)
    )
    for units in spec.units:
        if units.name not in permutations:
            continue
        permutation = _checked(units, torch.as_tensor(permutations[units.name]))
        for axis in units.axes:
            tensor = tensors[axis.tensor]
            places = torch.arange(tensor.shape[axis.dim]).view(axis.outer, units.size, axis.inner)
            index = places[:, permutation].flatten().to(tensor.device)
            tensor.copy_(tensor.index_select(axis.dim, index))
    return made


def _checked(units: Units, permutation: Tensor) -> Tensor:
    permutation = permutation.cpu().long()
    if permutation.shape != (units.size,) or not torch.equal(
        permutation.sort().values, torch.arange(units.size)
    ):
        raise ValueError(
            f"permutations[{units.name!r}] is no permutation of its {units.size} units"
        )
    of_blocks = (permutation // (units.size // units.blocks)).view(units.blocks, -1)
    if not (of_blocks == of_blocks[:, :1]).all():
        raise ValueError(
            f"permutations[{units.name!r}] takes apart some of its {units.blocks} blocks"
        )
    return permutation


@torch.no_grad()
def _outputs(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None
) -> Tensor:
    model = copy.deepcopy(model).eval()
    outputs = model(inputs_of(model, batch)) if forward is None else forward(model, batch)
    leaves = [
        leaf
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return torch.cat([leaf.flatten() for leaf in leaves])


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of sums in another order."""
    return bool((a - b).double().norm() <= torch.finfo(a.dtype).eps ** 0.5 * a.double().norm())


def produced_axes(module: nn.Module) -> list[tuple[str, int]]:
    """Parameters, and their dims, along which a layer's output channels lie; none if it is no such
    layer.
    """
    if isinstance(module, nn.Linear):
        return [("weight", 0), ("bias", 0)]
    if isinstance(module, _ConvTransposeNd) and module.groups == 1:
        return [("weight", 1), ("bias", 0)]
    if isinstance(module, _ConvNd) and module.groups == 1:
        return [("weight", 0), ("bias", 0)]
    return [("weight", 1)] if isinstance(module, nn.Embedding | nn.EmbeddingBag) else []


def consumed_axes(module: nn.Module) -> list[tuple[str, int]]:
    """Parameters, and their dims, along which a layer's input channels lie; none if it is no such
    layer.
    """
    if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1):
        return [("weight", 0 if isinstance(module, _ConvTransposeNd) else 1)]
    return []


def carried_axes(module: nn.Module) -> list[tuple[str, int]]:
    """Parameters and buffers by channel of what goes through, and their dims; maybe none."""
    if isinstance(module, _NormBase):
        return [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, nn.GroupNorm) or is_depthwise(module):
        return [("weight", 0), ("bias", 0)]
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        last = len(module.normalized_shape) - 1
        return [("weight", last), ("bias", last)]
    return [("weight", 0)] if isinstance(module, nn.PReLU) and module.num_parameters > 1 else []


def is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and module.groups == module.in_channels > 1
    )


def blocks_of(module: nn.Module) -> int:
    """Of how many contiguous blocks of channels a module takes statistics; 1 where blocks do not
    matter.
    """
    if isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
        return module.num_groups
    return 1


def channel_dim(module: nn.Module) -> int:
    """Of a layer's output."""
    return (
        -1
        if isinstance(
            module, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding | nn.EmbeddingBag
        )
        else 1
    )


def channels_of(module: nn.Module) -> int | None:
    """Of a layer's output; None if it is no layer with channels."""
    names = (
        "out_features",
        "out_channels",
        "num_features",
        "num_channels",
        "embedding_dim",
        "num_parameters",
    )
    found: Any = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    shape: Any = getattr(module, "normalized_shape", None)
    found = found if shape is None else shape[-1]
    return None if found is None else int(found)


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one whose parameters are known."""
    return bool(produced_axes(module) or carried_axes(module))


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)


class _LayerReader:
    """Reads units by the names of their layers."""

    def __init__(self, model: nn.Module):
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.parameters = [name for name, _ in model.named_parameters()]
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= model.named_buffers(remove_duplicate=False)
        self.covered: set[str] = set()  # layers and single parameters
        self.taken: dict[tuple[str, int], str] = {}

    def read(self, layer: Mapping[str, Any]) -> Units:
        unknown = set(layer) - {"name", "producers", "consumers", "observe"}
        if unknown or not {"name", "producers", "consumers"} <= set(layer):
            raise ValueError(
                "units need name, producers and consumers, and may have observe; got "
                f"{sorted(layer)}"
            )
        name, blocks = layer["name"], set()
        size = self._size(name, layer["producers"])
        axes = []
        for role in ("producers", "consumers"):
            for entry in layer[role]:
                if isinstance(entry, UnitAxis):
                    axes.append(self._sized(name, size, entry))
                else:
                    axes += self._of(name, size, entry, role)
        for entry in layer["producers"]:
            if isinstance(entry, str):
                blocks.add(blocks_of(self.modules[entry]))
        blocks -= {1}
        if len(blocks) > 1:
            raise ValueError(
                f"units {name!r} have GroupNorms of {sorted(blocks)} groups: they must have the "
                "same"
            )
        for axis in axes:
            other = self.taken.setdefault((axis.tensor, axis.dim), name)
            if other != name:
                raise ValueError(
                    f"dim {axis.dim} of {axis.tensor!r} is in units {other!r} and {name!r}: join "
                    "them"
                )
        return Units(
            name,
            size,
            tuple(dict.fromkeys(axes)),
            self._observed(layer, size),
            max(blocks, default=1),
        )

    def require_all_covered(self, leave: Sequence[str]) -> None:
        unknown = [name for name in leave if name not in self.modules and name not in self.tensors]
        if unknown:
            raise ValueError(f"leave names {unknown[0]!r}, which the model does not have")
        for name in self.parameters:
            owner = name.rpartition(".")[0]
            if not {name, owner} & (self.covered | set(leave)):
                module = self.modules[owner]
                what = (
                    f"layer {owner!r}, a {type(module).__name__},"
                    if _is_layer(module)
                    else f"parameter {name!r}"
                )
                raise ValueError(
                    f"{what} is in no producers or consumers, so that it would be left as it is "
                    "while units around it are permuted. Name it (a parameter as UnitAxis), or "
                    "put it into leave= if it has no part in them"
                )

    def _module(self, units: str, name: Any) -> nn.Module:
        if name not in self.modules:
            raise ValueError(f"units {units!r} name a layer {name!r} that the model does not have")
        self.covered.add(name)
        return self.modules[name]

    def _size(self, units: str, producers: Sequence[str | UnitAxis]) -> int:
        for entry in producers:
            if isinstance(entry, str):
                module = self._module(units, entry)
                size = channels_of(module) if produced_axes(module) else None
                if size is not None:
                    return size
        raise ValueError(
            f"producers of units {units!r} hold no linear or convolutional layer or embedding"
        )

    def _of(self, units: str, size: int, name: str, role: str) -> list[UnitAxis]:
        module = self._module(units, name)
        if role == "consumers":
            local = consumed_axes(module)
        else:
            local = produced_axes(module) or carried_axes(module)
        owns = next(module.parameters(recurse=False), None) is not None
        if not local and (owns or role == "consumers"):
            more = f" of {module.groups} groups" if getattr(module, "groups", 1) != 1 else ""
            raise ValueError(
                f"layer {name!r} among the {role} of units {units!r} is a "
                f"{type(module).__name__}{more}, for which it is not known where its units lie. "
                "Give UnitAxis(tensor, dim) instead, if it can be permuted"
            )
        prefix = f"{name}." if name else ""
        return [self._sized(units, size, UnitAxis(f"{prefix}{tensor}", dim))
                for tensor, dim in local
                if f"{prefix}{tensor}" in self.tensors]  # fmt: skip

    def _sized(self, units: str, size: int, axis: UnitAxis) -> UnitAxis:
        """With `inner` made to fit, where it is open."""
        if axis.tensor not in self.tensors or axis.dim >= self.tensors[axis.tensor].dim():
            raise ValueError(
                f"units {units!r} name dim {axis.dim} of {axis.tensor!r}, which the model does not "
                "have"
            )
        length = self.tensors[axis.tensor].shape[axis.dim]
        owner = axis.tensor.rpartition(".")[0]
        self.covered.add(owner if _is_layer(self.modules[owner]) else axis.tensor)
        inner = length // (axis.outer * size) if axis.inner == 1 else axis.inner
        if axis.outer * size * inner != length:
            raise ValueError(
                f"layer {axis.tensor.rpartition('.')[0]!r} has {length} channels in dim "
                f"{axis.dim} of {axis.tensor!r}, which cannot be the {size} units of {units!r}"
            )
        return UnitAxis(axis.tensor, axis.dim, axis.outer, inner)

    def _observed(self, layer: Mapping[str, Any], size: int) -> tuple[Observed, ...]:
        names = layer.get("observe")
        if names is None:
            candidates = [entry for entry in layer["producers"] if isinstance(entry, str)]
            names = [n for n in candidates if is_norm(self.modules[n])]
            names = names or [n for n in candidates if produced_axes(self.modules[n])]
        found = []
        for name in names:
            module = self._module(layer["name"], name)
            found.append(
                Observed(name, channel_dim(module), 1, (channels_of(module) or size) // size)
            )
        return tuple(found)
