"""The torch-function mode under which an attached model's forward runs.

It sees every torch call with its arguments. Calls that use a served parameter in a way htv knows
are replaced by their aggregating twins (`htv.engine.handlers`); calls among parameters alone run
plainly and mark their result as from parameters; every other use of a parameter together with the
batch is refused by name. So no parameter is served by guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.from_parameters import TensorFromParameters
from htv.engine import expansion, graph_reading, handlers, propagation, results, torch_ops
from htv.engine.eager_helpers import hold_eager
from htv.engine.inputs import Batch
from htv.engine.protocols import ModeSession, ParameterLike
from htv.engine.provenance import (
    CONSTANT,
    PLAIN,
    Constant,
    FromParameters,
    Lost,
    Mark,
    Marks,
    OfBatch,
)
from htv.engine.torch_ops import plain_name, tensors_in
from htv.engine.usual import compiled, put_usual
from htv.errors import UnsupportedError
from htv.groups import BatchLayout, GroupedRows, Groups

# What calls tell of a tensor, but its values: nothing has to be known of it, and nothing comes of
# it.
QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_leaf", "grad_fn",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "_version",
        "output_nr", "itemsize", "nbytes",
    )),
    *(getattr(Tensor, name) for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size",
        "is_floating_point", "is_complex", "is_contiguous", "storage_offset", "get_device",
        "is_inference", "__len__",
    )),
    torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip
IN_TRANSFORM = (
    "torch.vmap, or another transform of torch.func, (without which a layer takes the whole batch)"
)
are_transforms_active = torch._C._are_functorch_transforms_active
SCALARS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format}


def left_on_stack(drop: Callable[[ServingMode], bool]) -> None:
    """Take modes off torch's stack of function modes for which `drop` is true: those an interrupt
    left there, or those that are done.
    """
    count = torch._C._len_torch_function_stack()
    if not count:
        return
    stack = [torch._C._get_function_stack_at(i) for i in range(count)]
    kept = [mode for mode in stack if not (isinstance(mode, ServingMode) and drop(mode))]
    if len(kept) == count:
        return
    for _ in stack:
        torch._C._pop_torch_function_stack()
    for mode in kept:
        torch._C._push_on_torch_function_stack(mode)


class RowsByLayout(dict):
    """Keeps who votes with the indices of a tensor that has the batch at a place, by that place.

    keeps_all:  also those whose examples are numbered one by one, which serve one batch.
    """

    def __init__(self, groups: Groups, keeps_all: bool = False):
        super().__init__()
        self._groups, self._keeps_all = groups, keeps_all

    def __missing__(self, layout: BatchLayout) -> GroupedRows:
        found = self._groups.grouped_rows(layout)
        if layout.examples is None or self._keeps_all:
            self[layout] = found
        return found


class ServingMode(TorchFunctionMode):
    """Runs one forward of an attached model, for one batch.

    session:       knows which tensors are served parameters.
    groups:        how this batch's examples map to groups.
    batch:         the tensors the model is called with, and which of them hold the examples.
    again:         of a part that activation checkpointing runs again, the forward it belongs to:
                   tensors keep their marks.
    carried:       what earlier forwards know of tensors the model is called with, by identity.
    rows:          who votes at which place, as far as earlier forwards of the same groups found it.
    """

    block = None  # a reference to the `Handle.forward` block that opened it
    frame = None  # of `Session.run`, as long as that runs it
    spec = None  # who was asked to vote
    eager = None  # keeps functions that are compiled by themselves eager

    def __init__(
        self,
        session: ModeSession,
        groups: Groups,
        batch: Batch,
        again: ServingMode | None = None,
        carried: dict[int, Mark] | None = None,
        rows: RowsByLayout | None = None,
    ):
        super().__init__()
        self.session, self.groups, self.batch, self._carried = session, groups, batch, carried or {}
        self.batch_size = groups.batch_size
        self.marks = marks = Marks(None if again is None else again.marks)
        self.table = known = marks.table
        # A backward inside the forward is not its business.
        self.task = torch._C._current_graph_task_id()
        self.own = own = session.own_marks
        self.rows = RowsByLayout(groups, keeps_all=True) if rows is None else rows
        self.found = session.known_results(groups)  # marks of results, by all that decides them
        for tensors in (session.constants(), batch.constants):
            for tensor in tensors:
                if tensor is None:  # a norm without running statistics
                    continue
                tracked = id(tensor) in own and tensor.requires_grad
                if (
                    id(tensor) not in known
                    and not tracked
                    and (again is None or marks.get(tensor) is None)
                ):
                    marks.put(tensor, PLAIN if tensor.requires_grad else CONSTANT)
        for name, tensor, layout, sure in batch.members:
            tracked = id(tensor) in own and tensor.requires_grad
            if (
                id(tensor) not in known
                and not tracked
                and (again is None or marks.get(tensor) is None)
            ):
                if not sure:
                    guess = f"{name!r}, an input of shape {tuple(tensor.shape)},"
                    layout = replace(layout, guess=guess)
                if not (layout.is_the_one and put_usual(known, tensor, layout)):
                    marks.put(tensor, layout)

    def enter(self) -> None:
        """Put the mode on torch's stack; `left_on_stack` takes it off, whatever was interrupted."""
        self.eager = hold_eager()
        torch._C._push_on_torch_function_stack(self)

    def is_stale(self) -> bool:
        """Tell whether the forward is over, in this thread, and the mode was left on the stack."""
        thread = getattr(self.session, "thread", None)
        return thread is not None and getattr(thread, "running", None) is not self

    def remember(self, result) -> None:
        """Note at `result`, which a forward returns, where the batch is in it, for forwards that it
        is handed to.
        """
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor):
                self._remember((result,))
                return
            for leaf in pytree.tree_leaves(result):
                self._remember(vars(leaf).values() if is_dataclass(leaf) else (leaf,))

    def _remember(self, values: Iterable) -> None:
        """Do so for those of `values` that are tensors of the batch."""
        for tensor in values:
            node = tensor.grad_fn if isinstance(tensor, Tensor) else None
            mark = None if node is None else self.marks.get(tensor)
            if isinstance(mark, OfBatch):
                knowledge = graph_reading.Knowledge(self.groups, self.spec, self.batch.source)
                graph_reading.remember(node, tensor.output_nr, knowledge, mark)

    def batch_misplaced(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is not what it would be taken for as an input of the model."""
        mark = self.mark(tensor)
        if isinstance(mark, BatchLayout):
            return not mark.same(self.groups.input_layout, self.batch_size)
        return isinstance(mark, (Lost, FromParameters)) or (
            isinstance(mark, Constant) and self.groups.fits(tensor)
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Serve one torch call of the forward, `func(*args, **kwargs)`."""
        kwargs = kwargs or {}
        if func in QUESTIONS or torch._C._current_graph_task_id() != self.task:
            # No tensor comes of it, or it is of a backward that the forward calls.
            return func(*args, **kwargs)
        if kwargs and torch_ops.is_reordered(func, args):
            args, kwargs = self.in_order(func, args, kwargs)
        handler = handlers.HANDLERS.get(func)
        if handler is not None:
            result = handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.general(func, args, kwargs)

    def call(self, func, args, kwargs):
        """Make one torch call of the forward, `func(*args, **kwargs)`, served where that is
        needed.
        """
        return self.__torch_function__(func, (), args, kwargs)

    def in_order(self, func, args, kwargs):
        """Return the arguments of `func(*args, **kwargs)` with tensors given by name in front."""
        return torch_ops.in_order(plain_name(func), args, kwargs)

    # -- what a tensor is --------------------------------------------------------------------------

    def tracked(self, tensor) -> ParameterLike | None:
        """Return the record of a served parameter, `tensor`, or None for anything else."""
        return self.session.tracked_parameter(tensor)

    def mark(self, tensor: Tensor | None) -> Mark | None:
        """Return what `tensor` is to the batch; None for None.

        A tensor without a graph that no call of this forward made is a constant: a global,
        something cached earlier. Of one with a graph the graph tells.
        """
        if tensor is None:
            return None
        own = self.own.get(id(tensor))
        if own is not None and tensor.requires_grad:
            return own
        mark = self.marks.current(tensor, self._mark_again)
        if mark is not None and not (isinstance(mark, Constant) and tensor.requires_grad):
            return mark
        mark = self._inside_transform(tensor) if are_transforms_active() else None
        if mark is None:
            mark = self.unseen(tensor) if tensor.requires_grad else CONSTANT
        self.marks.put(tensor, mark)
        return mark

    def _inside_transform(self, tensor: Tensor) -> Lost | None:
        """Return that the batch is lost in `tensor` if that stands for a part of the batch inside
        torch.vmap or its like, where dims are not those that marks speak of; else None.
        """
        wrapped = tensor
        while torch._C._functorch.is_functorch_wrapped_tensor(wrapped):
            wrapped = torch._C._functorch.get_unwrapped(wrapped)
        if wrapped is tensor or not isinstance(self.mark(wrapped), OfBatch):
            return None
        return Lost(IN_TRANSFORM, results.place_in_code())

    def _mark_again(self, view: Tensor) -> Mark:
        return results.mark_again(self, view)

    def unseen(self, tensor: Tensor) -> Mark:
        """Tell what a tensor with a gradient is that no call of this forward made, as far as one
        can see.
        """
        carried = self._carried.get(id(tensor))
        if carried is not None:
            return carried
        self._refuse_stand_in(tensor)
        if tensor.grad_fn is None:
            return PLAIN
        alive = self._alive()
        alive.pop((id(tensor.grad_fn), tensor.output_nr), None)  # what it was before
        mark = self._read(tensor.grad_fn, tensor.output_nr, alive)
        if isinstance(mark, Lost):
            return replace(mark, where=results.place_in_code())
        return (
            FromParameters(mark.parameters, tensor)
            if isinstance(mark, FromParameters)
            else mark or PLAIN
        )

    def at(self, node, number: int) -> Mark | None:
        """Return the mark of output `number` of a `node` of autograd; None if nothing known is in
        it.
        """
        return self._read(node, number, self._alive())

    def _alive(self) -> dict:
        return {(id(node), number): (node, mark) for node, number, mark in self.marks.nodes()}

    def _read(self, node, number: int, alive: dict) -> Mark | None:
        known = lambda node, number: self._known(node, number, alive)
        rows = self.groups.rows_vote
        return graph_reading.mark_at(node, number, lambda: self.batch_size, known, rows=rows)

    def _known(self, node, number: int, alive: dict) -> Mark | None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return self.mark(leaf)
        found = alive.get((id(node), number))
        if found is not None:
            return found[1]
        grouped_rows = graph_reading.grouped_rows_of(node, number)
        if grouped_rows is not None:
            mine = (
                grouped_rows.groups is self.groups
                or grouped_rows.groups.batch_size == self.batch_size
            )
            return (
                grouped_rows.layout
                if mine
                else Lost("another forward, of another number of examples,")
            )
        noted = graph_reading.remembered(node, number)
        if noted is None:
            return None
        mine = noted[0].groups.batch_size == self.batch_size
        return noted[1] if mine else Lost("another forward, of another number of examples,")

    def _refuse_stand_in(self, tensor: Tensor) -> None:
        """Refuse a tensor that took a parameter's place inside a module, as FSDP's do."""
        name = self.session.stands_in(tensor)
        if name is not None:
            raise UnsupportedError(
                f"{name!r} is another tensor than when the model was attached: a hook, FSDP or "
                "tensor parallelism put it there for this forward, and its gradient would be the "
                "plain one. Remedy: detach, and attach where the parameters stay what they are, "
                f"or exclude={name!r} and use htv.Mean() for the others"
            )

    def argument(self, value: Tensor | None, mark: Mark | None = None) -> ParameterArgument:
        """Return `value`, a layer's parameter argument: served if it is one or derived from some,
        plain otherwise. `mark` is its mark, if known.
        """
        mark = self.mark(value) if mark is None else mark
        if not isinstance(mark, FromParameters) or not value.requires_grad:
            return ParameterArgument(value)
        if mark is self.own.get(id(value)):
            return mark.parameters[0].argument(self.groups, self.task, small=False)
        return self.derived(value, mark).argument()

    def derived(self, value: Tensor, mark: FromParameters) -> TensorFromParameters:
        parameters, recorders = zip(
            *((s.parameter, s.recorder(self.groups, self.task)) for s in mark.parameters),
            strict=True,
        )
        return TensorFromParameters(
            value, list(parameters), list(recorders), mark.origin if value is mark.source else None
        )

    def input(self, x: Tensor) -> tuple[Tensor, Mark | None]:
        """Return `x`, a layer's input, or its copies per example, and its `layout`."""
        mark = self.mark(x)
        if isinstance(mark, FromParameters):
            x = expansion.copied_per_example(self, x)
            mark = self.mark(x)
        return x, mark if self.batch_size > 1 else self.layout(x, mark=mark)

    def layout(self, x: Tensor, dim: int = 0, mark: Mark | None = None) -> Mark | None:
        """Return `mark` of `x`, looked up if None; of a batch with one example, all of whose `x` it
        is, the place along `dim`.
        """
        mark = self.mark(x) if mark is None else mark
        if self.batch_size > 1:
            return mark
        return (
            propagation.all_of_one(x, dim)
            if isinstance(mark, BatchLayout) and x.dim() > dim
            else mark
        )

    def why_not_batch(self, x: Tensor, mark: Mark | None, features: int) -> str | None:
        """Return None if it is known where the batch is in `x`, before its last `features` dims;
        else the reason. `mark` is what `layout` says of `x`.
        """
        if isinstance(mark, Lost):
            self.session.note_loss(mark)
            return (
                f"it is not known any more which part of its input of shape {tuple(x.shape)} "
                f"belongs to which example: {mark} lost that (the batch is "
                f"{self.batch.source or 'not an argument'})"
            )
        if not isinstance(mark, BatchLayout):
            return f"its input of shape {tuple(x.shape)} was not computed from the batch"
        if mark.dim >= x.dim() - features:
            return (
                f"the batch is in dim {mark.dim} of its input of shape {tuple(x.shape)}, which "
                "this layer mixes"
            )
        return None

    def refuse(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> None:
        """Refuse a use of `parameters` by `op`, because of `why`, or note that it is passed on
        plainly where the session was told to.
        """
        self.session.unsupported(self.refusal(op, parameters, why), parameters)

    def refusal(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> str:
        names = ", ".join(repr(tracked.name) for tracked in parameters)
        return (
            f"parameter {names} is used by {op}: {why}. Remedy: exclude={names} to give it a "
            "plain gradient, on_unsupported='plain' to do so wherever needed, or write the use "
            "with layers htv.explain lists as served"
        )

    # -- calls that no layer serves ----------------------------------------------------------------

    def general(self, func, args, kwargs):
        """Run a call that no layer serves, `func(*args, **kwargs)`, expanding parameters where it
        is elementwise, and mark its results.

        Nearly all calls of a forward come here. Where htv is compiled, what was found for a call is
        kept for those like it (csrc/engine/dispatch.cpp), and the others are `unusual`.
        """
        return self.unusual(func, args, kwargs)

    def unusual(self, func, args, kwargs):
        """Do what `general` does, whatever the operands."""
        tensors = tensors_in(args, kwargs)
        marks = [self.mark(tensor) for tensor in tensors]
        derived = any(type(mark) is FromParameters for mark in marks)
        if derived or torch_ops.writes(func):
            return self._slowly(func, args, kwargs, tensors, marks, derived)
        result = func(*args, **kwargs)
        self.mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        return result

    def learn(self, func, args, kwargs, tensors, marks, result, key):
        """Mark what a usual call, `func(*args, **kwargs)`, made of `tensors` with such `marks`, and
        keep the mark for calls that have the same `key`, unless that is None.
        """
        self.mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        if key is not None:
            mark = self.marks.get(result)
            if results.may_be_kept(mark):
                try:
                    self.found[key] = mark
                except TypeError:  # something in it cannot be looked up
                    pass
        return result

    def _slowly(
        self, func, args, kwargs, tensors: list[Tensor], marks: list[Mark | None], derived: bool
    ):
        """Do the work of `unusual` for calls that use parameters or write to a tensor."""
        if (
            args
            and isinstance(args[0], Tensor)
            and torch_ops.writes(func)
            and args[0]._base is not None
        ):
            base = args[0]._base
            if self.tracked(base) is None:  # what it is before this write, which its view tells of
                self.marks.put(base, self.mark(base))
        if derived:
            result = expansion.call_with_parameters(self, func, args, kwargs, tensors, marks)
        else:
            result = func(*args, **kwargs)
        self.mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        return result

    # -- what becomes of its results ---------------------------------------------------------------

    def mark_results(self, func, args, kwargs, operands, result) -> None:
        """Mark what the call `func(*args, **kwargs)` made of its `operands`, tensors with their
        marks: `result`, or what it wrote to in place.
        """
        results.mark_results(self, func, args, kwargs, operands, result)


if compiled is not None:
    compiled.set_tables(
        handlers=handlers.HANDLERS,
        questions=QUESTIONS,
        scalars=SCALARS,
        reorders=torch_ops.is_reordered,
        writes=torch_ops.writes,
        is_kept=results.is_kept,
        layout=BatchLayout,
        derived=FromParameters,
    )
    ServingMode.__torch_function__ = compiled.torch_function
    ServingMode.general = compiled.general
