"""What `Handle.stats` tells: how far the contributions to one parameter agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from htv.ops import aggregate, blocks, functional, reference, sliced, statistics
from htv.ops.factors import Factors
from htv.ops.reference import Summary
from htv.rules import Rule, Statistic


@dataclass(frozen=True)
class Agreement:
    """Tell how far the contributions to one parameter agreed in the last vote.

    `Handle.stats` returns one for each parameter. A vote is a backward, or all those that vote
    together: the micro-batches of a step, on all ranks.

    kept_fraction:   share of coordinates the rule's mask keeps; 1.0 for rules without a mask.
    mean_agreement:  |sum_e sign(c_e)| / E, averaged over the coordinates. NaN where ranks vote
                     together by a rule that needs no votes of theirs (`Mean`, or `MedianOfMeans`
                     with buckets of ranks): none are exchanged.
    m_coherence:     ||sum_e c_e||^2 / sum_e ||c_e||^2: 1 for orthogonal groups of equal norm, E for
                     identical ones, NaN where every contribution is zero.
    noise_scale:     the trace of the contributions' covariance over the squared norm of their mean,
                     both estimated without bias from E groups: about how many groups a batch needs
                     for signal and noise to be of one size. Infinite where no signal is seen, NaN
                     for one group.

    All are NaN for a parameter without coordinates.

    Chatterjee and Zielinski 2020, "Making coherence out of nothing at all", arXiv 2008.01217;
    McCandlish et al. 2018, "An empirical model of large-batch training", arXiv 1812.06162.

    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> with htv.attach(model, htv.AndMask(1.0), stats=True) as handle:
    ...     model(x).sum().backward()
    ...     handle.stats()["weight"]
    Agreement(kept_fraction=0.5, mean_agreement=0.5, m_coherence=1.0, noise_scale=inf)
    """

    kept_fraction: float
    mean_agreement: float
    m_coherence: float
    noise_scale: float


def noise_scale(m_coherence: float, count: int) -> float:
    """Return the gradient noise scale of `count` groups whose m-coherence is known.

    With T = ||sum c||^2 and Q = sum ||c||^2, the trace is estimated by (Q - T / E) / (E - 1) and
    the squared norm by (T - Q) / (E (E - 1)): their ratio depends on T / Q and E alone.
    """
    if math.isnan(m_coherence) or count < 2:
        return math.nan
    if m_coherence <= 1:
        return math.inf
    return max(count - m_coherence, 0.0) / (m_coherence - 1)


@dataclass(frozen=True)
class AgreementSums:
    """Sums over coordinates from which an `Agreement` follows. Those of other coordinates of the
    same groups add up.

    agreeing:      |votes|; NaN where they are not known.
    kept:          the rule's mask.
    total_energy:  the square of the sum of contributions.
    energy:        the squares of contributions.

    Each is a number, or a tensor of one, which nobody waits for until it is asked for.
    """

    agreeing: float | Tensor
    kept: float | Tensor
    total_energy: float | Tensor
    energy: float | Tensor

    def agreement(self, count: int, coordinates: int) -> Agreement:
        """Return what follows for `count` groups and so many coordinates in all."""
        if coordinates == 0:
            return Agreement(math.nan, math.nan, math.nan, math.nan)
        energy = float(self.energy)
        coherence = float(self.total_energy) / energy if energy > 0 else math.nan
        return Agreement(
            float(self.kept) / coordinates,
            float(self.agreeing) / (count * coordinates),
            coherence,
            noise_scale(coherence, count),
        )


def agreement(parts: list[Factors], rule: Rule) -> Agreement:
    """`Agreement` of contributions that are the sums of the parts'."""
    first = parts[0]
    return agreement_sums(parts, rule).agreement(first.count, math.prod(first.shape))


def agreement_sums(parts: list[Factors], rule: Rule) -> AgreementSums:
    """`AgreementSums` of contributions that are the sums of the parts'.

    Votes, sum and norms each come from where they are cheapest, as long as no block of the
    parameter has uses of several kinds; else one sliced pass gives all.
    """
    first = parts[0]
    blocks.require_same_groups(parts)
    if math.prod(first.shape) == 0:
        return AgreementSums(0.0, 0.0, 0.0, 0.0)
    statistic = statistics.resolve(rule, first.count)
    apart = [blocks.joined(block) for block in blocks.blocks(parts)]
    tally = _tally_apart if all(len(block) == 1 for block in apart) else _tally_sliced
    return AgreementSums(*tally(parts, apart, statistic))


def sums_of_summary(
    summary: Summary, statistic: Statistic, energy: float | Tensor
) -> AgreementSums:
    """`AgreementSums` of what streaming statistics know of contributions, those of several batches
    or ranks perhaps.

    statistic:  of as many groups as the summary has; of an order statistic, whose mask keeps all.
    energy:     the squares of the contributions.
    """
    votes = summary.votes.abs()
    kept: float | Tensor
    if not _masks(statistic):
        kept = float(votes.numel())
    elif (mask_of_votes := statistics.of(statistic.name).mask_of_votes) is not None:
        kept = mask_of_votes(votes, statistic).sum()
    else:
        kept = reference.finish(summary, statistic)[1]
    agreeing = votes.nan_to_num(0).sum(dtype=torch.float64)  # a NaN agrees with nothing
    return AgreementSums(agreeing, kept, summary.total.double().square().sum(), energy)


def squared_norms(parts: list[Factors]) -> Tensor:
    """(E,) float64, the squared norms of contributions that are the sums of the parts'."""
    if math.prod(parts[0].shape) == 0:
        return torch.zeros(parts[0].count, dtype=torch.float64, device=parts[0].device)
    blocks.require_same_groups(parts)
    apart = [blocks.joined(block) for block in blocks.blocks(parts)]
    if all(len(block) == 1 for block in apart):
        return sum(block[0].squared_norms() for block in apart)
    joined = blocks.joined(parts)
    return sum(box.flatten(1).double().square().sum(dim=1) for _, _, box in sliced.slices(joined))


def projections(parts: list[Factors], direction: Tensor) -> Tensor:
    """(E,) float64, the inner products of such contributions with a direction of the parameter's
    shape.
    """
    blocks.require_same_groups(parts)
    return sum(part.projections(direction.to(part.dtype)) for part in parts)


def _masks(statistic: Statistic) -> bool:
    return statistic.reduce is None and statistics.of(statistic.name).masks


def _tally_apart(
    parts: list[Factors], apart: list[list[Factors]], statistic: Statistic
) -> tuple[float, float, float, float]:
    """Sums over coordinates: |votes|, mask, squared sum of contributions, squared contributions."""
    votes = aggregate.by_blocks(parts, Statistic("sign_sum"))[0].abs()
    if not _masks(statistic):
        kept = votes.numel()
    elif (mask_of_votes := statistics.of(statistic.name).mask_of_votes) is not None:
        kept = mask_of_votes(votes, statistic).sum().item()
    else:
        kept = aggregate.by_blocks(parts, statistic)[1].item()
    agreeing = votes.nan_to_num_(0).sum(dtype=torch.float64).item()  # a NaN agrees with nothing
    del votes
    total_energy = sum(block[0].total().double().square().sum().item() for block in apart)
    energy = sum(block[0].squared_norms().sum().item() for block in apart)
    return agreeing, kept, total_energy, energy


def _tally_sliced(
    parts: list[Factors], apart: list[list[Factors]], statistic: Statistic
) -> tuple[float, float, float, float]:
    """The same from one pass over the contributions."""
    agreeing = kept = total_energy = energy = 0.0
    for _, _, box in sliced.slices(blocks.joined(parts)):
        contributions = box.flatten(1)
        votes = functional.stacked(contributions, Statistic("sign_sum"))[0] * len(contributions)
        agreeing += votes.abs().nan_to_num(0).sum(dtype=torch.float64).item()
        wide = contributions.double()
        energy += wide.square().sum().item()
        total_energy += wide.sum(dim=0).square().sum().item()
        if _masks(statistic):
            kept += functional.stacked(contributions, statistic)[1].item()
        else:
            kept += contributions.shape[1]
    return agreeing, kept, total_energy, energy
