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
from functools import lru_cache

import torch
from torch import Tensor

from htv.engine.probing import WRITING, after_padding, after_writing, brings_together, probed
from htv.engine.provenance import LOST, Lost, Mark, OfBatch
from htv.engine.torch_ops import (
    ALONG,
    BROADCASTING,
    CONCATENATING,
    DIAGONALS,
    EXPANDING,
    JOINING,
    KEEPS_LAST,
    LOSSES,
    LOSSES_BY_TERMS,
    LOSSES_OF_CLASSES,
    MOVING,
    MULTIPLYING,
    OF_SEVERAL,
    PAIRED,
    PERMUTING,
    REDUCING,
    RESHAPING,
    ROWWISE,
    SHUFFLING,
    TERMS,
    Operation,
    tensors_in,
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
    if rows and _may_reorder(op):
        return [LOST] * len(op.outputs)
    if batch_size == 1:  # all there is is the one example's
        return [LOST if output.dim() == 0 else all_of_one(output) for output in op.outputs]
    operands = [(i, t, m) for i, (t, m) in enumerate(op.operands) if isinstance(m, OfBatch)]
    if op.name == "pad_packed_sequence":
        return [after_padding(op, batch_size), *[LOST] * (len(op.outputs) - 1)]
    if op.name in WRITING:
        return [after_writing(op, batch_size, groups)] * len(op.outputs)
    found = [
        _agreed(op, operands, i, batch_size, couples, all_say, groups)
        for i in range(len(op.outputs))
    ]
    for mark in found:
        if type(mark) is Lost:
            return _of_one_example(op, operands, found)
    return found


def _may_reorder(op: Operation) -> bool:
    """Tell whether an operation may put rows of an example in the places of others: by picking or
    permuting them, or by joining, padding or writing parts, which were cut where nobody looked.
    """
    if op.name == "getitem":
        return _picks(op.args[1])
    if op.name in JOINING:
        ndim = op.outputs[0].dim()
        return op.argument(0, "dim", "axis", default=0) % ndim != ndim - 1
    if op.name == "pad":
        return any(op.argument(0, "pad")[2:])
    if op.name in WRITING and op.name not in SHUFFLING:
        read, target, value, *_ = WRITING[op.name](op)
        if not any(t is value and isinstance(m, OfBatch) for t, m in op.operands):
            return False
        return op.name != "setitem" or read(target).shape[:-1] != target.shape[:-1]
    return op.name in SHUFFLING


def _of_one_example(op: Operation, operands, found: list[OfBatch]) -> list[OfBatch]:
    """Return marks in place of those `found` lost where all `operands` that are of the batch are
    one example's, as in a loop over the examples: whatever is made of them is its.
    """
    if op.name in JOINING and len(operands) < len(op.operands):
        return found  # rows of constants are nobody's
    layouts = [m for _, _, m in operands if isinstance(m, BatchLayout)]
    examples = [the_one_example(m) for m in layouts]
    if len(layouts) < len(operands) or None in examples or len(set(examples)) > 1:
        return found
    return [
        BatchLayout(0, examples=torch.full((output.shape[0],), examples[0]))
        if isinstance(mark, Lost) and output.dim()
        else mark
        for mark, output in zip(found, op.outputs, strict=True)
    ]


def the_one_example(mark: Mark | None) -> int | None:
    """Return the number of the example that all of a tensor is of, as its `mark` lists the examples
    index by index; None if it lists several, or none.
    """
    numbers = mark.examples if isinstance(mark, BatchLayout) else None
    if numbers is None or not numbers.numel() or bool((numbers != numbers[0]).any()):
        return None
    return int(numbers[0])


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
    found = [_place(op, i, t, m, output, batch_size) for i, t, m in operands]
    layouts = [layout for layout in found if layout is not None]
    if not layouts and op.name in MOVING:
        return probed(op, index, batch_size)
    kin = None if groups is None else groups.kin
    if not _all_same(layouts, batch_size, kin):
        if op.name in JOINING and not any(p.guess for p in layouts):
            joined = probed(op, index, batch_size)  # of parts of the batch, say every example's
            return _of_two_groups(op, layouts, groups) if joined is LOST and groups else joined
        # Data that only seemed to be the batch's has no say.
        told = [
            p
            for (_, t, _), p in zip(operands, found, strict=True)
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
    for (_, tensor, _), where in zip(operands, found, strict=True):
        at = layout.dim - (output.dim() - tensor.dim())
        broadcast = at < 0 or tensor.shape[at] == 1
        if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):
            return LOST
    return layout


def _all_same(layouts: list[BatchLayout], batch_size: int, kin: Tensor | None) -> bool:
    return all(layouts[0].same(other, batch_size, kin) for other in layouts[1:])


def _of_two_groups(op: Operation, layouts: list[BatchLayout], groups: Groups) -> Lost:
    """Say which groups an operation brings together whose operands have the batch at `layouts`."""
    if groups.kin is None:  # examples vote one by one
        return LOST
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
    op: Operation, number: int, tensor: Tensor, mark: OfBatch, output: Tensor, batch_size: int
) -> BatchLayout | None:
    """Return where operand `number`, a `tensor` with a `mark`, puts the batch dim in one output;
    None if that is not known.
    """
    if isinstance(mark, Lost):
        return None
    dim, name, is_first = mark.dim, op.name, number == 0
    binary = name in ("max", "min") and isinstance(op.argument(0, "other"), Tensor)
    if name == "gaussian_nll_loss" and _is_argument(op, number, tensor, 2, "var"):
        return mark if _unreduced(op) else None  # it may lack the last dim
    if name in BROADCASTING or name in EXPANDING or binary or (name in LOSSES and _unreduced(op)):
        at = dim + output.dim() - tensor.dim()
        stays = name not in EXPANDING or output.shape[at] == tensor.shape[dim]
        return mark.at(at) if stays else None
    if name in CONCATENATING:
        return mark if op.argument(0, "dim", "axis", default=0) % tensor.dim() != dim else None
    if name == "stack":
        along = op.argument(0, "dim", default=0) % output.dim()
        return mark.at(dim + (along <= dim))
    if name in MULTIPLYING:
        return _multiplied(op, number, tensor, mark, output)
    if name == "einsum":
        return _einsum(op, number, mark)
    if name in ("inner", "tensordot"):
        return _summed_by_pairs(op, number, tensor, mark)
    if name in ("linalg_multi_dot", "chain_matmul"):
        return _chained(op, number, tensor, mark, output)
    if name in TERMS:
        return _by_terms(op, number, mark)
    if name in LOSSES_OF_CLASSES:
        return _of_classes(op, number, tensor, mark, output)
    if name == "kron":
        return _repeated_by_kron(op, number, tensor, mark, output)
    if name == "scaled_dot_product_attention":
        return mark if dim < tensor.dim() - 2 and tensor.dim() == output.dim() else None
    by_element = name == "gather" and not isinstance(op.operands[0][1], OfBatch)
    given = min(OF_SEVERAL.get(name, 1), len(tensors_in(op.args, None)))  # by position
    alike = name in PAIRED or number < given
    if not (is_first or alike) and (by_element or name not in ("gather", "take_along_dim")):
        return _looked_up(op, tensor, mark)
    if name in ("embedding", "embedding_bag") and tensor.is_floating_point():
        return None  # torch.embedding takes the table first, whose rows are picked
    if name in ROWWISE:
        return _rowwise(op, tensor, mark)
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
    if name in DIAGONALS:
        return _diagonal(op, tensor, mark)
    if (
        op.func is torch.nn.functional.unfold
    ):  # im2col of (N, C, *space); the method of that name goes along a dim
        return mark if dim == 0 and tensor.dim() == 4 else None
    if name in ALONG or name in REDUCING:
        return _along(op, tensor, mark, output)
    if name == "renorm":  # each index of the dim by itself
        return mark if op.argument(1, "dim") % tensor.dim() == dim else None
    if name in ("stft", "istft"):  # of (N, time), and of (N, frequencies, frames)
        return mark if dim == 0 and tensor.dim() == (2 if name == "stft" else 3) else None
    return None


def _rowwise(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    if op.name == "pad":
        return _padded(op, tensor, mark)
    if op.name.startswith("conv") and op.operands[1][0].dim() != tensor.dim():
        return None  # an unbatched image
    if op.name.startswith("max_unpool") and tensor.dim() != 2 + int(op.name[-2]):
        return None
    last = _mixed_at_the_end(op)
    kept = mark.dim == 0 if last is None else mark.dim < tensor.dim() - last
    return mark if kept else None


def _padded(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    """Return `mark` if nothing is padded, or cut off, along the batch's dim."""
    pads = op.argument(0, "pad")
    start = 2 * (tensor.dim() - 1 - mark.dim)  # pairs are counted from the last dim
    return None if any(pads[start : start + 2]) else mark


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
    return KEEPS_LAST.get(op.name)


def _dims(value, ndim: int) -> set[int] | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {v % ndim for v in values} if values and all(type(v) is int for v in values) else None


def _along(op: Operation, tensor: Tensor, mark: BatchLayout, output: Tensor) -> BatchLayout | None:
    """Follow the batch through an operation along dims, or over them."""
    name, reduces = op.name, op.name in REDUCING
    position, default = (REDUCING if reduces else ALONG)[name]
    value = op.argument(position, "dim", "dims", "axis", "dimension", default=default)
    if name == "flip" and isinstance(value, int):
        value = op.args[1 + position :] or value
    if value is None and name.startswith("fft_") and name.endswith("n"):
        sizes = op.argument(0, "s")
        value = None if sizes is None else tuple(range(-len(sizes), 0))
    dims = _dims(value, tensor.dim())
    if name in PAIRED and tensor.dim() != max(t.dim() for t, _ in op.operands):
        return None  # it is broadcast, or lies along the dim
    if dims is None or mark.dim in dims:
        return None
    return _less_dims(op, tensor, mark, output, dims) if reduces else mark


def _less_dims(
    op: Operation, tensor: Tensor, mark: BatchLayout, output: Tensor, dims: set[int]
) -> BatchLayout | None:
    """Return where the batch is once an operation reduced `dims`, none of them the batch's."""
    if op.name in ("quantile", "nanquantile"):
        q = op.argument(0, "q")
        in_front = isinstance(q, Tensor) and q.dim() == 1  # one of the result's for every q
    else:
        in_front = False
    left = output.dim() - in_front
    if left == tensor.dim() and op.name not in ("cosine_similarity", "linalg_vecdot"):
        return mark.at(mark.dim + in_front)  # keepdim
    if left != tensor.dim() - len(dims):
        return None
    return mark.at(mark.dim - sum(d < mark.dim for d in dims) + in_front)


def _diagonal(op: Operation, tensor: Tensor, mark: BatchLayout) -> BatchLayout | None:
    """Follow a dim beside those of a diagonal that is read, or written along the last."""
    writes, defaults = op.name == "diag_embed", DIAGONALS[op.name]
    ndim = tensor.dim() + writes
    pair = {op.argument(1 + i, f"dim{i + 1}", default=defaults[i]) % ndim for i in range(2)}
    others = [d for d in range(ndim) if d not in pair]
    if writes:
        return mark.at(others[mark.dim]) if mark.dim < tensor.dim() - 1 else None
    return mark.at(others.index(mark.dim)) if mark.dim in others else None


def _is_argument(op: Operation, number: int, tensor: Tensor, position: int, name: str) -> bool:
    """Tell whether operand `number` is the tensor argument at `position`, or given as `name`."""
    return tensor is op.kwargs[name] if name in op.kwargs else number == position


def _unreduced(op: Operation) -> bool:
    """Tell whether a loss is asked for every element or example by itself."""
    named = op.kwargs.get("reduction")
    return named == "none" or any(type(a) is str and a == "none" for a in op.args)


def _of_classes(
    op: Operation, number: int, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    """Follow the batch from (N, C, ...) to the loss of every (N, ...)."""
    if not _unreduced(op) or number > 1 or tensor.dim() != output.dim() + 1 or mark.dim == 1:
        return None
    return mark.at(mark.dim - (mark.dim > 1)) if tensor.dim() > 1 else None


def _repeated_by_kron(
    op: Operation, number: int, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    """Follow a dim of a Kronecker product's factor: its indices are repeated, each at once if it is
    the first factor's, all of them if it is the second's.
    """
    at, other = mark.dim + output.dim() - tensor.dim(), op.operands[1 - number][0]
    times = output.shape[at] // max(1, tensor.shape[mark.dim])
    if other is tensor or not times:
        return None
    if mark.examples is not None:
        repeat = mark.examples.repeat_interleave if number == 0 else mark.examples.repeat
        return replace(mark, dim=at, examples=repeat(times))
    if number == 0:
        return replace(mark, dim=at, times=mark.times * times)
    return replace(mark, dim=at, outer=mark.outer * times)


def _multiplied(
    op: Operation, number: int, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    """Keep batches and rows of the first factor, batches and columns of the second; no contracted
    dims.
    """
    count = len(op.operands)
    factors = [t for t, _ in op.operands][-2:]  # baddbmm and addmm take the addend first
    is_first = number == count - 2
    if op.name == "rmatmul":
        factors.reverse()
        is_first = number == count - 1
    if number < count - 2:  # an addend
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


def _einsum(op: Operation, number: int, mark: BatchLayout) -> BatchLayout | None:
    equation, operands = op.args[0], [t for t, _ in op.operands]
    if not isinstance(equation, str):
        return None
    terms, result = einsum_terms(equation, operands)
    letter = terms[number][mark.dim]
    return mark.at(result.index(letter)) if letter in result else None


def _chained(
    op: Operation, number: int, tensor: Tensor, mark: BatchLayout, output: Tensor
) -> BatchLayout | None:
    """Keep the rows of the first of several matrices and the columns of the last."""
    if tensor.dim() == 2 and number == mark.dim == 0:
        return mark
    last = number == len(op.operands) - 1
    return mark.at(output.dim() - 1) if tensor.dim() == 2 and last and mark.dim == 1 else None


def _summed_by_pairs(
    op: Operation, number: int, tensor: Tensor, mark: BatchLayout
) -> BatchLayout | None:
    """Follow the batch through an inner product or a torch.tensordot: the dims of the first that
    are not summed come before those of the second.
    """
    if "b" in op.kwargs or "other" in op.kwargs or len(op.operands) != 2:
        return None
    sides = [t for t, _ in op.operands]
    dims = op.argument(1, "dims", default=2)
    if op.name == "inner":
        summed = [{t.dim() - 1} for t in sides]
    elif isinstance(dims, int):
        summed = [set(range(sides[0].dim() - dims, sides[0].dim())), set(range(dims))]
    elif isinstance(dims, Tensor):
        return None
    else:
        summed = [{d % t.dim() for d in given} for t, given in zip(sides, dims, strict=True)]
    if mark.dim in summed[number] or 0 in (t.dim() for t in sides):
        return None
    before = sides[0].dim() - len(summed[0]) if number else 0
    return mark.at(before + mark.dim - sum(d < mark.dim for d in summed[number]))


def _by_terms(op: Operation, number: int, mark: BatchLayout) -> BatchLayout | None:
    """Follow the batch where `TERMS` says which dims of each operand the results have."""
    if op.name in LOSSES_BY_TERMS and not _unreduced(op):
        return None
    names, written, result = _read_terms(TERMS[op.name])
    places = _argument_places(op, names)
    if places is None or len(set(places)) != len(places):
        return None
    tensors = [t for t, _ in op.operands]
    inputs = [written[place] for place in places]
    if op.name in ("linalg_solve", "linalg_solve_ex", "linalg_lstsq") and len(inputs) == 2:
        a, b = (tensors[places.index(i)] for i in range(2))
        if b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]):
            inputs[places.index(1)] = "...i"  # a vector for every matrix
    terms, result = einsum_terms(f"{','.join(inputs)}->{result}", tensors)
    letter = terms[number][mark.dim]
    return mark.at(result.index(letter)) if letter in result else None


@lru_cache
def _read_terms(written: str) -> tuple[list[list[str]], list[str], str]:
    """Read an entry of `TERMS`: the names an operand goes by, and the term, of each; the result."""
    inputs, _, result = written.partition(" -> ")
    pairs = [part.split() for part in inputs.split(", ")]
    return [names.split("|") for names, _ in pairs], [term for _, term in pairs], result


def _argument_places(op: Operation, names: list[list[str]]) -> list[int] | None:
    """Return, for every tensor operand of a call, which of the arguments called `names` it is; None
    if one is none of them.
    """
    places = list(range(len(tensors_in(op.args, None))))
    for name, value in op.kwargs.items():
        if isinstance(value, Tensor):
            place = next((i for i, known in enumerate(names) if name in known), None)
            if place is None:
                return None
            places.append(place)
    return places if len(places) == len(op.operands) and max(places) < len(names) else None


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
