"""The torch-function mode under which an attached model's forward runs.

It sees every torch call with its arguments. Calls that use a served parameter in a way htv knows
are replaced by their aggregating twins (`htv.engine.handlers`); calls among parameters alone run
plainly and mark their result as from parameters; every other use of a parameter together with the
batch is refused by name. So no parameter is served by guess.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.expand import expand, expand_rows, per_example
from htv.autograd.from_parameters import TensorFromParameters
from htv.engine import graph_reading, handlers, probing, propagation, torch_ops
from htv.engine.checkpointing import in_first_run
from htv.engine.inputs import Batch
from htv.engine.protocols import ModeSession, ParameterLike
from htv.engine.provenance import (
    CONSTANT,
    LOST,
    PLAIN,
    Constant,
    FromParameters,
    Lost,
    Mark,
    Marks,
    OfBatch,
    Plain,
)
from htv.engine.torch_ops import Operation, plain_name, replace_tensors, tensors_in
from htv.errors import UnsupportedError
from htv.groups import BatchLayout, GroupedRows, Groups

# One tensor only lends its dtype, device or shape to the other.
BORROWING = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
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
SCALARS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format}
# They hand out values without a gradient, or no tensor at all.
QUERIES = {
    "detach",
    "data",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_complex",
    "data_ptr",
}


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


class ServingMode(TorchFunctionMode):
    """Runs one forward of an attached model, for one batch.

    session:       knows which tensors are served parameters.
    groups:        how this batch's examples map to groups.
    batch:         the tensors the model is called with, and which of them hold the examples.
    again:         of a part that activation checkpointing runs again, the forward it belongs to:
                   tensors keep their marks.
    carried:       what earlier forwards know of tensors the model is called with, by identity.
    grouped_rows:  who votes at which place, as far as earlier forwards of the same groups found it.
    """

    block = None  # a reference to the `Handle.forward` block that opened it
    spec = None  # who was asked to vote

    def __init__(
        self,
        session: ModeSession,
        groups: Groups,
        batch: Batch,
        again: ServingMode | None = None,
        carried: dict[int, Mark] | None = None,
        grouped_rows: dict | None = None,
    ):
        super().__init__()
        self.session, self.groups, self.batch, self._carried = session, groups, batch, carried or {}
        self.marks = marks = Marks(None if again is None else again.marks)
        self.task = (
            torch._C._current_graph_task_id()
        )  # a backward inside the forward is not its business
        self.own = own = session.own_marks
        self._grouped_rows, self._rows_of_one_batch = (
            ({}, True) if grouped_rows is None else (grouped_rows, False)
        )
        self._found = session.known_results(groups)  # marks of results, by all that decides them
        known = marks.table
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
                guess = "" if sure else f"{name!r}, an input of shape {tuple(tensor.shape)},"
                marks.put(tensor, replace(layout, guess=guess) if guess else layout)

    def enter(self) -> None:
        """Put the mode on torch's stack; `left_on_stack` takes it off, whatever was interrupted."""
        torch._C._push_on_torch_function_stack(self)

    def is_stale(self) -> bool:
        """Tell whether the forward is over, in this thread, and the mode was left on the stack."""
        thread = getattr(self.session, "thread", None)
        return thread is not None and getattr(thread, "running", None) is not self

    def remember(self, result) -> None:
        """Note at `result`, which a forward returns, where the batch is in it, for forwards that it
        is handed to.
        """
        knowledge = graph_reading.Knowledge(self.groups, self.spec, self.batch.source)
        leaves = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
        with torch._C.DisableTorchFunction():
            for leaf in leaves:
                values = vars(leaf).values() if is_dataclass(leaf) else (leaf,)
                for tensor in values:
                    if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                        mark = self.marks.get(tensor)
                        if isinstance(mark, OfBatch):
                            graph_reading.remember(tensor, knowledge, mark)

    def batch_misplaced(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is not what it would be taken for as an input of the model."""
        mark = self.mark(tensor)
        if isinstance(mark, BatchLayout):
            return not mark.same(self.groups.input_layout, self.groups.batch_size)
        return isinstance(mark, (Lost, FromParameters)) or (
            isinstance(mark, Constant) and self.groups.fits(tensor)
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in QUESTIONS or torch._C._current_graph_task_id() != self.task:
            return func(
                *args, **kwargs
            )  # no tensor comes of it, or it is of a backward that the forward calls
        if kwargs and (not args or plain_name(func) in torch_ops.MULTIPLYING):
            args, kwargs = torch_ops.in_order(plain_name(func), args, kwargs)
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
        if not tensor.requires_grad:
            return CONSTANT
        mark = self._unseen(tensor)
        self.marks.put(tensor, mark)
        return mark

    def _unseen(self, tensor: Tensor) -> Mark:
        """Tell what a tensor with a gradient is that no call of this forward made, as far as one
        can see.
        """
        carried = self._carried.get(id(tensor))
        if carried is not None:
            return carried
        self._refuse_stand_in(tensor)
        if tensor.grad_fn is None:
            return PLAIN
        alive = {(id(node), number): (node, mark) for node, number, mark in self.marks.nodes()}
        alive.pop((id(tensor.grad_fn), tensor.output_nr), None)  # what it was before
        mark = graph_reading.mark_of(
            tensor,
            lambda: self.groups.batch_size,
            lambda node, number: self._known(node, number, alive),
        )
        if isinstance(mark, Lost):
            return replace(mark, where=_place_in_code())
        return (
            FromParameters(mark.parameters, tensor)
            if isinstance(mark, FromParameters)
            else mark or PLAIN
        )

    def _known(self, node, number: int, alive: dict) -> Mark | None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return self.mark(leaf)
        found = alive.get((id(node), number))
        if found is not None:
            return found[1]
        grouped_rows = graph_reading.grouped_rows_of(node)
        if grouped_rows is not None:
            mine = (
                grouped_rows.groups is self.groups
                or grouped_rows.groups.batch_size == self.groups.batch_size
            )
            return (
                grouped_rows.layout
                if mine
                else Lost("another forward, of another number of examples,")
            )
        noted = graph_reading.remembered(node, number)
        if noted is None:
            return None
        mine = noted[0].groups.batch_size == self.groups.batch_size
        return noted[1] if mine else Lost("another forward, of another number of examples,")

    def _refuse_stand_in(self, tensor: Tensor) -> None:
        """Refuse a tensor that took a parameter's place inside a module, as FSDP's do."""
        name = self.session.stands_in(tensor)
        if name is not None:
            raise UnsupportedError(
                f"{name!r} is another tensor than when the model was attached: a hook, FSDP or "
                "tensor parallelism put it "
                "there for this forward, and its gradient would be the plain one. Remedy: detach, "
                "and attach where the "
                f"parameters stay what they are, or exclude={name!r} and use htv.Mean() for the "
                "others"
            )

    def argument(self, value: Tensor | None, mark: Mark | None = None) -> ParameterArgument:
        """Return `value`, a layer's parameter argument: served if it is one or derived from some,
        plain otherwise. `mark` is its mark, if known.
        """
        mark = self.mark(value) if mark is None else mark
        if not isinstance(mark, FromParameters) or not value.requires_grad:
            return ParameterArgument(value)
        if mark is self.own.get(id(value)):
            return ParameterArgument(
                value.detach(), [mark.parameters[0].recorder(self.groups, self.task)]
            )
        return self._derived(value, mark).argument()

    def _derived(self, value: Tensor, mark: FromParameters) -> TensorFromParameters:
        parameters, recorders = zip(
            *((s.parameter, s.recorder(self.groups, self.task)) for s in mark.parameters),
            strict=True,
        )
        return TensorFromParameters(
            value, list(parameters), list(recorders), mark.origin if value is mark.source else None
        )

    def input(self, x: Tensor) -> tuple[Tensor, Mark | None]:
        """Return `x`, a layer's input, as `copied_per_example` gives it, and its `layout`."""
        entry = self.marks.table.get(id(x))
        if (
            entry is not None
            and entry[2] is not None
            and entry[0]() is x
            and self.groups.batch_size > 1
        ):
            if (
                entry[2] == x._version
                and x.requires_grad <= entry[3]
                and type(entry[1]) is BatchLayout
            ):
                return x, entry[1]  # the usual case
        mark = self.mark(x)
        if isinstance(mark, FromParameters):
            x = self.copied_per_example(x)
            mark = self.mark(x)
        return x, mark if self.groups.batch_size > 1 else self.layout(x, mark=mark)

    def layout(self, x: Tensor, dim: int = 0, mark: Mark | None = None) -> Mark | None:
        """Return `mark` of `x`, looked up if None; of a batch with one example, all of whose `x` it
        is, the place along `dim`.
        """
        mark = self.mark(x) if mark is None else mark
        if self.groups.batch_size > 1:
            return mark
        return (
            propagation.all_of_one(x, dim)
            if isinstance(mark, BatchLayout) and x.dim() > dim
            else mark
        )

    def grouped_rows(self, layout: BatchLayout) -> GroupedRows:
        """Return who votes with the indices of a tensor that has the batch at `layout`."""
        found = self._grouped_rows.get(layout)
        if found is None:
            found = self.groups.grouped_rows(layout)
            if layout.examples is None or self._rows_of_one_batch:
                self._grouped_rows[layout] = found
        return found

    def why_not_batch(self, x: Tensor, mark: Mark | None, features: int) -> str | None:
        """Return None if it is known where the batch is in `x`, before its last `features` dims;
        else the reason. `mark` is what `layout` says of `x`.
        """
        if isinstance(mark, Lost):
            self.session.note_loss(mark)
            return (
                f"it is not known any more which part of its input of shape {tuple(x.shape)} "
                "belongs to which example: "
                f"{mark} lost that (the batch is {self.batch.source or 'not an argument'})"
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
        self.session.unsupported(self._refusal(op, parameters, why), parameters)

    def _refusal(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> str:
        names = ", ".join(repr(tracked.name) for tracked in parameters)
        return (
            f"parameter {names} is used by {op}: {why}. Remedy: exclude={names} to give it a plain "
            "gradient, "
            "on_unsupported='plain' to do so wherever needed, or write the use with layers "
            "htv.explain lists as served"
        )

    # -- calls that no layer serves ----------------------------------------------------------------

    def general(self, func, args, kwargs):
        """Run a call that no layer serves, `func(*args, **kwargs)`, expanding parameters where it
        is elementwise, and mark its results.

        Nearly all calls of a forward come here, so what is found for one is kept for those like it,
        and the usual case makes no further call of a function.
        """
        # Tuples are built by concatenation: calls, of append() too, are what the time goes by.
        table = self.marks.table
        key = None if self._found is None or torch._C._len_torch_function_stack() else (func,)
        tensors, marks, derived = (), (), False
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind in SCALARS:
                if key is not None:
                    key = (*key, value)
            elif kind is Tensor or isinstance(value, Tensor):
                entry = table.get(id(value))
                if (
                    entry is not None
                    and key is not None
                    and entry[2] is not None
                    and entry[0]() is value
                    and entry[2] == value._version
                    and value.requires_grad <= entry[3]
                ):
                    mark = entry[1]
                else:
                    mark = self.mark(value)
                tensors, marks = (*tensors, value), (*marks, mark)
                if type(mark) is FromParameters:
                    derived = True
                elif type(mark) is BatchLayout and mark.examples is not None:
                    key = None
                elif key is not None:
                    key = (*key, mark, value.shape, value.dtype, value.requires_grad)
            elif kind is tuple or kind is list:
                inside = tensors_in(value, None)
                if inside:
                    more = [self.mark(t) for t in inside]
                    tensors, marks = (*tensors, *inside), (*marks, *more)
                    derived = derived or any(type(m) is FromParameters for m in more)
                    key = None
                elif key is not None:
                    key = (*key, (*value,))
            elif key is not None:
                key = (*key, value)
        if derived or _writes(func):
            return self._slowly(func, args, kwargs, tensors, marks, derived)
        result = func(*args, **kwargs)
        if key is None or type(result) is not Tensor or not _is_kept(func, not tensors[1:]):
            self._mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
            return result
        key = (*key, *kwargs, result.shape, result.requires_grad, torch.is_grad_enabled())
        try:
            mark = self._found.get(key)
        except TypeError:  # a slice, say, cannot be looked up
            key = mark = None
        if mark is not None:
            table[id(result)] = (weakref.ref(result), mark, result._version, result.requires_grad)
            return result
        self._mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        mark = self.marks.get(result)
        if (
            key is not None and key[-1] and _may_be_kept(mark)
        ):  # without gradients more than the key decides
            self._found[key] = mark
        return result

    def _slowly(
        self, func, args, kwargs, tensors: list[Tensor], marks: list[Mark | None], derived: bool
    ):
        """Do the work of `general` for calls that use parameters or write to a tensor."""
        if args and isinstance(args[0], Tensor) and _writes(func) and args[0]._base is not None:
            base = args[0]._base
            if self.tracked(base) is None:  # what it is before this write, which its view tells of
                self.marks.put(base, self.mark(base))
        if derived:
            result = self._with_parameters(func, args, kwargs, tensors, marks)
        else:
            result = func(*args, **kwargs)
        self._mark_results(func, args, kwargs, list(zip(tensors, marks, strict=True)), result)
        return result

    def _with_parameters(self, func, args, kwargs, tensors, marks):
        name = plain_name(func)
        derived = [
            m
            for t, m in zip(tensors, marks, strict=True)
            if isinstance(m, FromParameters) and t.requires_grad
        ]
        parameters = tuple(dict.fromkeys(p for m in derived for p in m.parameters))
        if (
            not derived
            or not torch.is_grad_enabled()
            or name in QUERIES
            or name in torch_ops.COMPARING
        ):
            return func(*args, **kwargs)
        if name in BORROWING:
            return func(*args, **kwargs)
        if any(isinstance(m, OfBatch) for m in marks):
            replaced = self._expand_operands(func, name, args, kwargs, tensors, marks, parameters)
            return func(*args, **kwargs) if replaced is None else func(*replaced[0], **replaced[1])
        if any(isinstance(m, Plain) for m in marks):
            why = (
                "it is combined with something that keeps its plain gradient, an excluded "
                "parameter or an input that is not of the batch; exclude both or neither"
            )
            self.refuse(name, parameters, why)
        return func(*args, **kwargs)

    def _expand_operands(self, func, name, args, kwargs, tensors, marks, parameters):
        """Return arguments with every parameter replaced by its copies per example, or None to run
        the call plainly.
        """
        if _in_place(func) and isinstance(marks[0], FromParameters):
            return self.refuse(name, parameters, "it is written to in place")
        if name in torch_ops.ELEMENTWISE:
            ndim = max(t.dim() for t in tensors)
        elif name in torch_ops.CONCATENATING:
            ndim = tensors[0].dim()
        else:
            return self.refuse(
                name,
                parameters,
                "htv does not know how to separate its contributions by group there",
            )
        layouts = [
            (t, m.at(m.dim + ndim - t.dim()))
            for t, m in zip(tensors, marks, strict=True)
            if isinstance(m, BatchLayout)
        ]
        losses = [
            m
            for t, m in zip(tensors, marks, strict=True)
            if isinstance(m, Lost) and t.requires_grad
        ]
        lost = not self.session.shares_statistics and bool(losses)
        shapes = [
            tuple(t.shape) for t, m in zip(tensors, marks, strict=True) if isinstance(m, OfBatch)
        ]
        batch_size = self.groups.batch_size
        if (
            not layouts
            or lost
            or not (batch_size == 1 or all(p.same(layouts[0][1], batch_size) for _, p in layouts))
        ):
            why = (
                f"of the other operands, of shapes {shapes}, it is not known which part belongs to "
                "which example: "
            )
            for mark in losses:
                self.session.note_loss(mark)
            blame = (
                f"{losses[0]} lost that"
                if losses
                else "the batch was indexed, mixed or reduced away"
            )
            why = f"{why}{blame} (the batch is {self.batch.source})"
            if losses and all(m.pairs for m in losses) and not self.session.passes_plainly:
                # Only a loss of the similarities would reach the parameter, and the guard on it
                # then says why not.
                message = self._refusal(name, parameters, why)
                for tracked in parameters:
                    tracked.defer(message)
                return None
            return self.refuse(name, parameters, why)
        beside, layout = layouts[0]
        if batch_size == 1 and not self.groups.rows_vote:
            copies = {
                id(t): self._of_one(t, m, beside)
                for t, m in zip(tensors, marks, strict=True)
                if _tracked(t, m)
            }
            return replace_tensors(args, copies), replace_tensors(kwargs, copies)
        if name in torch_ops.CONCATENATING and _along(args, kwargs) % ndim == layout.dim:
            return self.refuse(name, parameters, "it is concatenated along the batch")
        copies = {}
        for tensor, mark in zip(tensors, marks, strict=True):
            if _tracked(tensor, mark):
                copies[id(tensor)] = found = self._copies(tensor, mark, ndim, beside, layout)
                if found is None:
                    why = (
                        f"its shape {tuple(tensor.shape)} varies along dim {layout.dim}, the "
                        f"batch's, of {shapes}"
                    )
                    return self.refuse(name, mark.parameters, why)
        return replace_tensors(args, copies), replace_tensors(kwargs, copies)

    def _copies(
        self, tensor: Tensor, mark: FromParameters, ndim: int, beside: Tensor, layout: BatchLayout
    ) -> Tensor | None:
        """Make a derived tensor's copies for every example, to stand in for it; None if it cannot
        be told apart by example.
        """
        for tracked in mark.parameters:
            tracked.note("elementwise")
        source, size = mark.source, layout.size(self.groups.batch_size)
        of_batch = ((1,) * (ndim - source.dim()) + tuple(source.shape))[layout.dim]
        if of_batch != 1:
            if (
                source is not tensor
                or self.tracked(source)
                or source.dim() != ndim
                or of_batch != size
            ):
                return None
            derived = self._derived(source, mark)
            return None if derived.is_view else per_example(derived, self.grouped_rows(layout))
        # A scalar does not raise the type of what it meets: its copies must not either.
        dtype = torch.result_type(beside, tensor) if tensor.dim() == 0 else None
        argument = (
            self.argument(source)
            if self.tracked(source) is not None
            else self._derived(source, mark).argument()
        )
        if self.groups.rows_vote:
            return self._row_copies(argument, tensor, ndim, beside, layout, dtype)
        copies = expand(argument, ndim, size, self.grouped_rows(layout), dtype)
        shape = [*(1,) * (ndim - tensor.dim()), *tensor.shape]
        shape[layout.dim] = size
        return copies.expand(shape)

    def _of_one(self, tensor: Tensor, mark: FromParameters, beside: Tensor) -> Tensor:
        """Return a derived tensor as the only example uses it."""
        for tracked in mark.parameters:
            tracked.note("elementwise")
        dtype = torch.result_type(beside, tensor) if tensor.dim() == 0 else None
        return expand(
            self.argument(tensor), tensor.dim() + 1, 1, self.grouped_rows(BatchLayout(0)), dtype
        ).squeeze(0)

    def _row_copies(
        self,
        argument: ParameterArgument,
        tensor,
        ndim: int,
        beside: Tensor,
        layout: BatchLayout,
        dtype,
    ) -> Tensor | None:
        """Copy along all dims of the other operand but the last, where rows vote."""
        source = argument.value
        features = source.shape[-1] if source.dim() else 1
        lead = beside.shape[: ndim - 1]
        if (
            source.numel() > features
            or beside.dim() != ndim
            or layout.dim >= len(lead)
            or tensor.shape != source.shape
        ):
            return None  # it may differ from token to token
        return expand_rows(argument, (*lead, features), self.grouped_rows(layout), dtype)

    def with_copies(
        self, func, args, kwargs, tensors: list[Tensor], ndim: int, layout: BatchLayout
    ):
        """Make a call, `func(*args, **kwargs)`, with what comes from parameters among `tensors`
        replaced by its copies per example, which have them at `layout` in `ndim` dims.
        """
        copies = {}
        for tensor in tensors:
            mark = self.mark(tensor)
            if isinstance(mark, FromParameters) and tensor.requires_grad:
                found = self._copies(tensor, mark, ndim, tensor, layout)
                if found is None:
                    why = f"its shape {tuple(tensor.shape)} varies along the batch"
                    self.refuse(plain_name(func), mark.parameters, why)
                    continue
                copies[id(tensor)] = found
                self.marks.put(found, layout)
        return self.general(func, replace_tensors(args, copies), replace_tensors(kwargs, copies))

    def copied_per_example(self, x: Tensor | None) -> Tensor | None:
        """Return `x`, a layer's input; if it is a derived tensor expanded over the batch (learnt
        queries), its copies per example.
        """
        mark = self.mark(x)
        if (
            not isinstance(mark, FromParameters)
            or mark.source is x
            or not x.requires_grad
            or not torch.is_grad_enabled()
        ):
            return x
        own, batch_size = (
            (1,) * (x.dim() - mark.source.dim()) + tuple(mark.source.shape),
            self.groups.batch_size,
        )
        dims = [d for d in range(x.dim()) if x.shape[d] == batch_size and own[d] == 1]
        input_layout = self.groups.input_layout.dim
        if batch_size == 1 or self.groups.rows_vote or not (input_layout in dims or len(dims) == 1):
            return x
        names = ", ".join(repr(s.name) for s in mark.parameters)
        guess = f"a tensor of shape {tuple(x.shape)} expanded from parameter {names}"
        layout = BatchLayout(input_layout if input_layout in dims else dims[0], guess=guess)
        copies = self._copies(x, mark, x.dim(), x, layout)
        self.marks.put(copies, layout)
        return copies

    def unexpanded(self, w: Tensor, x: Tensor) -> Tensor:
        """Return `w`, a derived factor of a product with `x`, without leading dims along which it
        only repeats what `x` has.
        """
        source = self.mark(w).source
        if source is not w:
            own = (1,) * (w.dim() - source.dim()) + tuple(source.shape)
            repeated = [d for d in range(w.dim() - 2) if own[d] == 1 != w.shape[d]]
            known = x.dim() >= w.dim() and all(
                x.shape[x.dim() - w.dim() + d] == w.shape[d] for d in repeated
            )
            w = source if known else w
        while w.dim() > 2 and w.shape[0] == 1 and x.dim() >= w.dim():
            w = w.squeeze(0)
        return w

    # -- marks of results --------------------------------------------------------------------------

    def _mark_results(self, func, args, kwargs, operands, result) -> None:
        """Mark what a call made, or wrote to in place."""
        name = plain_name(func)
        written = args[0] if args and _writes(func) else kwargs.get("out")
        if (
            written is None
            and name in torch_ops.BROADCASTING
            and name not in BORROWING
            and isinstance(result, Tensor)
        ):
            layout = propagation.unmoved(operands, result, self.groups.batch_size)
            if layout is not None and self.tracked(result) is None:
                return self.marks.put(result, layout)
        outputs = tensors_in((result,), None) if written is None else tensors_in((written,), None)
        if not outputs:
            return
        if name in BORROWING and operands:
            operands = operands[:1]
        if getattr(func, graph_reading.ROWWISE, False):
            operation = Operation(name, func, args, kwargs, operands, outputs)
            batch_size = self.groups.batch_size
            follows = any(isinstance(m, OfBatch) for _, m in operands)
            if not follows:
                marks = [self._mark_without_batch(operation, output) for output in outputs]
            elif self.groups.rows_vote:  # it may take tokens out of their order
                marks = [propagation.LOST] * len(outputs)
            else:
                marks = [graph_reading.rowwise(operands, output, batch_size) for output in outputs]
        elif any(isinstance(m, OfBatch) for _, m in operands) and name not in torch_ops.MAKING:
            operation = Operation(name, func, args, kwargs, operands, outputs)
            couples, rows = self.session.shares_statistics, self.groups.rows_vote
            marks = propagation.follow(
                operation, self.groups.batch_size, couples, rows, in_first_run()
            )
            if written is not None and name in torch_ops.RESHAPED_IN_PLACE:
                marks = [LOST] * len(outputs)
        else:
            operation = Operation(name, func, args, kwargs, operands, outputs)
            marks = [self._mark_without_batch(operation, output) for output in outputs]
        if any(isinstance(m, Lost) for m in marks):
            marks = self._blamed(operation, marks)
        for output, mark in zip(outputs, marks, strict=True):
            if self.tracked(output) is None:
                self.marks.put(output, mark)
            if written is not None:
                self._mark_base(output, mark)

    def _blamed(self, operation: Operation, marks: list[Mark]) -> list[Mark]:
        """Return marks of which the lost ones say who lost the batch: this call, or an earlier one
        behind it.
        """
        earlier = next((m for _, m in operation.operands if isinstance(m, Lost) and m.by), None)
        pairs = any(isinstance(m, Lost) and m.pairs for m in marks)
        blame = earlier or Lost(f"{operation.name!r}", _place_in_code(), pairs)
        return [blame if isinstance(m, Lost) and not m.by else m for m in marks]

    def _mark_without_batch(self, op: Operation, output: Tensor) -> Mark:
        derived = [(t, m) for t, m in op.operands if isinstance(m, FromParameters)]
        if not output.requires_grad:
            return CONSTANT
        if not derived:
            return PLAIN
        tensor, mark = derived[0]
        if (
            output is tensor and not _in_place(op.func) and op.name != "setitem"
        ):  # x.to(...) of what is so already
            return mark
        if op.name in torch_ops.EXPANDING or _only_copies(op.name, op.args, op.kwargs):
            return FromParameters(mark.parameters, mark.source, mark.origin)
        if (
            op.name in torch_ops.PERMUTING
            and mark.source is not tensor
            and mark.source.dim() == tensor.dim()
        ):
            return FromParameters(
                mark.parameters, op.again({id(tensor): mark.source})
            )  # still an expanded tensor
        return FromParameters(
            tuple(dict.fromkeys(p for _, m in derived for p in m.parameters)), output
        )

    def _mark_again(self, view: Tensor) -> Mark:
        """Tell what a tensor is after its memory was written to elsewhere: through another view, or
        by a call nobody saw.
        """
        base, mark, batch_size = view._base, self.marks.get(view), self.groups.batch_size
        if getattr(type(view.grad_fn), "_forward_cls", None) is CheckpointFunction:
            return mark  # it was made where all operands have a say
        if base is None:
            return (
                self._unseen(view)
                if isinstance(mark, BatchLayout) and view.grad_fn is not None
                else mark
            )
        known = self.mark(base)
        if isinstance(known, BatchLayout):
            one = batch_size == 1 and view.dim() > 0
            return (
                propagation.all_of_one(view)
                if one
                else probing.view_after_writing(view, base, known, batch_size)
            )
        if (
            isinstance(known, FromParameters)
            and view.requires_grad
            and not isinstance(mark, OfBatch)
        ):
            same = isinstance(mark, FromParameters) and mark.parameters == known.parameters
            return mark if same else FromParameters(known.parameters, view)
        return LOST if isinstance(known, Lost) else mark

    def _mark_base(self, view: Tensor, mark: Mark) -> None:
        """Mark the base of a view that was written to: that changes what it is made of."""
        base = view._base
        if base is None or self.tracked(base) is not None:
            return
        known = self.marks.get(base) or self.mark(base)
        if isinstance(mark, OfBatch):
            self.marks.put(
                base, probing.base_after_writing(base, known, view, mark, self.groups.batch_size)
            )
        elif isinstance(mark, FromParameters) or not isinstance(
            known, (BatchLayout, Lost, FromParameters)
        ):
            self.marks.put(
                base,
                FromParameters(mark.parameters, base) if isinstance(mark, FromParameters) else mark,
            )


HERE = str(Path(__file__).resolve().parents[1]) + os.sep  # the package htv
TORCH = str(Path(torch.__file__).resolve().parent) + os.sep


def _place_in_code() -> str:
    """Return the line of the model's code that is running: "file:line"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((HERE, TORCH, "<frozen")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _tracked(tensor: Tensor, mark: Mark | None) -> bool:
    """Tell whether contributions to a tensor go to served parameters."""
    return isinstance(mark, FromParameters) and tensor.requires_grad


KEPT = torch_ops.BROADCASTING | torch_ops.EXPANDING | torch_ops.RESHAPING | torch_ops.PERMUTING
KEPT |= torch_ops.MULTIPLYING | torch_ops.ROWWISE | set(torch_ops.REDUCING)
KEPT |= {"unsqueeze", "einsum", "scaled_dot_product_attention", "repeat", "tile"}
KEPT_OF_ONE = set(torch_ops.ALONG) | {
    "getitem",
    "select",
}  # a second tensor would be an index, whose values matter


@lru_cache(maxsize=4096)
def _is_kept(func, of_one: bool) -> bool:
    """Tell whether the mark of a call's result follows from shapes and marks; `of_one`: of a call
    that takes one tensor at most.
    """
    name = plain_name(func)
    declared = getattr(func, graph_reading.ROWWISE, False)
    return not declared and (name in KEPT or (of_one and name in KEPT_OF_ONE))


def _may_be_kept(mark: Mark | None) -> bool:
    return (
        mark is CONSTANT or mark is PLAIN or (type(mark) is BatchLayout and mark.examples is None)
    )


@lru_cache(maxsize=4096)
def _writes(func) -> bool:
    """Tell whether a call changes its first argument."""
    return _in_place(func) or plain_name(func) == "setitem"


@lru_cache(maxsize=4096)
def _in_place(func) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    return name.endswith("_")


def _along(args, kwargs) -> int:
    """Return the dim tensors are concatenated along."""
    return kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))


def _only_copies(name: str, args, kwargs) -> bool:
    """Tell whether a call to Tensor.repeat only copies along dims of size 1, as expand does."""
    if name != "repeat" or kwargs:
        return False
    sizes = args[1:] if isinstance(args[1], int) else tuple(args[1])
    shape = (1,) * (len(sizes) - args[0].dim()) + tuple(args[0].shape)
    return all(size == 1 or dim == 1 for size, dim in zip(sizes, shape, strict=True))
