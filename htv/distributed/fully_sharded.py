"""One vote of all ranks under FSDP2 (`fully_shard`): `htv.distributed.fsdp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import (
    FSDPParamGroup,
    RegisterPostBackwardFunction,
)

from htv.distributed.rank_votes import LocalVotes, session_of
from htv.distributed.rounds import VOTES
from htv.distributed.sharded_unit import Unit, UnitVotes
from htv.engine.graph_reading import declare_passing_on
from htv.engine.parameter import TrackedParameter
from htv.engine.session import Session
from htv.errors import UnsupportedError
from htv.rules import Rule

__all__ = ["fsdp"]

declare_passing_on(RegisterPostBackwardFunction)  # which waits for a unit's gradients


def fsdp(model: nn.Module, handle: object, vote: str = "examples") -> None:
    """Let the examples of all ranks vote together under FSDP2.

    Sums are reduce-scattered as always, unit by unit while backward runs; the votes travel beside
    them as integers, and each rank applies the rule to its shard before anyone sees `.grad`.
    Micro-batches before ``set_requires_gradient_sync(True)`` join the vote of the backward that
    synchronises. Hybrid sharding (HSDP) and mixed precision policies are served.

    model:   what `torch.distributed.fsdp.fully_shard` was called on: the attached model.
    handle:  what `htv.attach` returned, for the model before or after it was sharded.
    vote:    "examples": every group of every rank votes; "ranks": every rank is one group;
             "local": each rank's groups vote alone and the ranks' aggregates are averaged, which
             is no vote.

    `MedianOfMeans(k)`, with k a multiple of the number of ranks, takes k / ranks buckets of each:
    its groups of one backward are cut into them, or each of so many micro-batches is one. Beside
    the sum their sums are kept, until they are on their way. Other order rules over examples
    exchange what layers recorded, in one backward.

    Call it once, after `fully_shard`, on all ranks. Raises TypeError or ValueError for bad
    arguments or ranks that attached different things, UnsupportedError for a model that is not
    sharded by `fully_shard` alone.

    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from torch.distributed.fsdp import fully_shard
    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> model = torch.nn.Linear(2, 1)
    >>> model = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    >>> handle = htv.attach(model, htv.AndMask(1.0))
    >>> htv.distributed.fsdp(model, handle)
    >>> x = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    >>> model(x).mean().backward()
    >>> model.weight.grad.full_tensor()
    tensor([[2., 0.]])
    >>> torch.distributed.destroy_process_group()
    """
    if vote not in (*VOTES, "local"):
        raise ValueError(f"vote must be 'examples', 'ranks' or 'local', got {vote!r}")
    session = session_of(handle)
    if not isinstance(model, nn.Module) or not any(
        isinstance(m, FSDPModule) for m in model.modules()
    ):
        raise TypeError(
            f"model must be sharded by torch.distributed.fsdp.fully_shard, got "
            f"{type(model).__name__}, no part of which is: call fully_shard first"
        )
    if session.joint.of_ranks is not None:
        raise RuntimeError("the handle's examples vote over ranks already: call this once")
    units = [Unit(m, group) for m in model.modules() for group in _groups(m)]
    _adopt(session, units)
    if vote == "local":
        LocalVotes(session).begin()
    else:
        FullyShardedVotes(session, units, vote).begin()


def _groups(module: nn.Module) -> Sequence[FSDPParamGroup]:
    """What torch keeps of the parameters that are sharded at this module."""
    if not isinstance(module, FSDPModule):
        return ()
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return several
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def _adopt(session: Session, units: Sequence[Unit]) -> None:
    """Have the session serve what stands in for sharded parameters during forwards: torch makes it
    at the first all-gather, and keeps it.
    """
    stand_ins: dict[int, Tensor] = {}
    for unit in units:
        missing = [p for p in unit.group.fsdp_params if not hasattr(p, "_unsharded_param")]
        if missing:
            unit.module.unshard()
            unit.module.reshard()
        for parameter in unit.group.fsdp_params:
            stand_ins[id(parameter.sharded_param)] = parameter.unsharded_param
    named = dict(session.model.named_parameters())
    served = {tracked.name for tracked in session.tracked()}
    for name, parameter in named.items():
        if id(parameter) in stand_ins:
            if hasattr(stand_ins[id(parameter)], "placements"):
                raise UnsupportedError(
                    f"parameter {name!r} is sharded by tensor parallelism beside fully_shard: its "
                    "votes cannot be counted. Remedy: shard it by fully_shard alone"
                )
        elif name in served and parameter.requires_grad:
            raise UnsupportedError(
                f"parameter {name!r} is served, but in no unit of fully_shard: nobody would bring "
                "its gradient together over ranks. Remedy: fully_shard(model) on the whole model "
                f"after its parts, or exclude={name!r}"
            )
    session.adopt({name: stand_ins.get(id(p), p) for name, p in named.items()})


class FullyShardedVotes(UnitVotes):
    """Votes beside the reductions of one model's units."""

    gathers = True

    def __init__(self, session: Session, units: Sequence[Unit], vote: str):
        ranks, group = _all_ranks(units)
        factors = {unit.group.gradient_divide_factor or len(ranks) for unit in units}
        if len(factors) > 1:
            raise UnsupportedError(
                f"units divide their gradients by different factors ({sorted(factors)}): what one "
                "example contributes cannot be told. Remedy: the same set_gradient_divide_factor "
                "for all"
            )
        self.units = units
        self._sharded = {id(p.unsharded_param): p for unit in units for p in unit.group.fsdp_params}
        self._replicated = any(
            getattr(u.group.mesh_info, "replicate_process_group", None) for u in units
        )
        super().__init__(session, group, vote, 1 / factors.pop(), "under FSDP2")
        self.rounds.batches.refuses_nested = True
        if self._replicated and any(self.rule_of_ranks(t) is not None for t in session.tracked()):
            raise UnsupportedError(
                "order rules over ranks with replicas (HSDP): a rank's sum meets those of its own "
                "shards only. Remedy: a mesh of one dim, or a mask"
            )
        if self._replicated and vote == "ranks" and any(u.is_whole for u in units):
            raise UnsupportedError(
                "vote='ranks' with replicas that are not sharded: a rank's own sums are not to be "
                "had once FSDP2 has added up the replicas'. Remedy: a mesh of one dim, or "
                "DistributedDataParallel with htv.distributed.ddp"
            )
        self._by_id = {id(t.parameter): t for t in session.tracked()}
        self._whole = [
            (path, m) for path, m in session.model.named_modules() if not isinstance(m, FSDPModule)
        ]

    def begin(self) -> None:
        super().begin()
        for unit in self.units:
            unit.begin(self)

    def end(self) -> None:
        super().end()
        for unit in self.units:
            unit.end()

    def buckets_of(self, rule: Rule) -> int:
        found = super().buckets_of(rule)
        return 0 if self._replicated and found > 1 else found  # sums meet those of shards only

    def held_by(self, tracked: TrackedParameter) -> Callable[[], Tensor | None]:
        sharded = self._sharded.get(id(tracked.parameter))
        if sharded is None:
            return super().held_by(tracked)

        def held() -> Tensor | None:
            grad = sharded.sharded_param.grad
            return None if grad is None else grad.to_local()

        return held

    def tracked(self, parameter: FSDPParam) -> TrackedParameter | None:
        """Return the record of a sharded parameter, or None if it is not served."""
        return self._by_id.get(id(parameter.unsharded_param))

    def require_covered(self, module: nn.Module) -> None:
        """Any forward will do: units bring their gradients together by themselves. Refuse it where
        a unit was added, or something else put in the place of what counts votes there, and after a
        backward that failed.
        """
        for path, part in self._whole:
            if isinstance(part, FSDPModule):
                where = f"part {path!r}" if path else "the model"
                raise UnsupportedError(
                    f"fully_shard was called on {where} after htv.distributed.fsdp(model, handle), "
                    "which knows the units there were then. Remedy: in this order, fully_shard for "
                    "all parts, fully_shard(model), htv.attach, htv.distributed.fsdp"
                )
        for unit in self.units:
            unit.refuse_replaced()
        left = self.rounds.batches.unfinished
        if left or any(unit.is_in_backward for unit in self.units):
            raise RuntimeError(
                "an earlier backward under FSDP2 failed part-way, by an error that was caught: "
                "some units have its gradients and votes and others do not, and FSDP2 would leave "
                "those of the next backward apart as well. Remedy: restart training from a "
                "checkpoint on all ranks"
            )

    def require_meeting(self) -> None:
        meets = (u.group.reduce_grads and u.group.all_reduce_grads for u in self.units)
        if not self.is_last or not all(meets):
            raise UnsupportedError(
                "order rules need the contributions of all micro-batches at once, and this "
                "backward (set_requires_gradient_sync, set_is_last_backward) is one of several. "
                "Remedy: "
                f"larger batches, MedianOfMeans({self.rounds.size}), or vote='ranks'"
            )

    @property
    def is_last(self) -> bool:
        """Tell whether the backward under way ends a vote: `set_is_last_backward` of FSDP2."""
        return all(u.module._get_fsdp_state()._state_ctx.is_last_backward for u in self.units)

    def refuse_parts(self) -> None:
        """Raise where ranks' sums are reduced before all micro-batches are in, and are ranked."""
        rounds = self.rounds
        ranked = any(self.rule_of_ranks(t) is not None for t in self.session.tracked())
        if ranked or rounds.vote == "ranks":
            raise UnsupportedError(
                "where each rank is one voter, or the sums of its buckets are ranked, all of its "
                "micro-batches must be summed before ranks meet: "
                "set_is_last_backward(False) and set_requires_all_reduce(False) reduce them one by "
                "one. Remedy: set_requires_gradient_sync(False) for all micro-batches but the last"
            )

    def pass_ended(self) -> None:
        # FSDP2 reduces the first units of its roots at the end of the pass, too: after them.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_round)

    def _end_round(self) -> None:
        if not any(unit.reduced for unit in self.units):  # a micro-batch
            return
        applied = [unit.applied for unit in self.units if unit.reduced]
        for unit in self.units:
            unit.reduced = unit.applied = False
        tracked = [self.tracked(p) for unit in self.units for p in unit.group.fsdp_params]
        left = any(t.gathering.came for t in tracked if t is not None)
        if left or len(set(applied)) > 1:
            raise RuntimeError(
                "a backward brought some units' gradients together and left others' apart: call "
                "set_requires_gradient_sync on the whole model, so that all vote at once"
            )
        if applied[0]:
            for unit in self.units:
                unit.require_applied()
            own = self.own_agreements(torch.device("cpu"))
            if own is not None:
                dist.all_reduce(own, group=self.rounds.channel)
            self.met(own)
        else:
            for unit in self.units:
                unit.remember_sums()
            self.rounds.go_on()


def _all_ranks(units: Sequence[Unit]) -> tuple[list[int], ProcessGroup]:
    """The ranks that train the model together, and a process group of them."""
    found: set[tuple[int, ...]] = set()
    for unit in units:
        mesh = unit.group.mesh_info.mesh
        found.add(tuple(mesh.mesh.flatten().tolist()))
        if not hasattr(unit.group.mesh_info, "shard_process_group"):
            raise UnsupportedError(
                "a unit is replicated, not sharded: use DistributedDataParallel and "
                "htv.distributed.ddp, or fully_shard"
            )
    if len(found) > 1:
        raise UnsupportedError(
            f"units are sharded over different ranks ({sorted(found)}): whose examples vote cannot "
            "be told. Remedy: one mesh for all units"
        )
    ranks = list(found.pop())
    if len(ranks) == dist.get_world_size():
        return ranks, dist.group.WORLD
    return ranks, dist.new_group(ranks, use_local_synchronization=True)
