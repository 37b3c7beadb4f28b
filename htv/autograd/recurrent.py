"""Recurrent layers with aggregated gradients of what their states are multiplied by.

One Function runs all steps of a layer in one direction. Its backward records one use of every
weight, whose rows are the time steps: those of an example vote together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.autograd.aggregation import MARKER, Function, ParameterArgument
from htv.autograd.linear import ABSENT, bias_factors, linear, linear_factors
from htv.groups import BatchLayout, GroupedRows

aten = torch.ops.aten
States = tuple[Tensor, ...]  # (h,) or (h, c), of (N, H) each
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steps:
    """Cuts a tensor that holds whole sequences into time steps.

    sizes:     the rows of every step. A row is the same sequence's in all steps, and those that end
               first come last, as in a PackedSequence.
    packed:    whether the tensor holds packed rows (R, D), not (T, N, D).
    backwards: whether the last step is computed first.
    """

    sizes: tuple[int, ...]
    packed: bool
    backwards: bool

    def order(self, turned: bool = False) -> range:
        """The numbers of the steps as they are computed, or the other way round if `turned`."""
        forth = range(len(self.sizes))
        return forth[::-1] if self.backwards != turned else forth

    def rows(self, whole: Tensor, plus: Tensor | None = None) -> Tensor:
        """A copy of the tensor, with something added: (R, D), step by step."""
        rows = whole.new_empty(whole.shape)
        if plus is None:
            rows.copy_(whole)
        else:
            torch.add(whole, plus, out=rows)
        return rows if self.packed else rows.flatten(0, 1)

    def whole(self, rows: Tensor) -> Tensor:
        """Such rows in the shape of the tensor."""
        return rows if self.packed else rows.unflatten(0, (len(self.sizes), -1))

    def cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of every step."""
        return rows.split_with_sizes(self.sizes)

    def met(
        self, step: int, states: States, fresh: States, ended: list[States]
    ) -> tuple[Tensor, ...]:
        """The states, behind the step computed before `step`, of the sequences that this has.

        fresh:  the states (N, H) of those that begin here.
        ended:  takes the states of those that ended.
        """
        size, before = self.sizes[step], len(states[0])
        if size < before:
            ended.append(tuple([state[size:] for state in states]))
            return tuple([state[:size] for state in states])
        if size > before:
            both = zip(states, fresh, strict=True)
            return tuple([torch.cat([state, new[before:size]]) for state, new in both])
        return states

    def first(self, fresh: States, turned: bool = False) -> States:
        """Of the `fresh` states those of the sequences in the first step of an order."""
        size = self.sizes[self.order(turned)[0]]
        return tuple([state[:size] for state in fresh])

    def before(self, rows: Tensor, begin: Tensor) -> Tensor:
        """(R, H): the states that the steps start from, given those that they lead to."""
        parts, found = self.cut(rows), [rows] * len(self.sizes)
        states = self.first((begin,))
        for t in self.order():
            states = self.met(t, states, (begin,), [])
            found[t], states = states[0], (parts[t],)
        return torch.cat(found)


def last_states(states: States, ended: list[States]) -> States:
    """A copy of the last states of all sequences, from those that `Steps.met` left."""
    return tuple([torch.cat(parts) for parts in zip(states, *ended[::-1], strict=True)])


class Cell:
    """What one kind of recurrent layer computes.

    adds_states:  whether states are added to what gates give, beside the product: under autocast,
                  where gates are of a lower type, the layer then computes in that of the states.
    """

    adds_states: ClassVar[bool] = True

    @staticmethod
    def step(gates: Tensor, states: States, product: Product, project: Product | None) -> States:
        """The next states of one step, by operations that autograd and the mode see.

        gates:    from the input.
        product:  from h to its part of the gates, with the bias.
        project:  from what an LSTM puts out to h, or None.
        """
        raise NotImplementedError

    @staticmethod
    def forward(
        steps: Steps,
        gates: Tensor,
        begin: States,
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor | None,
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """Run all steps. Returns h (R, H), the last states, and what `backward` needs."""
        raise NotImplementedError

    @staticmethod
    def backward(
        steps: Steps,
        rows: Tensor,
        begin: States,
        weight: Tensor,
        projection: Tensor | None,
        saved: tuple[Tensor, ...],
        grad_rows: Tensor | None,
        grad_last: States,
    ) -> tuple[Tensor, Tensor, States, Tensor | None]:
        """The gradients (R, G) of the input's gates and of the product, those of `begin`, and of
        what an LSTM's projection gives (R, H).

        rows:       h, as `forward` returned it; grad_rows: its gradient by the output, or None.
        grad_last:  that of the last states.
        """
        raise NotImplementedError


class Lstm(Cell):
    @staticmethod
    def step(gates, states, product, project):
        i, f, g, o = (gates + product(states[0])).chunk(4, -1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if project is None else project(h)), c

    @staticmethod
    def forward(steps, gates, begin, weight, bias, projection):
        gates, size = steps.rows(gates, bias), begin[1].shape[1]
        cells, outs = (gates.new_empty(len(gates), size) for _ in range(2))
        projected = outs if projection is None else gates.new_empty(len(gates), len(projection))
        at, cells_at, outs_at, h_at = map(steps.cut, (gates, cells, outs, projected))
        both = steps.cut(gates[:, : 2 * size])
        i, f, g, o = map(steps.cut, gates.chunk(4, 1))
        weight, states, ended = weight.t(), steps.first(begin), []
        for t in steps.order():
            h, c = steps.met(t, states, begin, ended)
            at[t].addmm_(h, weight)
            both[t].sigmoid_()
            o[t].sigmoid_()
            torch.mul(f[t], c, out=cells_at[t]).addcmul_(i[t], g[t].tanh_())
            torch.mul(o[t], cells_at[t].tanh(), out=outs_at[t])
            if projection is not None:
                torch.mm(outs_at[t], projection.t(), out=h_at[t])
            states = h_at[t], cells_at[t]
        return projected, last_states(states, ended), (gates, cells, outs)

    @staticmethod
    def backward(steps, rows, begin, weight, projection, saved, grad_rows, grad_last):
        gates, cells, _ = saved
        i, f, g, o = gates.chunk(4, 1)
        tanhs, size = cells.tanh(), cells.shape[1]
        # The gradients of i, f and g by that of c, and of o by that of what is put out; then these.
        grads = torch.empty_like(gates)
        by_i, by_f, by_g, by_o = grads.chunk(4, 1)
        aten.sigmoid_backward(g, i, grad_input=by_i)
        aten.sigmoid_backward(steps.before(cells, begin[1]), f, grad_input=by_f)
        aten.tanh_backward(i, g, grad_input=by_g)
        aten.sigmoid_backward(tanhs, o, grad_input=by_o)
        by_cell = steps.cut(aten.tanh_backward(o, tanhs))  # of what is put out
        by_three = steps.cut(grads[:, : 3 * size].unflatten(1, (3, size)))
        at, by_o, f = map(steps.cut, (grads, by_o, f))
        outer = None if grad_rows is None else steps.cut(grad_rows)
        inner: list[Tensor] = [grads] * len(steps.sizes)
        states, ended = steps.first(grad_last, turned=True), []
        for t in steps.order(turned=True):
            h, c = steps.met(t, states, grad_last, ended)
            h = h if outer is None else h + outer[t]
            if projection is not None:
                inner[t] = h
                h = h @ projection
            c = torch.addcmul(c, h, by_cell[t])
            by_three[t].mul_(c.unsqueeze(1))
            by_o[t].mul_(h)
            states = at[t] @ weight, c * f[t]
        projected = None if projection is None else torch.cat(inner)
        return grads, grads, last_states(states, ended), projected


class Gru(Cell):
    @staticmethod
    def step(gates, states, product, project):
        reset_x, update_x, new_x = gates.chunk(3, -1)
        reset_h, update_h, new_h = product(states[0]).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (new + update * (states[0] - new),)

    @staticmethod
    def forward(steps, gates, begin, weight, bias, projection):
        size = begin[0].shape[1]
        known, bias = (None, None) if bias is None else (bias[: 2 * size], bias[2 * size :])
        gates = steps.rows(gates, None if known is None else F.pad(known, (0, size)))
        news, rows = (gates.new_empty(len(gates), size) for _ in range(2))  # from h; h
        both, new, news_at, rows_at = map(
            steps.cut, (gates[:, : 2 * size], gates[:, 2 * size :], news, rows)
        )
        reset, update, _ = map(steps.cut, gates.chunk(3, 1))
        weight_of_both, weight_of_new = weight.t().split(2 * size, 1)
        states, ended = steps.first(begin), []
        for t in steps.order():
            (h,) = steps.met(t, states, begin, ended)
            both[t].addmm_(h, weight_of_both).sigmoid_()
            if bias is None:
                torch.mm(h, weight_of_new, out=news_at[t])
            else:
                torch.addmm(bias, h, weight_of_new, out=news_at[t])
            new[t].addcmul_(reset[t], news_at[t]).tanh_()
            states = (torch.lerp(new[t], h, update[t], out=rows_at[t]),)
        return rows, last_states(states, ended), (gates, news)

    @staticmethod
    def backward(steps, rows, begin, weight, projection, saved, grad_rows, grad_last):
        gates, news = saved
        (reset, update, new), size = gates.chunk(3, 1), news.shape[1]
        by_new = aten.tanh_backward(1 - update, new)
        grads = torch.empty_like(gates)  # of the product by that of h, then these
        by_reset, by_update, by_product = grads.chunk(3, 1)
        aten.sigmoid_backward(by_new * news, reset, grad_input=by_reset)
        aten.sigmoid_backward(steps.before(rows, begin[0]) - new, update, grad_input=by_update)
        torch.mul(by_new, reset, out=by_product)
        at, by_three, update = map(steps.cut, (grads, grads.unflatten(1, (3, size)), update))
        outer = None if grad_rows is None else steps.cut(grad_rows)
        inner: list[Tensor] = [grads] * len(steps.sizes)
        states, ended = steps.first(grad_last, turned=True), []
        for t in steps.order(turned=True):
            (h,) = steps.met(t, states, grad_last, ended)
            inner[t] = h = h if outer is None else h + outer[t]
            by_three[t].mul_(h.unsqueeze(1))
            states = (torch.addmm(h * update[t], at[t], weight),)
        of_input = grads.clone()
        torch.mul(torch.cat(inner), by_new, out=of_input[:, 2 * size :])
        return of_input, grads, last_states(states, ended), None


class _Rnn(Cell):
    """h = act(gates + product).

    act:           changes its argument.
    act_backward:  (gradient, h) -> the gradient of what act got.
    """

    adds_states = False
    act: Callable[[Tensor], Tensor]
    act_backward: Callable[..., Tensor]

    @classmethod
    def step(cls, gates, states, product, project):
        return (cls.act(gates + product(states[0])),)

    @classmethod
    def forward(cls, steps, gates, begin, weight, bias, projection):
        rows = steps.rows(gates, bias)
        at, weight, states, ended = steps.cut(rows), weight.t(), steps.first(begin), []
        for t in steps.order():
            (h,) = steps.met(t, states, begin, ended)
            states = (cls.act(at[t].addmm_(h, weight)),)
        return rows, last_states(states, ended), ()

    @classmethod
    def backward(cls, steps, rows, begin, weight, projection, saved, grad_rows, grad_last):
        at, grads = steps.cut(rows), [rows] * len(steps.sizes)
        outer = None if grad_rows is None else steps.cut(grad_rows)
        states, ended = steps.first(grad_last, turned=True), []
        for t in steps.order(turned=True):
            (h,) = steps.met(t, states, grad_last, ended)
            grads[t] = cls.act_backward(h if outer is None else h + outer[t], at[t])
            states = (grads[t] @ weight,)
        found = torch.cat(grads)
        return found, found, last_states(states, ended), None


class TanhRnn(_Rnn):
    act = torch.tanh_
    act_backward = aten.tanh_backward


class ReluRnn(_Rnn):
    act = torch.relu_

    @staticmethod
    def act_backward(grad: Tensor, h: Tensor) -> Tensor:
        return aten.threshold_backward(grad, h, 0)


CELLS: dict[str, type[Cell]] = {
    "lstm": Lstm,
    "gru": Gru,
    "rnn_tanh": TanhRnn,
    "rnn_relu": ReluRnn,
}


def recurrence(
    cell: type[Cell],
    steps: Steps,
    gates: Tensor,
    begin: States,
    weight: ParameterArgument,
    bias: ParameterArgument,
    projection: ParameterArgument,
    grouped_rows: tuple[GroupedRows, ...],
) -> tuple[Tensor, ...]:
    """All steps of a layer in one direction: the output, and the last states (N, H).

    gates:         from the input, with its bias: (T, N, G), or packed rows (R, G).
    begin:         the first states.
    weight, bias:  of the product of h and the gates.
    projection:    of an LSTM with proj_size.
    grouped_rows:  of the output, and of each of the last states.
    """
    arguments = weight, bias, projection
    h, c = (*begin, None)[:2]
    return _Recurrence.apply(
        gates,
        h,
        c,
        *(argument.value for argument in arguments),
        cell,
        steps,
        arguments,
        grouped_rows,
        *(token for argument in arguments for token in argument.tokens),
    )


class _Recurrence(Function):
    @staticmethod
    def forward(
        ctx, gates, h, c, weight, bias, projection, cell, steps, arguments, grouped_rows, *tokens
    ):
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.steps, ctx.arguments, ctx.grouped_rows = cell, steps, arguments, grouped_rows
        ctx.unused = (None,) * (4 + len(tokens))
        given = gates, h, c, weight, bias, projection
        mixed = torch._C._is_any_autocast_enabled()
        with torch.autocast(gates.device.type, enabled=False) if mixed else nullcontext():
            rows, last, saved = cell.forward(steps, *_as_computed(cell, given))
        ctx.save_for_backward(MARKER, *given, rows, *saved)
        return steps.whole(rows).clone(), *last  # not what is saved: it may be written to

    @staticmethod
    def gradients(ctx, grad, *grad_last):
        if grad is None and all(g is None for g in grad_last):
            return (None,) * len(ctx.needs_input_grad)
        _, *saved = ctx.saved_tensors
        given, (rows, *saved) = saved[:6], saved[6:]
        steps, grouped_rows, needs = ctx.steps, ctx.grouped_rows[0], ctx.needs_input_grad
        _, begin, weight, _, projection = _as_computed(ctx.cell, given)
        states = zip(grad_last, begin, strict=True)
        of_input, of_product, of_begin, of_projection = ctx.cell.backward(
            steps,
            rows,
            begin,
            weight,
            projection,
            saved,
            None if grad is None else steps.rows(grad),
            tuple([torch.zeros_like(b) if g is None else g for g, b in states]),
        )
        whole = steps.whole(of_product)
        gates = whole if of_input is of_product else steps.whole(of_input)
        found = [gates, *of_begin, *(None,) * (2 - len(of_begin))]
        found = [g if t is None else g.to(t.dtype) for g, t in zip(found, given, strict=False)]
        weight_argument, bias_argument, projection_argument = ctx.arguments
        before = steps.whole(steps.before(rows, begin[0].detach()))
        grad_projection = None
        if projection is not None:
            grad_projection = projection_argument.grad(
                needs[5],
                linear_factors,
                grouped_rows,
                steps.whole(saved[-1]),
                steps.whole(of_projection),
            )
        return (
            *found,
            weight_argument.grad(needs[3], linear_factors, grouped_rows, before, whole),
            bias_argument.grad(needs[4], bias_factors, grouped_rows, whole),
            grad_projection,
            *ctx.unused,
        )

    @staticmethod
    def differentiable(ctx, *grads):
        """Those of the steps one by one, whose products are uses of the same parameters."""
        given, needs = ctx.saved_tensors[1:7], ctx.needs_input_grad
        gates, begin, *values = _as_computed(ctx.cell, given)
        # Views, for one may be computed from another: only what this call does with each counts.
        gates, begin = gates.view_as(gates), tuple([t.view_as(t) for t in begin])
        values = [None if t is None else t.view_as(t) for t in values]
        both = zip(ctx.arguments, values, strict=True)
        arguments = [a if v is None else a.computed(v, _as_it_is) for a, v in both]
        outputs = _one_by_one(ctx.cell, ctx.steps, gates, begin, arguments, ctx.grouped_rows)
        inputs = [gates, *begin, *(None,) * (2 - len(begin)), *values]
        plain = [True] * 3 + [not argument.is_served for argument in ctx.arguments]
        wanted = [i for i in range(6) if needs[i] and plain[i]]
        found: list[Tensor | None] = [None] * 6
        reached = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        if wanted:
            parts = torch.autograd.grad(
                [y for y, _ in reached],
                [inputs[i] for i in wanted],
                [g for _, g in reached],
                create_graph=True,
                allow_unused=True,
            )
            for i, part in zip(wanted, parts, strict=True):
                found[i] = None if part is None else part.to(given[i].dtype)
        return *found, *ctx.unused


def _as_computed(cell: type[Cell], given) -> tuple:
    """(gates, begin, weight, bias, projection) in the type that the layer computes in."""
    gates, h, c, *weights = given
    begin = (h,) if c is None else (h, c)
    dtype = torch.promote_types(gates.dtype, h.dtype) if cell.adds_states else gates.dtype
    weights = [None if t is None else t.to(dtype) for t in weights]
    return gates.to(dtype), tuple([t.to(dtype) for t in begin]), *weights


def _as_it_is(factors):
    return factors


def _one_by_one(
    cell: type[Cell],
    steps: Steps,
    gates: Tensor,
    begin: States,
    arguments: list[ParameterArgument],
    grouped_rows: tuple[GroupedRows, ...],
) -> tuple[Tensor, ...]:
    """What `recurrence` returns, by operations that autograd differentiates any number of times."""
    weight, bias, projection = arguments
    outputs = list(steps.cut(gates) if steps.packed else gates)
    states, ended = steps.first(begin), []
    for t in steps.order():
        states = steps.met(t, states, begin, ended)
        rows = _first_rows(grouped_rows[1], steps.sizes[t])
        product = partial(linear, weight=weight, bias=bias, grouped_rows=rows)
        project = None
        if projection.value is not None:
            project = partial(linear, weight=projection, bias=ABSENT, grouped_rows=rows)
        states = cell.step(outputs[t], states, product, project)
        outputs[t] = states[0]
    y = torch.cat(outputs) if steps.packed else torch.stack(outputs)
    return y, *last_states(states, ended)


def _first_rows(grouped_rows: GroupedRows, size: int) -> GroupedRows:
    """Who votes with the first `size` of some rows."""
    groups, layout = grouped_rows.groups, grouped_rows.layout
    if layout.size(groups.batch_size) == size:
        return grouped_rows
    examples = layout.index(groups.batch_size)[:size]
    return groups.grouped_rows(BatchLayout(0, examples=examples))
