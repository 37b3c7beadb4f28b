"""Where the batch is in every tensor of a model's forward.

Shapes do not tell: five positions and five examples look alike. So every tensor gets a mark when an
operation makes it, from the marks of what it was made of. `follow` knows, operation by operation,
where the batch dim goes; an operation it does not know loses it, and a layer whose input lost it
refuses instead of guessing.
"""

from __future__ import annotations

import math
import string
from dataclasses import replace

import torch
from torch import Tensor

from htv.engine.probing import WRITING, after_padding, after_writing, brings_together, probed
from htv.engine.provenance import LOST, Lost, Mark, OfBatch
from htv.engine.torch_ops import (
    ALONG,
    BROADCASTING,
    CONCATENATING,
    EXPANDING,
    KEEPS_LAST,
    MOVING,
    MULTIPLYING,
    PERMUTING,
    REDUCING,
    RESHAPING,
    ROWWISE,
    SHUFFLING,
    Operation,
)
from htv.errors import UnsupportedError
from htv.groups import BatchLayout, Groups


def follow(
    op: Operation,
    batch_size: int,
    couples: bool = False,
    rows: bool = False,
    all_say: bool = False,
    groups: Groups | None = None,
) -> list[OfBatch]:
    """Return the mark of each output of `op`, some operand of which is of the batch.

    batch_size:  how many examples the batch has.
    couples:     whether what was computed from several examples (statistics of the batch) may meet
                 an example's own part.
    rows:        whether the order of rows inside an example matters too, as where tokens vote.
    all_say:     whether operands without a gradient have a say, too: in a checkpoint they get one
                 later.
    groups:      who votes, where examples of one group may meet; None: none may.
    """
    if rows and (op.name in SHUFFLING or (op.name == "getitem" and _picks(op.args[1]))):
        return [LOST] * len(op.outputs)
    if batch_size == 1:  # all there is is the one example's
        return [LOST if output.dim() == 0 else all_of_one(output) for output in op.outputs]
    operands = [(t, m) for t, m in op.operands if isinstance(m, OfBatch)]
    if op.name == "pad_packed_sequence":
        return [after_padding(op, batch_size), *[LOST] * (len(op.outputs) - 1)]
    if op.name in WRITING:
        return [after_writing(op, batch_size, groups)] * len(op.outputs)
    return [
        _agreed(op, operands, i, batch_size, couples, all_say, groups)
        for i in range(len(op.outputs))
    ]


def unmoved(
    operands: list[tuple[Tensor, Mark | None]], output: Tensor, batch_size: int
) -> BatchLayout | None:
    """Do what `follow` does for the usual case of broadcasting operations: all of `operands` that
    is of the batch, of `batch_size` examples, has it at one place already. None if that is not so,
    or does not fit `output`.
    """
    if batch_size == 1:
        return None
    found = None
    for tensor, mark in operands:
        if isinstance(mark, OfBatch):
            if (
                not isinstance(mark, BatchLayout)
                or (found is not None and mark is not found)
                or tensor.dim() != output.dim()
            ):
                return None
            found = mark
    return (
        found if found is not None and output.shape[found.dim] == found.size(batch_size) else None
    )


def all_of_one(tensor: Tensor, dim: int = 0) -> BatchLayout:
    """Return the place in `tensor` all of which is the only example's, as if it were along
    `dim`.
    """
    size = tensor.shape[dim]
    return (
        BatchLayout(dim, times=size)
        if size
        else BatchLayout(dim, examples=torch.zeros(0, dtype=torch.int64))
    )


def _agreed(
    op: Operation,
    operands,
    index: int,
    batch_size: int,
    couples: bool,
    all_say: bool,
    groups: Groups | None,
) -> OfBatch:
    """Return the place all operands agree on in one output; those without a gradient have no say.

    Where the operation moves parts of the batch about, it is run on the examples' numbers to see
    where they went.
    """
    output = op.outputs[index]
    found = [_place(op, t, m, output, batch_size) for t, m in operands]
    layouts = [layout for layout in found if layout is not None]
    if not layouts and op.name in MOVING:
        return probed(op, index, batch_size)
    kin = None if groups is None else groups.kin
    if not _all_same(layouts, batch_size, kin):
        # Data that only seemed to be the batch's has no say.
        told = [
            p
            for (t, _), p in zip(operands, found, strict=True)
            if p is not None and (all_say or t.requires_grad or not p.guess)
        ]
        if not told or not _all_same(told, batch_size, kin):
            if (op.name in MULTIPLYING or op.name == "einsum") and len(layouts) == len(found):
                _refuse_guesses_in_backward(op, layouts, output)
                return Lost(pairs=True)
            _refuse_guesses(op, layouts, output)
            return LOST if kin is None else _of_two_groups(op, told, groups)
        layouts = told
    layout = next((p for p in layouts if not p.guess), layouts[0] if layouts else None)
    if (
        layout is None
        or not 0 <= layout.dim < output.dim()
        or output.shape[layout.dim] != layout.size(batch_size)
    ):
        return LOST
    for (tensor, _), where in zip(operands, found, strict=True):
        at = layout.dim - (output.dim() - tensor.dim())
        broadcast = at < 0 or tensor.shape[at] == 1
        if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):
            return LOST
    return layout


def _all_same(layouts: list[BatchLayout], batch_size: int, kin: Tensor | None) -> bool:
    return all(layouts[0].same(other, batch_size, kin) for other in layouts[1:])


def _of_two_groups(op: Operation, layouts: list[BatchLayout], groups: Groups) -> Lost:
    """Say which groups an operation brings together whose operands have the batch at `layouts`."""
    for other in layouts[1:]:
        size = groups.batch_size
        if other.dim == layouts[0].dim and other.size(size) == layouts[0].size(size):
            met = [groups.kin[p.index(size).cpu()] for p in (layouts[0], other)]
            apart = (met[0] != met[1]).nonzero().flatten().tolist()
            if apart:
                return brings_together(op, groups, *(int(m[apart[0]]) for m in met))
    return LOST


def _refuse_guesses(op: Operation, layouts: list[BatchLayout], output: Tensor) -> None:
    guess = next((p.guess for p in layouts if p.guess), None)
    if guess is not None and output.requires_grad:
        raise UnsupportedError(_of_guess(op, guess))


def _refuse_guesses_in_backward(op: Operation, layouts: list[BatchLayout], output: Tensor) -> None:
    """Refuse a wrong guess once a loss is made of the output: a product of all examples with all
    (similarities) is no sign of one before.
    """
    guess = next((p.guess for p in layouts if p.guess), None)
    if guess is not None and output.requires_grad:
        message = _of_guess(op, guess)

        def refuse(_):
            raise UnsupportedError(message)

        output.register_hook(refuse)


def _of_guess(op: Operation, guess: str) -> str:
    return (
        f"{op.name}: {guess} was taken for the batch's by its size alone, but meets the batch in "
        "another dim. Remedy: if it holds examples, say so by naming all that do, attach(..., "
        "batch=('first', 'second')); if it does not, name the argument that does, give it a dim "
        "of size 1 where the batch would be, or use another batch size"
    )


def _place(
    op: Operation, tensor: Tensor, mark: OfBatch, output: Tensor, batch_size: int
) -> BatchLayout | None:
    """Return where one operand puts the batch dim in one output; None if that is not known."""
    if isinstance(mark, Lost):
        return None
    dim, name, is_first = mark.dim, op.name, op.operands[0][0] is tensor
    binary = name in ("max", "min") and isinstance(op.argument(0, "other"), Tensor)
    if name in BROADCASTING or name in EXPANDING or binary:
        at = dim + output.dim() - tensor.dim()
        stays = name not in EXPANDING or output.shape[at] == tensor.shape[dim]
        return mark.at(at) if stays else None
    if name in CONCATENATING:
        return mark if op.argument(0, "dim", "axis", default=0) % tensor.dim() != dim else None
    if name == "stack":
        along = op.argument(0, "dim", default=0) % output.dim()
        return mark.at(dim + (along <= dim))
    if name in MULTIPLYING:
        return _multiplied(op, tensor, mark, output)
    if name == "einsum":
        return _einsum(op, tensor, mark)
    if name == "scaled_dot_product_attention":
        return mark if dim < tensor.dim() - 2 and tensor.dim() == output.dim() else None
    by_element = name == "gather" and not isinstance(op.operands[0][1], OfBatch)
    if not is_first and (by_element or name not in ("gather", "take_along_dim")):
        return _looked_up(op, tensor, mark)
    if name in ("embedding", "embedding_bag") and tensor.is_floating_point():
        return None  # torch.embedding takes the table first, whose rows are picked
    if name in ROWWISE:
        last = _mixed_at_the_end(op)
        kept = dim == 0 if last is None else dim < tensor.dim() - last
        if name.startswith("conv") and op.operands[1][0].dim() != tensor.dim():
            return None  # an unbatched image
        return mark if kept else None
    if name in ("permute", "transpose"):
        return _permuted(op, tensor, mark)
    if name in PERMUTING:
        # Dims of distinct sizes show where each of them goes.
        probe = torch.empty(tuple(range(2, 2 + tensor.dim())), device="meta")
        moved = op.again({id(tensor): probe})
        return mark.at(list(moved.shape).index(dim + 2))
    if name in RESHAPING:
        return _reshaped(tensor, mark, output, batch_size)
    if name == "unsqueeze":
        along = op.argument(0, "dim") % (tensor.dim() + 1)
        return mark.at(dim + (along <= dim))
    if name in ("select", "unbind"):
        along = op.argument(0, "dim", default=0)
        return _without(mark, along % tensor.dim()) if isinstance(along, int) else None
    if name == "getitem":
        return _after_indexing(tensor, mark, op.args[1])
    if name in ("repeat", "tile"):
        return _repeated(op, tensor, mark)
    if (
        op.func is torch.nn.functional.unfold
    ):  # im2col of (N, C, *space); the method of that name goes along a dim
        return mark if dim == 0 and tensor.dim() == 4 else None
    if name in ALONG:
        return _along(op, tensor, mark)
    if name in REDUCING:
        return _reduced(op, tensor, mark, output)
    return None


def _permuted(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout:
    ndim = tensor.dim()
    if op.name == "permute":
        given = op.argument(0, "dims")
        dims = op.args[1:] if isinstance(given, int) else given
        return mark.at([d % ndim for d in dims].index(mark.dim))
    a, b = op.argument(0, "dim0") % ndim, op.argument(1, "dim1") % ndim
    if mark.dim == a:
        return mark.at(b)
    if mark.dim == b:
        return mark.at(a)
    return mark.at(mark.dim)


def _looked_up(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    """Find the batch in rows, or by gather elements, of a constant picked by ids of the batch."""
    constant = not isinstance(op.operands[0][1], OfBatch) and not tensor.is_floating_point()
    by_ids = op.name == "getitem" and op.args[1] is tensor and not _is_mask(tensor)
    along_0 = op.name == "index_select" and op.argument(0, "dim") == 0
    return mark if constant and (by_ids or along_0 or op.name == "gather") else None


def _mixed_at_the_end(op: Operation) -> int | None:
    """Return how many dims at the end a rowwise operation may mix; None for all but dim 0."""
    if op.name in ("layer_norm", "rms_norm"):
        return len(op.argument(0, "normalized_shape"))
    if op.name == "embedding_bag":
        return 1 if op.operands[0][0].dim() == 2 else op.operands[0][0].dim()
    if op.name == "pad":
        return len(op.argument(0, "pad")) // 2
    return KEEPS_LAST.get(op.name)


def _dims(value, ndim: int) -> set[int] | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {v % ndim for v in values} if values and all(type(v) is int for v in values) else None


def _along(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    position, default = ALONG[op.name]
    value = op.argument(position, "dim", "dims", "axis", "dimension", default=default)
    if op.name == "flip" and isinstance(value, int):
        value = op.args[1 + position :] or value
    dims = _dims(value, tensor.dim())
    return None if dims is None or mark.dim in dims else mark


def _reduced(
    op: Operation, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    default = 1 if op.name == "cosine_similarity" else None
    dims = _dims(op.argument(REDUCING[op.name], "dim", "axis", default=default), tensor.dim())
    if dims is None or mark.dim in dims:
        return None
    if output.dim() == tensor.dim() and op.name != "cosine_similarity":  # which keeps no dim
        return mark
    if output.dim() != tensor.dim() - len(dims):
        return None
    return mark.at(mark.dim - sum(d < mark.dim for d in dims))


def _multiplied(
    op: Operation, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    """Keep batches and rows of the first factor, batches and columns of the second; no contracted
    dims.
    """
    factors = [t for t, _ in op.operands][-2:]  # baddbmm and addmm take the addend first
    if op.name == "rmatmul":
        factors.reverse()
    if factors[0] is factors[1]:
        return None
    is_first = tensor is factors[0]
    if tensor is not factors[1] and not is_first:  # an addend
        return mark.at(mark.dim + output.dim() - tensor.dim())
    if tensor.dim() == 1:
        return None
    contracted = tensor.dim() - (1 if is_first else 2)
    if mark.dim == contracted:
        return None
    from_end = tensor.dim() - mark.dim  # the output lacks the dim of a factor that is a vector
    if min(f.dim() for f in factors) == 1:
        from_end -= mark.dim < contracted
    return mark.at(output.dim() - from_end)


def _einsum(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    equation, operands = op.args[0], [t for t, _ in op.operands]
    if not isinstance(equation, str):
        return None
    terms, result = einsum_terms(equation, operands)
    mine = {term for term, t in zip(terms, operands, strict=True) if t is tensor}
    if len(mine) != 1:
        return None
    letter = mine.pop()[mark.dim]
    return mark.at(result.index(letter)) if letter in result else None


def einsum_terms(equation: str, operands: list[Tensor]) -> tuple[list[str], str]:
    """Return the letters of an einsum's `operands` and result, by its `equation`, with those of
    "..." and of a result left out written in.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    written = [term.replace("...", "") for term in inputs.split(",")]
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [t.dim() - len(term) for t, term in zip(operands, written, strict=True)]
    dots = "".join(spare[: max(hidden)])  # aligned to the right, as in broadcasting
    if not arrow:
        once = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        result = "..." * ("..." in inputs) + "".join(once)
    terms = [
        term.replace("...", dots[len(dots) - count :])
        for term, count in zip(inputs.split(","), hidden, strict=True)
    ]
    return terms, result.replace("...", dots)


def _reshaped(
    tensor: Tensor, mark: BatchLayout, output: Tensor, batch_size: int
) -> BatchLayout | None:
    """Follow the batch through row-major order: whole examples stay together, whatever is before
    and behind them, as long as no dim cuts them.
    """
    before = math.prod(tensor.shape[: mark.dim])
    if mark.examples is not None:
        for at in range(output.dim()):
            factor, cut = divmod(output.shape[at], max(1, len(mark.examples)))
            if math.prod(output.shape[:at]) != before:
                continue
            if not cut and factor:
                return replace(
                    mark,
                    dim=at,
                    examples=mark.examples
                    if factor == 1
                    else mark.examples.repeat_interleave(factor),
                )
            if output.shape[at] and len(mark.examples) % output.shape[at] == 0:
                split = mark.examples.reshape(output.shape[at], -1)
                if bool((split == split[:, :1]).all()):
                    return replace(mark, dim=at, examples=split[:, 0])
        return None
    before *= mark.outer
    candidates = []
    for at in range(output.dim()):
        outer, cut = divmod(before, max(1, math.prod(output.shape[:at])))
        times, remainder = divmod(output.shape[at], max(1, outer * batch_size))
        if not cut and not remainder and outer and times:
            candidates.append(BatchLayout(at, outer, times, None, mark.guess))
    # Several only if there are no elements: then the dim that is there already.
    return next((p for p in candidates if p.dim == mark.dim), candidates[0] if candidates else None)


def _repeated(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    given = op.argument(0, "dims", "repeats")
    sizes = op.args[1:] if isinstance(given, int) else tuple(given)
    sizes = (1,) * (tensor.dim() - len(sizes)) + sizes  # tile may be given fewer
    at = mark.dim + len(sizes) - tensor.dim()
    if sizes[at] == 1:
        return mark.at(at)
    if mark.examples is not None:
        return replace(mark, dim=at, examples=mark.examples.repeat(sizes[at]))
    return replace(mark, dim=at, outer=mark.outer * sizes[at])


def _without(mark: BatchLayout, removed: int) -> BatchLayout | None:
    return None if removed == mark.dim else mark.at(mark.dim - (removed < mark.dim))


def _after_indexing(tensor: Tensor, mark: BatchLayout, index) -> BatchLayout | None:
    """Follow the batch dim through an index; None if the index takes anything but a full slice of
    it.
    """
    items = index if isinstance(index, tuple) else (index,)
    if any(_is_advanced(item) and not isinstance(item, Tensor) for item in items):
        return None
    taken = sum(_consumed(item) for item in items)
    position = old = 0  # in the result, in the indexed tensor
    advanced = 0
    for item in items:
        if item is None:
            position += 1
        elif item is Ellipsis:
            skipped = tensor.dim() - taken
            if old <= mark.dim < old + skipped:
                return _unless_scattered(items, mark.at(position + mark.dim - old))
            old, position = old + skipped, position + skipped
        elif isinstance(item, slice):
            if old == mark.dim:
                whole = item.indices(tensor.shape[old]) == (0, tensor.shape[old], 1)
                return _unless_scattered(items, mark.at(position)) if whole else None
            old, position = old + 1, position + 1
        elif type(item) is int:
            if old == mark.dim:
                return None
            old += 1
        else:
            consumed = _consumed(item)
            if old <= mark.dim < old + consumed or advanced:
                return None
            advanced += 1
            old += consumed
            position += 1 if _is_mask(item) else item.dim()
    return mark.at(position + mark.dim - old)


def _picks(index) -> bool:
    """Tell whether an index may change the order of what it takes."""
    items = index if isinstance(index, tuple) else (index,)
    return any(_is_advanced(item) for item in items)


def _is_advanced(item) -> bool:
    """Tell whether an item of an index picks by values: a tensor, list, array, tuple or bool."""
    return not (item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int)


def _is_mask(item) -> bool:
    return isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)


def _consumed(item) -> int:
    """Return how many dims of the indexed tensor an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if _is_mask(item) else 1


def _unless_scattered(items: tuple, found: BatchLayout) -> BatchLayout | None:
    """Return `found`, or None: two tensors in one index may move their dims to the front."""
    return found if sum(_is_advanced(item) for item in items) < 2 else None
