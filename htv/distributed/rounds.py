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
from htv.rules import MedianOfMeans

__all__ = ["VOTES", "Electorate", "Rounds", "require_same"]

VOTES = ("examples", "ranks")


@dataclass(frozen=True)
class Electorate:
    """The voters of one round.

    counts:  the number of groups of every rank.
    vote:    "examples", where each of these votes, or "ranks", where every rank that has any is
             one voter.
    """

    counts: tuple[int, ...]
    vote: str

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

        Raises RuntimeError where ranks are not at the same step, and on all ranks alike.
        """
        if self.electorate is None:
            self.electorate = self._call()
        return self.electorate

    def _call(self) -> Electorate:
        current, batches = torch._C._current_graph_task_id(), self.batches
        task = self.session.passes.outermost(current)
        opened = self.session.latest_groups
        if task != -1 and opened is not None:  # no served parameter of this pass may have come yet
            batches.note(task, opened)
        complete = not batches.unfinished - {current, task, batches.latest}
        named, weighted = batches.named, batches.weighted
        mine = [self.number, batches.count, batches.examples, complete, named, weighted]
        rows = self._gathered(mine)
        numbers, counts, examples, completes, names, weights = zip(*rows, strict=True)
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
        electorate = Electorate(tuple(counts), self.vote)
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

    def end(self) -> None:
        """End the round: the ranks have met."""
        self.batches.clear()
        self._sent = 0
        self.electorate = None
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


def ranks_are_buckets(rule: object, rounds: Rounds) -> bool:
    """Tell whether a rule needs one mean per rank only: each rank is one of its buckets."""
    if rounds.vote == "ranks":
        return True
    return isinstance(rule, MedianOfMeans) and rule.k == rounds.size


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
