"""Where the tensors of a model lie in a few flat ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Entry", "Group", "Layout", "template_of"]


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: coordinates [start, start + numel) of its group's flat tensor."""

    name: str
    shape: torch.Size
    start: int

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and device, all of them trained or none."""

    trained: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Layout:
    """The tensors of an architecture.

    names:       every name in the state dict -> the first name of that tensor: tied ones lie on the
                 path once.
    expected:    by every name, shape, dtype and device.
    parameters:  by first name, whether the parameter is trained.
    groups:      what lies on the path; parameters first, buffers that differ added by
                 `with_buffers`.
    """

    names: dict[str, str]
    expected: dict[str, tuple[torch.Size, torch.dtype, torch.device]]
    parameters: dict[str, bool]
    groups: tuple[Group, ...] = field(default=())

    @staticmethod
    def of(model: nn.Module) -> Layout:
        state = _tensors(model)
        if any(is_lazy(tensor) for tensor in state.values()):
            raise ValueError(
                "the model has lazy parameters without a shape: run it on a batch first"
            )
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        unknown = [
            name
            for name in tensors
            if isinstance(tensors[name], nn.Parameter) and name not in state
        ]
        unknown += [name for name in state if name not in tensors]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is in only one of the model's state_dict and its parameters and "
                "buffers, because of hooks that rename: pass the module inside"
            )
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(tensors[name]), name) for name in state}
        parameters = {name: p.requires_grad for name, p in model.named_parameters()}
        return Layout(
            names, {name: (t.shape, t.dtype, t.device) for name, t in state.items()}, parameters
        )

    def read(self, role: str, weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a model or state dict of this architecture by first name, on the devices
        of this one.
        """
        state = _tensors(weights)
        self._check(role, state)
        for name, canonical in self.names.items():
            if name != canonical and not _equal(state[name], state[canonical]):
                raise ValueError(
                    f"{role} has different values under {canonical!r} and {name!r}, which the "
                    "model ties"
                )
        return {
            name: state[name].detach().to(self.expected[name][2])
            for name, canonical in self.names.items()
            if name == canonical
        }

    def check(self, role: str, model: nn.Module) -> None:
        """Raise ValueError, naming the first key that differs, unless the model is of this
        architecture.
        """
        self._check(role, _tensors(model))
        ties = Layout.of(model).names
        for name, canonical in self.names.items():
            if ties[name] != canonical:
                raise ValueError(
                    f"{role} does not tie {name!r} to the same tensor as the model the path was "
                    "made with"
                )

    def _check(self, role: str, state: Mapping[str, Tensor]) -> None:
        for name, (shape, dtype, _) in self.expected.items():
            if name not in state:
                raise ValueError(f"{role} is of another architecture: it has no {name!r}")
            if state[name].shape != shape:
                raise ValueError(
                    f"{role} is of another architecture: {name!r} has shape "
                    f"{tuple(state[name].shape)} instead of {tuple(shape)}"
                )
            if state[name].dtype != dtype:
                raise ValueError(
                    f"{name!r} of {role} is {state[name].dtype} instead of {dtype}: convert it "
                    "with .to()"
                )
        extra = next((name for name in state if name not in self.expected), None)
        if extra is not None:
            raise ValueError(
                f"{role} is of another architecture: it has {extra!r} beside what is expected"
            )

    def with_buffers(
        self, states: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[Layout, dict[str, Tensor]]:
        """This layout with its groups, and what is constant along the path.

        states:  by role, what `read` returned; the first one's integers are taken.
        """
        (_, start), *others = states.items()
        constants: dict[str, Tensor] = {}
        keys: dict[tuple[bool, torch.dtype, torch.device], list[str]] = {}
        for name, tensor in start.items():
            differs = next(
                (role for role, state in others if not _equal(state[name], tensor)), None
            )
            floating = tensor.is_floating_point() or tensor.is_complex()
            if name in self.parameters and floating:
                keys.setdefault((self.parameters[name], tensor.dtype, tensor.device), []).append(
                    name
                )
            elif floating and differs is not None:
                keys.setdefault((False, tensor.dtype, tensor.device), []).append(name)
            elif differs is None or name.rpartition(".")[2] == "num_batches_tracked":
                constants[name] = tensor
            else:
                raise ValueError(
                    f"{name!r} is {tensor.dtype} and differs between start and {differs}: "
                    "integers have no path between them. Make it the same in all of them, or "
                    "register it with persistent=False"
                )
        groups = tuple(_group(key[0], names, start) for key, names in keys.items())
        return replace(self, groups=groups), constants

    def flatten(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """One new flat tensor per group, with the group's device."""
        return [
            torch.cat([state[entry.name].reshape(-1) for entry in group.entries])
            for group in self.groups
        ]

    def views(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """By first name; for flat tensors (..., P), views (..., *shape)."""
        return {
            entry.name: flat[..., entry.start : entry.end].unflatten(-1, entry.shape)
            if entry.shape
            else flat[..., entry.start]
            for flat, group in zip(flats, self.groups, strict=True)
            for entry in group.entries
        }


def template_of(
    points: Mapping[str, nn.Module | Mapping[str, Tensor]], model: nn.Module | None
) -> nn.Module:
    """The model that tells how the points are to be read."""
    for role, weights in points.items():
        if not isinstance(weights, nn.Module | Mapping):
            raise TypeError(f"{role} must be a model or a state dict, got {type(weights).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = model or next(
        (weights for weights in points.values() if isinstance(weights, nn.Module)), None
    )
    if found is None:
        raise TypeError(
            "all points are state dicts, which do not tell parameters from buffers: pass model= as "
            "well"
        )
    return found


def _tensors(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {
        name: value for name, value in state.items() if isinstance(value, Tensor)
    }  # not modules' extra state


def _equal(a: Tensor, b: Tensor) -> bool:
    """With NaN equal to itself, on whatever devices."""
    b = b.to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _group(trained: bool, names: list[str], state: Mapping[str, Tensor]) -> Group:
    entries, start = [], 0
    for name in names:
        entries.append(Entry(name, state[name].shape, start))
        start = entries[-1].end
    return Group(trained, tuple(entries))
