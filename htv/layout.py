"""Where the batch is in every tensor of a model's forward.

Shapes do not tell: five positions and five examples look alike. So every tensor gets a mark when an operation makes it,
from the marks of what it was made of. `follow` knows, operation by operation, where the batch dim goes; an operation it
does not know loses it, and a layer whose input lost it refuses instead of guessing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from htv.served import Served


@dataclass(frozen=True)
class Constant:
    """Computed without the batch and without a gradient: buffers, torch.arange, an input broadcast over the batch."""


@dataclass(frozen=True)
class Plain:
    """Computed without the batch, from something that keeps its plain gradient: an excluded parameter, an input."""


@dataclass(frozen=True, eq=False)
class Derived:
    """Computed from served parameters (and constants) alone, by a plain autograd graph.

    source: what it broadcasts: the tensor itself, or the one it is an `expand` of.
    ids:    integers, where the source is an embedding of them in the one parameter and nothing more.
    """

    parameters: tuple[Served, ...]
    source: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Computed from the batch.

    dim:   the dim along which units follow one another, or None if that is not known any more.
    times: consecutive indices of that dim per unit, as after merging the batch with the dim behind it.
    """

    dim: int | None
    times: int = 1


Mark = Constant | Plain | Derived | Batch
LOST = Batch(None)


class Marks:
    """Marks of live tensors, by identity; holds no tensor alive."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[weakref.ref, Mark]] = {}

    def get(self, tensor: Tensor) -> Mark | None:
        entry = self._marks.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: Tensor, mark: Mark) -> None:
        self._marks[id(tensor)] = (weakref.ref(tensor), mark)


def plain_name(func) -> str:
    """`Tensor.__add__`, `add_` and `torch.add` -> "add"; a property getter -> the property's name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    return name.strip("_").partition(".")[0]  # aten.transpose.int


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Broadcasting arithmetic: an expanded operand's gradient is its stack of contributions.
ELEMENTWISE = _names(
    "add sub subtract rsub mul multiply div divide true_divide truediv rdiv rtruediv pow rpow radd rmul iadd isub "
    "imul itruediv maximum minimum where lerp addcmul addcdiv atan2 hypot logaddexp"
)
COMPARING = _names(
    "eq ne lt le gt ge isclose equal logical_and logical_or logical_xor logical_not and or xor invert bitwise_and "
    "bitwise_or bitwise_not isnan isinf isfinite floor_divide floordiv remainder fmod mod rmod rfloordiv"
)
UNARY = _names(
    "abs absolute neg negative positive pos exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin "
    "cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv sign sgn floor ceil "
    "round trunc frac clamp clamp_min clamp_max clip nan_to_num relu relu6 leaky_relu elu selu celu gelu silu mish "
    "softplus softsign tanhshrink softshrink hardshrink hardtanh hardsigmoid hardswish threshold rrelu logsigmoid "
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d masked_fill "
    "masked_scatter bernoulli to float half bfloat16 double int long bool type type_as contiguous clone detach "
    "requires_grad_ requires_grad data real imag conj cpu cuda zeros_like ones_like empty_like full_like rand_like "
    "randn_like randint_like zero fill uniform normal copy alias special_expit polygamma lgamma "
    "digamma sinc heaviside"
)
BROADCASTING = ELEMENTWISE | COMPARING | UNARY

# Functions of (N, C, *space) or (*, features) that compute every example by itself, whatever their other arguments.
ROWWISE = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution max_pool1d max_pool2d "
    "max_pool3d boolean_dispatch fn avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d "
    "interpolate upsample pad grid_sample pixel_shuffle pixel_unshuffle channel_shuffle fold batch_norm group_norm "
    "instance_norm layer_norm rms_norm local_response_norm linear embedding one_hot prelu bilinear "
    "tril triu view_as_real view_as_complex"
)
# How many dims at the end some of them may mix; the others need the batch in dim 0.
KEEPS_LAST = {
    "layer_norm": 1, "rms_norm": 1, "linear": 1, "bilinear": 1, "pad": 1, "embedding": 0, "one_hot": 0, "tril": 2,
    "triu": 2, "view_as_real": 0, "view_as_complex": 1,
}  # fmt: skip

# Operations along dims, which keep the number of dims: where the dim stands after the tensor, and its default.
ALONG = {
    "softmax": (0, None), "log_softmax": (0, None), "softmin": (0, None), "gumbel_softmax": (3, -1),
    "cumsum": (0, None), "cumprod": (0, None), "cummax": (0, None), "cummin": (0, None), "logcumsumexp": (0, None),
    "flip": (0, None), "roll": (1, None), "sort": (0, -1), "argsort": (0, -1), "topk": (1, -1), "gather": (0, None),
    "scatter": (0, None), "scatter_add": (0, None), "scatter_reduce": (0, None), "index_select": (0, None),
    "index_add": (0, None), "index_copy": (0, None), "index_fill": (0, None), "take_along_dim": (1, None),
    "chunk": (1, 0), "split": (1, 0), "split_with_sizes": (1, 0), "tensor_split": (1, 0), "narrow": (0, None),
    "normalize": (1, 1), "glu": (0, -1), "repeat_interleave": (1, None), "diff": (1, -1), "renorm": (1, None),
    "unfold": (0, None),
}  # fmt: skip

# Reductions: where the dims stand after the tensor.
REDUCING = {
    "sum": 0, "nansum": 0, "mean": 0, "nanmean": 0, "amax": 0, "amin": 0, "max": 0, "min": 0, "median": 0, "std": 0,
    "var": 0, "prod": 0, "logsumexp": 0, "argmax": 0, "argmin": 0, "any": 0, "all": 0, "norm": 1, "vector_norm": 1,
    "linalg_norm": 1, "linalg_vector_norm": 1, "cosine_similarity": 1, "count_nonzero": 0,
}  # fmt: skip

PERMUTING = _names("transpose swapaxes swapdims permute movedim moveaxis t T mT H mH adjoint")
RESHAPING = _names("reshape view flatten unflatten squeeze view_as reshape_as unsafe_view")
EXPANDING = _names("expand expand_as broadcast_to")
MULTIPLYING = _names("matmul rmatmul mm bmm mv baddbmm addmm addbmm")
CONCATENATING = _names("cat concat concatenate")
MAKING = _names("new_zeros new_ones new_empty new_full new_tensor")  # a tensor only lends its dtype and device
RECURRENT = _names("lstm gru rnn_tanh rnn_relu")


@dataclass
class Operation:
    """One call: its name, function, arguments, tensor operands with their marks, and the shapes of its results."""

    name: str
    func: Callable
    args: tuple
    kwargs: dict
    operands: list[tuple[Tensor, Mark | None]]
    outputs: list[Tensor]

    def argument(self, position: int, *names: str, default=None):
        """An argument after the first tensor, by position or name."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[1 + position] if len(self.args) > 1 + position else default


def follow(op: Operation, units: int) -> list[Batch]:
    """The mark of each output of an operation some operand of which is of the batch.

    units: how many units the batch has.
    """
    operands = [(t, m) for t, m in op.operands if isinstance(m, Batch)]
    first, mark = operands[0]
    is_first = op.operands[0][0] is first
    lost = [LOST] * len(op.outputs)
    if op.name in RECURRENT:
        return [mark, *[Batch(1, mark.times)] * (len(op.outputs) - 1)] if is_first else lost
    if op.name == "multi_head_attention_forward":  # (T, N, D) -> (T, N, D) and weights (N, T, S)
        return [mark, *[Batch(0)] * (len(op.outputs) - 1)] if is_first and mark.dim == 1 else lost
    places = [_place(op, t, m, output, units) for output in op.outputs for t, m in operands]
    per_output = [places[i * len(operands) : (i + 1) * len(operands)] for i in range(len(op.outputs))]
    return [_agreed(found, operands, output, units) for found, output in zip(per_output, op.outputs, strict=True)]


def _agreed(found: list[Batch], operands, output: Tensor, units: int) -> Batch:
    """The place all operands agree on; those merely broadcast along it, or without a gradient, have no say."""
    known = {place for place in found if place.dim is not None}
    if len(known) != 1:
        return LOST
    (place,) = known
    if place.dim >= output.dim() or output.shape[place.dim] != units * place.times:
        return LOST
    for (tensor, _), where in zip(operands, found, strict=True):
        at = place.dim - (output.dim() - tensor.dim())
        if where.dim is None and tensor.requires_grad and at >= 0 and tensor.shape[at] != 1:
            return LOST
    return place


def _place(op: Operation, tensor: Tensor, mark: Batch, output: Tensor, units: int) -> Batch:
    """Where one operand puts the batch dim in one output."""
    dim = mark.dim
    if dim is None:
        return LOST
    name, is_first = op.name, op.operands[0][0] is tensor
    binary = name in ("max", "min") and isinstance(op.argument(0, "other"), Tensor)
    if name in BROADCASTING or name in EXPANDING or binary:
        return Batch(dim + output.dim() - tensor.dim(), mark.times)
    if name in CONCATENATING:
        along = op.argument(0, "dim", "axis", default=0) % tensor.dim()
        return LOST if along == dim else mark
    if name == "stack":
        along = op.argument(0, "dim", default=0) % output.dim()
        return Batch(dim + (along <= dim), mark.times)
    if name in MULTIPLYING:
        return _multiplied(op, tensor, mark, output)
    if name == "einsum":
        return _einsum(op, tensor, mark)
    if name == "scaled_dot_product_attention":
        return mark if dim < tensor.dim() - 2 and tensor.dim() == output.dim() else LOST
    if name == "setitem":
        return _after_setitem(op, tensor, mark)
    if not is_first and name not in ("gather", "take_along_dim"):
        return LOST
    if name in ROWWISE:
        kept = dim < tensor.dim() - KEEPS_LAST[name] if name in KEEPS_LAST else dim == 0
        if name.startswith("conv") and op.operands[1][0].dim() != tensor.dim():
            return LOST  # an unbatched image
        return mark if kept else LOST
    if name in PERMUTING:
        # Dims of distinct sizes show where each of them goes.
        probe = torch.empty(tuple(range(2, 2 + tensor.dim())), device="meta")
        swap = lambda value: probe if value is tensor else value
        moved = op.func(*map(swap, op.args), **{k: swap(v) for k, v in op.kwargs.items()})
        return Batch(list(moved.shape).index(dim + 2), mark.times)
    if name in RESHAPING:
        return _reshaped(tensor, mark, output, units)
    if name == "unsqueeze":
        along = op.argument(0, "dim") % (tensor.dim() + 1)
        return Batch(dim + (along <= dim), mark.times)
    if name in ("select", "unbind"):
        along = op.argument(0, "dim", default=0)
        return _without(mark, along % tensor.dim()) if isinstance(along, int) else LOST
    if name == "getitem":
        return _after_indexing(tensor, mark, op.args[1])
    if name in ("repeat", "tile"):
        sizes = op.args[1:] if isinstance(op.args[1], int) else tuple(op.args[1])
        at = dim + len(sizes) - tensor.dim()
        return Batch(at, mark.times) if at >= 0 and sizes[at] == 1 else LOST
    if op.func is torch.nn.functional.unfold:  # im2col of (N, C, *space); the method of that name goes along a dim
        return mark if dim == 0 and tensor.dim() == 4 else LOST
    if name in ALONG:
        return _along(op, tensor, mark)
    if name in REDUCING:
        return _reduced(op, tensor, mark, output)
    return LOST


def _dims(value, ndim: int) -> set[int] | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {v % ndim for v in values} if values and all(type(v) is int for v in values) else None


def _along(op: Operation, tensor: Tensor, mark: Batch) -> Batch:
    position, default = ALONG[op.name]
    value = op.argument(position, "dim", "dims", "axis", "dimension", default=default)
    if op.name == "flip" and isinstance(value, int):
        value = op.args[1 + position :] or value
    dims = _dims(value, tensor.dim())
    return LOST if dims is None or mark.dim in dims else mark


def _reduced(op: Operation, tensor: Tensor, mark: Batch, output: Tensor) -> Batch:
    default = 1 if op.name == "cosine_similarity" else None
    dims = _dims(op.argument(REDUCING[op.name], "dim", "axis", default=default), tensor.dim())
    if dims is None or mark.dim in dims:
        return LOST
    if output.dim() == tensor.dim():
        return mark
    if output.dim() != tensor.dim() - len(dims):
        return LOST
    return Batch(mark.dim - sum(d < mark.dim for d in dims), mark.times)


def _multiplied(op: Operation, tensor: Tensor, mark: Batch, output: Tensor) -> Batch:
    """Rows of the first factor and batches of either stay; contracted dims and columns of the second are no batch."""
    factors = [t for t, _ in op.operands][-2:]  # baddbmm and addmm take the addend first
    if op.name == "rmatmul":
        factors.reverse()
    if factors[0] is factors[1] or tensor.dim() - output.dim() not in (0, 1):
        return LOST
    kept = tensor.dim() - (1 if tensor is factors[0] else 2)  # the dims that are not summed over nor columns
    return mark if mark.dim < kept and (tensor.dim() == output.dim() or mark.dim == 0) else LOST


def _einsum(op: Operation, tensor: Tensor, mark: Batch) -> Batch:
    equation = op.args[0]
    if not isinstance(equation, str) or "->" not in equation or mark.dim is None:
        return LOST
    inputs, result = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    places = [i for i, (t, _) in enumerate(op.operands) if t is tensor]
    if len(terms) != len(op.operands) or len({terms[i] for i in places}) != 1:
        return LOST
    term = terms[places[0]]
    if "." in term or "." in result:
        return mark if term.startswith("...") and result.startswith("...") and mark.dim == 0 else LOST
    letter = term[mark.dim]
    return Batch(result.index(letter), mark.times) if letter in result else LOST


def _reshaped(tensor: Tensor, mark: Batch, output: Tensor, units: int) -> Batch:
    """Row-major order keeps whole units together as long as what precedes the batch dim stays as it is."""
    before = tensor.shape[: mark.dim]
    if math.prod(before) == 1:  # the batch is outermost but for dims of size 1
        at = next((i for i, size in enumerate(output.shape) if size != 1), mark.dim if mark.dim < output.dim() else 0)
        at = min(at, mark.dim) if units == 1 else at
    elif output.shape[: mark.dim] == before:
        at = mark.dim
    else:
        return LOST
    if at >= output.dim() or output.shape[at] % units:
        return LOST
    return Batch(at, output.shape[at] // units)


def _without(mark: Batch, removed: int) -> Batch:
    if removed == mark.dim:
        return LOST
    return Batch(mark.dim - (removed < mark.dim), mark.times)


def _after_indexing(tensor: Tensor, mark: Batch, index) -> Batch:
    """Follow the batch dim through an index; anything but a full slice of it loses it."""
    items = index if isinstance(index, tuple) else (index,)
    taken = sum(_consumed(item) for item in items)
    position = old = 0  # in the result, in the indexed tensor
    advanced = 0
    for item in items:
        if item is None:
            position += 1
        elif item is Ellipsis:
            skipped = tensor.dim() - taken
            if old <= mark.dim < old + skipped:
                return _unless_scattered(items, Batch(position + mark.dim - old, mark.times))
            old, position = old + skipped, position + skipped
        elif isinstance(item, slice):
            if old == mark.dim:
                whole = item.indices(tensor.shape[old]) == (0, tensor.shape[old], 1)
                return _unless_scattered(items, Batch(position, mark.times)) if whole else LOST
            old, position = old + 1, position + 1
        elif type(item) is int:
            if old == mark.dim:
                return LOST
            old += 1
        else:
            consumed = _consumed(item)
            if old <= mark.dim < old + consumed or advanced:
                return LOST
            advanced += 1
            old += consumed
            position += 1 if consumed > 1 or _is_mask(item) else getattr(item, "ndim", 1)
    return Batch(position + mark.dim - old, mark.times)


def _is_mask(item) -> bool:
    return isinstance(item, bool) or (isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8))


def _consumed(item) -> int:
    """How many dims of the indexed tensor an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and _is_mask(item) else 1


def _unless_scattered(items: tuple, found: Batch) -> Batch:
    """Two tensors in one index may move their dims to the front."""
    return found if sum(isinstance(item, (Tensor, list)) for item in items) < 2 else LOST


def _after_setitem(op: Operation, tensor: Tensor, mark: Batch) -> Batch:
    """target[index] = value: a batch target stays one; a batch value makes the target one if the index keeps dim 0."""
    target, index, value = op.args[:3]
    if tensor is target:
        return mark
    if tensor is not value or mark.times != 1 or target.dim() == 0:
        return LOST
    inside = _after_indexing(target, Batch(0), index)
    at = mark.dim + target[index].dim() - value.dim() if inside.dim is not None else None
    return Batch(0) if inside.dim is not None and at == inside.dim else LOST
