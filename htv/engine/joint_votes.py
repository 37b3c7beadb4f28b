"""Votes over more than one backward: micro-batches of accumulate(), and the ranks of a job."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from htv.autograd.accumulation import MicroBatches, refuse_unless_streaming
from htv.engine import ranks
from htv.engine.checkpointing import in_backward
from htv.engine.forward import ForwardStandIn
from htv.engine.protocols import GroupVotesLike, RankVotesLike, VotingSession
from htv.engine.unfinished import UnfinishedVoteGuard
from htv.errors import UnsupportedError

__all__ = ["JointVotes"]


class JointVotes:
    """Has the groups of several backwards of one session vote together.

    accumulates:  whether a block of accumulate() is open.
    later:        whether rules are applied after the backward: in accumulate(), or where ranks
                  meet.
    in_pipeline:  whether a schedule's micro-batches vote together.
    of_ranks:     what brings the ranks together in a backward (`htv.distributed.ddp`, `fsdp`), or
                  None.
    of_group:     what does so at the end of accumulate() (`htv.attach(process_group=)`), or None.
    guard:        against state_dict() before the vote.
    """

    def __init__(self, session: VotingSession):
        self._reference = weakref.ref(session)  # a detached session is freed at once
        self.accumulates = self.later = self.in_pipeline = False
        self._batches = MicroBatches()  # of the accumulation under way
        self.guard = UnfinishedVoteGuard(self.waiting_backwards)
        self.of_ranks: RankVotesLike | None = None
        self.of_group: GroupVotesLike | None = None
        self._told_of_ranks = False

    @property
    def _session(self) -> VotingSession:
        return self._reference()

    def over_ranks(self, of_ranks: RankVotesLike | None) -> None:
        """Let `of_ranks` bring the ranks together from now on; None: nobody."""
        self.of_ranks = of_ranks
        self.later = of_ranks is not None and of_ranks.gathers

    def end(self) -> None:
        """Let nobody bring ranks together any more: the session ends."""
        if self.of_ranks is not None:
            self.of_ranks.end()

    # -- micro-batches ----------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, fraction: float = 1.0) -> Iterator[None]:
        """See `Handle.accumulate`.

        fraction:  what contributions are multiplied by.
        """
        session = self._session  # and keep it to the block's end
        if self.accumulates:
            raise RuntimeError("accumulate() blocks cannot be nested")
        self._refuse_to_accumulate()
        try:
            self.accumulates = self.later = True
            self.guard.put_on(session.model)
            self._begin(fraction)
            yield
            if session.attached and self._waiting():
                self._vote(fraction)
        finally:
            self.accumulates = self.later = False
            self.guard.take_off()
            if self.of_group is not None:
                self.of_group.end()
            for tracked in session.tracked():
                tracked.accumulate(None)

    def finish(self) -> None:
        """See `Handle.finish`."""
        if self.of_ranks is not None:
            self.of_ranks.require_met()
        elif not self.accumulates:
            raise RuntimeError(
                "finish() outside accumulate(): nothing waits for a vote, for the end of a block, "
                "or every backward, has put its aggregate into .grad already. Remedy: with "
                "handle.accumulate(): around the loop"
            )
        elif self._waiting():
            self._vote()

    def waiting_backwards(self) -> int:
        """Return how many backwards of this rank have left contributions for a vote to come."""
        votes = self.of_ranks if self.of_ranks is not None else self.of_group
        if votes is not None:
            return votes.waiting_backwards()
        return len(self._batches) if self.accumulates else 0

    def _refuse_to_accumulate(self) -> None:
        if self.of_ranks is not None:
            raise UnsupportedError(
                "accumulate() where ranks vote together by htv.distributed.ddp or fsdp: the "
                "backward in which ranks meet ends a vote there. Remedy: no_sync() of "
                "DistributedDataParallel, or set_requires_gradient_sync(False) of FSDP2, for all "
                "micro-batches but the last"
            )
        if ranks.world_size() > 1 and self.of_group is None and not self.in_pipeline:
            raise UnsupportedError(
                f"accumulate() with {ranks.world_size()} ranks: each rank would put its own "
                "aggregate into .grad, and the ranks' parameters would drift apart. Remedy: "
                "htv.attach(..., process_group=torch.distributed.group.WORLD), so that all ranks "
                "vote together, or DistributedDataParallel with htv.distributed.ddp"
            )
        if self.of_group is None:
            for tracked in self._session.tracked():
                refuse_unless_streaming(tracked.rule, tracked.name)

    def _begin(self, fraction: float = 1.0) -> None:
        """Gather contributions for the next vote of an accumulation."""
        self._batches = MicroBatches()
        if self.of_group is not None:
            self.of_group.begin()
            return
        for tracked in self._session.tracked():
            tracked.accumulate(self._batches, fraction, self._session.settings.stats)

    def _waiting(self) -> bool:
        """Tell whether anything was gathered since the last vote of an accumulation, on any
        rank.
        """
        if self.of_group is not None:
            return self.of_group.waiting()
        return len(self._batches) > 0

    def _vote(self, fraction: float = 1.0) -> None:
        """Apply the rules to what an accumulation gathered."""
        if self.of_group is not None:
            found = self.of_group.results()
        else:
            found = self._aggregated()
        for tracked, grad in found:
            tracked.add_accumulated(grad)
        if self.of_group is None:
            self._begin(fraction)

    def _aggregated(self) -> list:
        """Return (tracked parameter, its aggregated gradient or None) of all micro-batches."""
        self._batches.require_complete()
        everything = "all micro-batches of accumulate() together"
        self._session.require_several(self._batches.count, everything)
        with torch.no_grad():
            found = [(t, t.gathering.result()) for t in self._session.tracked()]
            for tracked, _ in found:
                tracked.measure(tracked.gathering.agreement_sums(), self._batches.count)
        return found

    # -- ranks ------------------------------------------------------------------------------------

    def check_ranks(self, forward: ForwardStandIn) -> None:
        """Refuse a `forward` whose votes the ranks would not bring together as they should."""
        if in_backward():  # a checkpoint's part: the forward that it is part of was looked at
            return
        if self.of_ranks is not None:
            self.of_ranks.require_covered(forward.module)
        elif self.of_group is not None:
            if not self.accumulates:
                raise RuntimeError(
                    "the model was attached with process_group, and ranks meet where accumulate() "
                    "ends: a backward outside would leave each rank its own vote. Remedy: `with "
                    "handle.accumulate():` around the micro-batches of a step (or around the loop, "
                    "with handle.finish() before the optimizer), or DistributedDataParallel with "
                    "htv.distributed.ddp(ddp_model, handle)"
                )
        elif ranks.vote_alone() and not self.accumulates:
            ranks.refuse_alone(self._session.model)
            if not self._told_of_ranks:
                self._warn_of_ranks()

    def _warn_of_ranks(self) -> None:
        self._told_of_ranks = True
        warnings.warn(
            f"{ranks.world_size()} ranks are initialised, but the examples of each vote by "
            "themselves: averaging .grad over ranks would average votes. Use htv.Mean() there, or "
            "train in one process",
            stacklevel=4,
        )
