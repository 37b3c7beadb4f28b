"""One group of parameters that FSDP2 reduces together: where its sums lie, and the votes beside
them.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from htv.autograd.tally import state_of
from htv.distributed import bucket_means, reduction
from htv.distributed.bucket_means import RankedField
from htv.distributed.rank_votes import RankVotes
from htv.distributed.reduction import Field, Votes
from htv.engine.parameter import TrackedParameter
from htv.errors import UnsupportedError

__all__ = ["Unit", "UnitVotes"]


class UnitVotes(RankVotes):
    """Votes of one model's units, as each of them sees these."""

    @property
    @abstractmethod
    def is_last(self) -> bool:
        """Tell whether the backward under way ends a vote."""

    @abstractmethod
    def tracked(self, parameter: FSDPParam) -> TrackedParameter | None:
        """Return the record of a sharded parameter, or None if it is not served."""

    @abstractmethod
    def refuse_parts(self) -> None:
        """Raise where ranks' sums are reduced before all micro-batches are in, and are ranked."""


class Unit:
    """One group of parameters that FSDP2 reduces together.

    module:   at which they are sharded.
    group:    what torch keeps of them.
    reduced:  whether the backward under way reduced them, and
    applied:  whether it applied their rules.
    """

    def __init__(self, module: FSDPModule, group: FSDPParamGroup):
        self.module, self.group = module, group
        self.reduced = self.applied = False
        self.votes: UnitVotes | None = None
        self._plain: set[FSDPParam] = set()  # unserved parameters that have a gradient
        self._hooks: list = []
        self._undivided = float("1")  # an object of its own: the user may set 1.0 as well
        self._fields: list[tuple[FSDPParam, Field]] = []
        self._pending: Votes | None = None
        self._waiting: list[FSDPParam] = []  # what the votes of earlier micro-batches are of
        # Their sums in .grad, with torch's count of its changes.
        self._left: dict[FSDPParam, tuple[weakref.ref[Tensor], int]] = {}
        self._ranked: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Tell whether a shard of a parameter is all of it."""
        shards = getattr(self.group.mesh_info, "shard_process_group", None)
        return shards is None or shards.size() == 1

    def begin(self, votes: UnitVotes) -> None:
        """Bring votes together beside sums from now on."""
        group = self.group
        self.votes = votes
        if group._all_reduce_hook is not None:
            raise UnsupportedError(
                "a unit has an all-reduce hook already, and torch takes one only: htv applies its "
                "rules there. Remedy: do not call set_all_reduce_hook"
            )
        self._before = (
            group._reduce_scatter_comm, group.gradient_divide_factor,
            group.force_sum_reduction_for_comms,
        )  # fmt: skip
        group._reduce_scatter_comm = VotingReduceScatter(self)
        group._all_reduce_hook = self.apply
        # Sums come as they are: what they are divided by is a matter of `apply`.
        group.gradient_divide_factor, group.force_sum_reduction_for_comms = self._undivided, True
        for parameter in group.fsdp_params:
            if votes.tracked(parameter) is None and parameter.unsharded_param.requires_grad:
                self._hooks.append(
                    parameter.unsharded_param.register_hook(
                        lambda grad, parameter=parameter: self._plain.add(parameter)
                    )
                )

    @property
    def is_in_backward(self) -> bool:
        """Tell whether FSDP2 takes a backward of its module to be under way."""
        return self.module._get_fsdp_state()._state_ctx.post_backward_final_callback_queued

    def refuse_replaced(self) -> None:
        """Raise where the user set since what `begin` has set."""
        group, hook = self.group, self.group._all_reduce_hook
        if (
            getattr(hook, "__self__", None) is self
            and isinstance(group._reduce_scatter_comm, VotingReduceScatter)
            and group.gradient_divide_factor is self._undivided
            and group.force_sum_reduction_for_comms
        ):
            return
        raise UnsupportedError(
            f"the reduction of the unit at {group._module_fqn!r} was changed after "
            "htv.distributed.fsdp(model, handle), which counts votes there: "
            "set_gradient_divide_factor, set_force_sum_reduction_for_comms, "
            "set_reduce_scatter_divide_factor, set_all_reduce_hook or set_custom_reduce_scatter. "
            "Remedy: set a divide factor before; leave the others out"
        )

    def end(self) -> None:
        """Leave the reduction to torch again."""
        group = self.group
        for hook in self._hooks:
            hook.remove()
        group._all_reduce_hook = None
        (
            group._reduce_scatter_comm, group.gradient_divide_factor,
            group.force_sum_reduction_for_comms,
        ) = self._before  # fmt: skip

    # -- the sums of a unit are on their way ------------------------------------------------------

    def scatter(self, output: Tensor, sums: Tensor, group: ProcessGroup) -> None:
        """Bring the sums of a unit, and the votes beside them, together; leave this rank's shard of
        the sums in `output`.
        """
        world = group.size()
        self._lay_out(sums.numel(), world)
        self._observe_sums(sums, world)
        self._ranked = self._over_ranks(sums, world, group)
        if sums.dtype == torch.float16:  # which may overflow
            sums.mul_(self.votes.fraction)
        mine = self._own_votes(sums, world)
        self._keep(mine.map(lambda whole: reduction.scattered(whole, group)()))
        if self._ranked is None or not self._all_ranked():  # else the sums are of no use
            reduction.reduce_scatter(output, sums, group=group)

    def _keep(self, shards: Votes) -> None:
        """Keep this rank's shard of votes, those of earlier micro-batches added."""
        if self._pending is not None:
            reached = [p for p, _ in self._fields]
            if reached != self._waiting:
                self._refuse_left_out(set(reached) ^ set(self._waiting))
            for shard, earlier in zip(shards, self._pending, strict=True):
                shard += earlier.to(shard.dtype)
        self._pending, self._waiting = shards, [p for p, _ in self._fields]
        for parameter, _ in self._fields:
            tracked = self.votes.tracked(parameter)
            if tracked is not None:
                tracked.gathering.sent()
        self._plain, self.reduced = set(), True
        if not self.votes.is_last or not self.group.all_reduce_grads:
            self.votes.refuse_parts()

    def _refuse_left_out(self, parameters: Iterable[FSDPParam]) -> None:
        """Raise where micro-batches that are reduced one by one reach different parameters: votes
        of several are added up as they lie in the unit.
        """
        votes = self.votes
        names = sorted(t.name for p in parameters if (t := votes.tracked(p)) is not None)
        raise UnsupportedError(
            f"parameters {', '.join(names)} had a gradient in some micro-batches of a step and "
            "none in others, which set_is_last_backward(False) or set_requires_all_reduce(False) "
            "reduces one by one: their votes cannot be told apart. Remedy: "
            "set_requires_gradient_sync(False) for all micro-batches but the last"
        )

    def require_applied(self) -> None:
        """Raise where votes of earlier micro-batches wait still, though the ranks have met."""
        if self._pending is not None:
            self._refuse_left_out(self._waiting)

    def _all_ranked(self) -> bool:
        votes = self.votes
        return all(votes.rule_of_ranks(votes.tracked(p)) is not None for p, _ in self._fields)

    def _lay_out(self, size: int, world: int) -> None:
        """Find where parameters are in the flat shard, as `foreach_reduce` of FSDP2 puts them: one
        after the other, padded to a multiple of `world` rows.
        """
        self._fields, offset = [], 0
        unused = getattr(self.group, "reduce_scatter_unused_params", False)
        for parameter in self.group.fsdp_params:
            tracked = self.votes.tracked(parameter)
            came = parameter in self._plain if tracked is None else tracked.gathering.came
            if not came and not (unused and parameter.unsharded_param.requires_grad):
                continue
            shape = _as_reduced(parameter, world)
            rows = math.ceil(shape[0] / world)
            padded = rows * math.prod(shape[1:])
            valid = math.prod(parameter.sharded_size)
            whole = parameter.unsharded_param.numel()
            rule = None if tracked is None else tracked.rule
            self._fields.append((parameter, Field(rule, offset, padded, valid, whole)))
            offset += padded
        if offset * world != size:
            raise RuntimeError(
                f"FSDP2 reduces {size} values of the unit at {self.group._module_fqn!r}, where "
                f"{offset * world} have been counted: a parameter's gradient came by a way that "
                "htv does not know. Remedy: exclude= the parameters of this unit"
            )

    def _own_votes(self, sums: Tensor, world: int) -> Votes:
        """This rank's votes, laid out as FSDP2 lays out sums."""
        votes = self.votes
        rules = [votes.rule_of_votes(votes.tracked(p)) for p, _ in self._fields]
        electorate = votes.rounds.called()
        if all(rule is None for rule in rules):
            return Votes()
        state = {name for rule in rules if rule is not None for name in state_of(rule)}
        found = Votes.empty(sums, sums.numel(), electorate.count, state)
        for (parameter, field), rule in zip(self._fields, rules, strict=True):
            if rule is None:
                continue
            counts = votes.counts_of(
                votes.tracked(parameter), self._unflattened(parameter, field, sums, world)
            )
            if counts is not None:
                found.put(counts, _writer(parameter, field, world))
        return found

    def _unflattened(self, parameter: FSDPParam, field: Field, sums: Tensor, world: int) -> Tensor:
        """The sum of one parameter, of its shape, out of what FSDP2 reduces."""
        shape = _as_reduced(parameter, world)
        rows = field.of(sums.view(world, -1).t()).t().reshape(-1, *shape[1:])[: shape[0]]
        dim = parameter.fsdp_placement.dim
        return rows if dim == 0 or world == 1 else torch.cat(rows.chunk(world), dim=dim)

    def _over_ranks(self, sums: Tensor, world: int, group: ProcessGroup) -> Tensor | None:
        """This rank's shard of the aggregate by order rules over ranks, or None without any."""
        votes = self.votes
        members = [
            RankedField(tracked, field, tracked.gathering, _writer(parameter, field, world))
            for parameter, field in self._fields
            if votes.rule_of_ranks(tracked := votes.tracked(parameter)) is not None
        ]
        if not members:
            return None
        return bucket_means.rank_part(
            sums, members, votes.rounds, group, votes.fraction, votes.agreements
        )

    # -- the sums of a unit are there -------------------------------------------------------------

    def apply(self, sums: Tensor) -> None:
        """Apply the rules to this rank's shard of the sums of all ranks."""
        votes, mesh = self.votes, self.group.mesh_info
        shards = getattr(mesh, "shard_process_group", None)
        scattered = self.reduced
        if not scattered:  # there is one shard only
            self._lay_out(sums.numel(), 1)
            self._observe_sums(sums, 1)
            self._ranked = self._over_ranks(sums, 1, votes.rounds.group)
            self._keep(self._own_votes(sums, 1))
        if sums.dtype != torch.float16 or not scattered:  # else `scatter` did
            sums.mul_(votes.fraction)
        self._refuse_changed_sums()
        if not votes.is_last:  # FSDP2 adds the sums up in .grad
            return
        self._take_earlier_sums(sums)
        pending, self._pending, self.applied = self._pending, None, True
        replicas = getattr(mesh, "replicate_process_group", None)
        if replicas is not None:
            for tensor in pending:
                dist.all_reduce(tensor, group=replicas)
        fields = [f for p, f in self._fields]

        def over_shards(mask_sum: Tensor) -> Tensor:
            if shards is not None and shards.size() > 1:
                dist.all_reduce(mask_sum, group=shards)
            return mask_sum

        self._observe_shard(sums, pending)
        reduction.apply_rules(sums, fields, pending, votes.rounds.called(), over_shards)
        if self._ranked is not None:
            for parameter, field in self._fields:
                if votes.rule_of_ranks(votes.tracked(parameter)) is not None:
                    field.of(sums).copy_(field.of(self._ranked))
        self._ranked = None

    def _observe_sums(self, sums: Tensor, world: int) -> None:
        """Note this rank's sums for `Handle.stats`, as FSDP2 lays them out."""
        votes = self.votes
        if votes.agreements is not None:
            whole = sums.view(world, -1)
            found = ((votes.tracked(p), f.of(whole.t())) for p, f in self._fields)
            votes.observe_sums((t, own) for t, own in found if t is not None)

    def _observe_shard(self, sums: Tensor, pending: Votes) -> None:
        """Note what is known of all ranks' contributions to this rank's shard."""
        votes, replicas = self.votes, getattr(self.group.mesh_info, "replicate_process_group", None)
        if votes.agreements is None or (replicas is not None and replicas.rank() > 0):
            return  # replicas have the same shards
        electorate = votes.rounds.called()
        for parameter, field in self._fields:
            tracked = votes.tracked(parameter)
            if tracked is not None and votes.is_told_by_sums(tracked):
                found = reduction.agreement_sums(field, sums, pending, electorate, votes.fraction)
                votes.agreements.add(tracked, found)

    def remember_sums(self) -> None:
        """Remember the sums that a micro-batch left in `.grad`, whose votes wait here."""
        self._left = {
            parameter: (weakref.ref(grad), grad._version)
            for parameter in self._waiting
            if (grad := parameter.sharded_param.grad) is not None
        }

    def _refuse_changed_sums(self) -> None:
        """Raise where sums in `.grad`, whose votes wait here, were changed since."""
        left, self._left = self._left, {}
        for parameter, (grad, version) in left.items():
            held, tracked = parameter.sharded_param.grad, self.votes.tracked(parameter)
            same = held is not None and held is grad() and held._version == version
            if not same and tracked is not None:
                raise RuntimeError(
                    f".grad of {tracked.name!r} was changed, by zero_grad() perhaps, between "
                    "micro-batches that are reduced one by one, whose votes wait for the last. "
                    "Remedy: leave .grad as it is until set_is_last_backward(True)"
                )

    def _take_earlier_sums(self, sums: Tensor) -> None:
        """Add to this rank's shard of sums those that earlier micro-batches left in `.grad`."""
        for parameter, field in self._fields:
            held = parameter.sharded_param.grad
            if held is not None and self.votes.tracked(parameter) is not None:
                field.of(sums)[: field.valid] += held.to_local().reshape(-1).to(sums.dtype)
                parameter.sharded_param.grad = None


class VotingReduceScatter(ReduceScatter):
    """Reduces a unit's sums, and its votes beside them."""

    def __init__(self, unit: Unit):
        self.unit = unit

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        self.unit.scatter(output_tensor, input_tensor, group)


def _as_reduced(parameter: FSDPParam, world: int) -> tuple[int, ...]:
    """The shape in which FSDP2 reduces a parameter: shards of another dim than 0 stand in a row."""
    shape, dim = list(parameter.unsharded_param.shape), parameter.fsdp_placement.dim
    if dim != 0 and world > 1:
        shape[0], shape[dim] = shape[0] * world, shape[dim] // world
    return tuple(shape) if shape else (1,)


def _writer(parameter: FSDPParam, field: Field, world: int) -> Callable[[Tensor, Tensor], None]:
    """What writes a tensor of the parameter's shape where FSDP2 reduces it."""

    def write(value: Tensor, into: Tensor) -> None:
        dim = parameter.fsdp_placement.dim
        if dim != 0 and world > 1:
            value = torch.cat(torch.chunk(value, world, dim=dim), dim=0)
        rows = value.reshape(len(value) if value.dim() else 1, -1)
        padded = rows.new_zeros(world * math.ceil(len(rows) / world), rows.shape[1])
        padded[: len(rows)] = rows
        flat = into.view(world, -1)
        flat[:, field.offset : field.offset + field.size].copy_(padded.view(world, -1))

    return write
