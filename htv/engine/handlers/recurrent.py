"""Recurrent layers, unrolled in time: their weights are used at every step, and each step's use is
served.

The arithmetic is that of torch's own cells; what the fused kernels of torch save by running all
steps at once is the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.engine.handlers.call import behind, handles
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, OfBatch
from htv.errors import UnsupportedError
from htv.groups import BatchLayout

Hidden = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[
    [Tensor, Hidden, list[Tensor]], Hidden
]  # input gates, hidden, [w_hh, b_hh or None, w_hr or None]


def _gates(hidden: Hidden, weights: list[Tensor]) -> Tensor:
    return F.linear(hidden[0], weights[0], weights[1])


def _lstm_step(gates: Tensor, hidden: Hidden, weights: list[Tensor]) -> Hidden:
    i, f, g, o = (gates + _gates(hidden, weights)).chunk(4, -1)
    c = torch.sigmoid(f) * hidden[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if weights[2] is None else F.linear(h, weights[2])), c


def _gru_step(gates: Tensor, hidden: Hidden, weights: list[Tensor]) -> Hidden:
    reset_x, update_x, new_x = gates.chunk(3, -1)
    reset_h, update_h, new_h = _gates(hidden, weights).chunk(3, -1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + update * (hidden[0] - new),)


def _tanh_step(gates: Tensor, hidden: Hidden, weights: list[Tensor]) -> Hidden:
    return (torch.tanh(gates + _gates(hidden, weights)),)


def _relu_step(gates: Tensor, hidden: Hidden, weights: list[Tensor]) -> Hidden:
    return (torch.relu(gates + _gates(hidden, weights)),)


STEPS: dict[str, Cell] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}


MODULES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {  # the layer and the cell
    "lstm": (nn.LSTM, nn.LSTMCell),
    "gru": (nn.GRU, nn.GRUCell),
    "rnn_tanh": (nn.RNN, nn.RNNCell),
    "rnn_relu": (nn.RNN, nn.RNNCell),
}


def _server(kind: str, step: Cell):
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
        with mode:
            steps = (
                _PackedSteps(mode, name, *args[:2])
                if packed
                else _Steps(mode, name, args[0], batch_first[0])
            )
            options = num_layers, 1 + bidirectional, dropout if train else 0.0
            y, last = _stack_of_layers(
                steps, step, hidden, _by_layer(weights, has_biases, kind, hidden), *options
            )
        return (y, *last)

    def cell(mode: ModeLike, func, args, kwargs):
        x, hidden, w_ih, w_hh, *biases = args
        b_ih, b_hh = (*biases, None, None)[:2]
        if not _meets(mode, x, [w_ih, w_hh, b_ih, b_hh]):
            return NotImplemented
        hidden = tuple(hidden) if kind == "lstm" else (hidden,)
        layout = mode.layout(x)
        with mode:
            if isinstance(layout, BatchLayout):
                hidden = tuple(_started(mode, kind, h, layout) for h in hidden)
            found = step(F.linear(x, w_ih, b_ih), hidden, [w_hh, b_hh, None])
        return found if kind == "lstm" else found[0]

    return layer, cell


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


def _by_layer(weights, has_biases: bool, kind: str, hidden: Hidden) -> list[list[Tensor | None]]:
    """Per layer and direction [w_ih, w_hh, b_ih, b_hh, w_hr], None for what is absent."""
    projected = kind == "lstm" and hidden[0].shape[-1] != hidden[1].shape[-1]
    size = 2 + 2 * has_biases + projected
    rows = [list(weights[i : i + size]) for i in range(0, len(weights), size)]
    return [
        [*r[:2], *(r[2:4] if has_biases else (None, None)), r[-1] if projected else None]
        for r in rows
    ]


def _stack_of_layers(
    steps, step: Cell, hidden: Hidden, weights, num_layers: int, directions: int, dropout: float
):
    """Return the output of the last layer, and the last hidden state of all,
    (layers * directions, N, H).
    """
    lasts = []
    y = steps.x
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            w_ih, w_hh, b_ih, b_hh, w_hr = weights[row]
            gates = F.linear(y, w_ih, b_ih)
            first = tuple(steps.started(h[row]) for h in hidden)
            output, last = steps.run(
                step, gates, first, [w_hh, b_hh, w_hr], backwards=direction == 1
            )
            outputs.append(output)
            lasts.append(last)
        y = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if layer + 1 < num_layers and dropout:
            y = F.dropout(y, dropout)
    return steps.finished(y), [torch.stack(part) for part in zip(*lasts, strict=True)]


def _started(mode: ModeLike, kind: str, hidden: Tensor, layout: BatchLayout) -> Tensor:
    """A first hidden state (N, H); one that was made without the batch (zeros) is the batch's, row
    by row.
    """
    mark = mode.mark(hidden)
    if isinstance(mark, Constant):
        hidden = hidden.view_as(hidden)
        mode.marks.put(hidden, layout.at(0))
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


class _Steps:
    """Steps through equally long sequences. x: (T, N, D), or with batch_first (N, T, D)."""

    def __init__(self, mode: ModeLike, kind: str, x: Tensor, batch_first: bool):
        self.mode, self.kind, self.batch_first = mode, kind, batch_first
        self.x = x.transpose(0, 1) if batch_first else x
        self.layout = _require_place(mode, kind, self.x, 1)

    def started(self, hidden: Tensor) -> Tensor:
        return _started(self.mode, self.kind, hidden, self.layout)

    def run(
        self, step: Cell, gates: Tensor, hidden: Hidden, weights: list[Tensor], backwards: bool
    ):
        """Outputs (T, N, H) of one direction from its input gates, and the last hidden state."""
        outputs = []
        for at in gates.unbind(0)[:: -1 if backwards else 1]:
            hidden = step(at, hidden, weights)
            outputs.append(hidden[0])
        return torch.stack(outputs[:: -1 if backwards else 1]), hidden

    def finished(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1) if self.batch_first else y


class _PackedSteps:
    """The steps of a PackedSequence, longest first. x: (rows, D), step by step; batch_sizes: (T,)
    on the CPU.
    """

    def __init__(self, mode: ModeLike, kind: str, x: Tensor, batch_sizes: Tensor):
        self.mode, self.kind, self.x, self.sizes = mode, kind, x, batch_sizes.tolist()
        _require_place(mode, kind, x, 0)
        self.first = x[: self.sizes[0]]

    def started(self, hidden: Tensor) -> Tensor:
        return _started(self.mode, self.kind, hidden, self.mode.mark(self.first))

    def run(
        self, step: Cell, gates: Tensor, hidden: Hidden, weights: list[Tensor], backwards: bool
    ):
        steps = list(gates.split(self.sizes))
        outputs: list[Tensor] = [gates] * len(steps)
        for t in range(len(steps))[:: -1 if backwards else 1]:
            size = self.sizes[t]
            found = step(steps[t], tuple(h[:size] for h in hidden), weights)
            outputs[t] = found[0]
            if size < len(hidden[0]):
                found = tuple(
                    torch.cat([new, old[size:]]) for new, old in zip(found, hidden, strict=True)
                )
            hidden = found
        return torch.cat(outputs), hidden

    def finished(self, y: Tensor) -> Tensor:
        return y


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
    for kind, step in STEPS.items():
        functions = getattr(torch, kind), getattr(torch, f"{kind}_cell")
        servers = _server(kind, step)
        for function, server, module in zip(functions, servers, MODULES[kind], strict=True):
            handles(function, modules={module: "linear"})(server)


_register()
