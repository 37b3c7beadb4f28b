"""Who votes on all ranks: one round from the first backward after the ranks met to when they meet
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from htv.autograd.accumulation import MicroBatches
from htv.engine.session import Session
from htv.errors import UnsupportedError
from htv.rules import MedianOfMeans, Rule

__all__ = ["VOTES", "Electorate", "Rounds", "buckets_per_rank", "require_buckets", "require_same"]

VOTES = ("examples", "ranks")


@dataclass(frozen=True)
class Electorate:
    """The voters of one round.

    counts:  the number of groups of every rank.
    passes:  in how many backward passes it has them; 0 where these differ in how many they have.
    vote:    "examples", where each of these votes, or "ranks", where every rank that has any is
             one voter.
    """

    counts: tuple[int, ...]
    passes: tuple[int, ...]
    vote: str

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.counts)

    @property
    def count(self) -> int:
        """Return E, the number of voters of all ranks."""
        if self.vote == "ranks":
            return sum(count > 0 for count in self.counts)
        return sum(self.counts)


class Rounds:
    """Keeps count of the voters of one model on the ranks of a process group.

    session:  of the model.
    group:    the ranks that vote together.
    vote:     "examples" or "ranks".
    where:    what the ranks' backwards are inside of, for messages.
    ended:    called at the end of each backward pass.
    batches:  the backward passes of this rank in the round under way.
    """

    def __init__(
        self,
        session: Session,
        group: ProcessGroup,
        vote: str,
        where: str,
        ended: Callable[[], None] = lambda: None,
    ):
        self.session, self.group, self.vote = session, group, vote
        self.size, self.rank = group.size(), group.rank()
        self.batches = MicroBatches(where, ended)
        self.number = 0
        self._sent = 0  # groups of this rank whose votes are on their way
        self.electorate: Electorate | None = None
        # Small messages go by the host: which type votes travel in depends on them.
        self.channel = _host_group(group)

    def called(self) -> Electorate:
        """Return who votes in the round under way; the first to ask in it waits for all ranks.

        Raises RuntimeError where ranks are not at the same step, and on all ranks alike; and where
        more groups of this rank came since.
        """
        if self.electorate is None:
            self.electorate = self._call()
        if self.electorate.counts[self.rank] != self.batches.count:
            raise RuntimeError(
                f"a backward {self.batches.where} came after the ranks had counted the voters of "
                "a step, as order rules over the examples of all ranks have them do in its first. "
                f"Remedy: one batch per step, or MedianOfMeans({self.size}) in the place of these "
                "rules; where an earlier backward failed, restart from a checkpoint on all ranks"
            )
        return self.electorate

    def _call(self) -> Electorate:
        current, batches = torch._C._current_graph_task_id(), self.batches
        task = self.session.passes.outermost(current)
        opened = self.session.latest_groups
        if task != -1 and opened is not None:  # no served parameter of this pass may have come yet
            batches.note(task, opened)
        complete = not batches.unfinished - {current, task, batches.latest}
        named, weighted = batches.named, batches.weighted
        passes = len(batches) if batches.even else 0
        mine = [self.number, batches.count, passes, batches.examples, complete, named, weighted]
        rows = self._gathered(mine)
        numbers, counts, passed, examples, completes, names, weights = zip(*rows, strict=True)
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"ranks are at different steps ({_by_rank(numbers)}): one of them lost a step, by "
                "an error that was caught, say. Their votes cannot be told apart: restart training "
                "from a checkpoint on all ranks"
            )
        if not all(completes):
            raise RuntimeError(
                f"a backward {batches.where} failed part-way on rank {completes.index(0)}, so some "
                "parameters have its contributions and others do not: nothing was aggregated. "
                "Remedy: restart training from a checkpoint on all ranks"
            )
        if any(names) and self.vote == "examples":
            self._refuse_split_groups()
        if any(weights):
            self._refuse_unequal_weights(counts, examples)
        electorate = Electorate(tuple(counts), tuple(passed), self.vote)
        for rule in self.session.rules:
            rule.statistic(electorate.count)
        voters = "groups" if self.vote == "examples" else "ranks"
        told = f"all {voters} of a step, on {self.size} rank{'s' * (self.size > 1)}, together"
        self.session.require_several(electorate.count, told)
        return electorate

    def _gathered(self, row: list) -> list[list[int]]:
        mine = torch.tensor([int(value) for value in row])
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.channel)
        return [row.tolist() for row in rows]

    def _refuse_split_groups(self) -> None:
        """Refuse a group whose rows are on several ranks: each would have it vote."""
        keys: list = [None] * self.size
        dist.all_gather_object(keys, sorted(self.batches.keys), group=self.channel)
        seen: dict[int, int] = {}
        for rank, own in enumerate(keys):
            for key in own:
                if key in seen:
                    raise UnsupportedError(
                        f"the group with id {key} has rows on ranks {seen[key]} and {rank}: it "
                        "would vote once on each. Remedy: give every group's rows to one rank, "
                        "give the parts ids of their own if each may vote, or let every rank be "
                        "one group by vote='ranks'"
                    )
                seen[key] = rank

    def _refuse_unequal_weights(self, counts: tuple, examples: tuple) -> None:
        for rank, (count, size) in enumerate(zip(counts, examples, strict=True)):
            if size * counts[0] != count * examples[0]:
                raise ValueError(
                    "weight='equal' needs the same number of examples per group on every rank, "
                    f"got {examples[0]} / {counts[0]} on rank 0 and {size} / {count} on rank {rank}"
                )

    @property
    def waiting(self) -> int:
        """Return the number of this rank's groups whose votes are not on their way yet."""
        return self.batches.count - self._sent

    def go_on(self) -> None:
        """Go on with the round: votes of the backward pass that ended are on their way, and more
        are to come.
        """
        self._sent = self.batches.count
        self.electorate = None
        self.number += 1

    def drop(self) -> None:
        """Forget what this rank gathered for the round under way."""
        self.batches.clear()
        self._sent = 0
        self.electorate = None

    def end(self) -> None:
        """End the round: the ranks have met."""
        self.drop()
        self.number += 1


def require_same(rounds: Rounds) -> None:
    """Compare what the ranks attached. Raises ValueError that names the first difference, on all
    ranks alike.
    """
    session = rounds.session
    mine = [f"vote={rounds.vote!r}{', stats=True' * session.settings.stats}"]
    mine += [
        f"parameter {t.name!r}: {tuple(t.parameter.shape)}, {t.parameter.dtype}, {t.rule}"
        for t in session.tracked()
    ]
    everyone: list = [None] * rounds.size
    dist.all_gather_object(everyone, mine, group=rounds.channel)
    for rank, other in enumerate(everyone):
        if len(other) != len(everyone[0]):
            raise ValueError(
                f"rank 0 serves {len(everyone[0]) - 1} parameters, rank {rank} {len(other) - 1}: "
                "attach the same model with the same rules on every rank"
            )
        for first, line in zip(everyone[0], other, strict=True):
            if line != first:
                raise ValueError(
                    f"ranks differ: rank 0 has {first}; rank {rank} has {line}. Attach the same "
                    "model with the same rules, vote and stats on every rank"
                )


def refuse_rules(rounds: Rounds) -> None:
    """Raise UnsupportedError for rules of the user's own, which several ranks cannot serve."""
    for tracked in rounds.session.tracked():
        if tracked.rule.is_open:
            raise UnsupportedError(
                f"{type(tracked.rule).__name__}, the rule of parameter {tracked.name!r}, is one of "
                "your own, and several ranks cannot call its reduce(). Remedy: "
                f"MedianOfMeans({rounds.size}) or a mask, exclude={tracked.name!r}, or "
                "vote='local'"
            )


def buckets_per_rank(rule: Rule, who: Rounds | Electorate) -> int:
    """Return how many sums of each rank are all that an order rule needs: one where ranks vote,
    those of its buckets that are a rank's own for a median of means; 0 where it needs more.
    """
    if who.vote == "ranks":
        return 1
    if isinstance(rule, MedianOfMeans) and rule.k % who.size == 0:
        return rule.k // who.size
    return 0


def require_buckets(rule: Rule, electorate: Electorate) -> None:
    """Raise RuntimeError, on all ranks alike, where the buckets of a median of means are not those
    that ranks have summed.
    """
    if electorate.vote == "ranks":
        return
    counts, size, buckets = electorate.counts, electorate.size, buckets_per_rank(rule, electorate)
    what = "each rank for a bucket" if buckets == 1 else f"{buckets} buckets of each rank"
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"{rule} takes {what}, which needs equally many groups on all ranks, "
            f"but they have {', '.join(map(str, counts))}. Remedy: drop_last=True in "
            "the DataLoader, or vote='ranks'"
        )
    if buckets == 1:
        return
    for rank, passes in enumerate(electorate.passes):
        if passes == 1 and size > 1 and counts[rank] % buckets:
            raise RuntimeError(
                f"{rule} takes {what}, but {counts[rank]} groups, those of a rank, cannot be cut "
                f"into {buckets} of equal size. Remedy: a multiple of {buckets} groups per rank, "
                f"or MedianOfMeans({size}), which takes each rank for a bucket"
            )
        if passes not in (1, buckets):
            told = f"{passes} micro-batches" if passes else "micro-batches of different sizes"
            raise RuntimeError(
                f"{rule} takes {what}: those of one backward, or {buckets} micro-batches with "
                f"equally many groups, each of them a bucket; rank {rank} had {told}. Remedy: "
                f"{buckets} micro-batches of one size, one batch per step, or "
                f"MedianOfMeans({size}), which takes each rank for a bucket"
            )


def _host_group(group: ProcessGroup) -> ProcessGroup:
    """A group of the same ranks that sends tensors of the host."""
    members = dist.get_process_group_ranks(group)
    return dist.new_group(
        members,
        backend="gloo",
        timeout=_timeout_of(group),
        use_local_synchronization=len(members) < dist.get_world_size(),
    )


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """How long the group's ranks wait for each other; None for torch's choice."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        found = getattr(options, "_timeout", None)
        if found is not None:
            return found
    return None


def _by_rank(values: tuple) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
