"""Every op's contract: name, schema, fake. Kernels only register themselves for what is declared here.

    stacked(grads, statistic, count, votes, k) -> (value, mask_sum)
        grads     (E, P) contiguous, float64 / float32 / bfloat16 / float16, E >= 1
        value     (P,) in `compute_dtype(grads)`; without the factor E, not normalised
        mask_sum  () float64, sum of the mask over coordinates, 0 for statistics without one
        Serves every statistic of `htv.ops.reference.STATISTICS`.

    linear(x, grad_output, offsets, statistic, count, votes, k) -> (value, mask_sum)
        x            (R, I) contiguous, the layer's input rows, ordered by group
        grad_output  (R, O) contiguous, same dtype as x
        offsets      (E + 1,) int64 on the CPU; group e owns rows offsets[e]:offsets[e + 1]
        value        (O, I) in `compute_dtype(x)`; E * stat of the contributions sum_r grad_output[r, o] * x[r, i]
        mask_sum     as above
        Kernels serve what `FUSED` says of their backend, CUDA's only groups of at most one row; the sliced path serves
        the rest.

    norm_sums(grad, x, mean, rstd) -> (scale, shift)
        grad, x       (S, T, D) contiguous, the same dtype: output gradient and input of a normalisation
        mean, rstd    (S, T) contiguous, in `compute_dtype(x)`: those of every row
        scale, shift  (S, D) in `compute_dtype(x)`; sums over T of grad * (x - mean) * rstd, and of grad

    group_norm_backward(grad, x, weight, mean, rstd, needs_x) -> (grad_x, scale, shift)
        grad, x       (S, C, *space) contiguous, the same dtype: output gradient and input of a group normalisation
        weight        (C,) contiguous, in `compute_dtype(x)`, as mean and rstd
        mean, rstd    (S, G) contiguous: of every group of C / G channels
        grad_x        (S, C, *space) in `compute_dtype(x)`; (0, C, *space) unless needs_x
        scale, shift  (S, C) in `compute_dtype(x)`; sums over space of grad * (x - mean) * rstd, and of grad

    conv(x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count, votes, k)
            -> (value, mask_sum)
        x            (S, C, *space) of a convolution's samples, ordered by group; dense, channels first or last
        grad_output  (S, O, *out_space), same dtype as x; dense, channels first or last
        offsets      (E + 1,) int64 on the CPU; group e owns samples offsets[e]:offsets[e + 1]
        kernel, stride, padding, dilation: one entry per spatial dim; groups: of the convolution
        value        (O, C / groups, *kernel) in `compute_dtype(x)`; E * stat of the contributions to the weight
        mask_sum     as above
        Serves what `linear` serves.

    embedding(grad_output, ids, voter, num_embeddings, groups, statistic, count, votes, k) -> (value, mask_sum)
        grad_output  (R, D) contiguous
        ids, voter   (R,) int64 contiguous: the row of the table that was looked up, and the group that did
        value        (num_embeddings, D) in `compute_dtype(grad_output)`; E * stat of the groups' contributions
        mask_sum     as above
        Kernels serve the statistics of `COUNTED`, Triton's all that `linear` has. An id outside of the table raises
        on the CPU; in Triton its row takes no part, for looking at ids would wait for the device.

    embedding_contributions(grad_output, ids, voter, tokens, num_embeddings, groups) -> contributions
        tokens         (N,) int64, in 0 to num_embeddings - 1; the others as for `embedding`
        contributions  (groups, N, D) in `compute_dtype(grad_output)`, to these rows of the table

    shifted_cross_entropy(logits, targets, shift, temperature, weight, ignore_index, label_smoothing)
            -> (loss, peak, log_sum)
        logits       (N, K), K >= 1, stride 1 along K
        targets      (N,) int64 contiguous: classes, or `ignore_index`. Any other value raises on the CPU; in Triton its
                     row's loss and gradient are NaN, for raising would wait for the device
        shift        (N, K) stride 1 along K; rows may be one and the same (stride 0). float64 if and only if the
                     logits are, else of any other floating-point type
        weight       (K,) contiguous in `compute_dtype(logits)`, or None
        loss         (N,) in `compute_dtype(logits)`, as peak and log_sum; see `htv.ops.reference`
    shifted_cross_entropy_grad(grad, logits, ..., label_smoothing, peak, log_sum) -> grad_logits
        grad         (N,) of the losses, in `compute_dtype(logits)`; any stride, 0 too
        grad_logits  (N, K) contiguous, in the type of logits

The Triton kernels' are the ops `stacked_triton`, `linear_triton` and so on, of the same contracts, for float32,
bfloat16 and float16: they share devices with the kernels above, and `htv.ops.backend` decides between them.

`statistic` is the `code` of a `htv.rules.Statistic`'s name; `count`, `votes` and `k` are its fields.
"""

from __future__ import annotations

import importlib

import torch

from htv.ops import reference
from htv.rules import Statistic

# Those that sum and votes decide.
COUNTED = ("mean", "and_mask", "xor_mask", "sign_sum")
_RANKED = ("median", "trimmed_mean", "winsorized_mean")
# The statistics of factors that each backend has a fused kernel for.
FUSED = {"cpp": (*COUNTED, "geometric_mean", "sand_mask", *_RANKED), "cuda": (*COUNTED, *_RANKED)}
FUSED["triton"] = (*FUSED["cpp"], "median_of_means")

_NAMES = tuple(reference.STATISTICS)  # csrc/statistic.h lists them in this order


def code(name: str) -> int:
    """The number by which kernels know a statistic."""
    return _NAMES.index(name)


def numbers(statistic: Statistic) -> tuple[int, int, float, float]:
    """A statistic as ops take it."""
    return code(statistic.name), statistic.count, statistic.votes, statistic.k


_NUMBERS = "int statistic, int count, float votes, float k"
_CROSS_ENTROPY = "Tensor logits, Tensor targets, Tensor shift, float temperature, Tensor? weight, int ignore_index"
_CROSS_ENTROPY += ", float label_smoothing"
_SIGNATURES = {
    "stacked": f"(Tensor grads, {_NUMBERS}) -> (Tensor, Tensor)",
    "linear": f"(Tensor x, Tensor grad_output, Tensor offsets, {_NUMBERS}) -> (Tensor, Tensor)",
    "norm_sums": "(Tensor grad, Tensor x, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    "group_norm_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool needs_x)"
    " -> (Tensor, Tensor, Tensor)",
    "conv": "(Tensor x, Tensor grad_output, Tensor offsets, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    f" int groups, {_NUMBERS}) -> (Tensor, Tensor)",
    "embedding": "(Tensor grad_output, Tensor ids, Tensor voter, int num_embeddings, int groups,"
    f" {_NUMBERS}) -> (Tensor, Tensor)",
    "embedding_contributions": "(Tensor grad_output, Tensor ids, Tensor voter, Tensor tokens, int num_embeddings,"
    " int groups) -> Tensor",
    "shifted_cross_entropy": f"({_CROSS_ENTROPY}) -> (Tensor, Tensor, Tensor)",
    "shifted_cross_entropy_grad": f"(Tensor grad, {_CROSS_ENTROPY}, Tensor peak, Tensor log_sum) -> Tensor",
}
OPS = tuple(_SIGNATURES)
_OF_A_STATISTIC = ("stacked", "linear", "conv", "embedding")
_OF_CROSS_ENTROPY = ("shifted_cross_entropy", "shifted_cross_entropy_grad")
TRITON = (*_OF_A_STATISTIC, "embedding_contributions", *_OF_CROSS_ENTROPY)  # ops that Triton has kernels for

library = torch.library.Library("htv", "DEF")
for _op, _signature in _SIGNATURES.items():
    library.define(_op + _signature)
for _op in TRITON:
    library.define(f"{_op}_triton{_SIGNATURES[_op]}")


@torch.library.register_fake("htv::stacked")
@torch.library.register_fake("htv::stacked_triton")
def _stacked_fake(grads, statistic, count, votes, k):
    value = grads.new_empty(grads.shape[1:], dtype=reference.compute_dtype(grads.dtype))
    return value, grads.new_empty((), dtype=torch.float64)


@torch.library.register_fake("htv::linear")
@torch.library.register_fake("htv::linear_triton")
def _linear_fake(x, grad_output, offsets, statistic, count, votes, k):
    shape = (grad_output.shape[1], x.shape[1])
    value = x.new_empty(shape, dtype=reference.compute_dtype(x.dtype))
    return value, x.new_empty((), dtype=torch.float64)


@torch.library.register_fake("htv::norm_sums")
def _norm_sums_fake(grad, x, mean, rstd):
    shape = (x.shape[0], x.shape[2])
    return mean.new_empty(shape), mean.new_empty(shape)


@torch.library.register_fake("htv::group_norm_backward")
def _group_norm_backward_fake(grad, x, weight, mean, rstd, needs_x):
    shape = x.shape[:2]
    return mean.new_empty(shape[0] if needs_x else 0, *x.shape[1:]), mean.new_empty(shape), mean.new_empty(shape)


@torch.library.register_fake("htv::conv")
@torch.library.register_fake("htv::conv_triton")
def _conv_fake(x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count, votes, k):
    shape = (grad_output.shape[1], x.shape[1] // groups, *kernel)
    value = x.new_empty(shape, dtype=reference.compute_dtype(x.dtype))
    return value, x.new_empty((), dtype=torch.float64)


@torch.library.register_fake("htv::embedding")
@torch.library.register_fake("htv::embedding_triton")
def _embedding_fake(grad_output, ids, voter, num_embeddings, groups, statistic, count, votes, k):
    shape = (num_embeddings, grad_output.shape[1])
    value = grad_output.new_empty(shape, dtype=reference.compute_dtype(grad_output.dtype))
    return value, grad_output.new_empty((), dtype=torch.float64)


@torch.library.register_fake("htv::embedding_contributions")
@torch.library.register_fake("htv::embedding_contributions_triton")
def _embedding_contributions_fake(grad_output, ids, voter, tokens, num_embeddings, groups):
    shape = (groups, tokens.shape[0], grad_output.shape[1])
    return grad_output.new_empty(shape, dtype=reference.compute_dtype(grad_output.dtype))


@torch.library.register_fake("htv::shifted_cross_entropy")
@torch.library.register_fake("htv::shifted_cross_entropy_triton")
def _shifted_cross_entropy_fake(logits, *numbers):
    rows = logits.shape[0]
    return tuple(logits.new_empty(rows, dtype=reference.compute_dtype(logits.dtype)) for _ in range(3))


@torch.library.register_fake("htv::shifted_cross_entropy_grad")
@torch.library.register_fake("htv::shifted_cross_entropy_grad_triton")
def _shifted_cross_entropy_grad_fake(grad, logits, *numbers):
    return logits.new_empty(logits.shape)


def _stacked_reference(grads, statistic, count, votes, k):
    return reference.stacked(grads, Statistic(_NAMES[statistic], count, votes, k))


def _linear_reference(x, grad_output, offsets, statistic, count, votes, k):
    return reference.linear(x, grad_output, offsets, Statistic(_NAMES[statistic], count, votes, k))


def _conv_reference(x, grad_output, offsets, kernel, stride, padding, dilation, groups, statistic, count, votes, k):
    geometry = (kernel, stride, padding, dilation, groups)
    return reference.conv(x, grad_output, offsets, geometry, Statistic(_NAMES[statistic], count, votes, k))


def _embedding_reference(grad_output, ids, voter, num_embeddings, groups, statistic, count, votes, k):
    resolved = Statistic(_NAMES[statistic], count, votes, k)
    return reference.embedding(grad_output, ids, voter, num_embeddings, groups, resolved)


# Any device without a kernel of its own gets the definition.
library.impl("stacked", _stacked_reference, "CompositeExplicitAutograd")
library.impl("linear", _linear_reference, "CompositeExplicitAutograd")
library.impl("norm_sums", reference.norm_sums, "CompositeExplicitAutograd")
library.impl("group_norm_backward", reference.group_norm_backward, "CompositeExplicitAutograd")
library.impl("conv", _conv_reference, "CompositeExplicitAutograd")
library.impl("embedding_contributions", reference.embedding_contributions, "CompositeExplicitAutograd")
library.impl("embedding", _embedding_reference, "CompositeExplicitAutograd")
library.impl("shifted_cross_entropy", reference.shifted_cross_entropy, "CompositeExplicitAutograd")
library.impl("shifted_cross_entropy_grad", reference.shifted_cross_entropy_grad, "CompositeExplicitAutograd")


def _triton_kernel(module: str, op: str, of_a_statistic: bool):
    def kernel(*arguments):
        if of_a_statistic:
            *factors, statistic, count, votes, k = arguments
            arguments = *factors, Statistic(_NAMES[statistic], count, votes, k)
        # At the first call: Triton may not be installed.
        return getattr(importlib.import_module(f"htv.triton_kernels.{module}"), op)(*arguments)

    return kernel


for _op in _OF_A_STATISTIC:
    library.impl(f"{_op}_triton", _triton_kernel(_op, _op, True), "CompositeExplicitAutograd")
library.impl(
    "embedding_contributions_triton",
    _triton_kernel("embedding", "embedding_contributions", False),
    "CompositeExplicitAutograd",
)
for _op in _OF_CROSS_ENTROPY:
    library.impl(f"{_op}_triton", _triton_kernel("cross_entropy", _op, False), "CompositeExplicitAutograd")


def _stacked_setup(ctx, inputs, output):
    grads, statistic, *numbers = inputs
    ctx.statistic = Statistic(_NAMES[statistic], *numbers)
    ctx.save_for_backward(grads)


def _stacked_backward(ctx, grad_value, grad_mask_sum):
    """Differentiate the definition; recomputing it costs one materialised pass over what is materialised anyway."""
    (grads,) = ctx.saved_tensors
    with torch.enable_grad():
        leaf = grads.detach().requires_grad_()
        outputs = reference.stacked(leaf, ctx.statistic)
        pairs = [(o, g) for o, g in zip(outputs, (grad_value, grad_mask_sum), strict=True) if o.requires_grad]
        if not pairs:
            return torch.zeros_like(grads), None, None, None, None
        (grad,) = torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])
    return grad, None, None, None, None


for _op in ("stacked", "stacked_triton"):
    torch.library.register_autograd(f"htv::{_op}", _stacked_backward, setup_context=_stacked_setup, lib=library)
