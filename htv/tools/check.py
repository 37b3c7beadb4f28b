"""`htv.check`: does an attached model give what one group at a time gives?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from htv.attach import RuleChoice, attach
from htv.engine.forward import parameter_names
from htv.engine.inputs import choose, named_tensors
from htv.errors import CheckError
from htv.groups import Groups
from htv.ops import functional, open_rules, reference, statistics
from htv.rules import Rule

__all__ = ["CheckReport", "check", "one_group_at_a_time"]

Contributions = dict[str, Tensor | None]  # by parameter; None where no group reached it
MOVES = 3  # how often rounding is drawn anew
EPSILON = {
    t: torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True)
class CheckReport:
    """Hold the numbers of a passed check; true in a boolean context.

    parameters:  how many were compared.
    groups:      E.
    error:       largest difference, as a share of the largest contribution in the model.
    ambiguous:   share of coordinates left out because a contribution is rounding noise (its sign
                 means nothing, as for a key bias under softmax); only rules that look at signs
                 leave any out, and those of your own.
    batch:       which argument was taken for the batch.

    >>> report = htv.check(torch.nn.Linear(3, 2), torch.randn(4, 3), htv.Median())
    >>> bool(report), report.parameters, report.groups, report.error < 1e-9
    (True, 2, 4, True)
    """

    parameters: int
    groups: int
    error: float
    ambiguous: float
    batch: str = ""

    def __bool__(self) -> bool:
        return True


def one_group_at_a_time(
    loss_of_group: Callable[[int], Tensor],
    parameters: dict[str, Tensor],
    num_groups: int,
) -> Contributions:
    """The oracle: contributions by `num_groups` separate plain backwards.

    loss_of_group:  e -> the scalar part of the loss that belongs to group e.
    Returns name -> (E, *shape), or None where no group reached the parameter.
    """
    stacks: dict[str, list[Tensor | None]] = {name: [] for name in parameters}
    for e in range(num_groups):
        grads = torch.autograd.grad(loss_of_group(e), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            stacks[name].append(grad)
    contributions: Contributions = {}
    for name, stack in stacks.items():
        if all(grad is None for grad in stack):
            contributions[name] = None
        else:
            zeros = torch.zeros_like(parameters[name])
            contributions[name] = torch.stack([zeros if g is None else g for g in stack])
    return contributions


def aggregated(contributions: Tensor, rule: Rule) -> Tensor:
    """E * stat of stacked contributions, by the reference or by the rule's own `reduce`."""
    statistic = statistics.resolve(rule, len(contributions))
    if statistic.reduce is not None:
        return open_rules.reduced(contributions.clone(), statistic) * len(contributions)
    value, mask_sum = reference.stacked(contributions, statistic)
    return functional.normalise(value * len(contributions), mask_sum, statistic)


def check(
    model: nn.Module,
    batch: Any,
    rule: RuleChoice,
    groups: Tensor | None = None,
    exclude: tuple[str, ...] | list[str] | str = (),
    dtype: torch.dtype = torch.float64,
    batch_dim: int = 0,
    batch_norm: str = "error",
    batch_argument: str | tuple[str, ...] | list[str] = (),
    allow_single: bool = False,
) -> CheckReport:
    """Compare an attached backward with plain backwards of one group at a time.

    Both are those of copies of the model. The loss is a fixed random projection of the outputs.

    model:           not attached; it is copied and left as it is. Dropout is switched off in the
                     copy.
    batch:           what the model is called with: a tensor, a tuple of positional or a dict of
                     keyword arguments. Tensors whose dim `batch_dim` is the batch's are cut into
                     groups, others go to every group whole. Take a small one: the comparison stores
                     all contributions, (E x parameters) in float64.
    rule:            as for `htv.attach`.
    groups:          (N,) integer ids of who votes together; default: each example.
    exclude:         as for `htv.attach`.
    dtype:           what the attached model computes in; the one-group-at-a-time gradients are
                     always those of a float64 copy of it. A lower type may differ by what rounding
                     explains: twice as much as plain backwards of one group at a time in that type
                     are off; where that does not explain it, also with parameters moved by their
                     own rounding, which shows where a kink (of a ReLU, say) is so near that it may
                     fall on either side.
    batch_dim:       as for `htv.attach`.
    batch_norm:      "error" or "frozen", as for `htv.attach`; with shared statistics no example has
                     a gradient of its own.
    batch_argument:  as `batch` of `htv.attach`.
    allow_single:    as for `htv.attach`.

    Returns a `CheckReport`. Raises `htv.CheckError` naming the first parameter that differs,
    ValueError if the model's examples are not separable at all (its plain gradient is not the sum
    of its groups' gradients), and whatever attaching and running the model raises.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    >>> htv.check(model, torch.randn(6, 3), htv.Median()).parameters
    4
    """
    if dtype not in EPSILON:
        raise ValueError(f"dtype must be one of {', '.join(map(str, EPSILON))}; got {dtype!r}")
    if batch_norm == "shared":
        raise ValueError(
            "batch_norm='shared' couples the examples: there is no gradient of one group to "
            "compare with"
        )
    twin = _cast(model, dtype)
    single, exact = _cast(twin, dtype, batch_norm), _cast(twin, torch.float64, batch_norm)
    if groups is not None:
        groups = torch.as_tensor(groups)
    wanted = (batch_argument,) if isinstance(batch_argument, str) else tuple(batch_argument)
    call = _Call(twin, batch, dtype, batch_dim, wanted, None if groups is None else len(groups))
    with attach(
        twin,
        rule,
        exclude,
        batch_dim=batch_dim,
        batch_norm=batch_norm,
        batch=wanted,
        allow_single=allow_single,
    ) as handle:
        rules = {tracked.name: tracked.rule for tracked in handle._session.tracked()}
        with handle.groups(groups) if groups is not None else nullcontext():
            loss = call.loss()
        found = _gradients(loss, _trained(twin))
    del loss

    plain, contributions = _one_by_one(exact, call, groups)
    if dtype == torch.float64:
        return replace(
            _compare(found, plain, contributions, [contributions], rules, 1e-9), batch=call.source
        )
    rounded = [_one_by_one(single, call, groups)[1]]
    try:
        report = _compare(found, plain, contributions, rounded, rules, 4 * EPSILON[dtype])
    except CheckError:  # or a kink is near
        rounded += [
            _one_by_one(_moved(single, dtype, seed), call, groups)[1] for seed in range(MOVES)
        ]
        report = _compare(found, plain, contributions, rounded, rules, 4 * EPSILON[dtype])
    return replace(report, batch=call.source)


def _cast(model: nn.Module, dtype: torch.dtype, batch_norm: str = "error") -> nn.Module:
    """A copy that computes in dtype, without dropout; with BatchNorms in eval mode where "frozen"
    says so.
    """
    twin = copy.deepcopy(model)
    twin._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and batch_norm == "frozen":
            module.eval()
    return twin


def _moved(model: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """A copy whose parameters are off by about one rounding each."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                sign = (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(
                    p.device, p.dtype
                )
                p.add_(p * sign, alpha=EPSILON[dtype])
    return twin


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: None if g is None else g.double() for name, g in zip(parameters, grads, strict=True)
    }


def _one_by_one(
    model: nn.Module,
    like: _Call,
    groups: Tensor | None,
) -> tuple[Contributions, Contributions]:
    """Gradients of a model that is not attached, in float64: of the whole batch, and (E, *shape) of
    each group.
    """
    call, parameters = like.to(model), _trained(model)
    grouped_rows = Groups.each(call.size) if groups is None else Groups.by_id(groups, call.size)
    order = torch.arange(call.size) if grouped_rows.order is None else grouped_rows.order.cpu()
    members = order.split(grouped_rows.offsets.diff().tolist())
    plain = _gradients(call.loss(), parameters)
    stacks = one_group_at_a_time(lambda e: call.loss(members[e]), parameters, grouped_rows.count)
    return plain, {name: None if c is None else c.double() for name, c in stacks.items()}


class _Call:
    """A model and its arguments in one dtype; `loss` projects its outputs on fixed random
    directions.

    Every call starts from the buffers the model came with: one forward may change them (a power
    iteration, say).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        dtype: torch.dtype,
        dim: int,
        wanted: tuple[str, ...],
        size: int | None,
    ):
        cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        batch = pytree.tree_map(cast, batch)
        self.args: Any = () if isinstance(batch, dict) else batch
        self.kwargs: dict[str, Any] = batch if isinstance(batch, dict) else {}
        if not isinstance(self.args, (tuple, list)):
            self.args = (self.args,)
        tensors = named_tensors(parameter_names(model.forward), tuple(self.args), self.kwargs)
        if not any(isinstance(t, Tensor) and t.dim() > dim for _, t in tensors):
            raise ValueError(f"batch must hold at least one tensor with the batch in dim {dim}")
        if any(isinstance(t, PackedSequence) for _, t in tensors):
            raise ValueError(
                "batch holds a PackedSequence, which check cannot cut by examples: pad it"
            )
        chosen = choose(tensors, dim, wanted, size, "each" if size is None else "ids")
        self.dim, self.size, self.source = dim, chosen.batch_size, chosen.source
        self.directions: list[
            tuple[int, Tensor]
        ] = []  # per output, and the dim that is the batch's
        self._run_with(model)

    def to(self, model: nn.Module) -> _Call:
        """The same call of a copy of the model in another dtype."""
        other = copy.copy(self)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
        cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        other.args, other.kwargs = pytree.tree_map(cast, (tuple(self.args), self.kwargs))
        other._run_with(model)
        return other

    def _run_with(self, model: nn.Module) -> None:
        self.model = model
        self._buffers = [(b, b.clone(), b._version) for b in model.buffers()]

    def _outputs(self, rows: Tensor | None) -> list[Tensor]:
        def cut(value: Any) -> Any:
            is_batch = (
                isinstance(value, Tensor)
                and value.dim() > self.dim
                and value.shape[self.dim] == self.size
            )
            return (
                value.index_select(self.dim, rows.to(value.device))
                if is_batch and rows is not None
                else value
            )

        args, kwargs = pytree.tree_map(cut, (tuple(self.args), self.kwargs))
        for buffer, saved, version in self._buffers:
            if buffer._version != version:
                buffer.data.copy_(saved)
        result = self.model(*args, **kwargs)
        size = self.size if rows is None else len(rows)
        leaves = pytree.tree_leaves(dict(result) if hasattr(result, "items") else result)
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        return [t for t in tensors if size in (t.shape[d] for d in {self.dim, 0} if d < t.dim())]

    def loss(self, rows: Tensor | None = None) -> Tensor:
        """The scalar loss of some rows of the batch, or of all (first, for its outputs tell the
        directions).
        """
        outputs = self._outputs(rows)
        if not outputs:
            raise ValueError(
                f"the model returned no differentiable tensor whose dim {self.dim} is the batch's "
                f"({self.size})"
            )
        if not self.directions:
            generator = torch.Generator().manual_seed(0)
            for o in outputs:
                dim = self.dim if o.dim() > self.dim and o.shape[self.dim] == self.size else 0
                drawn = torch.randn(o.shape, generator=generator, dtype=torch.float64)
                self.directions.append(
                    (dim, drawn.to(o.device, o.dtype).double())
                )  # exact in both types
        parts = []
        for o, (dim, direction) in zip(outputs, self.directions, strict=True):
            part = (
                direction
                if rows is None
                else direction.index_select(dim, rows.to(direction.device))
            )
            parts.append((o * part.to(o.dtype)).sum())
        return torch.stack([part.to(parts[0].dtype) for part in parts]).sum()


def _exact_noise(contributions: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> float:
    """The rounding noise of this model's contributions in float64."""
    scale = _scale(contributions)
    noise = 1e-13 * scale
    for name, stacked in contributions.items():
        if stacked is None or not stacked.numel():
            continue
        whole = plain[name]
        assert whole is not None  # some group reaches it
        gap = (stacked.sum(dim=0) - whole).abs().max().item()
        if not gap <= 1e-4 * scale:
            raise ValueError(
                f"the plain gradient of parameter {name!r} is not the sum of its groups' "
                f"gradients (they differ by {gap:.2g}): the model couples the examples of a "
                "batch, or is random beyond its Dropout modules"
            )
        noise = max(noise, 8 * gap)
    return noise


def _scale(contributions: dict[str, Tensor | None]) -> float:
    return max(
        (c.abs().max().item() for c in contributions.values() if c is not None and c.numel()),
        default=0.0,
    )


def _noise(stacked: Tensor, rounded: list[Tensor], exact: float) -> Tensor:
    """Twice what contributions to each coordinate are off by in a lower type, or what is usual in
    their tensor.
    """
    off = torch.stack([(low - stacked).abs().amax(dim=0) for low in rounded]).amax(dim=0)
    reached = (stacked != 0).any(dim=0)
    usual = off[reached].mean() if bool(reached.any()) else off.new_zeros(())
    return 2 * torch.where(reached, torch.maximum(off, usual), off) + exact


def _compare(
    found: dict[str, Any],
    plain: dict[str, Any],
    contributions: dict[str, Any],
    rounded: list[dict[str, Any]],
    rules: dict[str, Any],
    relative: float,
) -> CheckReport:
    """rounded: the contributions as computed one group at a time in the type of what was found,
    several times.
    """
    exact, scale = _exact_noise(contributions, plain), _scale(contributions)
    worst = ambiguous = total = 0.0
    groups = next((len(c) for c in contributions.values() if c is not None), 0)
    for name, stacked in contributions.items():
        if (found[name] is None) != (stacked is None):
            raise CheckError(
                f"parameter {name!r} {'has no' if found[name] is None else 'has a'} gradient when "
                f"attached, but {'no group' if stacked is None else 'some group'} contributes to "
                "it"
            )
        if stacked is None or not stacked.numel():
            continue
        rule, low = rules.get(name), [stacked if r[name] is None else r[name] for r in rounded]
        off = _noise(stacked, low, exact)
        expected = plain[name] if rule is None else aggregated(stacked, rule)
        compared = torch.ones_like(expected, dtype=torch.bool)
        budget = groups * off + relative * expected.abs()
        if relative > 1e-9:  # sums are taken in float32 at least
            budget = budget + 4 * EPSILON[torch.float32] * stacked.abs().sum(dim=0)
        by_sign, steep, normalised = _noticed(rule, groups)
        if by_sign:
            reached = torch.stack([stacked != 0, *(r != 0 for r in low)]).any(dim=0)
            compared = ~(reached & (stacked.abs() <= off)).any(dim=0)
            if normalised:  # signs left out still count in the kept fraction
                slack = (~compared).sum().item() / max(1, (compared & (expected != 0)).sum().item())
                budget = budget + slack * expected.abs()
        if (
            steep and rule is not None and rule.is_open
        ):  # zeros that are exact stay so: their sign would be no noise
            budget = budget + _sensitivity(stacked, off * reached, rule)
        elif steep and relative > 1e-9:
            budget = budget + _sensitivity(stacked, off, rule)
        error = (found[name] - expected).abs()
        wrong = compared & ~((error <= budget) | (found[name] == expected))
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise CheckError(
                f"parameter {name!r} differs from one group at a time under "
                f"{rule or 'its plain gradient'}: {int(wrong.sum())} of {wrong.numel()} "
                f"coordinates, first at {at}: {found[name][at].item():.9g} instead of "
                f"{expected[at].item():.9g}"
            )
        if bool(compared.any()):
            worst = max(worst, error[compared].max().item())
        ambiguous += (~compared).sum().item()
        total += compared.numel()
    return CheckReport(
        len(contributions),
        groups,
        worst / scale if scale else 0.0,
        ambiguous / total if total else 0.0,
    )


def _noticed(rule: Rule | None, groups: int) -> tuple[bool, bool, bool]:
    """Tell whether a rule looks at signs, may be steep, and normalises; one's own may do both."""
    if rule is None:
        return False, False, False
    statistic = statistics.resolve(rule, groups)
    if statistic.reduce is not None:
        return True, True, False
    definition = statistics.of(statistic.name)
    return definition.by_sign, definition.steep, statistic.normalise


def _sensitivity(stacked: Tensor, off: Tensor, rule: Any) -> Tensor:
    """How far noise in the contributions moves a rule that may magnify it, as far as a few draws
    tell.
    """
    generator = torch.Generator().manual_seed(0)
    expected, moved = aggregated(stacked, rule), torch.zeros_like(stacked[0])
    for _ in range(8):
        drawn = torch.randint(0, 2, stacked.shape, generator=generator).to(stacked) * 2 - 1
        moved = torch.maximum(moved, (aggregated(stacked + drawn * off, rule) - expected).abs())
    return 2 * moved
