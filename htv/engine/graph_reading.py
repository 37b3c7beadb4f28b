"""Where the batch is in a tensor nobody saw being made, read off its autograd graph.

A function of torch.jit.script, a custom autograd.Function, or what a training script does between
two forwards is seen by no mode. Its graph still says how gradients go back: node by node, by the
same rules as in `htv.engine.propagation`. A node that is not understood loses the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import handle_torch_function

from htv.autograd.aggregation import Function
from htv.engine import propagation
from htv.engine.function_trials import can_be_tried, tried
from htv.engine.provenance import CONSTANT, PLAIN, FromParameters, Lost, Mark, OfBatch
from htv.engine.torch_ops import BROADCASTING, Operation, tensors_in
from htv.errors import UnsupportedError
from htv.groups import BatchLayout, GroupedRows, Groups

__all__ = [
    "RECORD",
    "Knowledge",
    "declare_passing_on",
    "declare_rowwise",
    "mark_at",
    "mixed_in",
    "remember",
    "remembered",
    "grouped_rows_of",
]

RECORD = "htv"  # key in the metadata of autograd's nodes, which die with their graph
# attribute by which a Function or function says that it computes every example by itself
ROWWISE = "htv_rowwise"
# That output i of a Function is input i as it is.
PASSES_ON = "htv_passes_on"
MOST_NODES = 100_000

# Nodes by the name of their operation; those of elementwise operations need no entry.
ALIASES = {
    "to_copy": "to", "native_dropout": "dropout", "unsafe_view": "view", "reshape_alias": "view",
    "t": "permute", "select": "select", "slice": "narrow", "unsafe_split": "split",
    "split_with_sizes": "split", "linalg_vector_norm": "norm",
    "native_layer_norm": "layer_norm", "fused_rms_norm": "rms_norm", "constant_pad_nd": "pad",
    "special_expit": "sigmoid", "fused_dropout": "dropout",
}  # fmt: skip
SHAPED = {"view", "squeeze", "expand"}  # what they do shows in the shapes
ALONG = {
    "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "select", "narrow", "split",
    "unbind", "unsqueeze", "sum", "nansum", "mean", "amax", "amin", "max", "min", "var", "std",
    "prod", "logsumexp", "norm", "median", "glu", "sort", "topk",
}  # fmt: skip
BRINGING_TOGETHER = ALONG - {"select", "narrow", "split", "unbind", "unsqueeze", "glu"}
PRODUCTS = tuple(f"{name}Backward" for name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Dot"))


class Knowledge(NamedTuple):
    """Holds what a forward knew of its batch, for later ones.

    groups:  who voted.
    spec:    what the caller had said of that, or None.
    source:  the argument that was taken for the batch.
    """

    groups: Groups
    spec: object
    source: str


def remember(node, number: int, knowledge: Knowledge, mark: Mark) -> None:
    """Note `knowledge` of a forward, and the mark of its result, at output `number` of the result's
    `node`, for later forwards. Nothing is kept alive.
    """
    _notes_at(node).setdefault(RECORD, {})[number] = (knowledge, mark)


def remembered(node, number: int) -> tuple[Knowledge, Mark] | None:
    """Return what `remember` noted at output `number` of `node`, or None."""
    notes = _notes_at(node).get(RECORD)
    return None if notes is None else notes.get(number)


def _notes_at(node) -> dict:
    """Return a dict that lives as long as `node`: of a Function written in Python its attributes,
    for autograd makes the metadata of a node when they are first asked for.
    """
    return node.__dict__ if isinstance(node, BackwardCFunction) else node.metadata


def grouped_rows_of(node, number: int) -> GroupedRows | None:
    """Return who votes with result `number` of a served layer, if `node` is one's; else None."""
    if issubclass(getattr(type(node), "_forward_cls", object), Function):
        found = getattr(node, "grouped_rows", None)
        return found[number] if isinstance(found, tuple) else found
    return None


def mark_at(
    node,
    number: int,
    batch_size: Callable[[], int | None],
    known: Callable[[object, int], Mark | None],
    through: Callable[..., Mark | None] | None = None,
    rows: bool = False,
) -> Mark | None:
    """Read off where the batch is in output `number` of `node`; None if nothing known is in it.

    batch_size:  returns how many examples there are; called once something known was found.
    known:       (node, output) -> its mark where that is known without its inputs, as for leaves
                 and what htv served.
    through:     (node, output, marks of its inputs, batch_size) -> its mark, where not as usual.
    rows:        whether the order of rows inside an example matters too.
    """
    through = through or partial(_through, rows=rows)
    root = node, number
    marks: dict[tuple[int, int], Mark | None] = {}
    keep = []  # nodes stay the same Python objects as long as somebody holds them
    ahead = [(node, number, False)]
    while ahead:
        node, number, ready = ahead.pop()
        key = (id(node), number)
        if key in marks and not ready:
            continue
        if not ready:
            keep.append(node)
            mark = known(node, number)
            if mark is not None:
                marks[key] = mark
                continue
            marks[key] = None
            if len(keep) > MOST_NODES:
                return Lost("a graph of too many nodes")
            ahead.append((node, number, True))
            ahead += [(n, i, False) for n, i in node.next_functions if n is not None]
            continue
        inputs = [None if n is None else marks.get((id(n), i)) for n, i in node.next_functions]
        marks[key] = through(node, number, inputs, batch_size)
    return marks[(id(root[0]), root[1])]


def _through(
    node,
    number: int,
    inputs: list[Mark | None],
    batch_size: Callable[[], int | None],
    rows: bool = False,
) -> Mark | None:
    """Return the mark of one output of a node from those of its inputs."""
    lost = next((m for m in inputs if isinstance(m, Lost)), None)
    if lost is not None:
        return lost
    if not any(isinstance(m, OfBatch) for m in inputs):
        derived = [m for m in inputs if isinstance(m, FromParameters)]
        if derived:
            return FromParameters(
                tuple(dict.fromkeys(p for m in derived for p in m.parameters)), None
            )
        return PLAIN if any(m is PLAIN for m in inputs) else None
    size = batch_size()
    found = _followed(node, number, inputs, size, rows)
    if isinstance(found, Lost) and not rows and can_be_tried(node):
        found = tried(node, number, inputs, size) or found
    return Lost(f"{_spoken(node)}, which htv did not see") if isinstance(found, Lost) else found


def mixed_in(gradient: Tensor, groups: Groups) -> Lost | None:
    """Return what mixes examples in the graph of `gradient`, which a served layer gets where
    create_graph=True asks for a graph; None where nothing is seen to.

    gradient:  of the layer's output.
    groups:    who votes with its rows.

    What happens inside a forward was judged there, and its derivatives are made of operations that
    nobody lists. So only what mixes examples by what it is counts: sums over them, products and
    differences of them. Another operation is believed to leave the batch in its dim, if there are
    as many dims as before, that one has its size and the operation is not along it.
    """
    if gradient.grad_fn is None or groups.batch_size == 1:
        return None
    if groups.count == 1 and not groups.rows_vote:  # whatever is mixed, one group it is
        return None
    size = groups.batch_size
    mark = mark_at(gradient.grad_fn, gradient.output_nr, lambda: size, _known_place, _mixing)
    return mark if isinstance(mark, Lost) else None


def _known_place(node, number: int) -> Mark | None:
    rows, noted = grouped_rows_of(node, number), remembered(node, number)
    if rows is not None:
        return rows.layout
    # What a forward lost before it returned is looked at here: it may have added up examples.
    return noted[1] if noted is not None and isinstance(noted[1], BatchLayout) else None


def _mixing(
    node, number: int, inputs: list[Mark | None], batch_size: Callable[[], int | None]
) -> Mark | None:
    """Do what `_through` does, where only what is known to mix examples loses the batch."""
    lost = next((m for m in inputs if isinstance(m, Lost)), None)
    layouts = [m for m in inputs if isinstance(m, BatchLayout)]
    if lost is not None or not layouts:
        return lost
    size, name = batch_size(), _operation(node.name())
    shape = node._input_metadata[number].shape
    if name in BROADCASTING and _all_alike(node, inputs, layouts[0], len(shape)):  # most of them
        return layouts[0]
    if node.name().startswith(PRODUCTS) and _product_mixes(node, inputs):
        return Lost(_spoken(node))
    found = None if name is None else _followed(node, number, inputs, size)
    if isinstance(found, BatchLayout):
        return found
    if found is not None and (name in BRINGING_TOGETHER or name in BROADCASTING):
        return Lost(_spoken(node))
    kept = [
        mark
        for (n, i), mark in zip(node.next_functions, inputs, strict=True)
        if isinstance(mark, BatchLayout) and len(n._input_metadata[i].shape) == len(shape)
    ]
    if not kept or shape[kept[0].dim] != kept[0].size(size):
        return None
    return None if kept[0].dim in _named_dims(node, len(shape)) else kept[0]


def _product_mixes(node, inputs: list[Mark | None]) -> bool:
    """Tell whether a product sums over examples, or multiplies all with all."""
    outside = []
    for (n, i), mark, row in zip(node.next_functions[-2:], inputs[-2:], (False, True), strict=True):
        if isinstance(mark, BatchLayout):
            ndim = len(n._input_metadata[i].shape)
            if mark.dim == ndim - 1 - (row and ndim > 1):
                return True
            outside.append(mark.dim if mark.dim < ndim - 2 else None)
    return len(outside) > 1 and (outside[0] is None or outside[0] != outside[1])


def _all_alike(node, inputs: list[Mark | None], layout: BatchLayout, ndim: int) -> bool:
    """Tell whether all of a node's inputs that are of the batch have it at `layout` in `ndim`
    dims.
    """
    return all(
        mark is layout and len(n._input_metadata[i].shape) == ndim
        for (n, i), mark in zip(node.next_functions, inputs, strict=True)
        if mark is not None
    )


def _named_dims(node, ndim: int) -> set[int]:
    """Return the dims, of `ndim`, along which the operation of a `node` moves something, as far as
    that tells.
    """
    found: list = []
    for name in ("_saved_dim", "_saved_dims"):
        value = getattr(node, name, ())
        found += value if isinstance(value, (tuple, list)) else [value]
    picked = getattr(node, "_saved_indices", None)
    if isinstance(picked, tuple):
        found += [dim for dim, index in enumerate(picked) if index is not None]
    return {_signed(dim) % ndim for dim in found if isinstance(dim, int)}


def _spoken(node) -> str:
    function = getattr(type(node), "_forward_cls", None)
    if function is not None:
        return f"the custom autograd.Function {function.__name__}"
    return f"an operation ({node.name()})"


def _followed(
    node, number: int, inputs: list[Mark | None], batch_size: int, rows: bool = False
) -> Mark:
    function = getattr(type(node), "_forward_cls", None)
    if getattr(function, PASSES_ON, False) and number < len(inputs):
        return CONSTANT if inputs[number] is None else inputs[number]
    shapes = [
        None if n is None else tuple(n._input_metadata[i].shape) for n, i in node.next_functions
    ]
    operands = [
        (
            torch.empty(shape or (), device="meta", requires_grad=True),
            CONSTANT if mark is None else mark,
        )
        for shape, mark in zip(shapes, inputs, strict=True)
    ]
    output = torch.empty(tuple(node._input_metadata[number].shape), device="meta")
    if function is not None:
        return (
            rowwise(operands, output, batch_size)
            if getattr(function, ROWWISE, False) and not rows
            else propagation.LOST
        )
    name = _operation(node.name())
    if name is None:
        return propagation.LOST
    missing = any(shape is None for shape in shapes)
    call = _arguments(node, name, [t for t, _ in operands], missing)
    if call is None:
        return propagation.LOST
    args, kwargs, func = call
    if name in BROADCASTING:
        operands = [o for o, shape in zip(operands, shapes, strict=True) if shape is not None]
    try:
        operation = Operation(name, func, args, kwargs, operands, [output])
        return propagation.follow(operation, batch_size, rows=rows)[0]
    except UnsupportedError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return propagation.LOST  # values were asked for that nobody has


@lru_cache(maxsize=1024)
def _operation(node: str) -> str | None:
    """Return the name in `torch_ops` of what a node of autograd differentiates, or None."""
    match = re.fullmatch(r"([A-Z]\w*)Backward\d+", node)
    if match is None:
        return None
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", match[1]).lower().replace("__", "_")
    name = ALIASES.get(name, name)
    known = name in BROADCASTING or name in SHAPED or name in ALONG
    extra = {"transpose", "permute", "cat", "stack", "layer_norm", "pad", "flip"}
    return name if known or name in extra else None


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim  # torch shows negative dims unsigned


def _arguments(node, name: str, tensors: list[Tensor], missing: bool):
    """Return the call as `htv.engine.propagation` reads it, (args, kwargs, func), or None."""
    first = tensors[0] if tensors else None
    if name in BROADCASTING or name in SHAPED:
        return tuple(tensors), {}, None
    if name == "transpose":
        dims = _signed(node._saved_dim0), _signed(node._saved_dim1)
        return (first, *dims), {}, None
    if name == "permute":
        dims = getattr(node, "_saved_dims", (1, 0))
        return (first, [_signed(d) for d in dims]), {}, None
    if name == "stack" or name == "cat":
        if missing and name == "stack":
            return None
        return (
            (tensors,),
            {"dim": _signed(node._saved_dim)},
            torch.cat if name == "cat" else torch.stack,
        )
    if name == "layer_norm":
        return (first, list(node._saved_normalized_shape)), {}, None
    if name == "pad":
        return (first, list(node._saved_pad)), {}, None
    if name == "flip":
        return (first,), {"dims": [_signed(d) for d in node._saved_dims]}, torch.flip
    dim = getattr(node, "_saved_dim", None)
    if dim is None:
        return (first,), {}, None
    dim = [_signed(d) for d in dim] if isinstance(dim, tuple) else _signed(dim)
    if name == "narrow" and node._saved_step == 1:
        start, end = _signed(node._saved_start), _signed(node._saved_end)
        index = slice(start, min(end, 2**62))
        return (first,), {"dim": dim}, lambda t, dim: t[(slice(None),) * (dim % t.dim()) + (index,)]
    return (first,), {"dim": dim}, None


def rowwise(operands: list[tuple[Tensor, Mark | None]], output: Tensor, batch_size: int) -> Mark:
    """Return the mark of `output` of a function that was declared to compute every example by
    itself.

    operands:    tensors it was called with, and their marks.
    batch_size:  how many examples there are.
    """
    layouts = [m for _, m in operands if isinstance(m, OfBatch)]
    if (
        batch_size == 1
        and output.dim()
        and layouts
        and not any(isinstance(m, Lost) for m in layouts)
    ):
        return propagation.all_of_one(output)
    if not layouts or any(isinstance(m, Lost) for m in layouts):
        return next((m for m in layouts if isinstance(m, Lost)), propagation.LOST)
    layout = layouts[0]
    agree = all(layout.same(other, batch_size) for other in layouts[1:])
    fits = layout.dim < output.dim() and output.shape[layout.dim] == layout.size(batch_size)
    return layout if agree and fits else propagation.LOST


def declare_passing_on(function: type[torch.autograd.Function]) -> None:
    """Declare that output i of `function` is its tensor input i as it is."""
    setattr(function, PASSES_ON, True)


def declare_rowwise(function):
    """Declare that a function computes every example by itself, whatever htv cannot see inside.

    For functions of torch.jit.script, custom autograd.Functions and calls into other libraries:
    row i of the batch's dim of each result may depend on row i of the arguments that hold examples,
    on no other row, and on no served parameter. Without it what such a function returns is lost to
    htv unless its autograd graph tells where the examples are; a custom autograd.Function has its
    backward tried in every forward, on the gradients of some examples at a time.

    function:  a function of tensors, or a subclass of torch.autograd.Function, which is marked and
               returned.

    Returns the function, to be called in its place. What it says is believed: a wrong declaration
    is a wrong gradient. Raises TypeError for what is neither.

    >>> @htv.rowwise
    ... class Doubled(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return 2 * x
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         return 2 * grad
    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> model = torch.nn.Sequential(layer, torch.nn.Identity(), torch.nn.Linear(1, 1))
    >>> model[1].forward = Doubled.apply
    >>> htv.check(model, torch.randn(4, 1), htv.Median()).parameters
    3
    """
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        setattr(function, ROWWISE, True)
        return function
    if not callable(function) or isinstance(function, type):
        raise TypeError(
            f"rowwise takes a function or a subclass of torch.autograd.Function, got {function!r}"
        )

    @wraps(function, updated=())
    def declared(*args, **kwargs):
        tensors = tensors_in(args, kwargs)
        if tensors and torch._C._len_torch_function_stack():
            return handle_torch_function(declared, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    setattr(declared, ROWWISE, True)
    return declared
