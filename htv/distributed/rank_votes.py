"""One vote of several ranks: what every way of training on several ranks has in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from htv.autograd.tally import Counts, PlainSum, Tally, of_sums
from htv.distributed.agreements import SharedAgreements
from htv.distributed.bucket_means import BucketMeans
from htv.distributed.factor_exchange import FactorExchange
from htv.distributed.reduction import Field, by_votes_alone
from htv.distributed.rounds import Rounds, buckets_per_rank, refuse_rules, require_same
from htv.engine.parameter import TrackedParameter
from htv.engine.session import Session
from htv.ops.agreement import AgreementSums
from htv.rules import Mean, Rule

__all__ = ["LocalVotes", "RankVotes", "session_of"]


class RankVotes:
    """Has the contributions of one model's parameters gathered for a vote of all ranks.

    session:   of the model.
    group:     the ranks that vote together.
    vote:      "examples", "ranks".
    fraction:  what the ranks' reduction multiplies sums by: 1 / ranks where it averages.
    where:     what backwards are inside of, for messages.
    """

    sums_stay = False  # whether .grad holds the sums of micro-batches until the ranks meet

    def __init__(
        self, session: Session, group: ProcessGroup, vote: str, fraction: float, where: str
    ):
        self.session, self.fraction = session, fraction
        self.rounds = Rounds(session, group, vote, where, self.pass_ended)
        refuse_rules(self.rounds)
        require_same(self.rounds)
        # The gradients that the last backward left, with torch's count of their changes.
        self._left: list[tuple[TrackedParameter, weakref.ref[Tensor], int]] = []
        # What `Handle.stats` will tell of the round under way, if it was asked for.
        self.agreements = self._new_agreements()

    def _new_agreements(self) -> SharedAgreements | None:
        if not self.session.settings.stats:
            return None
        return SharedAgreements(self.session.tracked())

    def begin(self) -> None:
        """Gather contributions from now on."""
        for tracked in self.session.tracked():
            tracked.gathering = self.gathering_of(tracked)
            tracked.gathering.stays = self.sums_stay
        self.session.joint.over_ranks(self)
        self.session.joint.guard.put_on(self.session.model)

    def end(self) -> None:
        """Gather no more."""
        for tracked in self.session.tracked():
            tracked.gathering = None
        self.session.joint.over_ranks(None)
        self.session.joint.guard.take_off()

    def gathering_of(self, tracked: TrackedParameter) -> PlainSum:
        """Return what takes the contributions of a parameter."""
        found = self._gathering_of(tracked)
        found.observes = self.agreements is not None and self.rounds.vote == "examples"
        return found

    def _gathering_of(self, tracked: TrackedParameter) -> PlainSum:
        rule, rounds = tracked.rule, self.rounds
        held = self.held_by(tracked)
        if type(rule) is Mean or rounds.vote == "ranks":
            return PlainSum(tracked.name, rounds.batches, held)
        if not rule.streaming:
            buckets = self.buckets_of(rule)
            if buckets == 1:
                return PlainSum(tracked.name, rounds.batches, held)
            if buckets:
                return BucketMeans(tracked.name, rounds.batches, held, buckets)
            return FactorExchange(tracked.name, rounds, held, rule, self.require_meeting)
        return Tally(tracked.name, rounds.batches, held, rule, self.fraction)

    def buckets_of(self, rule: Rule) -> int:
        """Return how many sums of each rank are ranked under an order rule; 0 for none, where
        what layers recorded is exchanged.
        """
        return buckets_per_rank(rule, self.rounds)

    def held_by(self, tracked: TrackedParameter) -> Callable[[], Tensor | None]:
        """Return what returns the gradient that a parameter holds."""
        return lambda: tracked.parameter.grad

    def waiting_backwards(self) -> int:
        """Return how many backwards of this rank have left contributions for a vote to come."""
        return len(self.rounds.batches)

    def require_met(self) -> None:
        """Raise RuntimeError where contributions wait for a backward in which ranks meet."""
        count = self.waiting_backwards()
        if count:
            raise RuntimeError(
                f"backwards {self.rounds.batches.where} wait for one in which the ranks meet "
                f"({count} so far): .grad holds plain sums of this rank. Remedy: leave "
                "no_sync() (or set_requires_gradient_sync(True)) for the last micro-batch of a step"
            )

    def require_meeting(self) -> None:
        """Raise where the backward under way is not one in which the ranks meet."""

    def pass_ended(self) -> None:
        """Be told that a backward pass came to its end."""

    def remember_sums(self) -> None:
        """Remember which gradients the backward that ends has left to wait for a vote."""
        self._left = []
        if not self.rounds.batches:
            return
        for tracked in self.session.tracked():
            held = tracked.parameter.grad
            if held is not None and tracked.gathering.came:
                self._left.append((tracked, weakref.ref(held), held._version))

    def drop_zeroed(self) -> None:
        """Where zero_grad() dropped the sums that wait for a vote, drop their votes as well.

        Raises RuntimeError where some of them were changed otherwise since the last backward.
        """
        if not self._left or self.rounds.batches.unfinished:
            return
        changed = [
            tracked
            for tracked, left, version in self._left
            if (held := tracked.parameter.grad) is None
            or held is not left()
            or held._version != version
        ]
        if not changed:
            return
        held_now = [tracked.parameter.grad for tracked, _, _ in self._left]
        if any(held is not None and bool((held != 0).any()) for held in held_now):
            raise RuntimeError(
                f".grad of {changed[0].name!r} was changed while sums and votes of "
                f"{len(self.rounds.batches)} backward(s) wait there for the ranks to meet. Remedy: "
                "zero_grad() of the whole model, which drops them, or leave .grad as it is until "
                "the ranks have met"
            )
        self._left = []
        self.rounds.batches.clear()
        for tracked in self.session.tracked():
            tracked.gathering.clear()

    def rule_of_votes(self, tracked: TrackedParameter | None) -> Rule | None:
        """Return the rule that sums and votes are put through when ranks meet, or None where the
        sum is the gradient.
        """
        if tracked is None or type(tracked.rule) is Mean:
            return None
        return tracked.rule if tracked.rule.streaming else None

    def rule_of_ranks(self, tracked: TrackedParameter | None) -> Rule | None:
        """Return the order rule that ranks' sums are put through when they meet, or None."""
        if tracked is None or tracked.rule.streaming:
            return None
        return tracked.rule if self.buckets_of(tracked.rule) else None

    def masks_suffice(self, fields: Sequence[Field]) -> bool:
        """Tell whether all that ranks need of each other, beside the sums of a buffer with such
        `fields`, is which of them are kept.
        """
        rules = [field.rule for field in fields if field.rule is not None]
        if self.agreements is not None or self.rounds.size == 1:
            return False
        return bool(rules) and all(map(by_votes_alone, rules))

    def counts_of(self, tracked: TrackedParameter, sums: Tensor) -> Counts | None:
        """Return what this rank has to say of a parameter, beside its `sums`; None for nothing."""
        own = self.rounds.called().counts[self.rounds.rank]
        if self.rounds.vote == "ranks":
            return of_sums(sums, tracked.rule, self.fraction) if own else None
        return tracked.gathering.counts(self.rounds.waiting, sums)

    def is_told_by_sums(self, tracked: TrackedParameter) -> bool:
        """Tell whether sums and votes of all ranks say how far contributions agree."""
        exchanged = isinstance(self.counted(tracked), FactorExchange)
        return not exchanged and self.rule_of_ranks(tracked) is None

    def observe_sums(self, sums: Iterable[tuple[TrackedParameter, Tensor]]) -> None:
        """Note what ranks are about to meet over, for `Handle.stats`: parameters, each with this
        rank's sum.
        """
        for tracked, own in sums:
            gathering = self.counted(tracked)
            if not isinstance(gathering, FactorExchange) or gathering.came:
                self.agreements.meet(tracked)
            if self.rounds.vote == "ranks":  # the sum is the rank's contribution
                energy = own.double().square().sum()
                self.agreements.add(tracked, AgreementSums(0.0, 0.0, 0.0, energy))

    def counted(self, tracked: TrackedParameter) -> PlainSum:
        """Return what counts the votes of a parameter."""
        return tracked.gathering

    def own_agreements(self, device: torch.device) -> Tensor | None:
        """Return what ranks are to sum, in place, when they have met over all parameters, for
        `Handle.stats`; None if nobody asked for it.
        """
        if self.agreements is None:
            return None
        if self.rounds.vote != "ranks":  # else the contributions are ranks' sums
            for tracked in self.session.tracked():
                self.agreements.add(tracked, self.counted(tracked).agreement_sums())
        return self.agreements.parts(device)

    def tell(self, agreements: Tensor | None) -> None:
        """Let parameters tell how far contributions agree in the round that ends.

        agreements:  what `own_agreements` returned, which may be about to be summed.
        """
        if agreements is not None:
            self.agreements.tell(agreements, self.rounds.called().count)
            self.agreements = self._new_agreements()

    def met(self, agreements: Tensor | None) -> None:
        """End the round: the ranks have met over all parameters.

        agreements:  as for `tell`.
        """
        self.tell(agreements)
        self._left = []
        self.rounds.end()
        for tracked in self.session.tracked():
            tracked.gathering.clear()


class LocalVotes:
    """Leaves each rank's groups to vote alone, as the user said aloud."""

    gathers = False

    def __init__(self, session: Session):
        self.session = session

    def begin(self) -> None:
        """Let forwards of several ranks pass."""
        self.session.joint.over_ranks(self)

    def end(self) -> None:
        """Refuse them again."""
        self.session.joint.over_ranks(None)

    def require_covered(self, module: nn.Module) -> None:
        """Any forward will do."""

    def waiting_backwards(self) -> int:
        """Every backward is a vote of its own."""
        return 0

    def require_met(self) -> None:
        """Every backward is a vote of its own."""


def session_of(handle: object) -> Session:
    """Return the session of a handle. Raises TypeError for anything else, RuntimeError once it is
    detached, or in the middle of `accumulate()`, whose end would drop what ranks gather.
    """
    session = getattr(handle, "_session", None)
    if not isinstance(session, Session):
        raise TypeError(f"handle must be what htv.attach returned, got {type(handle).__name__}")
    session.require_attached("htv.distributed")
    if session.joint.accumulates:
        raise RuntimeError(
            "htv.distributed inside handle.accumulate(): the block would end what the ranks "
            "gather. Remedy: call it once, before training, outside of any block"
        )
    return session
