"""What a compiled forward returns: only a list of tensors leaves what Dynamo does not look into, so
the rest is described, and built again around them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from htv.errors import UnsupportedError


def described(
    value, tensors: list[Tensor], classes: list[type], held: set[int] = frozenset()
) -> tuple:
    """Say how a forward's result is made of tensors, which are appended, and of classes: (kind,
    detail, items). Raise UnsupportedError if it is made of anything else.

    held:  ids of objects that modules hold, which a copy cannot stand for.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", len(tensors) - 1, ()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return "constant", value, ()
    cls, names = type(value), ()
    if cls in (tuple, list):
        kind, items = cls.__name__, value
    elif cls is dict:
        kind, names, items = "dict", tuple(value), value.values()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        kind, items = "named", value
    elif dataclasses.is_dataclass(value):
        names = tuple(f.name for f in dataclasses.fields(value))
        kind, items = "dataclass", [getattr(value, name) for name in names]
    elif isinstance(value, type):
        kind, cls, items = "class", value, ()
    elif _has_attributes_alone(cls) and id(value) not in held:
        kind, names, items = "object", tuple(vars(value)), vars(value).values()
    else:
        raise UnsupportedError(
            f"a compiled forward of an attached model cannot return a {cls.__name__}: return "
            "tensors and constants in tuples, lists, dicts, dataclasses or objects with attributes "
            "that the forward made"
        )
    if kind in ("named", "dataclass", "class", "object") and cls not in classes:
        classes.append(cls)
    number = classes.index(cls) if cls in classes else -1
    inside = held | {id(value)}  # an object that holds itself cannot be built again
    parts = tuple(described(item, tensors, classes, inside) for item in items)
    return kind, (number, names), parts


def held_by(model: torch.nn.Module) -> set[int]:
    """List the ids of what the modules of a model hold."""
    return {id(value) for module in model.modules() for value in vars(module).values()}


def _has_attributes_alone(cls: type) -> bool:
    """Whether instances are made of their attributes, as the caches of Hugging Face's models."""
    return (
        cls.__new__ is object.__new__
        and cls.__setattr__ is object.__setattr__
        and cls.__dictoffset__ != 0
        and not any(vars(c).get("__slots__") for c in cls.__mro__)
        and not issubclass(cls, (torch.nn.Module, type(torch)))
    )


def rebuilt(description: tuple, tensors: list[Tensor], classes: list[type]):
    """The forward's result. Traced by Dynamo, which can guard on classes found in a list, not in a
    constant.
    """
    kind, detail, items = description
    if kind == "tensor":
        return tensors[detail]
    if kind == "constant":
        return detail
    if kind == "class":
        return classes[detail[0]]
    values = [rebuilt(item, tensors, classes) for item in items]
    if kind == "list":
        return values
    if kind == "tuple":
        return tuple(values)
    if kind == "named":
        return classes[detail[0]](*values)
    pairs = dict(zip(detail[1], values))  # noqa: B905
    if kind == "object":
        made = object.__new__(classes[detail[0]])
        for name, value in pairs.items():
            setattr(made, name, value)
        return made
    return pairs if kind == "dict" else classes[detail[0]](**pairs)
