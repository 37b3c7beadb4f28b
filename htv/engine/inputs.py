"""What a forward is called with: its tensors by name, and which of them hold the examples of the
batch.

Shapes decide only where they leave no doubt: one size in the batch's dim, beside which tensors of
                                              size 1 are constants.
Two larger sizes that disagree are refused, with names and shapes, until the caller names the
argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from htv.errors import UnsupportedError
from htv.groups import BatchLayout

__all__ = ["Batch", "choose", "named_tensors"]

DEEPEST = 6  # containers inside one another, where an argument is an object of the user's


@dataclass
class Batch:
    """Holds the examples of one call.

    batch_size:    N, how many there are.
    input_layout:  where a tensor of that size has them.
    members:       (name, tensor, place, sure) of all that hold examples; what is not sure only has
                   their size.
    constants:     the other tensors of the call.
    source:        which argument said so, for messages.
    """

    batch_size: int
    input_layout: BatchLayout
    members: list[tuple[str, Tensor, BatchLayout, bool]] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    source: str = ""

    def rows(self) -> tuple[int, ...]:
        """Return how many rows the examples may have, each of which is a token: ids, or what is
        behind two dims or more. Empty where no tensor is sure to hold the examples.
        """
        tensor = next((t for _, t, _, sure in self.members if sure), None)
        if tensor is None:
            return ()
        first = max(1, min(2, tensor.dim() - tensor.is_floating_point()))
        return tuple(math.prod(tensor.shape[:k]) for k in range(first, tensor.dim() + 1))


def named_tensors(
    names: tuple[str, ...],
    args: tuple,
    kwargs: dict,
    wanted: tuple[str, ...] = (),
    size: int | None = None,
) -> list[tuple[str, object]]:
    """List the tensors and packed sequences of a call of `args` and `kwargs` as (name, value), in
    the order of the arguments.

    names:   of the positional parameters.
    wanted:  those that the caller named as the batch.
    size:    how many examples the caller said there are, or None.

    Tuples, lists, mappings and dataclasses are looked into; other objects (a graph batch, say) only
    if no tensor is found without, or none of those that the caller named or of that size.
    """
    given = [(names[i] if i < len(names) else f"args[{i}]", value) for i, value in enumerate(args)]
    given += kwargs.items()
    found = [leaf for name, value in given for leaf in _leaves(name, value, False, 0)]
    named = all(any(_is_of(n, name) for n, _ in found) for name in wanted)
    sized = size is None or any(isinstance(t, PackedSequence) or size in t.shape for _, t in found)
    if found and named and sized:
        return found
    return [leaf for name, value in given for leaf in _leaves(name, value, True, 0)]


def _leaves(name: str, value: object, objects: bool, depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(value, (Tensor, PackedSequence)):
        yield name, value
        return
    if value is None or isinstance(value, (bool, int, float, str, bytes)) or depth > DEEPEST:
        return
    if isinstance(value, Mapping):
        items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f"{name}.{key}", getattr(value, key)) for key in value._fields]
    elif isinstance(value, (tuple, list)):
        items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [
            (f"{name}.{f.name}", getattr(value, f.name, None)) for f in dataclasses.fields(value)
        ]
    elif objects and not isinstance(value, (type, torch.nn.Module)):
        slots = (key for c in type(value).__mro__ for key in getattr(c, "__slots__", ()))
        own = {key: getattr(value, key, None) for key in slots if not key.startswith("__")}
        own |= getattr(value, "__dict__", {})
        items = [(f"{name}.{key}", item) for key, item in own.items()]
    else:
        return
    for key, item in items:
        yield from _leaves(key, item, objects, depth + 1)


def choose(
    tensors: list[tuple[str, object]],
    dim: int,
    wanted: tuple[str, ...] = (),
    size: int | None = None,
    kind: str = "each",
) -> Batch:
    """Decide which tensors of a call hold the examples, and how many examples there are.

    tensors:  of `named_tensors`.
    dim:      the batch's.
    wanted:   the arguments the caller named, or none: then all that agree in size.
    size:     how many examples there are, where ids, bounds or a mask say so.
    kind:     of what the caller said of who votes: "each", "rows", "ids" or "packed".

    Raises ValueError where sizes disagree or nothing has the batch's dim, UnsupportedError for
    layouts without rows.
    """
    packed = [(name, value) for name, value in tensors if isinstance(value, PackedSequence)]
    plain = [(name, value) for name, value in tensors if isinstance(value, Tensor)]
    named = _named(tensors, wanted)
    candidates = plain if named is None else [(n, t) for n, t in named if isinstance(t, Tensor)]
    for name, tensor in candidates:
        _refuse_layout(name, tensor)
    if packed and (named is None or any(isinstance(t, PackedSequence) for _, t in named)):
        return _of_packed_sequence(packed, plain, dim)
    if kind == "packed":
        dim = _dim_of_rows(candidates, dim, size)
    sized = [(name, t) for name, t in candidates if t.dim() > dim]
    if size is None or not any(t.shape[dim] == size for _, t in sized):
        size = _size(sized, dim, kind, size, named is not None, tensors)
    input_layout = BatchLayout(dim)
    members = [
        (name, t, input_layout, named is not None) for name, t in sized if t.shape[dim] == size
    ]
    if members:
        members[0] = (*members[0][:3], True)  # the others only have its size
    else:
        return Batch(size, input_layout, [], [t for _, t in plain], "")
    name, tensor = members[0][:2]
    batch = Batch(size, input_layout, members, source=_described(name, tensor, dim))
    mine = {id(t) for _, t, _, _ in members}
    for name, t in plain:
        if id(t) in mine:
            continue
        if (
            named is not None
            and t.dim() > dim
            and t.shape[dim] == size
            and t.layout == torch.strided
        ):
            batch.members.append((name, t, input_layout, False))
        else:
            batch.constants.append(t)
    return batch


def _described(name: str, tensor: Tensor, dim: int) -> str:
    return f"{name!r} of shape {tuple(tensor.shape)}, examples in dim {dim}"


def _named(
    tensors: list[tuple[str, object]], wanted: tuple[str, ...]
) -> list[tuple[str, object]] | None:
    """Return the tensors the caller named as the batch, or None if nothing was named."""
    if not wanted:
        return None
    found = []
    for name in wanted:
        mine = [(n, t) for n, t in tensors if _is_of(n, name)]
        if not mine:
            raise ValueError(
                f"batch={name!r} is no tensor argument of this forward, which got "
                f"{_listed(tensors) or 'none'}: name one of these in attach(..., batch=...)"
            )
        found += mine
    return found


def _is_of(name: str, argument: str) -> bool:
    """Tell whether `name`, one of `named_tensors`, is `argument` or lies in it."""
    return name == argument or name.startswith((f"{argument}.", f"{argument}["))


def _listed(tensors: list[tuple[str, object]]) -> str:
    return ", ".join(
        f"{name!r} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"{name!r} (packed)"
        for name, t in tensors
    )


def _refuse_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise UnsupportedError(
            f"argument {name!r} is a nested tensor, whose rows htv does not follow. Remedy: call "
            f"the model with its values, `with handle.packed({name}.offsets()): "
            f"model({name}.values())`, for layers that take rows, or pad it"
        )
    if tensor.layout != torch.strided:
        raise UnsupportedError(
            f"argument {name!r} is a sparse tensor ({tensor.layout}), whose rows htv does not "
            f"follow. Remedy: pass {name}.to_dense(), or name the argument that holds the "
            "examples, attach(..., batch=...)"
        )


def _size(sized, dim: int, kind: str, given: int | None, was_named: bool, tensors) -> int:
    """Return N by the tensors' own sizes."""
    sizes = list(dict.fromkeys(int(t.shape[dim]) for _, t in sized))
    larger = [n for n in sizes if n != 1]
    if len(larger) > 1 and given is None:
        if was_named:
            raise ValueError(
                f"the arguments named by attach(..., batch=...) disagree in dim {dim}, the "
                f"batch's: {_listed(sized)}"
            )
        raise ValueError(
            f"which argument holds the examples? They disagree in dim {dim}: {_listed(sized)}. "
            "Name it: attach(..., "
            f"batch={next(n for n, t in sized if t.shape[dim] == larger[0])!r}), or say who votes "
            "with `with handle.groups(ids)`"
        )
    if sizes:
        return larger[0] if larger else sizes[0]
    if given is not None:
        return given
    got = f"it got {_listed(tensors)}" if tensors else "it got no tensor"
    raise ValueError(
        f"the forward has no tensor argument whose dim {dim} could be the batch ({got}). Remedy: "
        "pass the examples to the forward as a tensor, in a tuple, list, mapping or dataclass; or "
        "run it inside `with handle.forward(examples): ...`, which names the tensors that hold "
        "them (handle.groups(ids) alone does not)"
    )


def _dim_of_rows(candidates: list[tuple[str, Tensor]], dim: int, total: int | None) -> int:
    """Return the dim in which packed rows lie: the batch's, or one behind a dim of size 1."""
    if total is None:  # a compiled forward does not know the bounds
        return (
            1 if dim == 0 and any(t.dim() > 1 and len(t) == 1 for _, t in candidates[:1]) else dim
        )
    if any(t.dim() > dim and t.shape[dim] == total for _, t in candidates):
        return dim
    return (
        1 if any(t.dim() > 1 and tuple(t.shape[:2]) == (1, total) for _, t in candidates) else dim
    )


def _of_packed_sequence(packed, plain, dim: int) -> Batch:
    """Choose the examples of packed sequences: whose row each row of the data is, by the batch
    sizes and the sorting.
    """
    members, size = [], None
    for name, sequence in packed:
        sizes = sequence.batch_sizes
        order = sequence.sorted_indices
        order = torch.arange(int(sizes[0])) if order is None else order.cpu()
        if size is not None and len(order) != size:
            raise ValueError(
                f"packed sequences {packed[0][0]!r} and {name!r} hold {size} and {len(order)} "
                "examples: which of them is the batch? Name it: attach(..., batch=...)"
            )
        size = len(order)
        example_of = torch.cat([order[:n] for n in sizes.tolist()])
        members.append((name, sequence.data, BatchLayout(0, examples=example_of), True))
    known = {id(part) for _, s in packed for part in s if part is not None}
    batch = Batch(
        size,
        BatchLayout(dim),
        members,
        source=f"{packed[0][0]!r}, a PackedSequence of {size} examples",
    )
    batch.constants = [part for _, s in packed for part in s[1:] if part is not None]
    for name, t in plain:
        if id(t) in known:
            continue
        if t.dim() > dim and t.shape[dim] == size and t.layout == torch.strided:
            batch.members.append((name, t, batch.input_layout, False))
        else:
            batch.constants.append(t)
    return batch


def ids_of_examples(ids: Tensor, batch: Batch) -> Tensor:
    """Return the ids of `batch`'s packed sequences, one per example, of `ids`, one per packed row;
    all rows of an example must have the same.
    """
    example_of = batch.members[0][2].examples
    if ids.dim() != 1 or len(ids) != len(example_of):
        raise ValueError(
            f"groups has {len(ids)} ids, but {batch.source}, has {batch.batch_size} examples of "
            f"{len(example_of)} rows in all: pass one id per example, or one per row"
        )
    ids = ids.cpu()
    found = ids.new_zeros(batch.batch_size).index_copy_(0, example_of, ids)
    if not torch.equal(found[example_of], ids):
        raise ValueError(
            "groups gives the rows of one packed example different ids: an example votes as a whole"
        )
    return found


def argument_of(name: str) -> str:
    """Return the argument that `name`, one of `named_tensors`, lies in: "x[0].y" -> "x"."""
    return name.partition(".")[0].partition("[")[0]


def fitting(size: int, dim: int, tensors: list[tuple[str, object]], source: str) -> Batch:
    """Find among the `tensors` of a call those that have a size known before.

    size:    how many examples there are; none of the tensors says so by itself.
    dim:     the batch's.
    source:  what said so.
    """
    batch = Batch(size, BatchLayout(dim), source=source)
    for name, t in tensors:
        if isinstance(t, PackedSequence):
            raise UnsupportedError(
                f"argument {name!r} is a PackedSequence beside a batch that comes from elsewhere"
            )
        strided = t.layout == torch.strided and not t.is_nested
        if strided and t.dim() > dim and t.shape[dim] == size:
            batch.members.append((name, t, batch.input_layout, False))
        else:
            batch.constants.append(t)
    return batch
