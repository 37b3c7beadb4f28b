"""Recurrent layers: the input's products are linear layers, the steps one Function per layer and
direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.recurrent import CELLS, Cell, States, Steps, recurrence
from htv.engine.handlers.call import Call, behind, handles, signature
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, FromParameters, OfBatch
from htv.errors import UnsupportedError
from htv.groups import BatchLayout

_STATES = signature("gates, weight, bias, projection")
_WEIGHTS = _STATES.names[1:]

MODULES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {  # the layer and the cell
    "lstm": (nn.LSTM, nn.LSTMCell),
    "gru": (nn.GRU, nn.GRUCell),
    "rnn_tanh": (nn.RNN, nn.RNNCell),
    "rnn_relu": (nn.RNN, nn.RNNCell),
}


def _server(kind: str, cell: type[Cell]):
    def layer(mode: ModeLike, func, args, kwargs):
        packed = isinstance(args[3], (tuple, list))  # then args[1] are the batch sizes
        weights = args[3 if packed else 2]
        if not _meets(mode, args[0], weights):
            return _as_torch_does(
                mode, func, args, kwargs, packed, batch_first=not packed and args[-1]
            )
        hidden = args[2 if packed else 1]
        hidden = tuple(hidden) if kind == "lstm" else (hidden,)
        has_biases, num_layers, dropout, train, bidirectional, *batch_first = args[
            4 if packed else 3 :
        ]
        owner = next(s for w in weights for s in behind(mode, w))
        name = f"{kind} with parameter {owner.name!r}"
        if any(isinstance(mode.mark(w), OfBatch) for w in weights):
            raise UnsupportedError(
                f"{name}: another of its weights is computed from the batch. Remedy: write the "
                f"layer's steps in the model, or exclude={owner.name!r}"
            )
        turned = not packed and batch_first[0]
        with mode:
            x = args[0].transpose(0, 1) if turned else args[0]
        layers = _Layers(mode, cell, name, x, args[1].tolist() if packed else None)
        weights = _by_layer(weights, has_biases, kind, hidden)
        options = num_layers, 1 + bidirectional, dropout if train else 0.0
        y, *last = layers.stacked(hidden, weights, *options)
        with mode:
            return (y.transpose(0, 1) if turned else y, *last)

    def one_step(mode: ModeLike, func, args, kwargs):
        x, hidden, w_ih, w_hh, *biases = args
        b_ih, b_hh = (*biases, None, None)[:2]
        if not _meets(mode, x, [w_ih, w_hh, b_ih, b_hh]):
            return NotImplemented
        hidden = tuple(hidden) if kind == "lstm" else (hidden,)
        layout = mode.layout(x)
        with mode:
            if isinstance(layout, BatchLayout):
                hidden = tuple(_started(mode, kind, h, layout) for h in hidden)
            product = lambda h: F.linear(h, w_hh, b_hh)
            found = cell.step(F.linear(x, w_ih, b_ih), hidden, product, None)
        return found if kind == "lstm" else found[0]

    return layer, one_step


def _as_torch_does(mode: ModeLike, func, args, kwargs, packed: bool, batch_first: bool):
    """No served weight, or no gradients: only where the batch is in the results has to be known."""
    expected = 0 if packed or batch_first else 1
    layout = mode.layout(args[0], expected)
    if not isinstance(layout, BatchLayout) or layout.dim != expected:
        return NotImplemented
    y, *last = func(*args, **kwargs)
    mode.marks.put(y, layout)
    for hidden in last:
        first = (
            mode.call(Tensor.__getitem__, (args[0], slice(int(args[1][0]))), {}) if packed else None
        )
        mode.marks.put(hidden, (mode.mark(first) if packed else layout).at(1))
    return (y, *last)


def _meets(mode: ModeLike, x: Tensor, weights) -> bool:
    owners = [owner for w in weights for owner in behind(mode, w)]
    meets = bool(torch.is_grad_enabled() and owners and isinstance(mode.mark(x), OfBatch))
    if meets and mode.groups.rows_vote:
        raise UnsupportedError(
            f"a recurrent layer with parameter {owners[0].name!r}: its steps are no rows that "
            f"could vote by themselves (tokens()). Remedy: exclude={owners[0].name!r} and its "
            "others"
        )
    return meets


def _by_layer(weights, has_biases: bool, kind: str, hidden: States) -> list[list[Tensor | None]]:
    """Per layer and direction [w_ih, w_hh, b_ih, b_hh, w_hr], None for what is absent."""
    projected = kind == "lstm" and hidden[0].shape[-1] != hidden[1].shape[-1]
    size = 2 + 2 * has_biases + projected
    rows = [list(weights[i : i + size]) for i in range(0, len(weights), size)]
    return [
        [*r[:2], *(r[2:4] if has_biases else (None, None)), r[-1] if projected else None]
        for r in rows
    ]


def _started(mode: ModeLike, kind: str, hidden: Tensor, layout: BatchLayout) -> Tensor:
    """A first hidden state (N, H); one that was made without the batch (zeros, or parameters) is
    the batch's, row by row.
    """
    mark = mode.mark(hidden)
    if isinstance(mark, Constant):
        hidden = hidden.view_as(hidden)
        mode.marks.put(hidden, layout.at(0))
    elif isinstance(mark, FromParameters):  # a copy for every example
        nothing = torch.zeros_like(hidden)
        mode.marks.put(nothing, layout.at(0))
        hidden = hidden + nothing
    elif isinstance(mark, OfBatch) and not (
        isinstance(mark, BatchLayout) and mark.same(layout.at(0), mode.groups.batch_size)
    ):
        raise UnsupportedError(
            f"{kind}: its first hidden state, of shape {tuple(hidden.shape)} for one layer, does "
            "not have the examples in the dim before the last, as (layers, N, H), or they were "
            "taken to be in another one for its size. Remedy: make it inside the model, or "
            "exclude= the layer's parameters"
        )
    return hidden


class _Layers:
    """The layers of one call, with the batch where it is in their input `x`: (T, N, D), or the
    rows of a PackedSequence with their `batch_sizes`.
    """

    def __init__(
        self, mode: ModeLike, cell: type[Cell], name: str, x: Tensor, batch_sizes: list[int] | None
    ):
        self.mode, self.cell, self.name, self.x = mode, cell, name, x
        self.packed = batch_sizes is not None
        self.layout = _require_place(mode, name, x, 0 if self.packed else 1)
        self.sizes = tuple(batch_sizes if self.packed else [x.shape[1]] * len(x))
        self.of_states = self.layout.at(0)
        if self.packed:
            first = mode.call(Tensor.__getitem__, (x, slice(self.sizes[0])), {})
            self.of_states = mode.mark(first)

    def stacked(
        self,
        hidden: States,
        weights: list[list[Tensor | None]],
        num_layers: int,
        directions: int,
        dropout: float,
    ) -> tuple[Tensor, ...]:
        """The output of the last layer, and the last states of all, (layers * directions, N, H)."""
        lasts, y = [], self.x
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                row = layer * directions + direction
                begin = [self.mode.call(Tensor.__getitem__, (h, row), {}) for h in hidden]
                output, *last = self.one(y, begin, weights[row], backwards=direction == 1)
                outputs.append(output)
                lasts.append(last)
            with self.mode:
                y = outputs[0] if directions == 1 else torch.cat(outputs, -1)
                if layer + 1 < num_layers and dropout:
                    y = F.dropout(y, dropout)
        with self.mode:
            return (y, *(torch.stack(part) for part in zip(*lasts, strict=True)))

    def one(
        self, x: Tensor, begin: list[Tensor], weights: list[Tensor | None], backwards: bool
    ) -> tuple[Tensor, ...]:
        """The output of one layer in one direction, and its last states (N, H)."""
        mode = self.mode
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        with mode:
            gates = F.linear(x, w_ih, b_ih)
            begin = [_started(mode, self.name, h, self.of_states) for h in begin]
        call = Call(mode, "linear", _STATES, (gates, w_hh, b_hh, w_hr), {}, "gates", *_WEIGHTS)
        rows = mode.rows[self.layout], *(mode.rows[self.of_states] for _ in begin)
        steps = Steps(self.sizes, self.packed, backwards)
        y, *last = recurrence(self.cell, steps, gates, tuple(begin), *call.enter(features=1), rows)
        mode.marks.put(y, self.layout)
        for state in last:
            mode.marks.put(state, self.of_states)
        return (y, *last)


def _require_place(mode: ModeLike, kind: str, x: Tensor, dim: int) -> BatchLayout:
    mark = mode.layout(x, dim)
    if not isinstance(mark, BatchLayout) or mark.dim != dim:
        raise UnsupportedError(
            f"{kind}: the examples must be in dim {dim} of its input, seen as "
            f"{'(T, N, D)' if dim else 'packed rows'}, of shape {tuple(x.shape)}, but are not. "
            "Remedy: batch_first=True for inputs (N, T, D), attach(..., batch_dim=1) for models "
            "whose input is (T, N, D), or exclude= the layer's parameters"
        )
    return mark


def _register() -> None:
    for kind, cell in CELLS.items():
        functions = getattr(torch, kind), getattr(torch, f"{kind}_cell")
        servers = _server(kind, cell)
        for function, server, module in zip(functions, servers, MODULES[kind], strict=True):
            handles(function, modules={module: "linear"})(server)


_register()
