"""How far rounding may take a statistic from its exact value: bounds from the data alone.

No error measured on the machine enters: an implementation that happens to be exact somewhere would
leave the others nothing.
"""

import torch

from htv.ops import reference, statistics


def growth(terms: int | torch.Tensor) -> torch.Tensor:
    """Return what rounding a sum of so many terms may cost, in eps * the sum of their magnitudes.

    Roundings are as good as random: they grow as the root of their number. eps is twice what one
    rounding may be.
    """
    return 8 + 2 * torch.as_tensor(terms, dtype=torch.float64).sqrt()


def statistic_budget(contributions, statistic, dtype, error=0.0):
    """Bound how far a statistic, without the factor E, may be from exact ones': (*shape) float64.

    contributions: (E, *shape) float64, exact; dtype: what is computed in; error: (E, *shape) or a
    number, how far those an implementation forms may be from them.

    A sum is rounded as if its terms were, and a logarithm by its own size. What that does to the
    value is the rule's own magnification of it: its derivative where it is smooth. An order
    statistic moves no more than the contribution that moves most.
    """
    eps, groups = torch.finfo(dtype).eps, len(contributions)
    exact = reference.stacked(contributions, statistic)[0].abs()
    least = 8 * eps * exact + torch.finfo(dtype).tiny
    moved = error + eps * growth(groups) * contributions.abs() + torch.finfo(dtype).tiny
    moved = moved.nan_to_num(0, 0)  # an infinite contribution is not rounded
    if not statistics.of(statistic.name).streams:
        return moved.amax(dim=0) + least
    if statistic.name == "geometric_mean":
        sizes = contributions.abs() + reference.LOG_OFFSET
        relative = error / sizes + eps * growth(groups) * (1 + sizes.log().abs()).nan_to_num(0, 0)
        total = contributions.sum(dim=0)
        in_doubt = (total.abs() <= moved.sum(dim=0)) & (total != 0)  # its sign
        return exact * relative.mean(dim=0) + 2 * exact * in_doubt + least
    leaf = contributions.detach().clone().requires_grad_()
    value = reference.stacked(leaf, statistic)[0]
    slope = torch.zeros_like(contributions)
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value.nan_to_num(0, 0, 0).sum(), leaf)
    return (slope.abs() * moved).nan_to_num(0).sum(dim=0) + least


def linear_budget(x, grad_output, offsets, statistic, dtype):
    """Bound what `linear` may lose, (O, I) float64, and tell where no sign is in doubt, (O, I).

    In doubt is a sign where rounding may change that of a contribution.
    """
    x, grad_output, bounds = x.double(), grad_output.double(), offsets.tolist()
    groups = [(grad_output[a:b], x[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    contributions = torch.stack([g.T @ rows for g, rows in groups])
    terms = torch.stack([growth(len(g)) * (g.abs().T @ rows.abs()) for g, rows in groups])
    error = torch.finfo(dtype).eps * terms
    # Sums may be taken over all groups at once.
    of_all = torch.finfo(dtype).eps * growth(len(x)) * (grad_output.abs().T @ x.abs())
    budget = len(groups) * statistic_budget(contributions, statistic, dtype, error)
    return budget + of_all, (contributions.abs() > 4 * error).all(dim=0)
