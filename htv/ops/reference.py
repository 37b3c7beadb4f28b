"""What every statistic means, in plain PyTorch: the definition kernels are tested against, and the
path taken wherever no kernel serves. Runs on any device and in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.ops import statistics
from htv.ops.statistics import order, streaming
from htv.rules import Statistic

SAND_UNDEFINED = (
    1e-17  # the soft mask where variance and excess agreement are both 0, as its authors chose
)
LOG_OFFSET = 1e-10  # keeps the logarithm of the geometric mean finite


HALF = frozenset((torch.float16, torch.bfloat16))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half-precision values are computed and returned in float32, all others in their
    own type.
    """
    return torch.float32 if dtype in HALF else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the way through torch's dispatcher where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def stacked(grads: Tensor, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """The statistic of stacked contributions over dim 0.

    grads: (E, *shape), floating point, E >= 1. Returns ``value`` (*shape), in `compute_dtype`,
    without the factor E and not yet normalised; and ``mask_sum`` (), float64, the sum of the rule's
    mask over all coordinates (0 for rules without a mask). A coordinate with a NaN among its E
    values is NaN and counts 0 in `mask_sum`. So is one where inf - inf makes the mean of a bucket,
    or a variance, NaN: no rank and no mask hides it.
    """
    values = grads.to(compute_dtype(grads.dtype))
    definition = statistics.of(statistic.name)
    if definition.streams:
        return finish(Summary.of(values, statistic.name), statistic)
    return _finished(definition.function(values, statistic), None, values.isnan().any(dim=0))


@dataclass(frozen=True)
class Summary:
    """What streaming statistics need to know of the contributions of some groups; those of several
    batches add up.

    count:  how many groups.
    total:  (*shape), the sum of contributions.
    votes:  (*shape), the sum of their signs, in the same floating-point type; NaN where a
            contribution is NaN.
    spread: (*shape), the sum of squared deviations from the mean, where the statistic's `state`
            names it; else None.
    logs:   (*shape), the sum of logarithms of magnitudes, likewise.
    """

    count: int
    total: Tensor
    votes: Tensor
    spread: Tensor | None = None
    logs: Tensor | None = None

    @staticmethod
    def of(values: Tensor, name: str, log_offset: float = LOG_OFFSET) -> Summary:
        """Of stacked contributions (E, *shape), for the streaming statistic of this name.

        log_offset:  added to magnitudes before their logarithm is taken, in units of `values`.
        """
        state, spread, logs = statistics.of(name).state, None, None
        votes = torch.where(values.isnan().any(dim=0), torch.nan, values.sign().sum(dim=0))
        if "spread" in state:
            spread = (values - values.mean(dim=0)).square().sum(dim=0)
        if "logs" in state:
            logs = (values.abs() + log_offset).log().sum(dim=0)
        return Summary(len(values), values.sum(dim=0), votes, spread, logs)

    @staticmethod
    def of_fields(count: int, name: str, fields: Sequence[Tensor]) -> Summary:
        """Of what an op for summaries returned for the statistic of this name."""
        state, (total, votes, spread, logs) = statistics.of(name).state, fields
        return Summary(
            count,
            total,
            votes,
            spread if "spread" in state else None,
            logs if "logs" in state else None,
        )

    @staticmethod
    def of_zeros(count: int, like: Summary, log_offset: float = LOG_OFFSET) -> Summary:
        """Of that many groups that contribute nothing anywhere; `log_offset` as for `of`."""
        zeros = torch.zeros_like(like.total)
        logs = None if like.logs is None else torch.full_like(zeros, count * math.log(log_offset))
        return Summary(count, zeros, zeros, None if like.spread is None else zeros, logs)

    def __add__(self, other: Summary) -> Summary:
        count, spread, logs = self.count + other.count, None, None
        if self.spread is not None:
            apart = self.total / self.count - other.total / other.count
            spread = (
                self.spread + other.spread + apart.square() * (self.count * other.count / count)
            )
        if self.logs is not None:
            logs = self.logs + other.logs
        return Summary(count, self.total + other.total, self.votes + other.votes, spread, logs)

    def scaled(self, factor: float) -> Summary:
        """Of contributions times `factor` (> 0); logarithms were taken with the offset divided by
        it.
        """
        spread = None if self.spread is None else self.spread * factor**2
        logs = None if self.logs is None else self.logs + self.count * math.log(factor)
        return Summary(self.count, self.total * factor, self.votes, spread, logs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Summary:
        """The same with every tensor replaced by what a function makes of it."""
        fields = (self.total, self.votes, self.spread, self.logs)
        return Summary(self.count, *(None if t is None else function(t) for t in fields))

    @property
    def tensors(self) -> list[Tensor]:
        """Return the fields there are."""
        fields = (self.total, self.votes, self.spread, self.logs)
        return [field for field in fields if field is not None]


def finish(summary: Summary, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Return what `stacked` does, for a streaming statistic of all that a summary is of."""
    value, mask = statistics.of(statistic.name).function(summary, statistic)
    return _finished(value, mask, summary.votes.isnan())


def _finished(value: Tensor, mask: Tensor | None, has_nan: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.where(has_nan, torch.nan, value)
    if mask is None:
        return value, torch.zeros((), dtype=torch.float64, device=value.device)
    return value, mask.masked_fill(has_nan, 0).sum(dtype=torch.float64)


# -- the statistics --------------------------------------------------------------------------------
# Their numbers are those of csrc/statistic.h. What the decorators take: htv/ops/statistics.py.


def _agrees(votes: Tensor, statistic: Statistic) -> Tensor:
    return votes.abs() >= statistic.count


def _disagrees(votes: Tensor, statistic: Statistic) -> Tensor:
    return votes.abs() < statistic.count


@streaming("mean", number=0)
def _mean(s: Summary, statistic: Statistic):
    return s.total / s.count, None


@streaming("and_mask", number=1, mask_of_votes=_agrees, by_sign=True)
def _and_mask(s: Summary, statistic: Statistic):
    keep = _agrees(s.votes, statistic)
    return torch.where(keep, s.total / s.count, 0), keep


@streaming("xor_mask", number=2, mask_of_votes=_disagrees, by_sign=True)
def _xor_mask(s: Summary, statistic: Statistic):
    drop = _disagrees(s.votes, statistic)
    return torch.where(drop, s.total / s.count, 0), drop


@streaming(
    "geometric_mean",
    number=3,
    state=("logs",),
    mask_of_votes=_agrees,
    by_sign=True,
    steep=True,
)
def _geometric_mean(s: Summary, statistic: Statistic):
    keep = _agrees(s.votes, statistic)
    sign = torch.where(s.total.isnan(), s.total, s.total.sign())  # whose sign of NaN is 0
    return torch.where(keep, sign * (s.logs / s.count).exp(), 0), keep


@streaming("sand_mask", number=4, state=("spread",), masks=True, by_sign=True, steep=True, least=2)
def _sand_mask(s: Summary, statistic: Statistic):
    excess = (s.votes.abs() - statistic.votes) / s.count
    mask = torch.tanh(statistic.k / (s.spread / (s.count - 1)) * excess).clamp(min=0)
    lost = s.spread.isnan()  # by inf - inf
    mask = torch.where(mask.isnan(), torch.where(lost, torch.nan, SAND_UNDEFINED), mask)
    value = torch.where(mask == 0, 0, mask * s.total / s.count)
    return value, torch.where(lost, 0, mask)


@streaming("sign_sum", number=5, by_sign=True)
def _sign_sum(s: Summary, statistic: Statistic):
    return s.votes / s.count, None


@streaming("sign_agreement", number=6, by_sign=True)
def _sign_agreement(s: Summary, statistic: Statistic):
    return s.votes.abs() / s.count, None


def midpoint(lower: Tensor, higher: Tensor) -> Tensor:
    """(lower + higher) / 2 that neither overflows nor rounds when both are equal."""
    return torch.where(lower == higher, lower, 0.5 * lower + 0.5 * higher)


def _fewer_than_half(groups: int) -> tuple[int, int]:
    return 0, (groups - 1) // 2


def _per_side(statistic: Statistic, groups: int) -> int:
    return statistic.count


@order(
    "median",
    number=7,
    counts=lambda groups: (-1, 1),
    outvoted=lambda statistic, groups: (groups - 1) // 2,
)
def _median(values: Tensor, statistic: Statistic):
    ranked = values.sort(dim=0).values
    lower, higher = ranked[(len(values) - 1) // 2], ranked[len(values) // 2]
    if statistic.count == 0:
        return midpoint(lower, higher)
    return lower if statistic.count < 0 else higher


@order("trimmed_mean", number=8, counts=_fewer_than_half, outvoted=_per_side)
def _trimmed_mean(values: Tensor, statistic: Statistic):
    count = statistic.count
    return values.sort(dim=0).values[count : len(values) - count].mean(dim=0)


@order("winsorized_mean", number=9, counts=_fewer_than_half, outvoted=_per_side)
def _winsorized_mean(values: Tensor, statistic: Statistic):
    ranked = values.sort(dim=0).values
    low, high = ranked[statistic.count], ranked[len(values) - 1 - statistic.count]
    return torch.minimum(torch.maximum(ranked, low), high).mean(dim=0)


@order(
    "median_of_means",
    number=10,
    counts=lambda groups: (1, groups),
    outvoted=lambda statistic, groups: (statistic.count - 1) // 2,
    ranks_sums=True,
)
def _median_of_means(values: Tensor, statistic: Statistic):
    means = torch.stack([bucket.mean(dim=0) for bucket in values.tensor_split(statistic.count)])
    lost = means.isnan().any(dim=0)  # by inf - inf; NaN would rank last
    return torch.where(lost, torch.nan, _median(means, Statistic("median")))


def linear(
    x: Tensor, grad_output: Tensor, offsets: Tensor, statistic: Statistic
) -> tuple[Tensor, Tensor]:
    """The statistic of a linear layer's contributions by forming all of them: E x O x I memory, for
    tests.

    x: (R, I); grad_output: (R, O); offsets: (E + 1,) int64, rows of group e are
    offsets[e]:offsets[e + 1]. Returns what `stacked` returns for the (E, O, I) contributions, times
    E.
    """
    contributions = linear_contributions(x, grad_output, offsets)
    value, mask_sum = stacked(contributions, statistic)
    return value * len(contributions), mask_sum


def linear_contributions(x: Tensor, grad_output: Tensor, offsets: Tensor) -> Tensor:
    """Return (E, O, I), of the same arguments."""
    dtype = compute_dtype(torch.promote_types(x.dtype, grad_output.dtype))
    bounds = offsets.tolist()
    return torch.stack(
        [
            grad_output[a:b].to(dtype).t() @ x[a:b].to(dtype)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
    )


def embedding(
    grad_output: Tensor,
    ids: Tensor,
    group_index: Tensor,
    num_embeddings: int,
    groups: int,
    statistic: Statistic,
) -> tuple[Tensor, Tensor]:
    """The statistic of an embedding table's contributions by forming all of them: E x V x D memory,
    for tests.

    grad_output: (R, D); ids, voter: (R,) int64, the row of the table that was looked up, and the
    group that did. Returns what `stacked` returns for the (E, V, D) contributions, times E.
    """
    grad = grad_output.to(compute_dtype(grad_output.dtype))
    contributions = grad.new_zeros(groups, num_embeddings, grad.shape[1])
    value, mask_sum = stacked(
        contributions.index_put_((group_index, ids), grad, accumulate=True), statistic
    )
    return value * groups, mask_sum


def embedding_contributions(
    grad_output: Tensor,
    ids: Tensor,
    group_index: Tensor,
    tokens: Tensor,
    num_embeddings: int,
    groups: int,
) -> Tensor:
    """Return (groups, N, D), contributions to the rows `tokens` (N,) of an embedding table."""
    grad = grad_output.to(compute_dtype(grad_output.dtype))
    row, nth = (ids[:, None] == tokens).nonzero().unbind(1)
    contributions = grad.new_zeros(groups, len(tokens), grad.shape[1])
    return contributions.index_put_((group_index[row], nth), grad[row], accumulate=True)


def norm_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """What every sample contributes to the scale and the shift of a normalisation.

    grad and x: (S, T, D); mean and rstd: (S, T), of every row, in `compute_dtype`. Returns (S, D),
    (S, D) in `compute_dtype`: the sums over T of grad * (x - mean) * rstd, and of grad.
    """
    grad = grad.to(mean.dtype)
    x_hat = (x.to(mean.dtype) - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    return (grad * x_hat).sum(dim=1), grad.sum(dim=1)


def group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a group normalisation's input, and what every sample contributes to its scale
    and shift.

    grad and x: (S, C, *space); weight: (C,), mean and rstd: (S, G), in `compute_dtype`. Returns (S,
    C, *space), or (0, C, *space) unless needs_x; (S, C) and (S, C), as `norm_sums`; all in
    `compute_dtype`.
    """
    apart = mean.shape[1], x.shape[1] // mean.shape[1]
    flat = *x.shape[:2], math.prod(x.shape[2:])
    grad = grad.to(mean.dtype).reshape(flat).unflatten(1, apart)
    x_hat = (x.to(mean.dtype).reshape(flat).unflatten(1, apart) - mean[:, :, None, None]) * rstd[
        :, :, None, None
    ]
    scale, shift = (grad * x_hat).sum(dim=3).flatten(1), grad.sum(dim=3).flatten(1)
    if not needs_x:
        return mean.new_empty(0, *x.shape[1:]), scale, shift
    weighted = grad * weight.unflatten(0, apart)[..., None]
    along = (weighted * x_hat).mean(dim=(2, 3), keepdim=True)
    grad_x = (weighted - weighted.mean(dim=(2, 3), keepdim=True) - along * x_hat) * rstd[
        :, :, None, None
    ]
    return grad_x.reshape(x.shape), scale, shift


def conv(
    x: Tensor, grad_output: Tensor, offsets: Tensor, geometry: tuple, statistic: Statistic
) -> tuple[Tensor, Tensor]:
    """The same of a convolution's weight.

    x: (S, C, *space); grad_output: (S, O, *out_space); offsets: (E + 1,) int64, of samples;
    geometry: kernel, stride, padding and dilation, one entry per spatial dim each, and the number
    of the convolution's groups.
    """
    contributions = conv_contributions(x, grad_output, offsets, geometry)
    value, mask_sum = stacked(contributions, statistic)
    return value * len(contributions), mask_sum


def conv_contributions(x: Tensor, grad_output: Tensor, offsets: Tensor, geometry: tuple) -> Tensor:
    """Return (E, O, C / groups, *kernel), of the same arguments."""
    kernel, stride, padding, dilation, groups = geometry
    dtype = compute_dtype(x.dtype)
    x, grad_output, bounds = x.to(dtype), grad_output.to(dtype), offsets.tolist()
    weight = x.new_zeros(
        grad_output.shape[1], x.shape[1] // groups, *kernel
    )  # only its shape counts
    contributions = weight.repeat(len(bounds) - 1, *(1,) * weight.dim())
    for contribution, a, b in zip(contributions, bounds[:-1], bounds[1:], strict=True):
        if a < b and grad_output[a:b].numel() > 0:
            options = (
                stride,
                padding,
                dilation,
                False,
                [0] * len(kernel),
                groups,
                [False, True, False],
            )
            found = torch.ops.aten.convolution_backward(
                grad_output[a:b], x[a:b], weight, None, *options
            )
            contribution.copy_(found[1])
    return contributions


def shifted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shift: Tensor,
    temperature: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row's cross-entropy of ``z = logits + shift / temperature``, as F.cross_entropy's with
    reduction "none".

    logits, shift: (N, K), each of its own floating-point type; targets: (N,) int64; weight: (K,) in
    `compute_dtype`. Returns (N,), (N,), (N,) in `compute_dtype(logits)`: the loss; the largest z;
    and the logarithm of the sum of exp(z - largest). Of a row whose target is `ignore_index` all
    are 0.
    """
    z = _shifted(logits, shift, temperature)
    kept, classes = _classes(targets, ignore_index)
    peak = z.detach().amax(dim=1)  # cancels: as a constant, also from derivatives
    log_sum = (z - torch.where(peak == -math.inf, 0, peak).unsqueeze(1)).exp().sum(dim=1).log()
    surprise = (peak.unsqueeze(1) - z) + log_sum.unsqueeze(1)  # -log softmax(z)
    loss = surprise.gather(1, classes).squeeze(1)
    if weight is not None:
        loss = loss * weight[classes.squeeze(1)]
    if label_smoothing:
        everywhere = surprise if weight is None else surprise * weight
        loss = (1 - label_smoothing) * loss + label_smoothing / z.shape[1] * everywhere.sum(dim=1)
    return tuple(torch.where(kept, of_row, 0) for of_row in (loss, peak, log_sum))


def shifted_cross_entropy_grad(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    shift: Tensor,
    temperature: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    peak: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """The gradient by the logits, (N, K) in their type, from the losses' (N,) and what the forward
    returned.

    A row's is grad * (sum(target) * softmax(z) - target), where the target is ``1 -
    label_smoothing`` times the class's weight there, plus ``label_smoothing / K`` times the weights
    everywhere; exactly 0 where the row is ignored.
    """
    z = _shifted(logits, shift, temperature)
    kept, classes = _classes(targets, ignore_index)
    weight = z.new_ones(z.shape[1]) if weight is None else weight
    target = (label_smoothing / z.shape[1] * weight).expand_as(z)
    target = target.scatter_add(1, classes, (1 - label_smoothing) * weight[classes])
    softmax = ((z - peak.unsqueeze(1)) - log_sum.unsqueeze(1)).exp()
    by_row = grad.unsqueeze(1) * (target.sum(dim=1, keepdim=True) * softmax - target)
    return torch.where(kept.unsqueeze(1), by_row, 0).to(logits.dtype)


def _shifted(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    dtype = compute_dtype(logits.dtype)
    return logits.to(dtype) + shift.to(dtype) * (1 / temperature)


def _classes(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) which rows count, and (N, 1) their classes: 0 for the others."""
    kept = targets != ignore_index
    return kept, torch.where(kept, targets, 0).unsqueeze(1)
