"""Every op's contract: name, schema, fake. Kernels only register themselves for what is declared
here.

    stacked(grads, statistic, count, votes, k) -> (value, mask_sum)
        grads     (E, P) contiguous, float64 / float32 / bfloat16 / float16, E >= 1
        value     (P,) in `compute_dtype(grads)`; without the factor E, not normalised
        mask_sum  () float64, sum of the mask over coordinates, 0 for statistics without one
        The reference serves every statistic of `htv.ops.statistics`.

    stacked_summary(grads, statistic, log_offset) -> (total, votes, spread, logs)
        grads         as above
        log_offset    finite, at least float32's smallest normal number
        total, votes  (P,) in `compute_dtype(grads)`; the fields of `htv.ops.reference.Summary` of
                      the contributions, for a streaming statistic
        spread, logs  (P,) likewise where the statistic's `state` names them, else (0,)

    linear(x, grad_output, offsets, statistic, count, votes, k) -> (value, mask_sum)
        x            (R, I) contiguous, the layer's input rows, ordered by group
        grad_output  (R, O) contiguous, same dtype as x
        offsets      (E + 1,) int64 on the CPU; group e owns rows offsets[e]:offsets[e + 1]
        value        (O, I) in `compute_dtype(x)`; E * stat of the contributions
                     sum_r grad_output[r, o] * x[r, i]
        mask_sum     as above
        Kernels serve what they are registered for (`htv.ops.kernels`); the sliced path serves
        the rest.

    together(grads, x, grad_output, offsets, statistic, count, votes, k) -> values
        grads           tensors as for `stacked`, of E groups each; contiguous or not
        x, grad_output  as many of the one as of the other, pairs as for `linear`; contiguous or not
        offsets         as for `linear`, for all pairs; None only where there is none
        values          E * stat of each: of grads, (P,), then of the pairs, (O, I). For
                        parameters so small that a call takes as long as their kernels.
        Kernels serve what they are registered for; the ops above serve the rest, one by one.

    linear_summary(x, grad_output, offsets, statistic, log_offset) -> (total, votes, spread, logs)
        What `stacked_summary` returns, (O, I) each, of the contributions that `linear` is of.

    norm_sums(grad, x, mean, rstd) -> (scale, shift)
        grad, x       (S, T, D) contiguous, the same dtype: output gradient and input of a
                      normalisation
        mean, rstd    (S, T) contiguous, in `compute_dtype(x)`: those of every row
        scale, shift  (S, D) in `compute_dtype(x)`; sums over T of grad * (x - mean) * rstd, and of
                      grad

    group_norm_backward(grad, x, weight, mean, rstd, needs_x) -> (grad_x, scale, shift)
        grad, x       (S, C, *space) contiguous, the same dtype: output gradient and input of a
                      group normalisation
        weight        (C,) contiguous, in `compute_dtype(x)`, as mean and rstd
        mean, rstd    (S, G) contiguous: of every group of C / G channels
        grad_x        (S, C, *space) in `compute_dtype(x)`; (0, C, *space) unless needs_x
        scale, shift  (S, C) in `compute_dtype(x)`; sums over space of grad * (x - mean) * rstd,
                      and of grad

    conv(x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count,
    votes, k)
            -> (value, mask_sum)
        x            (S, C, *space) of a convolution's samples, ordered by group; dense,
                     channels first or last
        grad_output  (S, O, *out_space), same dtype as x; dense, channels first or last
        offsets      (E + 1,) int64 on the CPU; group e owns samples offsets[e]:offsets[e + 1]
        kernel, stride, padding, dilation: one entry per spatial dim; groups: of the convolution
        value        (O, C / groups, *kernel) in `compute_dtype(x)`; E * stat of the contributions
                     to the weight
        mask_sum     as above
        Kernels serve what they are registered for.

    conv_summary(x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic,
    log_offset)
            -> (total, votes, spread, logs)
        The same, (O, C / groups, *kernel) each, of the contributions that `conv` is of.

    embedding(grad_output, ids, voter, num_embeddings, groups, statistic, count, votes, k) ->
    (value, mask_sum)
        grad_output  (R, D) contiguous
        ids, voter   (R,) int64 contiguous: the row of the table that was looked up, and the
                     group that did
        value        (num_embeddings, D) in `compute_dtype(grad_output)`; E * stat of the groups'
                     contributions
        mask_sum     as above
        Kernels serve what they are registered for. An id outside of the table raises on the CPU;
        in Triton its row takes no part, for looking at ids would wait for the device.

    embedding_contributions(grad_output, ids, voter, tokens, num_embeddings, groups) ->
    contributions
        tokens         (N,) int64, in 0 to num_embeddings - 1; the others as for `embedding`
        contributions  (groups, N, D) in `compute_dtype(grad_output)`, to these rows of the table

    shifted_cross_entropy(logits, targets, shift, temperature, weight, ignore_index,
    label_smoothing)
            -> (loss, peak, log_sum)
        logits       (N, K), K >= 1, stride 1 along K
        targets      (N,) int64 contiguous: classes, or `ignore_index`. Any other value raises on
                     the CPU; in Triton its row's loss and gradient are NaN, for raising would wait
                     for the device
        shift        (N, K) stride 1 along K; rows may be one and the same (stride 0). float64 if
                     and only if the logits are, else of any other floating-point type
        weight       (K,) contiguous in `compute_dtype(logits)`, or None
        loss         (N,) in `compute_dtype(logits)`, as peak and log_sum; see `htv.ops.reference`
    shifted_cross_entropy_grad(grad, logits, ..., label_smoothing, peak, log_sum) -> grad_logits
        grad         (N,) of the losses, in `compute_dtype(logits)`; any stride, 0 too
        grad_logits  (N, K) contiguous, in the type of logits

The Triton kernels' are the ops `stacked_triton`, `linear_triton` and so on, of the same contracts,
for float32, bfloat16 and float16: they share devices with the kernels above, and `htv.ops.backend`
decides between them.

`statistic` is the number of a `htv.rules.Statistic`'s name in `htv.ops.statistics`; `count`,
`votes` and `k` are its fields.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from htv.ops import reference, statistics
from htv.rules import Statistic

MOST_GROUPS = 2**31 - 1  # of any op
LEAST_LOG_OFFSET = torch.finfo(torch.float32).tiny


def code(name: str) -> int:
    """Return the number by which kernels know a statistic."""
    return statistics.of(name).number


def numbers(statistic: Statistic) -> tuple[int, int, float, float]:
    """Return a statistic as ops take it. Raises ValueError for that of a rule of the user's own."""
    return code(statistic.name), statistic.count, statistic.votes, statistic.k


def checked(op: str, statistic: int, count: int, votes: float, k: float, groups: int) -> Statistic:
    """Return the statistic of this number for so many groups; ValueError if there is none."""
    found = _known(op, statistic, groups)
    low, high = found.counts(groups)
    if not low <= count <= high:
        raise ValueError(
            f"htv::{op}: count must be {low} to {high} for {found.name} of {groups} groups, "
            f"got {count}"
        )
    return Statistic(found.name, count, votes, k)


def checked_summary(op: str, statistic: int, log_offset: float, groups: int) -> str:
    """Return the name of the statistic of this number, whose summary is asked for; ValueError if
    there is none.
    """
    found = _known(op, statistic, groups)
    if not found.streams:
        raise ValueError(f"htv::{op}: there is no summary for {found.name}")
    if not (LEAST_LOG_OFFSET <= log_offset < math.inf):
        raise ValueError(
            f"htv::{op}: log_offset must be finite and at least {LEAST_LOG_OFFSET}, "
            f"got {log_offset}"
        )
    return found.name


def _known(op: str, statistic: int, groups: int) -> statistics.Definition:
    try:
        found = statistics.by_number(statistic)
    except ValueError as error:
        raise ValueError(f"htv::{op}: {error}") from None
    if not 1 <= groups <= MOST_GROUPS:
        raise ValueError(f"htv::{op}: needs 1 to {MOST_GROUPS} groups, got {groups}")
    return found


def require_one_device(op: str, *given: torch.Tensor | None) -> None:
    """Raise ValueError unless an op's tensors, but for offsets, are dense and on one device."""
    tensors = [t for t in given if t is not None]
    if any(t.layout != torch.strided for t in tensors):
        raise ValueError(f"htv::{op}: all tensors must be dense, of strided layout")
    devices = {str(t.device): None for t in tensors}
    if len(devices) > 1:
        names = " and ".join(devices)
        raise ValueError(f"htv::{op}: all tensors must be on one device, got {names}")


def require_indices(op: str, name: str, tensor: torch.Tensor, limit: int) -> None:
    """Raise unless a tensor is int64 with values in 0 to limit - 1; looked at on the CPU only."""
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"htv::{op}: {name} must be an int64 vector, got {got}")
    if tensor.device.type == "cpu" and not bool(((tensor >= 0) & (tensor < limit)).all()):
        raise ValueError(f"htv::{op}: {name} must lie in 0 to {limit - 1}")


_NUMBERS = "int statistic, int count, float votes, float k"
_SUMMARY = "int statistic, float log_offset) -> (Tensor, Tensor, Tensor, Tensor)"
_WINDOWS = (
    "Tensor x, Tensor grad_output, Tensor offsets, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, int groups"
)
_CROSS_ENTROPY = (
    "Tensor logits, Tensor targets, Tensor shift, float temperature, Tensor? weight, "
    "int ignore_index, float label_smoothing"
)
_SIGNATURES = {
    "stacked": f"(Tensor grads, {_NUMBERS}) -> (Tensor, Tensor)",
    "linear": f"(Tensor x, Tensor grad_output, Tensor offsets, {_NUMBERS}) -> (Tensor, Tensor)",
    "together": "(Tensor[] grads, Tensor[] x, Tensor[] grad_output, Tensor? offsets, "
    f"{_NUMBERS}) -> Tensor[]",
    "norm_sums": "(Tensor grad, Tensor x, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    "group_norm_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "bool needs_x) -> (Tensor, Tensor, Tensor)",
    "conv": f"({_WINDOWS}, {_NUMBERS}) -> (Tensor, Tensor)",
    "embedding": "(Tensor grad_output, Tensor ids, Tensor voter, int num_embeddings, int groups,"
    f" {_NUMBERS}) -> (Tensor, Tensor)",
    "embedding_contributions": "(Tensor grad_output, Tensor ids, Tensor voter, Tensor tokens, "
    "int num_embeddings, int groups) -> Tensor",
    "shifted_cross_entropy": f"({_CROSS_ENTROPY}) -> (Tensor, Tensor, Tensor)",
    "shifted_cross_entropy_grad": f"(Tensor grad, {_CROSS_ENTROPY}, Tensor peak, Tensor log_sum) "
    "-> Tensor",
    "stacked_summary": f"(Tensor grads, {_SUMMARY}",
    "linear_summary": f"(Tensor x, Tensor grad_output, Tensor offsets, {_SUMMARY}",
    "conv_summary": f"({_WINDOWS}, {_SUMMARY}",
}
OPS = tuple(_SIGNATURES)

library = torch.library.Library("htv", "DEF")
for _op, _signature in _SIGNATURES.items():
    library.define(_op + _signature)

_fakes: dict[str, Callable] = {}


def _fake(op: str) -> Callable[[Callable], Callable]:
    """Register what an op returns of tensors without values."""

    def register(function: Callable) -> Callable:
        _fakes[op] = function
        return torch.library.register_fake(f"htv::{op}", function)

    return register


@_fake("stacked")
def _stacked_fake(grads, statistic, count, votes, k):
    value = grads.new_empty(grads.shape[1:], dtype=reference.compute_dtype(grads.dtype))
    return value, grads.new_empty((), dtype=torch.float64)


@_fake("linear")
def _linear_fake(x, grad_output, offsets, statistic, count, votes, k):
    require_one_device("linear", x, grad_output, None if offsets.is_cpu else offsets)
    shape = (grad_output.shape[1], x.shape[1])
    value = x.new_empty(shape, dtype=reference.compute_dtype(x.dtype))
    return value, x.new_empty((), dtype=torch.float64)


@_fake("together")
def _together_fake(grads, x, grad_output, offsets, *numbers):
    require_one_device("together", *grads, *x, *grad_output)
    return [
        *(_stacked_fake(of_one, *numbers)[0] for of_one in grads),
        *(_linear_fake(*pair, offsets, *numbers)[0] for pair in zip(x, grad_output, strict=True)),
    ]


@_fake("norm_sums")
def _norm_sums_fake(grad, x, mean, rstd):
    require_one_device("norm_sums", x, grad, mean, rstd)
    shape = (x.shape[0], x.shape[2])
    return mean.new_empty(shape), mean.new_empty(shape)


@_fake("group_norm_backward")
def _group_norm_backward_fake(grad, x, weight, mean, rstd, needs_x):
    require_one_device("group_norm_backward", x, grad, weight, mean, rstd)
    shape = x.shape[:2]
    return (
        mean.new_empty(shape[0] if needs_x else 0, *x.shape[1:]),
        mean.new_empty(shape),
        mean.new_empty(shape),
    )


@_fake("conv")
def _conv_fake(
    x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count, votes, k
):
    require_one_device("conv", x, grad_output, None if offsets.is_cpu else offsets)
    shape = (grad_output.shape[1], x.shape[1] // groups, *kernel)
    value = x.new_empty(shape, dtype=reference.compute_dtype(x.dtype))
    return value, x.new_empty((), dtype=torch.float64)


@_fake("embedding")
def _embedding_fake(
    grad_output, ids, group_index, num_embeddings, groups, statistic, count, votes, k
):
    require_one_device("embedding", grad_output, ids, group_index)
    shape = (num_embeddings, grad_output.shape[1])
    value = grad_output.new_empty(shape, dtype=reference.compute_dtype(grad_output.dtype))
    return value, grad_output.new_empty((), dtype=torch.float64)


@_fake("embedding_contributions")
def _embedding_contributions_fake(grad_output, ids, group_index, tokens, num_embeddings, groups):
    require_one_device("embedding_contributions", grad_output, ids, group_index, tokens)
    shape = (groups, tokens.shape[0], grad_output.shape[1])
    return grad_output.new_empty(shape, dtype=reference.compute_dtype(grad_output.dtype))


@_fake("shifted_cross_entropy")
def _shifted_cross_entropy_fake(logits, targets, shift, temperature, weight, *numbers):
    require_one_device("shifted_cross_entropy", logits, targets, shift, weight)
    rows = logits.shape[0]
    return tuple(
        logits.new_empty(rows, dtype=reference.compute_dtype(logits.dtype)) for _ in range(3)
    )


@_fake("shifted_cross_entropy_grad")
def _shifted_cross_entropy_grad_fake(
    grad, logits, targets, shift, temperature, weight, ignore_index, label_smoothing, peak, log_sum
):
    others = grad, targets, shift, weight, peak, log_sum
    require_one_device("shifted_cross_entropy_grad", logits, *others)
    return logits.new_empty(logits.shape)


def _summary_fake(like, shape, statistic):
    state = statistics.by_number(statistic).state
    dtype = reference.compute_dtype(like.dtype)
    kept = (True, True, "spread" in state, "logs" in state)
    return tuple(like.new_empty(shape if is_kept else 0, dtype=dtype) for is_kept in kept)


@_fake("stacked_summary")
def _stacked_summary_fake(grads, statistic, log_offset):
    return _summary_fake(grads, grads.shape[1:], statistic)


@_fake("linear_summary")
def _linear_summary_fake(x, grad_output, offsets, statistic, log_offset):
    require_one_device("linear_summary", x, grad_output, None if offsets.is_cpu else offsets)
    return _summary_fake(x, (grad_output.shape[1], x.shape[1]), statistic)


@_fake("conv_summary")
def _conv_summary_fake(
    x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, log_offset
):
    require_one_device("conv_summary", x, grad_output, None if offsets.is_cpu else offsets)
    return _summary_fake(x, (grad_output.shape[1], x.shape[1] // groups, *kernel), statistic)


def _stacked_reference(grads, statistic, count, votes, k):
    require_one_device("stacked", grads)
    return reference.stacked(grads, checked("stacked", statistic, count, votes, k, grads.shape[0]))


def _linear_reference(x, grad_output, offsets, statistic, count, votes, k):
    require_one_device("linear", x, grad_output)
    _require_offsets("linear", offsets, x.shape[0])
    resolved = checked("linear", statistic, count, votes, k, len(offsets) - 1)
    return reference.linear(x, grad_output, offsets, resolved)


def _together_reference(grads, x, grad_output, offsets, statistic, count, votes, k):
    require_one_device("together", *grads, *x, *grad_output)
    if len(x) != len(grad_output) or (x and offsets is None):
        raise ValueError("htv::together: x and grad_output go in pairs, with their offsets")
    counts = {len(of_one) for of_one in grads} | (set() if offsets is None else {len(offsets) - 1})
    if len(counts) != 1:
        raise ValueError(f"htv::together: one number of groups is needed, got {sorted(counts)}")
    (groups,) = counts
    resolved = checked("together", statistic, count, votes, k, groups)
    values = [reference.stacked(of_one, resolved)[0] * groups for of_one in grads]
    for of_x, of_grad in zip(x, grad_output, strict=True):
        _require_offsets("together", offsets, of_x.shape[0])
        values.append(reference.linear(of_x, of_grad, offsets, resolved)[0])
    return values


def _conv_reference(
    x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count, votes, k
):
    require_one_device("conv", x, grad_output)
    _require_offsets("conv", offsets, x.shape[0])
    geometry = (kernel, stride, padding, dilation, groups)
    resolved = checked("conv", statistic, count, votes, k, len(offsets) - 1)
    return reference.conv(x, grad_output, offsets, geometry, resolved)


def _stacked_summary_reference(grads, statistic, log_offset):
    require_one_device("stacked_summary", grads)
    name = checked_summary("stacked_summary", statistic, log_offset, grads.shape[0])
    values = grads.to(reference.compute_dtype(grads.dtype))
    return _fields(reference.Summary.of(values, name, log_offset))


def _linear_summary_reference(x, grad_output, offsets, statistic, log_offset):
    require_one_device("linear_summary", x, grad_output)
    _require_offsets("linear_summary", offsets, x.shape[0])
    name = checked_summary("linear_summary", statistic, log_offset, len(offsets) - 1)
    contributions = reference.linear_contributions(x, grad_output, offsets)
    return _fields(reference.Summary.of(contributions, name, log_offset))


def _conv_summary_reference(
    x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, log_offset
):
    require_one_device("conv_summary", x, grad_output)
    _require_offsets("conv_summary", offsets, x.shape[0])
    name = checked_summary("conv_summary", statistic, log_offset, len(offsets) - 1)
    geometry = (kernel, stride, padding, dilation, groups)
    contributions = reference.conv_contributions(x, grad_output, offsets, geometry)
    return _fields(reference.Summary.of(contributions, name, log_offset))


def _fields(summary: reference.Summary) -> tuple[torch.Tensor, ...]:
    fields = summary.total, summary.votes, summary.spread, summary.logs
    return tuple(summary.total.new_empty(0) if field is None else field for field in fields)


def _embedding_reference(
    grad_output, ids, group_index, num_embeddings, groups, statistic, count, votes, k
):
    require_one_device("embedding", grad_output, ids, group_index)
    resolved = checked("embedding", statistic, count, votes, k, groups)
    require_indices("embedding", "ids", ids, num_embeddings)
    require_indices("embedding", "voter", group_index, groups)
    return reference.embedding(grad_output, ids, group_index, num_embeddings, groups, resolved)


def _embedding_contributions_reference(
    grad_output, ids, group_index, tokens, num_embeddings, groups
):
    require_one_device("embedding_contributions", grad_output, ids, group_index, tokens)
    if num_embeddings < 0 or not 1 <= groups <= MOST_GROUPS:
        table = f"{num_embeddings} rows and {groups} groups"
        raise ValueError(f"htv::embedding_contributions: no table of {table}")
    for name, tensor in {"ids": ids, "voter": group_index, "tokens": tokens}.items():
        limit = groups if name == "voter" else num_embeddings
        require_indices("embedding_contributions", name, tensor, limit)
    lookups = grad_output, ids, group_index, tokens
    return reference.embedding_contributions(*lookups, num_embeddings, groups)


def _norm_sums_reference(grad, x, mean, rstd):
    require_one_device("norm_sums", x, grad, mean, rstd)
    return reference.norm_sums(grad, x, mean, rstd)


def _group_norm_backward_reference(grad, x, weight, mean, rstd, needs_x):
    require_one_device("group_norm_backward", x, grad, weight, mean, rstd)
    return reference.group_norm_backward(grad, x, weight, mean, rstd, needs_x)


def _shifted_cross_entropy_reference(
    logits, targets, shift, temperature, weight, ignore_index, label_smoothing
):
    require_one_device("shifted_cross_entropy", logits, targets, shift, weight)
    numbers = temperature, weight, ignore_index, label_smoothing
    return reference.shifted_cross_entropy(logits, targets, shift, *numbers)


def _shifted_cross_entropy_grad_reference(
    grad, logits, targets, shift, temperature, weight, ignore_index, label_smoothing, peak, log_sum
):
    others = grad, targets, shift, weight, peak, log_sum
    require_one_device("shifted_cross_entropy_grad", logits, *others)
    numbers = temperature, weight, ignore_index, label_smoothing
    given = grad, logits, targets, shift
    return reference.shifted_cross_entropy_grad(*given, *numbers, peak, log_sum)


def _require_offsets(op: str, offsets: torch.Tensor, rows: int) -> None:
    require_one_device(op, offsets)
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not offsets.is_cpu or len(offsets) < 2:
        raise ValueError(
            f"htv::{op}: offsets must be 2 or more int64 on the CPU, got {offsets.dtype}"
        )
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"htv::{op}: offsets must ascend from 0 to the number of rows, {rows}")


# Any device without a kernel of its own gets the definition.
library.impl("stacked", _stacked_reference, "CompositeExplicitAutograd")
library.impl("linear", _linear_reference, "CompositeExplicitAutograd")
library.impl("together", _together_reference, "CompositeExplicitAutograd")
library.impl("stacked_summary", _stacked_summary_reference, "CompositeExplicitAutograd")
library.impl("linear_summary", _linear_summary_reference, "CompositeExplicitAutograd")
library.impl("conv_summary", _conv_summary_reference, "CompositeExplicitAutograd")
library.impl("norm_sums", _norm_sums_reference, "CompositeExplicitAutograd")
library.impl("group_norm_backward", _group_norm_backward_reference, "CompositeExplicitAutograd")
library.impl("conv", _conv_reference, "CompositeExplicitAutograd")
library.impl(
    "embedding_contributions", _embedding_contributions_reference, "CompositeExplicitAutograd"
)
library.impl("embedding", _embedding_reference, "CompositeExplicitAutograd")
library.impl("shifted_cross_entropy", _shifted_cross_entropy_reference, "CompositeExplicitAutograd")
library.impl(
    "shifted_cross_entropy_grad", _shifted_cross_entropy_grad_reference, "CompositeExplicitAutograd"
)


def define_beside(op: str, backend: str, implementation: Callable) -> None:
    """Define the op `{op}_{backend}`, of the contract of `op`, for any device.

    implementation: takes what the op takes and returns what it returns.
    """
    name = f"{op}_{backend}"
    library.define(name + _SIGNATURES[op])
    torch.library.register_fake(f"htv::{name}", _fakes[op], lib=library)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    if op == "stacked":
        library.impl(name, _differentiable(name), "Autograd")


def takes_a_statistic(op: str) -> bool:
    """Tell whether an op is of a statistic, or of its summary."""
    return "int statistic" in _SIGNATURES[op]


def yields_a_summary(op: str) -> bool:
    """Tell whether an op yields what a statistic needs to know, in the place of its value."""
    return _SUMMARY in _SIGNATURES[op]


def groups_of(op: str, factors: tuple) -> int:
    """Return E of the arguments of an op up to the statistic's numbers."""
    if op in ("stacked", "stacked_summary"):
        return len(factors[0])
    return factors[4] if op == "embedding" else len(factors[2]) - 1


def transformed(tensor: torch.Tensor) -> bool:
    """Tell whether torch.func is at work, or a forward-mode derivative of the tensor is taken."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class _Stacked(torch.autograd.Function):
    """An implementation of `stacked`, differentiable any number of times by its definition."""

    @staticmethod
    def forward(ctx, operator, grads, statistic, *numbers):
        ctx.statistic = Statistic(statistics.by_number(statistic).name, *numbers)
        ctx.save_for_backward(grads)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(grads, statistic, *numbers)

    @staticmethod
    def backward(ctx, grad_value, grad_mask_sum):
        """Recompute the definition: one materialised pass over what is materialised anyway."""
        (grads,) = ctx.saved_tensors
        further = torch.is_grad_enabled()  # create_graph
        with torch.enable_grad():
            leaf = grads if further and grads.requires_grad else grads.detach().requires_grad_()
            outputs = reference.stacked(leaf, ctx.statistic)
            pairs = zip(outputs, (grad_value, grad_mask_sum), strict=True)
            pairs = [(o, g) for o, g in pairs if o.requires_grad]
            if not pairs:  # constant almost everywhere
                return None, torch.zeros_like(grads), *(None,) * 4
            values, given = zip(*pairs, strict=True)
            (grad,) = torch.autograd.grad(values, leaf, given, create_graph=further)
        return None, grad, *(None,) * 4


def _differentiable(op: str):
    operator = getattr(torch.ops.htv, op).default

    def autograd(grads, statistic, count, votes, k):
        if transformed(grads):  # plain PyTorch, which they all go through
            return reference.stacked(grads, checked(op, statistic, count, votes, k, len(grads)))
        if torch.is_grad_enabled() and grads.requires_grad:
            return _Stacked.apply(operator, grads, statistic, count, votes, k)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(grads, statistic, count, votes, k)

    return autograd


library.impl("stacked", _differentiable("stacked"), "Autograd")
