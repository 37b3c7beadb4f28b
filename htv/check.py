"""`htv.check`: does an attached model give what one group at a time gives?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htv.attach import RuleChoice, attach
from htv.errors import CheckError
from htv.groups import Groups
from htv.ops import functional, reference
from htv.rules import Rule

__all__ = ["CheckReport", "check", "one_group_at_a_time"]

SIGN_RULES = ("and_mask", "xor_mask", "geometric_mean", "sand_mask", "sign_sum")


@dataclass(frozen=True)
class CheckReport:
    """A passed check; true in a boolean context.

    parameters:  how many were compared.
    groups:      E.
    error:       largest difference, as a share of the largest contribution in the model.
    ambiguous:   share of coordinates left out because a contribution is rounding noise (its sign means nothing, as for
                 a key bias under softmax); only rules that look at signs leave any out.
    """

    parameters: int
    groups: int
    error: float
    ambiguous: float

    def __bool__(self) -> bool:
        return True


def one_group_at_a_time(loss_of_group, parameters: dict[str, Tensor], num_groups: int) -> dict[str, Tensor | None]:
    """The oracle: contributions by `num_groups` separate plain backwards.

    loss_of_group:  e -> the scalar part of the loss that belongs to group e.
    Returns name -> (E, *shape), or None where no group reached the parameter.
    """
    stacks: dict[str, list] = {name: [] for name in parameters}
    for e in range(num_groups):
        grads = torch.autograd.grad(loss_of_group(e), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            stacks[name].append(grad)
    return {
        name: None
        if all(g is None for g in grads)
        else torch.stack([torch.zeros_like(parameters[name]) if g is None else g for g in grads])
        for name, grads in stacks.items()
    }


def aggregated(contributions: Tensor, rule: Rule) -> Tensor:
    """E * stat of stacked contributions, by the reference."""
    statistic = rule.statistic(len(contributions))
    value, mask_sum = reference.stacked(contributions, statistic)
    return functional.normalise(value * len(contributions), mask_sum, statistic)


def check(
    model: nn.Module,
    batch,
    rule: RuleChoice,
    groups: Tensor | None = None,
    exclude: tuple[str, ...] | list[str] | str = (),
) -> CheckReport:
    """Compare an attached backward with plain backwards of one group at a time, on a float64 copy of the model.

    model:    not attached; it is copied and left as it is. Dropout is switched off in the copy.
    batch:    what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments. Tensors
              whose dim 0 is the batch's are cut into groups, others go to every group whole. Take a small one: the
              comparison stores all contributions, (E x parameters) in float64.
    rule, exclude:  as for `htv.attach`.
    groups:   (N,) integer ids of who votes together; default: each example.

    The loss is a fixed random projection of the outputs. Returns a `CheckReport`; raises `htv.CheckError` naming the
    first parameter that differs, ValueError if the model's examples are not separable at all (its plain gradient is
    not the sum of its groups' gradients), and whatever attaching and running the model raises.
    """
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    call = _Call(twin, batch)
    voters = Groups.each(call.size) if groups is None else Groups.by_id(groups, call.size)

    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with attach(twin, rule, exclude=exclude) as handle:
        rules = {served.name: served.rule for served in handle.served()}
        if groups is None:
            loss = call.loss()
        else:
            with handle.groups(groups):
                loss = call.loss()
        found = dict(zip(parameters, _gradients(loss, parameters), strict=True))

    plain = dict(zip(parameters, _gradients(call.loss(), parameters), strict=True))
    members = [voters.order[a:b] if voters.order is not None else torch.arange(a, b) for a, b in _bounds(voters)]
    contributions = one_group_at_a_time(lambda e: call.loss(members[e]), parameters, voters.count)
    noise, scale = _noise(contributions, plain)
    return _compare(found, plain, contributions, rules, noise, scale)


def _bounds(voters: Groups) -> Iterator[tuple[int, int]]:
    offsets = voters.offsets.tolist()
    return zip(offsets[:-1], offsets[1:], strict=True)


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)


class _Call:
    """A model and its arguments; `loss` projects its outputs on fixed random directions."""

    def __init__(self, model: nn.Module, batch):
        self.model = model
        to_double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        batch = pytree.tree_map(to_double, batch)
        self.args, self.kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
        if not isinstance(self.args, (tuple, list)):
            self.args = (self.args,)
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise ValueError("batch must hold at least one tensor with the batch in dim 0")
        self.size = len(tensors[0])
        self.directions: list[Tensor] = []

    def _outputs(self, rows: Tensor | None) -> list[Tensor]:
        def cut(value):
            is_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.size
            return value[rows] if is_batch and rows is not None else value

        args, kwargs = pytree.tree_map(cut, (tuple(self.args), self.kwargs))
        result = self.model(*args, **kwargs)
        size = self.size if rows is None else len(rows)
        leaves = pytree.tree_leaves(dict(result) if hasattr(result, "items") else result)
        return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad and t.dim() and len(t) == size]

    def loss(self, rows: Tensor | None = None) -> Tensor:
        """The scalar loss of some rows of the batch, or of all."""
        outputs = self._outputs(rows)
        if not outputs:
            raise ValueError(f"the model returned no differentiable tensor whose dim 0 is the batch's ({self.size})")
        if not self.directions:
            generator = torch.Generator().manual_seed(0)
            self.directions = [
                torch.randn(self.size, *o.shape[1:], generator=generator, dtype=torch.float64).to(o.device)
                for o in outputs
            ]
        directions = self.directions if rows is None else [d[rows] for d in self.directions]
        return torch.stack([(o * d).sum() for o, d in zip(outputs, directions, strict=True)]).sum()


def _noise(contributions: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> tuple[float, float]:
    """The rounding noise of this model's contributions, and their largest magnitude."""
    scale = max((c.abs().max().item() for c in contributions.values() if c is not None and c.numel()), default=0.0)
    noise = 1e-13 * scale
    for name, stacked in contributions.items():
        if stacked is None or not stacked.numel():
            continue
        gap = (stacked.sum(dim=0) - plain[name]).abs().max().item()
        if not gap <= 1e-4 * scale:
            raise ValueError(
                f"the plain gradient of parameter {name!r} is not the sum of its groups' gradients (they differ by "
                f"{gap:.2g}): the model couples the examples of a batch, or is random beyond its Dropout modules"
            )
        noise = max(noise, 8 * gap)
    return noise, scale


def _compare(found, plain, contributions, rules, noise: float, scale: float) -> CheckReport:
    worst = ambiguous = total = 0.0
    groups = next((len(c) for c in contributions.values() if c is not None), 0)
    for name, stacked in contributions.items():
        if (found[name] is None) != (stacked is None):
            raise CheckError(
                f"parameter {name!r} {'has no' if found[name] is None else 'has a'} gradient when attached, "
                f"but {'no group' if stacked is None else 'some group'} contributes to it"
            )
        if stacked is None or not stacked.numel():
            continue
        rule = rules.get(name)
        expected = plain[name] if rule is None else aggregated(stacked, rule)
        compared = torch.ones_like(expected, dtype=torch.bool)
        slack = 0.0
        if rule is not None and rule.statistic(groups).name in SIGN_RULES:
            compared = ~((stacked != 0) & (stacked.abs() <= noise)).any(dim=0)
            if rule.statistic(groups).normalise:  # signs left out still count in the kept fraction
                slack = (~compared).sum().item() / max(1, (compared & (expected != 0)).sum().item())
        error = (found[name] - expected).abs()
        budget = groups * noise + (1e-9 + slack) * expected.abs()
        wrong = compared & ~((error <= budget) | (found[name] == expected))
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise CheckError(
                f"parameter {name!r} differs from one group at a time under {rule or 'its plain gradient'}: "
                f"{int(wrong.sum())} of {wrong.numel()} coordinates, first at {at}: "
                f"{found[name][at].item():.9g} instead of {expected[at].item():.9g}"
            )
        if bool(compared.any()):
            worst = max(worst, error[compared].max().item())
        ambiguous += (~compared).sum().item()
        total += compared.numel()
    return CheckReport(len(contributions), groups, worst / scale if scale else 0.0, ambiguous / total if total else 0.0)
