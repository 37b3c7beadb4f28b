"""The torch-function mode under which an attached model's forward runs.

It sees every torch call with its arguments. Calls that use a served parameter in a way htv knows are replaced by their
aggregating twins (`htv.layers`); calls among parameters alone run plainly and mark their result as derived; every other
use of a parameter together with the batch is refused by name. So no parameter is served by guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from htv import layers, layout
from htv.autograd.expand import DerivedTensor, expand
from htv.autograd.ledger import Slot
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.layout import Constant, Derived, Marks, Moved, Plain

if TYPE_CHECKING:
    from htv.attach import Handle, Served

CONSTANT, PLAIN = Constant(), Plain()

# Broadcasting operations, by name without underscores: an expanded operand's gradient is its stack of contributions.
ELEMENTWISE = {
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truedivide", "rdiv", "rtruediv", "pow",
    "rpow", "radd", "rmul", "iadd", "isub", "imul", "itruediv", "maximum", "minimum", "where", "lerp", "addcmul",
    "addcdiv", "atan2", "hypot", "logaddexp",
}  # fmt: skip
CONCATENATING = {"cat", "concat", "concatenate"}
EXPANDING = {"expand", "expandas", "broadcastto"}
# The second tensor only lends its dtype, device or shape.
BORROWING = {"typeas", "to", "expandas", "viewas", "reshapeas"}
# They hand out values without a gradient, or no tensor at all.
QUERIES = {"detach", "size", "dim", "numel", "stride", "isfloatingpoint", "iscomplex", "dataptr", "iscontiguous"}


def plain_name(func) -> str:
    """`Tensor.__add__`, `add_` and `torch.add` -> "add"; a property getter -> the property's name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    return name.replace("_", "") if name != "__getitem__" else name


class Intercept(TorchFunctionMode):
    """One forward of an attached model, for one batch.

    handle:  knows which tensors are served parameters.
    groups:  how this batch's units map to groups.
    """

    def __init__(self, handle: Handle, groups: Groups, inputs: list[Tensor]):
        super().__init__()
        self.handle, self.groups = handle, groups
        self.marks = Marks()
        for tensor in handle.constants():
            self.marks.put(tensor, PLAIN if tensor.requires_grad else CONSTANT)
        for tensor in inputs:
            if not groups.fits(tensor):
                self.marks.put(tensor, CONSTANT)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        server = layers.SERVERS.get(func)
        if server is not None:
            result = server(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.general(func, args, kwargs)

    # -- what a tensor is ---------------------------------------------------------------------------------------------

    def served(self, tensor) -> Served | None:
        """The record of a served parameter, or None for anything else."""
        return self.handle.served_parameter(tensor)

    def mark(self, tensor: Tensor) -> layout.Mark | None:
        served = self.served(tensor)
        return Derived((served,), tensor) if served is not None else self.marks.get(tensor)

    def slot(self, value: Tensor | None) -> Slot:
        """A layer's parameter argument: served if it is a served parameter, plain otherwise."""
        served = None if value is None else self.served(value)
        return Slot(value) if served is None else served.slot(self.groups)

    def require_batch(self, x: Tensor, op: str, *parameters: Tensor | None, lead_only: bool = False) -> None:
        """Raise unless x has the batch in its leading dims, as the contributions of `parameters` need."""
        names = ", ".join(repr(s.name) for s in map(self.served, parameters) if s is not None)
        if isinstance(self.marks.get(x), Moved):
            raise UnsupportedError(
                f"{op} with parameter {names}: the batch is no longer dim 0 of its input of shape {tuple(x.shape)} "
                "(it was transposed, indexed or reduced away), so its rows cannot be told apart by group. Keep the "
                f"batch in dim 0 (batch_first=True), or exclude={names}"
            )
        if not self.groups.fits(x):
            raise ValueError(
                f"{op} with parameter {names}: its input of shape {tuple(x.shape)} must start with the batch's dims "
                f"{self.groups.lead}, or its rows cannot be told apart by group. Keep the batch in dim 0 up to this "
                f"layer (x.flatten(1) rather than x.view(-1, d)), or exclude={names}"
            )
        if lead_only and len(self.groups.lead) > 1:
            raise UnsupportedError(
                f"{op} with parameter {names} cannot take packed sequences of shape {self.groups.lead}; exclude={names}"
            )

    def refuse(self, op: str, parameters: tuple[Served, ...], why: str) -> None:
        """Refuse a use of parameters, or pass it on plainly where the handle was told to."""
        names = ", ".join(repr(served.name) for served in parameters)
        self.handle.unsupported(
            f"parameter {names} is used by {op}: {why}. Remedy: exclude={names} to give it a plain gradient, "
            "on_unsupported='plain' to do so wherever needed, or write the use with layers htv.explain lists as served",
            parameters,
        )

    # -- calls that no layer serves -----------------------------------------------------------------------------------

    def general(self, func, args, kwargs):
        tensors = _tensors(args, kwargs)
        marks = [self.mark(t) for t in tensors]
        derived = [m for m in marks if isinstance(m, Derived)]
        if derived:
            return self._with_parameters(func, args, kwargs, tensors, marks, derived)
        result = func(*args, **kwargs)
        if all(isinstance(m, (Constant, Plain)) for m in marks):  # so is whatever is made from no tensor at all
            for tensor in _tensors((result,), {}):
                self.marks.put(tensor, PLAIN if tensor.requires_grad else CONSTANT)
        elif isinstance(result, (Tensor, tuple, list)):
            self._follow_batch_dim(func, args, kwargs, tensors, marks, result)
        return result

    def _with_parameters(self, func, args, kwargs, tensors, marks, derived: list[Derived]):
        name = plain_name(func)
        parameters = tuple(dict.fromkeys(p for m in derived for p in m.parameters))
        batch = [t for t, m in zip(tensors, marks, strict=True) if m is None or isinstance(m, Moved)]
        if not batch or name in QUERIES or (name in BORROWING and isinstance(marks[0], Derived)):
            if any(isinstance(m, Plain) for m in marks):
                self.refuse(name, parameters, "it is combined with an excluded parameter; exclude both or neither")
            result = func(*args, **kwargs)
            copied = name in EXPANDING or _repeats_lead(name, args, kwargs)
            for tensor in _tensors((result,), {}):
                if self.served(tensor) is not None:
                    continue
                mark = Derived(parameters, derived[0].source, derived[0].ids) if copied else Derived(parameters, tensor)
                self.marks.put(tensor, mark if tensor.requires_grad else CONSTANT)
            return result
        if not any(t.requires_grad for t, m in zip(tensors, marks, strict=True) if isinstance(m, Derived)):
            return func(*args, **kwargs)
        if torch.is_grad_enabled():
            replaced = self._expand_operands(func, name, args, kwargs, tensors, marks, parameters)
            if replaced is not None:
                return func(*replaced[0], **replaced[1])
        return func(*args, **kwargs)

    def _expand_operands(self, func, name, args, kwargs, tensors, marks, parameters):
        """Arguments with every parameter replaced by its copies per unit, or None to run the call plainly."""
        lead = self.groups.lead
        if _in_place(func) and isinstance(marks[0], Derived):
            return self.refuse(name, parameters, "it is written to in place")
        if name in ELEMENTWISE:
            ndim = max(t.dim() for t in tensors)
        elif name in CONCATENATING:
            ndim = tensors[0].dim()
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim % ndim < len(lead):
                return self.refuse(name, parameters, "it is concatenated along the batch")
        else:
            return self.refuse(name, parameters, "htv does not know how to separate its contributions by group there")
        full = [t for t, m in zip(tensors, marks, strict=True) if m is None and t.dim() == ndim and self.groups.fits(t)]
        if not full:
            shapes = [tuple(t.shape) for t, m in zip(tensors, marks, strict=True) if not isinstance(m, Derived)]
            return self.refuse(name, parameters, f"no operand starts with the batch's dims {lead}, but {shapes}")
        copies = {}
        for tensor, mark in zip(tensors, marks, strict=True):
            if isinstance(mark, Derived) and tensor.requires_grad:
                source = mark.source
                leading = ((1,) * (ndim - source.dim()) + tuple(source.shape))[: len(lead)]
                if any(size != 1 for size in leading):
                    return self.refuse(
                        name, mark.parameters, f"its shape {tuple(source.shape)} varies along the batch's dims {lead}"
                    )
                copies[id(tensor)] = self._copies(tensor, mark, ndim)
        return _replace(args, copies), _replace(kwargs, copies)

    def _copies(self, tensor: Tensor, mark: Derived, ndim: int) -> Tensor:
        slots = []
        for served in mark.parameters:
            served.note("elementwise")
            slots.append(served.slot(self.groups))
        derived = DerivedTensor(mark.source, [s.parameter for s in mark.parameters], slots, mark.ids)
        copies = expand(derived, ndim, self.groups)
        shape = (1,) * (ndim - tensor.dim()) + tuple(tensor.shape)
        return copies.expand(*self.groups.lead, *shape[len(self.groups.lead) :])

    # -- marks of results ---------------------------------------------------------------------------------------------

    def _follow_batch_dim(self, func, args, kwargs, tensors, marks, result) -> None:
        """Mark results whose batch dim is not dim 0. Only dim 0 is followed; packed (1, total) batches keep both."""
        first, name = tensors[0], plain_name(func)
        moved = next(((t, m) for t, m in zip(tensors, marks, strict=True) if isinstance(m, Moved)), None)
        outputs = _tensors((result,), {})
        if moved is None:
            if not self.groups.fits(first) or marks[0] is not None:
                return
            dim = layout.batch_dim_after(name, func, first, 0, args[1:], kwargs) if args else 0
        else:
            tensor, mark = moved
            if self._is_broadcast(tensor, tensors, marks) and all(self.groups.fits(o) for o in outputs):
                return
            if mark.dim is None:
                dim = None
            elif tensor is first and args:
                dim = layout.batch_dim_after(name, func, first, mark.dim, args[1:], kwargs)
                if dim is not None and name not in layout.FOLLOWED and not _keeps(tensor, dim, outputs):
                    dim = None
            else:
                dim = mark.dim if _keeps(tensor, mark.dim, outputs) else None
        if dim != 0:
            for output in outputs:
                self.marks.put(output, Moved(dim))

    def _is_broadcast(self, tensor: Tensor, tensors, marks) -> bool:
        """Whether `tensor` only broadcasts along the batch of another operand (a mean over the batch, say)."""
        full = [t for t, m in zip(tensors, marks, strict=True) if m is None and self.groups.fits(t)]
        return any(tensor.dim() < t.dim() or (tensor.dim() == t.dim() and tensor.shape[0] == 1) for t in full)


def _in_place(func) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def _keeps(tensor: Tensor, dim: int, outputs: list[Tensor]) -> bool:
    """Whether every output has the dims of `tensor` at least in number and in the size of `dim`."""
    return all(o.dim() == tensor.dim() and o.shape[dim] == tensor.shape[dim] for o in outputs)


def _repeats_lead(name: str, args, kwargs) -> bool:
    """Whether a call to Tensor.repeat only copies along dim 0, as expand does."""
    if name != "repeat" or kwargs:
        return False
    sizes = args[1:] if isinstance(args[1], int) else tuple(args[1])
    return len(sizes) == args[0].dim() and args[0].shape[0] == 1 and all(size == 1 for size in sizes[1:])


def _tensors(args, kwargs) -> list[Tensor]:
    """Tensors among the arguments, in order, looking into lists and tuples."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors(value, None))
    return found


def _replace(value, copies: dict[int, Tensor]):
    """The same structure with some tensors replaced, by identity."""
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if isinstance(value, dict):
        return {key: _replace(item, copies) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(item, copies) for item in value)
    return value
