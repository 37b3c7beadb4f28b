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
from htv.layout import LOST, Batch, Constant, Derived, Mark, Marks, Operation, Plain, plain_name

if TYPE_CHECKING:
    from htv.attach import Handle
    from htv.served import Served

CONSTANT, PLAIN = Constant(), Plain()

# One tensor only lends its dtype, device or shape to the other.
BORROWING = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
# They hand out values without a gradient, or no tensor at all.
QUERIES = {"detach", "data", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "data_ptr"}


class Intercept(TorchFunctionMode):
    """One forward of an attached model, for one batch.

    handle:  knows which tensors are served parameters.
    groups:  how this batch's units map to groups.
    inputs:  the tensors the model is called with; those that start with the batch's dims are taken as the batch's.
    """

    def __init__(self, handle: Handle, groups: Groups, inputs: list[Tensor]):
        super().__init__()
        self.handle, self.groups = handle, groups
        self.home = Batch(len(groups.lead) - 1)  # where layers need the batch
        self.marks = Marks()
        for tensor in handle.constants():
            self._mark_constant(tensor)
        for tensor in inputs:
            if self.served(tensor) is not None:
                continue
            if groups.fits(tensor):
                self.marks.put(tensor, self.home)
            else:
                self._mark_constant(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        server = layers.SERVERS.get(func)
        if server is not None:
            result = server(self, func, args, kwargs)
            if result is not NotImplemented:
                if self.marks.get(result) is None:
                    self.marks.put(result, self.home)
                return result
        return self.general(func, args, kwargs)

    # -- what a tensor is ---------------------------------------------------------------------------------------------

    def served(self, tensor) -> Served | None:
        """The record of a served parameter, or None for anything else."""
        return self.handle.served_parameter(tensor)

    def mark(self, tensor: Tensor | None) -> Mark | None:
        """What a tensor is to the batch; None for None.

        A tensor no call of this forward made is a constant: a global, something cached earlier. One with a graph comes
        from a custom autograd.Function, whose results the mode does not see: it is the batch's if its shape is.
        """
        if tensor is None:
            return None
        served = self.served(tensor)
        if served is not None:
            return Derived((served,), tensor)
        mark = self.marks.get(tensor)
        if mark is not None and not (isinstance(mark, Constant) and tensor.requires_grad):
            return mark
        if tensor.grad_fn is not None:
            return self.home if self.groups.fits(tensor) else LOST
        return PLAIN if tensor.requires_grad else CONSTANT

    def slot(self, value: Tensor | None) -> Slot:
        """A layer's parameter argument: served if it is a served parameter, plain otherwise."""
        served = None if value is None else self.served(value)
        return Slot(value) if served is None else served.slot(self.groups)

    def why_not_batch(self, x: Tensor, features: int) -> tuple[type[Exception], str] | None:
        """None if x has the batch in its leading dims and `features` dims behind it; else the error and its reason."""
        lead = self.groups.lead
        mark = self.mark(x)
        if mark == self.home and self.groups.fits(x) and x.dim() >= len(lead) + features:
            return None
        if mark.dim != self.home.dim:
            return UnsupportedError, (
                f"the batch is no longer in the leading dims of its input of shape {tuple(x.shape)} (it was "
                "transposed, indexed, mixed or reduced away), so its rows cannot be told apart by group. Keep the "
                "batch in dim 0 (batch_first=True)"
            )
        return ValueError, (
            f"its input of shape {tuple(x.shape)} must start with the batch's dims {lead}, those of the forward's "
            "first tensor argument, and have features behind them, or its rows cannot be told apart by group. Keep the "
            "batch in dim 0 up to this layer (x.flatten(1) rather than x.view(-1, d))"
        )

    def refuse(self, op: str, parameters: tuple[Served, ...], why: str) -> None:
        """Refuse a use of parameters, or note that it is passed on plainly where the handle was told to."""
        names = ", ".join(repr(served.name) for served in parameters)
        self.handle.unsupported(
            f"parameter {names} is used by {op}: {why}. Remedy: exclude={names} to give it a plain gradient, "
            "on_unsupported='plain' to do so wherever needed, or write the use with layers htv.explain lists as served",
            parameters,
        )

    # -- calls that no layer serves -----------------------------------------------------------------------------------

    def general(self, func, args, kwargs):
        """Run a call that no layer serves, expanding parameters where it is elementwise, and mark its results."""
        tensors = tensors_in(args, kwargs)
        marks = [self.mark(t) for t in tensors]
        if any(isinstance(m, Derived) for m in marks):
            result = self._with_parameters(func, args, kwargs, tensors, marks)
        else:
            result = func(*args, **kwargs)
        self._mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        return result

    def _with_parameters(self, func, args, kwargs, tensors, marks):
        name = plain_name(func)
        derived = [m for t, m in zip(tensors, marks, strict=True) if isinstance(m, Derived) and t.requires_grad]
        parameters = tuple(dict.fromkeys(p for m in derived for p in m.parameters))
        if not derived or not torch.is_grad_enabled() or name in QUERIES or name in layout.COMPARING:
            return func(*args, **kwargs)
        if name in BORROWING:
            return func(*args, **kwargs)
        if any(isinstance(m, Batch) for m in marks):
            replaced = self._expand_operands(func, name, args, kwargs, tensors, marks, parameters)
            return func(*args, **kwargs) if replaced is None else func(*replaced[0], **replaced[1])
        if any(isinstance(m, Plain) for m in marks):
            why = "it is combined with something that keeps its plain gradient, an excluded parameter or an input that "
            self.refuse(name, parameters, f"{why}is not of the batch; exclude both or neither")
        return func(*args, **kwargs)

    def _expand_operands(self, func, name, args, kwargs, tensors, marks, parameters):
        """Arguments with every parameter replaced by its copies per unit, or None to run the call plainly."""
        lead = self.groups.lead
        if _in_place(func) and isinstance(marks[0], Derived):
            return self.refuse(name, parameters, "it is written to in place")
        if name in layout.ELEMENTWISE:
            ndim = max(t.dim() for t in tensors)
        elif name in layout.CONCATENATING:
            ndim = tensors[0].dim()
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim % ndim < len(lead):
                return self.refuse(name, parameters, "it is concatenated along the batch")
        else:
            return self.refuse(name, parameters, "htv does not know how to separate its contributions by group there")
        full = [
            t for t, m in zip(tensors, marks, strict=True) if m == self.home and t.dim() == ndim and self.groups.fits(t)
        ]
        lost = [t for t, m in zip(tensors, marks, strict=True) if m == LOST and t.requires_grad and t.numel() > 1]
        if not full or lost:
            shapes = [tuple(t.shape) for t, m in zip(tensors, marks, strict=True) if isinstance(m, Batch)]
            why = f"no operand has the batch in its leading dims {lead}: their shapes are {shapes}, and the batch was "
            return self.refuse(name, parameters, f"{why}transposed, indexed or reduced away if they seem to fit")
        copies = {}
        for tensor, mark in zip(tensors, marks, strict=True):
            if isinstance(mark, Derived) and tensor.requires_grad:
                source = mark.source
                leading = ((1,) * (ndim - source.dim()) + tuple(source.shape))[: len(lead)]
                if any(size != 1 for size in leading):
                    return self.refuse(
                        name, mark.parameters, f"its shape {tuple(source.shape)} varies along the batch's dims {lead}"
                    )
                copies[id(tensor)] = self._copies(tensor, mark, ndim, full[0])
        return _replace(args, copies), _replace(kwargs, copies)

    def _copies(self, tensor: Tensor, mark: Derived, ndim: int, beside: Tensor) -> Tensor:
        slots = []
        for served in mark.parameters:
            served.note("elementwise")
            slots.append(served.slot(self.groups))
        derived = DerivedTensor(mark.source, [s.parameter for s in mark.parameters], slots, mark.ids)
        # A scalar does not raise the type of what it meets: its copies must not either.
        dtype = torch.result_type(beside, tensor) if tensor.dim() == 0 else None
        copies = expand(derived, ndim, self.groups, dtype)
        shape = (1,) * (ndim - tensor.dim()) + tuple(tensor.shape)
        return copies.expand(*self.groups.lead, *shape[len(self.groups.lead) :])

    # -- marks of results ---------------------------------------------------------------------------------------------

    def _mark_constant(self, tensor: Tensor) -> None:
        self.marks.put(tensor, PLAIN if tensor.requires_grad else CONSTANT)

    def _mark_results(self, func, args, kwargs, operands, result) -> None:
        """Mark what a call made, or wrote to in place."""
        name = plain_name(func)
        written = args[0] if args and (_in_place(func) or name == "setitem") else kwargs.get("out")
        outputs = tensors_in((result,), None) if written is None else tensors_in((written,), None)
        if not outputs:
            return
        if name in BORROWING and operands:
            operands = operands[:1]
        if any(isinstance(m, Batch) for _, m in operands) and name not in layout.MAKING:
            operation = Operation(name, func, args, kwargs, operands, outputs)
            marks = layout.follow(operation, self.groups.num_units)
        else:
            marks = [self._mark_without_batch(name, args, kwargs, operands, output) for output in outputs]
        for output, mark in zip(outputs, marks, strict=True):
            if self.served(output) is None:
                self.marks.put(output, mark)
            if written is not None:
                self._mark_base(output, mark)

    def _mark_without_batch(self, name, args, kwargs, operands, output: Tensor) -> Mark:
        derived = [m for _, m in operands if isinstance(m, Derived)]
        if not output.requires_grad:
            return CONSTANT
        if not derived:
            return PLAIN
        if name in layout.EXPANDING or _repeats_lead(name, args, kwargs):
            return Derived(derived[0].parameters, derived[0].source, derived[0].ids)
        return Derived(tuple(dict.fromkeys(p for m in derived for p in m.parameters)), output)

    def _mark_base(self, view: Tensor, mark: Mark) -> None:
        """Writing to a view changes what its base is made of."""
        base = view._base
        if base is None or self.served(base) is not None:
            return
        if isinstance(mark, Batch):
            same = mark == self.home and self.groups.fits(base) and base.stride(mark.dim) == view.stride(mark.dim)
            self.marks.put(base, mark if same else LOST)
        elif isinstance(mark, Derived) or not isinstance(self.mark(base), (Batch, Derived)):
            self.marks.put(base, Derived(mark.parameters, base) if isinstance(mark, Derived) else mark)


def _in_place(func) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def _repeats_lead(name: str, args, kwargs) -> bool:
    """Whether a call to Tensor.repeat only copies along dim 0, as expand does."""
    if name != "repeat" or kwargs:
        return False
    sizes = args[1:] if isinstance(args[1], int) else tuple(args[1])
    return len(sizes) == args[0].dim() and args[0].shape[0] == 1 and all(size == 1 for size in sizes[1:])


def tensors_in(args, kwargs) -> list[Tensor]:
    """Tensors among the arguments, in order, looking into lists and tuples."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(tensors_in(value, None))
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
