"""One attachment of a rule to a model: its parameters, the forwards under way, and who votes."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from htv.autograd.accumulation import MicroBatches, refuse_unless_streaming
from htv.autograd.aggregation import NestedBackwards
from htv.engine import inputs, ranks
from htv.engine.call_plan import CallPlan, shapes_of
from htv.engine.checkpointing import RecentForwards, in_backward, in_reentrant_checkpoint
from htv.engine.continuation import carried_marks
from htv.engine.forward import ForwardStandIn, thaw
from htv.engine.group_spec import GroupSpec, groups_of, same_spec
from htv.engine.guard_state import PASSES
from htv.engine.inputs import Batch
from htv.engine.mode import ServingMode, left_on_stack
from htv.engine.parameter import TrackedParameter, share_nodes
from htv.engine.protocols import GroupVotesLike, RankVotesLike
from htv.engine.provenance import FromParameters, Lost, Mark
from htv.engine.unfinished import UnfinishedVoteGuard
from htv.engine.usual import call_layer
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops.factors import Factors
from htv.rules import Mean, Rule

__all__ = ["ForwardBlock", "Session", "Settings"]

MOST_NODE_PLANS = 16
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
MOST_SIZES, MOST_KEPT = 16, 1 << 16  # of batches, and of results whose marks are kept
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()  # those attached


@dataclass(frozen=True)
class Settings:
    """Holds what `htv.attach` was called with, beside model and rules; see there."""

    on_unsupported: str = "error"
    stats: bool = False
    batch_dim: int = 0
    batch_norm: str = "error"
    batch: tuple[str, ...] = ()
    allow_single: bool | str = False


class ForwardBlock:
    """Runs code under the mode of a forward: the context manager that `Handle.forward` returns."""

    def __init__(self, session: Session, args: tuple, kwargs: dict):
        self._session, self._args, self._kwargs = session, args, kwargs
        self._mode: ServingMode | None = None
        self._frozen: list[nn.Module] = []

    def __enter__(self) -> None:
        session = self._session
        session.require_attached("forward")
        if session.running() is not None:
            raise RuntimeError(
                "handle.forward() inside another forward of the same handle: it is served already"
            )
        if not torch.is_grad_enabled():
            return
        names: tuple[str, ...] = ("batch",)
        if len(self._args) > 1:
            names = tuple(f"batch[{i}]" for i in range(len(self._args)))
        try:
            self._mode = session.open(session.root, self._args, self._kwargs, names)
            self._mode.block = weakref.ref(self)
            session.thread.running = self._mode
            session.root.freeze(self._frozen)
            self._mode.enter()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        mode, self._mode = self._mode, None
        try:
            self._session.close(mode, None)
        finally:
            thaw(self._frozen)

    def handles(self, mode: ServingMode) -> bool:
        """Tell whether the block is open and `mode` its own."""
        return self._mode is mode


class Session:
    """Does all that is behind a `htv.Handle` and not for users to call.

    model:     the attached model.
    rules:     parameter name -> its rule, or None for a plain gradient.
    settings:  of the user.
    methods:   (module, its path, name) of methods that are served beside the modules' forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: dict[str, Rule | None],
        settings: Settings,
        methods: list[tuple[nn.Module, str, str]],
    ):
        self.model, self.attached, self.settings = model, True, settings
        self.batch_norm, self.collects_stats = settings.batch_norm, settings.stats
        # Shown what is recorded, instead of statistics.
        self.examine: Callable[[str, list[Factors]], None] | None = None
        self.told_of_sums = self._told_of_ranks = self._told_of_one = False
        self.thread = threading.local()  # .running: the forward under way in this thread, or True
        self.passes = NestedBackwards()
        # Calls at which the batch was lost, where a parameter came to need it.
        self.losses: dict[Lost, None] = {}
        self.batch_source = ""  # which argument the last forward took for the batch
        self.settlements: list = []  # what compiled backwards of this model look up

        self.spec: GroupSpec | None = (
            None  # while a block of groups(), packed() or tokens() is open
        )
        self._last_spec: GroupSpec | None = None
        self._specs: list[GroupSpec | None] = []  # since the last backward; at most two different
        self._sizes: set[int] = set()  # of the batches since the last backward
        self.accumulates = False
        # Whether rules are applied after the backward: in accumulate(), or where ranks meet.
        self.votes_later = False
        self._batches = MicroBatches()  # of the accumulation under way
        self.unfinished_guard = UnfinishedVoteGuard(self.waiting_backwards)
        self.in_pipeline = False  # whether a schedule's micro-batches vote together
        self.rank_votes: RankVotesLike | None = None
        # Where the ranks of a process group meet at the end of accumulate().
        self.group_votes: GroupVotesLike | None = None
        self.latest_groups: Groups | None = None  # of the last forward with a graph
        # Whether a backward has reached a parameter: the forwards before it are done with then.
        self.backward_started = False
        self._recent = RecentForwards()

        parameters = dict(model.named_parameters())
        self._tracked = {
            id(p): TrackedParameter(self, name, p, rules[name])
            for name, p in parameters.items()
            if rules[name] is not None
        }
        self.own_marks = {k: FromParameters((s,), s.parameter) for k, s in self._tracked.items()}
        self._plans: dict[tuple, CallPlan] = {}  # who votes, by how the forward was called
        self._enough: set[int] = set()  # numbers of groups that suffice for all rules
        self._found: dict[tuple, dict[tuple, Mark]] = {}  # marks of results, by size of the batch
        # Who shares a node, by the numbers of groups and examples, and whether matrices do.
        self._nodes: dict[tuple, dict[TrackedParameter, tuple[TrackedParameter, ...]]] = {}
        self._shares_nodes = True
        # By identity: a rule of the user's own may not be hashable.
        self.rules = list({id(t.rule): t.rule for t in self._tracked.values()}.values())
        self.only_means = all(type(rule) is Mean for rule in self.rules)
        self._plain = [p for name, p in parameters.items() if rules[name] is None]
        self._modules = list(model.modules())
        self._attributes = [
            v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)
        ]
        for tracked in self._tracked.values():
            tracked.watch()
        self._forwards = [ForwardStandIn(self, m, path) for path, m in self._with_a_say()]
        self._forwards += [
            ForwardStandIn(self, module, path, name) for module, path, name in methods
        ]
        self.root = self._forwards[0]
        for forward in self._forwards:
            forward.install()
        _sessions.add(self)

    def _with_a_say(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules whose forward is replaced, the model first.

        Modules without parameters run plainly, but a checkpoint may run a frozen BatchNorm again
        by itself. A ScriptModule runs plainly, too.
        """
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            frozen = self.batch_norm == "frozen"
            also = frozen and isinstance(module, nn.modules.batchnorm._BatchNorm)
            if module is self.model or also or next(module.parameters(), None) is not None:
                yield path, module

    def detach(self) -> None:
        """Restore the model, and drop what would keep it alive in a circle."""
        if not self.attached:
            return
        self.attached = False
        _sessions.discard(self)
        if self.rank_votes is not None:
            self.rank_votes.end()
        left_on_stack(lambda mode: mode.session is self)
        for forward in self._forwards:
            forward.restore()
        for tracked in self._tracked.values():
            tracked.unwatch()
        for forward in self._forwards:
            forward.let_go()
        self._forwards, self.root, self.thread = [], None, threading.local()
        self._plans, self._found, self._nodes = {}, {}, {}
        self._recent.modes.clear()

    def require_attached(self, method: str) -> None:
        """Raise where `method` of a detached handle is called."""
        if not self.attached:
            raise RuntimeError(
                f"{method}() of a detached handle would do nothing: the model has its plain "
                "gradients again. Call htv.attach for a new handle"
            )

    def adopt(self, parameters: dict[str, Tensor]) -> None:
        """Serve other tensors in the place of the model's parameters from now on: what stands in
        for them during forwards. Each keeps a node of its own: whoever put them there gives them
        their memory, and takes their gradients, at different times.

        parameters:  by name, all of the model's.
        """
        for tracked in self._tracked.values():
            tracked.adopt(parameters[tracked.name])
        served = {tracked.name: tracked for tracked in self._tracked.values()}
        self._tracked = {id(t.parameter): t for t in served.values()}
        self.own_marks = {k: FromParameters((t,), t.parameter) for k, t in self._tracked.items()}
        self._plain = [p for name, p in parameters.items() if name not in served]
        self._plans, self._found, self._nodes = {}, {}, {}
        self._shares_nodes = False
        for forward in self._forwards:
            forward.parameters_move = True

    # -- blocks of the user's ---------------------------------------------------------------------

    @contextmanager
    def voting(self, spec: GroupSpec, method: str) -> Iterator[None]:
        """Let forwards inside the block vote by `spec`; `method` of the handle is for messages."""
        self.require_attached(method)
        if spec.weight not in ("size", "equal"):
            raise ValueError(f"weight must be 'size' or 'equal', got {spec.weight!r}")
        if self.spec is not None:
            raise RuntimeError("groups(), packed() and tokens() blocks cannot be nested")
        if isinstance(spec.value, Tensor):  # the one time that a device is waited for
            spec = replace(spec, value=spec.value.cpu())
        try:
            self.spec = spec
            yield
        finally:
            self.spec = None

    @contextmanager
    def accumulate(self, fraction: float = 1.0) -> Iterator[None]:
        """See `Handle.accumulate`.

        fraction:  what contributions are multiplied by.
        """
        self.require_attached("accumulate")
        if self.accumulates:
            raise RuntimeError("accumulate() blocks cannot be nested")
        self._refuse_to_accumulate()
        try:
            self.accumulates = self.votes_later = True
            self.unfinished_guard.put_on(self.model)
            self._begin_vote(fraction)
            yield
            if self.attached and self._waiting():
                self._finish_vote(fraction)
        finally:
            self.accumulates = self.votes_later = False
            self.unfinished_guard.take_off()
            if self.group_votes is not None:
                self.group_votes.end()
            for tracked in self._tracked.values():
                tracked.accumulate(None)

    def _refuse_to_accumulate(self) -> None:
        if self.rank_votes is not None:
            raise UnsupportedError(
                "accumulate() where ranks vote together by htv.distributed.ddp or fsdp: the "
                "backward in which ranks meet ends a vote there. Remedy: no_sync() of "
                "DistributedDataParallel, or set_requires_gradient_sync(False) of FSDP2, for all "
                "micro-batches but the last"
            )
        if ranks.world_size() > 1 and self.group_votes is None and not self.in_pipeline:
            raise UnsupportedError(
                f"accumulate() with {ranks.world_size()} ranks: each rank would put its own "
                "aggregate into .grad, and the ranks' parameters would drift apart. Remedy: "
                "htv.attach(..., process_group=torch.distributed.group.WORLD), so that all ranks "
                "vote together, or DistributedDataParallel with htv.distributed.ddp"
            )
        if self.group_votes is None:
            for tracked in self._tracked.values():
                refuse_unless_streaming(tracked.rule, tracked.name)

    def _begin_vote(self, fraction: float = 1.0) -> None:
        """Gather contributions for the next vote of an accumulation."""
        self._batches = MicroBatches()
        if self.group_votes is not None:
            self.group_votes.begin()
            return
        for tracked in self._tracked.values():
            tracked.accumulate(self._batches, fraction, self.settings.stats)

    def _waiting(self) -> bool:
        """Tell whether anything was gathered since the last vote of an accumulation, on any
        rank.
        """
        if self.group_votes is not None:
            return self.group_votes.waiting()
        return len(self._batches) > 0

    def waiting_backwards(self) -> int:
        """Return how many backwards of this rank have left contributions for a vote to come."""
        votes = self.rank_votes if self.rank_votes is not None else self.group_votes
        if votes is not None:
            return votes.waiting_backwards()
        return len(self._batches) if self.accumulates else 0

    def _finish_vote(self, fraction: float = 1.0) -> None:
        """Apply the rules to what an accumulation gathered."""
        if self.group_votes is not None:
            found = self.group_votes.results()
        else:
            self._batches.require_complete()
            everything = "all micro-batches of accumulate() together"
            self.require_several(self._batches.count, everything)
            with torch.no_grad():
                found = [(s, s.gathering.result()) for s in self._tracked.values()]
                for tracked in self._tracked.values():
                    tracked.measure(tracked.gathering.agreement_sums(), self._batches.count)
        for tracked, grad in found:
            tracked.add_accumulated(grad)
        if self.group_votes is None:
            self._begin_vote(fraction)

    def finish(self) -> None:
        """See `Handle.finish`."""
        self.require_attached("finish")
        if self.rank_votes is not None:
            self.rank_votes.require_met()
        elif not self.accumulates:
            raise RuntimeError(
                "finish() outside accumulate(): nothing waits for a vote, for the end of a block, "
                "or every backward, has put its aggregate into .grad already. Remedy: with "
                "handle.accumulate(): around the loop"
            )
        elif self._waiting():
            self._finish_vote()

    def vote_over_ranks(self, rank_votes: RankVotesLike | None) -> None:
        """Let `rank_votes` bring the ranks together from now on; None: nobody."""
        self.rank_votes = rank_votes
        self.votes_later = rank_votes is not None and rank_votes.gathers

    def unserved_parameters(self) -> list[Tensor]:
        """Return the parameters that want a plain gradient."""
        return [p for p in self._plain if p.requires_grad]

    @contextmanager
    def examined(self, see: Callable[[str, list[Factors]], None]) -> Iterator[None]:
        """See `Handle.examined`."""
        self.require_attached("examined")
        before = self.collects_stats, self.examine
        try:
            self.collects_stats, self.examine = True, see
            yield
        finally:
            self.collects_stats, self.examine = before

    # -- what the mode and the parameters ask -----------------------------------------------------

    def tracked_parameter(self, tensor: Tensor) -> TrackedParameter | None:
        """Return the record of a served parameter, `tensor`, or None for anything else."""
        tracked = self._tracked.get(id(tensor))
        return tracked if tracked is not None and tensor.requires_grad else None

    def sharing_node(
        self, tracked: TrackedParameter, groups: Groups, matrices: bool
    ) -> tuple[TrackedParameter, ...]:
        """Return the parameters that share a node with `tracked` for `groups`, itself among
        them; see `share_nodes`.
        """
        if groups.rows_vote or self.votes_later or not self._shares_nodes:
            return (tracked,)
        key = groups.count, groups.batch_size, matrices
        nodes = self._nodes.get(key)
        if nodes is None:
            if len(self._nodes) >= MOST_NODE_PLANS:
                self._nodes.clear()
            nodes = share_nodes(self._tracked.values(), groups, matrices)
            self._nodes[key] = nodes
        return nodes.get(tracked, (tracked,))

    def tracked(self) -> list[TrackedParameter]:
        """Return all served parameters."""
        return list(self._tracked.values())

    def known_results(self, groups: Groups) -> dict[tuple, Mark]:
        """Return the marks of results that earlier forwards of a batch with such `groups` found."""
        key = groups.batch_size, groups.rows_vote
        found = self._found.setdefault(key, {})
        if len(self._found) > MOST_SIZES or len(found) > MOST_KEPT:
            self._found = {key: {}}
        return self._found[key]

    def constants(self) -> Iterator[Tensor]:
        """Yield the model's tensors that are not served.

        Buffers, plain tensor attributes, frozen and excluded parameters.
        """
        for module in self._modules:
            if module._buffers:
                yield from module._buffers.values()
        yield from self._attributes
        yield from self._plain
        for tracked in self._tracked.values():
            if not tracked.parameter.requires_grad:
                yield tracked.parameter

    @property
    def shares_statistics(self) -> bool:
        """Tell whether a contribution may include what passes through a BatchNorm's statistics."""
        return self.batch_norm == "shared"

    @property
    def passes_plainly(self) -> bool:
        """Tell whether uses that cannot be served are passed on plainly, with a warning."""
        return self.settings.on_unsupported == "plain"

    def unsupported(self, message: str, parameters: tuple[TrackedParameter, ...]) -> None:
        """Refuse a use of `parameters` with `message`, or note that contributions are summed
        plainly.
        """
        if not self.passes_plainly:
            raise UnsupportedError(message)
        if any(tracked.refusal is None for tracked in parameters):
            told = f"{message} (summed plainly, as on_unsupported='plain' asks)"
            warnings.warn(told, stacklevel=3)
        for tracked in parameters:
            tracked.refusal = message

    def forwards_of(self, module: nn.Module) -> list[ForwardStandIn]:
        """Return what stands in for methods of `module`."""
        return [forward for forward in self._forwards if forward.module is module]

    def stands_in(self, tensor: Tensor) -> str | None:
        """Return the name under which an attached module has `tensor`, if it had not when
        attached.
        """
        if self.only_means:  # whose gradient is the plain one
            return None
        for path, module in self.model.named_modules():
            for name, value in (*module._parameters.items(), *vars(module).items()):
                if value is tensor:
                    return f"{path}.{name}".lstrip(".")
        return None

    def note_loss(self, lost: Lost) -> None:
        """Remember where the batch was lost, at `lost`, once a parameter came to need it."""
        self.losses[lost] = None

    def require_several(self, count: int, source: str) -> None:
        """Refuse a batch of one group, a `count` of 1, under a rule that needs several; `source`
        says what the batch was taken from.
        """
        allowed = self.settings.allow_single
        if count != 1 or allowed is True or self._told_of_one:
            return
        rule = next((r for r in self.rules if r.needs_several), None)
        if rule is None:
            return
        message = (
            f"one group alone votes ({source}): the aggregate of one contribution under {rule} "
            "is its plain gradient. This is also how trainers with one example per device "
            "(per_device_train_batch_size=1 without accumulation, say) end in plain training. "
            "Remedy: larger batches, htv.attach(..., batch='the argument that holds the "
            "examples') if another was meant, `with handle.accumulate():` around micro-batches, "
            "or allow_single=True if the plain gradient is meant here"
        )
        if allowed != "warn":
            raise ValueError(message)
        self._told_of_one = True
        warnings.warn(message, stacklevel=3)

    def warn_of_sums(self, tracked: TrackedParameter) -> None:
        """Say once that several backwards were added up in `.grad` of `tracked`."""
        self.told_of_sums = True
        warnings.warn(
            f"a backward adds to the aggregate that .grad of {tracked.name!r} holds from an "
            "earlier backward: each backward is a vote of its own, so micro-batches that a "
            "trainer accumulates do not vote together. Use `with handle.accumulate():` around the "
            "micro-batches of a step, or zero_grad() between the backwards",
            stacklevel=2,
        )

    def check_ranks(self, forward: ForwardStandIn) -> None:
        """Refuse a `forward` whose votes the ranks would not bring together as they should."""
        if in_backward():  # a checkpoint's part: the forward that it is part of was looked at
            return
        if self.rank_votes is not None:
            self.rank_votes.require_covered(forward.module)
        elif self.group_votes is not None:
            if not self.accumulates:
                raise RuntimeError(
                    "the model was attached with process_group, and ranks meet where accumulate() "
                    "ends: a backward outside would leave each rank its own vote. Remedy: `with "
                    "handle.accumulate():` around the micro-batches of a step (or around the loop, "
                    "with handle.finish() before the optimizer), or DistributedDataParallel with "
                    "htv.distributed.ddp(ddp_model, handle)"
                )
        elif ranks.vote_alone() and not self.accumulates:
            ranks.refuse_alone(self.model)
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

    # -- a forward --------------------------------------------------------------------------------

    def run(self, forward: ForwardStandIn, args: tuple, kwargs: dict):
        """Run `forward(*args, **kwargs)`, a module's, under the mode if it is the outermost one and
        gradients are on.
        """
        running = self.running()
        if running is True:
            return forward.inner(*args, **kwargs)
        if running is not None and forward.layer is not None and args and not (args[1:] or kwargs):
            result = call_layer(running, forward.layer, forward.module, args[0])
            if result is not NotImplemented:
                return result
        if running is not None and running.task == torch._C._current_graph_task_id():
            if top_hooks(True) is not None or not torch.is_grad_enabled():  # checkpoints
                self._recent.note(running, forward, args, kwargs)
            return forward.inner(*args, **kwargs)
        if not torch.is_grad_enabled() or not self._tracked:
            self._begin(graph=False)
            with forward.frozen_statistics():
                return forward.inner(*args, **kwargs)
        mode, frozen = None, []
        try:
            mode = self.thread.running = self.open(forward, args, kwargs)
            if top_hooks(True) is not None or not torch.is_grad_enabled():  # checkpoints
                self._recent.note(mode, forward, args, kwargs)
            if forward.batch_norms:
                forward.freeze(frozen)
            torch._C._push_on_torch_function_stack(mode)
            result = forward.inner(*args, **kwargs)
            mode.remember(result)
            return result
        finally:
            try:
                self.close(mode, running)
            finally:
                if frozen:
                    thaw(frozen)

    def run_compiled(self, forward: ForwardStandIn, args: tuple, kwargs: dict):
        """Run `forward(*args, **kwargs)`, a module's, while torch.compile traces it."""
        from htv.engine.compile import calls  # Dynamo takes long to load

        return calls.call(forward, args, kwargs)

    def running(self) -> ServingMode | bool | None:
        """Return the forward under way in this thread; drop one that an interrupt left behind."""
        try:
            running = self.thread.running
        except AttributeError:  # the first in this thread
            running = None
        if running is None:
            return None
        if running is not True and running.block is not None:
            block = running.block()
            if block is not None and block.handles(running):
                return running
            self.thread.running = None
            return None
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code in PASSES:
                local = frame.f_locals
                owner = local["self"] if "self" in local else local.get("session")
                if owner is self:
                    return running
            frame = frame.f_back
        self.thread.running = None
        return None

    def open(
        self,
        forward: ForwardStandIn,
        args: tuple,
        kwargs: dict,
        names: tuple[str, ...] | None = None,
    ) -> ServingMode:
        """Make the mode of `forward`, called with `args` and `kwargs`, which starts now.

        names:  of the positional arguments, where they are not those of the forward.
        """
        if torch._C._len_torch_function_stack():
            left_on_stack(lambda mode: mode.is_stale())
        forward.check()
        several = self.rank_votes is not None or self.group_votes is not None
        if not self.only_means and (several or ranks.vote_alone()):
            self.check_ranks(forward)
        again, carried, spec, rows = None, {}, None, None
        usual = not kwargs and names is None and self.spec is None
        key = shapes_of(forward, args) if usual else None
        plan = None if key is None else self._plans.get(key)
        if plan is not None:
            self._begin(graph=True)
            groups, batch, rows = plan.groups, plan.of(args), plan.rows
        else:
            own = forward.names if names is None else names
            tensors = inputs.named_tensors(own, args, kwargs)
            plain = [t for _, t in tensors if isinstance(t, Tensor)]
            again = self._recent.run_again(forward, plain)
            if again is None:
                spec = self._begin(graph=True)
                wanted = self._wanted(forward, tensors, names)
                groups, batch, carried = self._who_votes(spec, tensors, wanted)
                if key is not None:
                    self._keep_plan(key, groups, batch, args)
            else:
                spec, groups = again.spec, again.groups
                source = again.batch.source
                batch = inputs.fitting(groups.batch_size, groups.input_layout.dim, tensors, source)
        for tracked in self._tracked.values():
            tracked.deferred = None
            if tracked.hook is None:
                tracked.watch()
        self.batch_source = batch.source
        self._sizes.add(groups.batch_size)
        self.latest_groups = groups
        if not groups.rows_vote and groups.count not in self._enough and not self.votes_later:
            self.require_enough(groups.count, batch.source)
            self._enough.add(groups.count)
        mode = ServingMode(self, groups, batch, again, carried, rows)
        mode.spec = spec
        return mode

    def _keep_plan(self, key: tuple, groups: Groups, batch: Batch, args: tuple) -> None:
        """Keep who votes in a forward for those that are called alike."""
        if len(self._plans) >= MOST_SIZES:
            self._plans.clear()
        self._plans[key] = CallPlan.for_call(groups, batch, args)

    def close(self, mode: ServingMode | None, outer: ServingMode | bool | None) -> None:
        """End the forward of `mode`; `outer` is the one around it, or None."""
        self.thread.running = outer
        if mode is None:
            return
        count = torch._C._len_torch_function_stack()
        if count and torch._C._get_function_stack_at(count - 1) is mode:
            torch._C._pop_torch_function_stack()
        elif count:
            left_on_stack(lambda other: other is mode)

    def require_enough(self, count: int, source: str) -> None:
        """Refuse too few groups, `count` of them, before anything runs; `source` is for
        messages.
        """
        for rule in self.rules:
            rule.statistic(count)
        self.require_several(count, source)

    # -- who votes in it --------------------------------------------------------------------------

    def _wanted(
        self, forward: ForwardStandIn, tensors: list, names: tuple[str, ...] | None
    ) -> tuple[str, ...]:
        """Return the arguments that the user named as the batch, as far as the call has them."""
        named = self.settings.batch
        if forward is self.root and names is None:
            return named
        own = {inputs.argument_of(name) for name, _ in tensors}
        return tuple(name for name in named if inputs.argument_of(name) in own)

    def batch_of(
        self, forward: ForwardStandIn, tensors: list, kind: str, size: int | None
    ) -> Batch:
        """Choose the batch of a call of `forward` by its `tensors` alone, for votes of this `kind`
        by `size` examples.
        """
        wanted = self._wanted(forward, tensors, None)
        return inputs.choose(tensors, self.settings.batch_dim, wanted, size, kind)

    def _who_votes(
        self, spec: GroupSpec | None, tensors: list, wanted: tuple[str, ...]
    ) -> tuple[Groups, Batch, dict[int, Mark]]:
        """Return groups, the call's batch, and what earlier forwards know of its tensors."""
        carried, earlier = carried_marks(tensors, self.own_marks, self._recent)
        fresh = [(name, t) for name, t in tensors if id(t) not in carried]
        dim = self.settings.batch_dim
        kind, size = ("each", None) if spec is None else (spec.kind, spec.size())
        if earlier is not None:
            batch = inputs.fitting(earlier.groups.batch_size, dim, fresh, earlier.source)
            alike = spec is not None and spec is earlier.spec
            neither = spec is None and earlier.spec is None and not earlier.groups.rows_vote
            if alike or neither:
                return earlier.groups, batch, carried
        elif in_backward() and len(self._sizes) == 1:  # a reentrant checkpoint's part
            batch = inputs.fitting(next(iter(self._sizes)), dim, fresh, self.batch_source)
            if not batch.members:
                batch = inputs.choose(fresh, dim, wanted, kind=kind)
        else:
            batch = inputs.choose(fresh, dim, wanted, size, kind)
        return groups_of(spec, batch, fresh), batch, carried

    def _begin(self, graph: bool) -> GroupSpec | None:
        """Return who votes in the forward that starts now, and keep it for its checkpoints.

        graph: whether gradients are on. A reentrant checkpoint runs its first forward without, as
               an evaluation does.
        """
        if torch._C._current_graph_task_id() != -1:
            if len(self._specs) > 1 and in_reentrant_checkpoint():
                raise RuntimeError(
                    "a reentrant activation checkpoint runs a forward again, but since the last "
                    "backward there were forwards with different groups() or packed(): whose votes "
                    "these are cannot be told. Call backward() before the next forward, or "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            return self._last_spec
        if graph:
            passes = self.passes
            passes.outer, passes.groups, passes.latest = {}, {}, (-1, None)
        if self.backward_started:
            self._specs, self.backward_started, self._last_spec = [], False, None
            self._sizes = set()
            self._recent.modes.clear()
        spec = self.spec
        if graph or spec is not None:
            self._last_spec = spec
            known = self._specs
            if not known:
                known.append(spec)
            elif len(known) < 2 and spec is not known[0] and not same_spec(spec, known[0]):
                known.append(spec)
        return spec


PASSES.add(Session.run.__code__)


def refuse_shared(model: nn.Module, rules: dict[str, Rule | None]) -> None:
    """Raise RuntimeError if another session serves a parameter of `model` that has one of
    `rules`.
    """
    mine = {id(p): name for name, p in model.named_parameters() if rules[name] is not None}
    for session in list(_sessions):
        for tracked in session.tracked():
            name = mine.get(id(tracked.parameter))
            if name is not None:
                raise RuntimeError(
                    f"parameter {name!r} is served by another handle already (as {tracked.name!r} "
                    f"of a {type(session.model).__name__}): detach that handle first, or "
                    f"exclude={name!r} from one of the two"
                )
