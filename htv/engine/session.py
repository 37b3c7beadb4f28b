"""One attachment of a rule to a model: its parameters, and the forwards under way."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from htv.autograd.aggregation import NestedBackwards
from htv.engine import handlers, inputs, ranks
from htv.engine.call_plan import CallPlan, shapes_of
from htv.engine.eager_helpers import hold_eager
from htv.engine.forward import ForwardStandIn, thaw
from htv.engine.guard_state import PASSES
from htv.engine.inputs import Batch
from htv.engine.joint_votes import JointVotes
from htv.engine.mode import ServingMode, left_on_stack
from htv.engine.parameter import TrackedParameter, share_nodes
from htv.engine.provenance import FromParameters, Lost, Mark
from htv.engine.usual import call_layer
from htv.engine.voters import Voters
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.ops.factors import Factors
from htv.rules import Mean, Rule

__all__ = ["Session", "Settings"]

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
        self.told_of_sums = self._told_of_one = False
        self.thread = threading.local()  # .running: the forward under way in this thread, or True
        self.passes = NestedBackwards()
        self.differentiated = -1  # the last pass in which a use's backward was given a graph
        # Calls at which the batch was lost, where a parameter came to need it.
        self.losses: dict[Lost, None] = {}
        self.settlements: list = []  # what compiled backwards of this model look up

        self.voters = Voters(settings.batch, settings.batch_dim, self.passes)
        self.joint = JointVotes(self)
        self.latest_groups: Groups | None = None  # of the last forward with a graph

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
        self._buffers = [module._buffers for module in model.modules()]
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
        self.joint.end()
        left_on_stack(lambda mode: mode.session is self)
        for forward in self._forwards:
            forward.restore()
        for tracked in self._tracked.values():
            tracked.unwatch()
        for forward in self._forwards:
            forward.let_go()
        self._forwards, self.root, self.thread = [], None, threading.local()
        self._plans, self._found, self._nodes = {}, {}, {}
        self.voters.recent.modes.clear()

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
        if groups.rows_vote or self.joint.later or not self._shares_nodes:
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
        for buffers in self._buffers:
            if buffers:
                yield from buffers.values()
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
                self.voters.recent.note(running, forward, args, kwargs)
            return forward.inner(*args, **kwargs)
        if not torch.is_grad_enabled() or not self._tracked:
            self.voters.begin(graph=False)
            with forward.frozen_statistics():
                return forward.inner(*args, **kwargs)
        mode, frozen = None, []
        try:
            mode = self.thread.running = self.open(forward, args, kwargs)
            mode.frame = sys._getframe()
            if top_hooks(True) is not None or not torch.is_grad_enabled():  # checkpoints
                self.voters.recent.note(mode, forward, args, kwargs)
            if forward.batch_norms:
                forward.freeze(frozen)
            if "torch._dynamo" in sys.modules:
                mode.eager = hold_eager()
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
        frame, known = sys._getframe(2), None if running is True else running.frame
        while frame is not None:
            if frame is known or (known is None and self._runs(frame)):
                return running
            frame = frame.f_back
        self.thread.running = None
        return None

    def _runs(self, frame: FrameType) -> bool:
        """Tell whether a forward of this session is under way in `frame`."""
        if frame.f_code not in PASSES:
            return False
        local = frame.f_locals
        return (local["self"] if "self" in local else local.get("session")) is self

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
        joint = self.joint
        several = joint.of_ranks is not None or joint.of_group is not None
        if not self.only_means and (several or ranks.vote_alone()):
            joint.check_ranks(forward)
        again, carried, spec, rows = None, {}, None, None
        usual = not kwargs and names is None and self.voters.spec is None
        key = shapes_of(forward, args) if usual else None
        plan = None if key is None else self._plans.get(key)
        if plan is not None:
            self.voters.begin(graph=True)
            groups, batch, rows = plan.groups, plan.of(args), plan.rows
        else:
            own = forward.names if names is None else names
            said, asked = self.voters.spec, self.settings.batch if forward is self.root else ()
            size = None if said is None else said.size()
            tensors = inputs.named_tensors(own, args, kwargs, asked, size)
            plain = [t for _, t in tensors if isinstance(t, Tensor)]
            again = self.voters.recent.run_again(forward, plain)
            if again is None:
                spec = self.voters.begin(graph=True)
                whole = forward is self.root and names is None
                wanted = self.settings.batch if whole else self.voters.named_in(tensors)
                if not wanted and spec is None and names is None and forward.method == "forward":
                    given = [name for name, _ in tensors]
                    wanted = handlers.batch_argument(forward.module, given)
                groups, batch, carried = self.voters.of_call(spec, tensors, wanted, self.own_marks)
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
        self.voters.source = batch.source
        self.voters.sizes.add(groups.batch_size)
        self.latest_groups = groups
        if not groups.rows_vote and groups.count not in self._enough and not self.joint.later:
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
        mode.frame = mode.eager = None
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
