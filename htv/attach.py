"""Serving a whole model: `attach` makes every backward put the aggregated gradient into `.grad`."""

from __future__ import annotations

import fnmatch
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from htv import history, inputs, ranks
from htv.autograd.accumulation import MicroBatches, refuse_unless_streaming
from htv.autograd.ledger import Passes
from htv.errors import UnsupportedError
from htv.forward import ServedForward, thaw
from htv.groups import Groups, Place
from htv.history import Knowledge
from htv.inputs import Batch
from htv.intercept import Intercept, left_on_stack
from htv.marks import Derived, Lost, Mark, OfBatch
from htv.ops.agreement import Agreement
from htv.ops.factors import Factors
from htv.rules import Mean, Rule
from htv.served import Served, share_hubs
from htv.watched import PASSES

__all__ = ["Handle", "attach"]

RuleChoice = Rule | Callable[[str, nn.Parameter], Rule | None]


def attach(
    model: nn.Module,
    rule: RuleChoice,
    exclude: tuple[str, ...] | list[str] | str = (),
    on_unsupported: str = "error",
    stats: bool = False,
    batch_dim: int = 0,
    batch_norm: str = "error",
    batch: str | tuple[str, ...] | list[str] = (),
    methods: tuple[str, ...] | list[str] | str = (),
    allow_single: bool = False,
) -> Handle:
    """Aggregate the per-group gradients of a model's parameters by a rule.

    From then on ``loss.backward()`` (or `torch.autograd.grad`) gives each parameter ``E * stat({c_e})`` over the
    contributions c_e of the E groups of the batch, and any optimizer works unchanged. No class, parameter or state_dict
    key of the model changes; forwards without gradients run as before.

    model:           any module whose parameters are used in ways `htv.explain` lists as served. For what torch.compile
                     returned, the module it was made of; torch.compile may as well be called later.
    rule:            an `htv.Rule` for all parameters, or a callable (name, parameter) -> rule, or None for a plain
                     gradient.
    exclude:         parameters that keep their plain gradient: names, module names, or patterns such as "*.bias".
    on_unsupported:  "error" refuses a use whose contributions cannot be separated; "plain" warns once and lets the
                     contributions of that use be summed plainly.
    batch_dim:       the dim of the model's inputs that holds the examples: 1 for sequence-first models.
    batch_norm:      what becomes of BatchNorm modules in train mode, which couple the examples of a batch: "error"
                     refuses them; "frozen" runs them on their running statistics, which stay as they are; "shared" lets
                     an example's contribution be its rows' part of the plain gradient, with what passes through the
                     shared statistics.
    batch:           the arguments of the forward that hold the examples, by name: "input_ids", or
                     several where examples
                     come in two parts. Without it, all tensor arguments of one size in the batch's
                     dim are taken;
                     tensors of size 1 beside them are constants, and other sizes are refused.
    methods:         other methods of the model, or of its parts ("encoder.embed"), that are called
                     in its place and are
                     to be served as one forward: "training_step", "get_action_and_value".
    allow_single:    let a batch of one group pass, whose aggregate is its plain gradient, under
                     rules that need several.
    stats:           collect what `Handle.stats` returns, at about the price of aggregating every parameter once more.

    Raises TypeError or ValueError for bad arguments, RuntimeError if the model, a part of it or one of its parameters
    is attached already, or if a parameter has no shape yet.
    """
    while type(model).__name__ == "OptimizedModule":  # what torch.compile returns
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(rule, Rule) or (callable(rule) and not isinstance(rule, type))):
        raise TypeError(
            f"rule must be an htv rule such as htv.AndMask(0.4), or a callable (name, parameter) -> rule or None; "
            f"got {rule!r}"
        )
    if on_unsupported not in ("error", "plain"):
        raise ValueError(f"on_unsupported must be 'error' or 'plain', got {on_unsupported!r}")
    if batch_norm not in ("error", "frozen", "shared"):
        raise ValueError(f"batch_norm must be 'error', 'frozen' or 'shared', got {batch_norm!r}")
    if type(batch_dim) is not int or batch_dim < 0:
        raise ValueError(f"batch_dim must be a dim counted from the front, 0, 1, ...; got {batch_dim!r}")
    batch, methods = _as_names("batch", batch), _as_names("methods", methods)
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), ServedForward):
            raise RuntimeError(
                f"{'the model' if name == '' else f'module {name!r}'} is attached already: call detach() on its "
                "handle before attaching another rule"
            )
    rules = _choose_rules(model, rule, exclude)
    _refuse_shared(model, rules)
    _refuse_scripted(model, rules)
    sharded = ranks.sharded_by(model)
    if not all(type(r) is Mean for r in rules.values() if r is not None):
        ranks.refuse_sharded(model, sharded)
    elif sharded is not None:  # Mean() is the plain gradient, which the ranks bring together
        rules = dict.fromkeys(rules)
    served = _served_methods(model, methods)
    return Handle(model, rules, on_unsupported, stats, batch_dim, batch_norm, batch, served, allow_single)


def _as_names(argument: str, value) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a name or several, got {value!r}")
    return names


def _served_methods(model: nn.Module, methods: tuple[str, ...]) -> list[tuple[nn.Module, str, str]]:
    """(module, its path, name of the method) of what `methods` names."""
    found = []
    for method in methods:
        path, _, name = method.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"methods={method!r}: {type(model).__name__} has no part {path!r}") from None
        if name == "forward" or not callable(getattr(module, name, None)) or name in module._modules:
            raise ValueError(
                f"methods={method!r}: {type(module).__name__} has no method {name!r} to serve "
                "beside its forward"
            )
        found.append((module, path, name))
    return found


def _refuse_scripted(model: nn.Module, rules: dict[str, Rule | None]) -> None:
    """A ScriptModule runs where no mode sees it: its parameters cannot be served."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            inside = [n for n, _ in model.named_parameters() if n == path or n.startswith(f"{path}.") or not path]
            if any(rules.get(name) is not None for name in inside):
                what = f"its part {path!r}" if path else "it"
                raise UnsupportedError(
                    f"the model cannot be served: {what} was compiled by torch.jit.script or "
                    "trace, and htv does not see "
                    "what happens inside. Remedy: attach before scripting, keep that part in "
                    "Python, or "
                    f"exclude={path or '*'!r}"
                )


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()  # those attached


def _refuse_shared(model: nn.Module, rules: dict[str, Rule | None]) -> None:
    mine = {id(p): name for name, p in model.named_parameters() if rules[name] is not None}
    for handle in list(_handles):
        for served in handle.served():
            if id(served.parameter) in mine:
                raise RuntimeError(
                    f"parameter {mine[id(served.parameter)]!r} is served by another handle already (as "
                    f"{served.name!r} of a {type(handle.model).__name__}): detach that handle first, or "
                    f"exclude={mine[id(served.parameter)]!r} from one of the two"
                )


def _choose_rules(model: nn.Module, rule: RuleChoice, exclude) -> dict[str, Rule | None]:
    """Parameter name -> its rule, or None for a plain gradient; tied parameters go by their first name."""
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    unmatched = set(patterns)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise RuntimeError(
                f"parameter {name!r} is not initialized: it gets its shape from a first batch. Run the model once first"
            )
    rules: dict[str, Rule | None] = {}
    for name, parameter in model.named_parameters():
        hits = {p for p in patterns for alias in aliases[id(parameter)] if _matches(alias, p)}
        unmatched -= hits
        chosen = None if hits else rule if isinstance(rule, Rule) else rule(name, parameter)
        if chosen is not None and not isinstance(chosen, Rule):
            raise TypeError(f"the rule for parameter {name!r} must be an htv rule or None, got {chosen!r}")
        if not (parameter.dtype.is_floating_point or parameter.dtype.is_complex or parameter.requires_grad):
            chosen = None  # integers, which never have a gradient
        if chosen is not None and not parameter.dtype.is_floating_point:
            raise TypeError(
                f"parameter {name!r} is {parameter.dtype}: rules rank and count real numbers; exclude={name!r}"
            )
        rules[name] = chosen
    if unmatched:
        raise ValueError(
            f"exclude={sorted(unmatched)} matches no parameter; names are those of model.named_parameters()"
        )
    return rules


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True, eq=False)
class Voting:
    """Who votes in a forward, as asked for by `Handle.groups`, `packed` or `tokens`: kind "ids", "packed" or "rows"."""

    kind: str
    value: Tensor | None
    weight: str

    def size(self) -> int | None:
        """How many examples, or packed rows, it speaks of."""
        if self.value is None:
            return None
        if self.kind == "packed":
            return int(self.value[-1]) if len(self.value) else 0
        return len(self.value)


UNKNOWN = Voting("unknown", None, "size")  # who votes in a forward that left no note


class ForwardBlock:
    """The context manager of `Handle.forward`."""

    def __init__(self, handle: Handle, args: tuple, kwargs: dict):
        self._handle, self._args, self._kwargs = handle, args, kwargs
        self._mode: Intercept | None = None
        self._frozen: list[nn.Module] = []

    def __enter__(self) -> None:
        handle = self._handle
        handle._require_attached("forward")
        if handle._running() is not None:
            raise RuntimeError("handle.forward() inside another forward of the same handle: it is served already")
        if not torch.is_grad_enabled():
            return
        try:
            names = tuple(f"batch[{i}]" for i in range(len(self._args))) if len(self._args) > 1 else ("batch",)
            self._mode = handle._open(handle._root, self._args, self._kwargs, names)
            self._mode.block = weakref.ref(self)
            handle._thread.running = self._mode
            handle._root.freeze(self._frozen)
            self._mode.enter()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *_) -> None:
        mode, self._mode = self._mode, None
        try:
            self._handle._close(mode, None)
        finally:
            thaw(self._frozen)

    def serves(self, mode: Intercept) -> bool:
        """Whether the block is open and the mode its own."""
        return self._mode is mode


class Handle:
    """What `attach` returns: who votes, what was measured, and the way back. Also a context manager that detaches."""

    def __init__(
        self,
        model: nn.Module,
        rules: dict[str, Rule | None],
        on_unsupported: str,
        stats: bool,
        batch_dim: int,
        batch_norm: str,
        batch: tuple[str, ...] = (),
        methods: list[tuple[nn.Module, str, str]] | tuple = (),
        allow_single: bool = False,
    ):
        self.model, self.attached = model, True
        self._batch_dim, self.batch_norm, self._batch = batch_dim, batch_norm, batch
        self.collects_stats, self._on_unsupported, self._allow_single = stats, on_unsupported, allow_single
        self.examine: Callable[[str, list[Factors]], None] | None = (
            None  # shown what is recorded, instead of statistics
        )
        self._spec: Voting | None = None  # who votes, while a block of groups() or packed() is open
        self._last_spec = self._spec
        self._specs: list[Voting | None] = []  # since the last backward; at most two different ones
        self._sizes: set[int] = set()  # of the batches since the last backward
        self._differentiated = self._accumulates = False
        self.told_of_sums = self._told_of_ranks = False
        self._thread = threading.local()  # .running: the mode of the forward under way in this thread, or True
        self._checkpointed: deque[Intercept] = deque(maxlen=16)  # forwards that may be run again in parts
        self.passes = Passes()
        self.losses: dict[Lost, None] = {}  # calls at which the batch was lost, where a parameter came to need it
        self.batch_source = ""  # which argument the last forward took for the batch
        parameters = dict(model.named_parameters())
        self._served = {
            id(p): Served(self, name, p, rules[name]) for name, p in parameters.items() if rules[name] is not None
        }
        self.own_marks = {key: Derived((served,), served.parameter) for key, served in self._served.items()}
        self._hubs: dict[int, dict[Served, tuple[Served, ...]]] = {}  # by the number of groups, who shares one
        self._rules = {served.rule for served in self._served.values()}
        self.only_means = all(type(rule) is Mean for rule in self._rules)
        self._plain = [p for name, p in parameters.items() if rules[name] is None]
        self._modules = list(model.modules())
        self.settlements: list = []  # what compiled backwards of this model look up
        self._attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
        for served in self._served.values():
            served.watch()
        # Modules without parameters run plainly, but a checkpoint may run a frozen BatchNorm again by itself.
        also = nn.modules.batchnorm._BatchNorm if batch_norm == "frozen" else ()
        self._forwards = [
            ServedForward(self, module, path)
            for path, module in model.named_modules()
            if next(module.parameters(), None) is not None or isinstance(module, also) or module is model
            if not isinstance(module, torch.jit.ScriptModule)  # which runs plainly
        ]
        self._forwards += [ServedForward(self, module, path, name) for module, path, name in methods]
        self._root = self._forwards[0]
        for forward in self._forwards:
            forward.install()
        _handles.add(self)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<htv.Handle {state}: {len(self._served)} parameters of {type(self.model).__name__} served>"

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a handle cannot be copied or pickled: copy the model, and attach to the copy")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model exactly: forwards, hooks, nothing left behind. Detaching twice does nothing."""
        if not self.attached:
            return
        self.attached = False
        _handles.discard(self)
        left_on_stack(lambda mode: mode.handle is self)
        for forward in self._forwards:
            forward.restore()
        for served in self._served.values():
            served.unwatch()
        # What would keep the model alive in a circle.
        for forward in self._forwards:
            forward.let_go()
        self._forwards, self._root, self._thread = [], None, threading.local()
        self._checkpointed.clear()

    def _require_attached(self, method: str) -> None:
        if not self.attached:
            raise RuntimeError(
                f"{method}() of a detached handle would do nothing: the model has its plain "
                "gradients again. Call "
                "htv.attach for a new handle"
            )

    @contextmanager
    def groups(self, ids: Tensor, weight: str = "size") -> Iterator[None]:
        """Forwards inside the block let examples with equal ids vote together.

        ids:     (N,) integers, one per index of the batch's dim; any values in any order. For a
                 PackedSequence one per
                 example, in the order it was packed from, or one per row of its data.
        weight:  "size": a group's contribution is the sum of its examples', as the loss has it; "equal": it is scaled
                 as if every group had N / E examples, so that the mean of every group (environment) counts once.
        """
        with self._voters(Voting("ids", ids, weight), "groups"):
            yield

    @contextmanager
    def packed(self, cu_seqlens: Tensor, weight: str = "size") -> Iterator[None]:
        """Forwards inside the block take packed sequences: inputs of shape (total, ...) or (1, total, ...).

        cu_seqlens: (E + 1,) integers from 0 to total; rows cu_seqlens[e]:cu_seqlens[e + 1] vote together.
        weight:     as for `groups`.
        """
        with self._voters(Voting("packed", cu_seqlens, weight), "packed"):
            yield

    @contextmanager
    def tokens(self, mask: Tensor | None = None) -> Iterator[None]:
        """Forwards inside the block let every row a layer sees vote by itself: every token of every example.

        The contribution of a token is its row's part of the parameter's gradient, including what other tokens draw from
        it through attention. Layers on (..., features) can be served so; convolutions and parameters that differ from
        token to token (positions) are refused.

        mask: (N, T) booleans, True where a token votes; what the others (padding) contribute is left out.
        """
        with self._voters(Voting("rows", mask, "size"), "tokens"):
            yield

    @contextmanager
    def _voters(self, spec: Voting, method: str) -> Iterator[None]:
        self._require_attached(method)
        if spec.weight not in ("size", "equal"):
            raise ValueError(f"weight must be 'size' or 'equal', got {spec.weight!r}")
        if self._spec is not None:
            raise RuntimeError("groups(), packed() and tokens() blocks cannot be nested")
        if isinstance(spec.value, Tensor):  # the one time that a device is waited for
            spec = replace(spec, value=spec.value.cpu())
        try:
            self._spec = spec
            yield
        finally:
            self._spec = None

    def forward(self, *batch, **named) -> ForwardBlock:
        """Serve all that a block computes as one forward of the model.

        For code that calls parts of the model one by one: a training step, the methods of an
                                                           agent, a loss that uses
        parameters. What is computed between the calls is followed, too.

        batch, named: the tensors that hold the examples, in their dim `batch_dim`; tuples,
                      mappings and PackedSequences
                      of these as well.

        Returns a context manager. Raises RuntimeError inside another forward, ValueError if the
        tensors' sizes disagree.

            with handle.forward(x):
                loss = criterion(model.head(model.encode(x).flatten(0, 1)), y.flatten())
            loss.backward()
        """
        self._require_attached("forward")
        return ForwardBlock(self, batch, named)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let the groups of all backwards inside the block vote together, as if they were one large batch.

        Inside, served parameters get no gradient; the block's end adds the aggregated one to `.grad`, ready for
        clipping and the optimizer. Divide the loss by the number of micro-batches, as for plain accumulation. If the
        block raises, what it gathered is dropped. Hooks on served parameters do not run for what the block adds.

        Exact for streaming rules (masks, sums). Median, TrimmedMean and WinsorizedMean need all contributions at once
        and are refused; MedianOfMeans(k) takes k micro-batches of equally many groups as its buckets.

        Raises ValueError for such a rule or a group id that occurs in two micro-batches, RuntimeError for nested blocks
        and for torch.autograd.grad() inside.
        """
        self._require_attached("accumulate")
        if self._accumulates:
            raise RuntimeError("accumulate() blocks cannot be nested")
        if ranks.world_size() > 1:
            raise UnsupportedError(
                f"accumulate() with {ranks.world_size()} ranks: each rank would put its own "
                "aggregate into .grad, and the "
                "ranks' parameters would drift apart. Remedy: train in one process, or accumulate "
                "plainly"
            )
        for served in self._served.values():
            refuse_unless_streaming(served.rule, served.name)
        batches = MicroBatches()
        try:
            self._accumulates = True
            for served in self._served.values():
                served.accumulate(batches)
            yield
            batches.require_complete()
            if len(batches):
                self.require_several(batches.count, "all micro-batches of accumulate() together")
            with torch.no_grad():
                for served, grad in [(s, s.accumulation.result()) for s in self._served.values()]:
                    served.add_accumulated(grad)
        finally:
            self._accumulates = False
            for served in self._served.values():
                served.accumulate(None)

    @contextmanager
    def examined(self, see: Callable[[str, list[Factors]], None]) -> Iterator[None]:
        """Show what backwards record to a function, before it is aggregated, where forward and backward are inside.

        see: called as see(name, parts) once per served parameter and backward; the parameter's contributions are the
             sums of the parts' (`htv.ops.factors`, `htv.ops.agreement`). `stats` is not updated inside.
        """
        self._require_attached("examined")
        before = self.collects_stats, self.examine
        try:
            self.collects_stats, self.examine = True, see
            yield
        finally:
            self.collects_stats, self.examine = before

    def stats(self) -> dict[str, Agreement]:
        """Per parameter, `kept_fraction`, `mean_agreement` and `m_coherence` of its last backward.

        Needs ``attach(..., stats=True)``. Votes come from the path that serves sign counts, the sum of contributions
        from the plain gradient, their norms from the factors (by Gram matrices where groups have few rows): together
        about the price of aggregating once more. Only parameters used in several ways at once take a full sliced pass.
        Parameters that received no contribution yet are absent.
        """
        if not self.collects_stats:
            raise RuntimeError("statistics are not collected: attach with stats=True (it costs one more pass)")
        return {s.name: s.agreement for s in self._served.values() if s.agreement is not None}

    # -- for the intercepting mode ------------------------------------------------------------------------------------

    def served_parameter(self, tensor) -> Served | None:
        served = self._served.get(id(tensor))
        return served if served is not None and tensor.requires_grad else None

    def hub_of(self, served: Served, groups: Groups) -> tuple[Served, ...]:
        """The parameters that share a hub with this one, itself among them."""
        if groups.rows_vote or self._accumulates:
            return (served,)
        hubs = self._hubs.get(groups.count)
        if hubs is None:
            if len(self._hubs) >= 16:
                self._hubs.clear()
            hubs = self._hubs[groups.count] = share_hubs(self._served.values(), groups)
        return hubs.get(served, (served,))

    def served(self) -> list[Served]:
        """All served parameters."""
        return list(self._served.values())

    def constants(self) -> Iterator[Tensor]:
        """Tensors of the model that are not served: buffers, plain tensor attributes, frozen or excluded parameters."""
        yield from (b for module in self._modules for b in module._buffers.values() if b is not None)
        yield from self._attributes
        yield from self._plain
        yield from (s.parameter for s in self._served.values() if not s.parameter.requires_grad)

    @property
    def shares_statistics(self) -> bool:
        """Whether contributions may include what passes through the statistics of a BatchNorm in train mode."""
        return self.batch_norm == "shared"

    @property
    def passes_plainly(self) -> bool:
        """Whether uses that cannot be served are passed on plainly, with a warning."""
        return self._on_unsupported == "plain"

    def unsupported(self, message: str, parameters: tuple[Served, ...]) -> None:
        """Refuse a use of parameters, or note that its contributions are summed plainly."""
        if self._on_unsupported == "error":
            raise UnsupportedError(message)
        if any(served.refusal is None for served in parameters):
            warnings.warn(f"{message} (summed plainly, as on_unsupported='plain' asks)", stacklevel=3)
        for served in parameters:
            served.refusal = message

    def forwards_of(self, module: nn.Module) -> list[ServedForward]:
        """What stands in for methods of a module."""
        return [forward for forward in self._forwards if forward.module is module]

    def stands_in(self, tensor: Tensor) -> str | None:
        """The name under which an attached module has a tensor that it did not have when it was attached, or None."""
        if self.only_means:  # whose gradient is the plain one
            return None
        for path, module in self.model.named_modules():
            for name, value in (*module._parameters.items(), *vars(module).items()):
                if value is tensor:
                    return f"{path}.{name}".lstrip(".")
        return None

    def require_several(self, count: int, source: str) -> None:
        """Refuse a batch of one group under a rule that needs several."""
        if count != 1 or self._allow_single:
            return
        rule = next((r for r in self._rules if r.needs_several), None)
        if rule is not None:
            raise ValueError(
                f"one group alone votes ({source}): the aggregate of one contribution under {rule} "
                "is its plain "
                "gradient. This is also how trainers with one example per device end in plain "
                "training. Remedy: larger "
                "batches, htv.attach(..., batch='the argument that holds the examples') if another "
                "was meant, `with "
                "handle.accumulate():` around micro-batches, or allow_single=True if the plain "
                "gradient is meant here"
            )

    def note_loss(self, lost: Lost) -> None:
        """Remember where the batch was lost, once a parameter came to need it."""
        self.losses[lost] = None

    def warn_of_sums(self, served: Served) -> None:
        """Say once that several backwards were added up in `.grad`."""
        self.told_of_sums = True
        warnings.warn(
            f"a backward adds to the aggregate that .grad of {served.name!r} holds from an earlier "
            "backward: each backward "
            "is a vote of its own, so micro-batches that a trainer accumulates do not vote "
            "together. Use `with "
            "handle.accumulate():` around the micro-batches of a step, or zero_grad() between the "
            "backwards",
            stacklevel=2,
        )

    def run(self, forward: ServedForward, args: tuple, kwargs: dict):
        """Run a module's forward, under the mode if it is the outermost one and gradients are wanted."""
        running = self._running()
        if running is True or (running is not None and running.task == torch._C._current_graph_task_id()):
            if running is not True:
                self._note_checkpoint(running, forward, args, kwargs)
            return forward.inner(*args, **kwargs)
        if not torch.is_grad_enabled() or not self._served:
            self._remember(graph=False)
            with forward.frozen_statistics():
                return forward.inner(*args, **kwargs)
        mode = None
        try:
            mode = self._thread.running = self._open(forward, args, kwargs)
            self._note_checkpoint(mode, forward, args, kwargs)
            mode.enter()
            with forward.frozen_statistics():
                result = forward.inner(*args, **kwargs)
            mode.remember(result)
            return result
        finally:
            self._close(mode, running)

    def _running(self) -> Intercept | bool | None:
        """The forward under way in this thread; one that an interrupt left behind is dropped."""
        running = getattr(self._thread, "running", None)
        if running is None:
            return None
        if running is not True and running.block is not None:
            block = running.block()
            if block is not None and block.serves(running):
                return running
            self._thread.running = None
            return None
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code in PASSES:
                local = frame.f_locals
                if (local.get("self") or local.get("handle")) is self:
                    return running
            frame = frame.f_back
        self._thread.running = None
        return None

    def _open(
        self, forward: ServedForward, args: tuple, kwargs: dict, names: tuple[str, ...] | None = None
    ) -> Intercept:
        """The mode of a forward that starts now."""
        left_on_stack(lambda mode: mode.is_stale())
        forward.check()
        if not self.only_means:
            ranks.refuse_data_parallel()
            self._warn_of_ranks()
        tensors = inputs.named_tensors(forward.names if names is None else names, args, kwargs)
        again = self._forward_run_again(forward, [t for _, t in tensors if isinstance(t, Tensor)])
        carried: dict[int, Mark] = {}
        if again is None:
            spec = self._remember(graph=True)
            groups, batch, carried = self._who_votes(spec, tensors, self._wanted(forward, tensors, names))
        else:
            spec, groups = again.spec, again.groups
            batch = _fitting(groups.num_units, groups.home.dim, tensors, again.batch.source)
        for served in self._served.values():
            served.watch()
        self.batch_source = batch.source
        self._sizes.add(groups.num_units)
        if not groups.rows_vote and not self._accumulates:
            for rule in self._rules:
                rule.statistic(groups.count)  # refuse too few groups before anything runs
            self.require_several(groups.count, batch.source)
        mode = Intercept(self, groups, batch, again, carried)
        mode.spec = spec
        return mode

    def _close(self, mode: Intercept | None, outer: Intercept | bool | None) -> None:
        self._thread.running = outer
        if mode is not None:
            left_on_stack(lambda other: other is mode)

    def _warn_of_ranks(self) -> None:
        if not self._told_of_ranks and ranks.world_size() > 1:
            self._told_of_ranks = True
            warnings.warn(
                f"{ranks.world_size()} ranks are initialised, but the examples of each vote by "
                "themselves: averaging .grad "
                "over ranks would average votes. Use htv.Mean() there, or train in one process",
                stacklevel=4,
            )

    def _note_checkpoint(self, mode: Intercept, forward: ServedForward, args: tuple, kwargs: dict) -> None:
        """Remember what activation checkpointing may ask for when it runs this part of a forward again."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None and mode not in self._checkpointed:
            self._checkpointed.append(mode)
        if not torch.is_grad_enabled():  # a reentrant one
            forward.misplaced = forward.misplaced or any(mode.misplaced(t) for t in _tensors(args, kwargs))

    def _forward_run_again(self, forward: ServedForward, tensors: list[Tensor]) -> Intercept | None:
        """The forward of which activation checkpointing runs a part again, as far as its inputs show it."""
        if torch._C._current_graph_task_id() == -1:
            return None
        if forward.misplaced and _in_reentrant_checkpoint():
            raise RuntimeError(
                "a reentrant activation checkpoint runs a module again whose inputs do not have the batch where the "
                "model's have it, or come from parameters: which part is whose cannot be told. Call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        known = (mode for mode in reversed(self._checkpointed) if any(mode.marks.get(t) is not None for t in tensors))
        return next(known, None)

    def _wanted(self, forward: ServedForward, tensors: list, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """The arguments that `attach(batch=...)` named, as far as they are arguments of what is called."""
        if forward is self._root and names is None:
            return self._batch
        own = {name.partition(".")[0].partition("[")[0] for name, _ in tensors}
        return tuple(name for name in self._batch if name.partition(".")[0].partition("[")[0] in own)

    def batch_of(self, forward: ServedForward, tensors: list, kind: str, size: int | None) -> Batch:
        """The batch of a call, by its tensors alone."""
        return inputs.choose(tensors, self._batch_dim, self._wanted(forward, tensors, None), size, kind)

    def _who_votes(self, spec: Voting | None, tensors: list, wanted: tuple[str, ...]) -> tuple:
        """Groups, the call's batch, and what earlier forwards know of its tensors.

        wanted: the arguments the caller named as the batch.
        """
        carried, earlier = self._carried(tensors)
        fresh = [(name, t) for name, t in tensors if id(t) not in carried]
        dim = self._batch_dim
        if earlier is not None:
            batch = _fitting(earlier.groups.num_units, dim, fresh, earlier.source)
            if spec is None and earlier.spec is None and not earlier.groups.rows_vote:
                return earlier.groups, batch, carried
            if spec is not None and spec is earlier.spec:
                return earlier.groups, batch, carried
        elif torch._C._current_graph_task_id() != -1 and len(self._sizes) == 1:  # a reentrant checkpoint's part
            batch = _fitting(next(iter(self._sizes)), dim, fresh, self.batch_source)
            if not batch.members:
                batch = inputs.choose(fresh, dim, wanted, kind="each" if spec is None else spec.kind)
        else:
            kind, size = ("each", None) if spec is None else (spec.kind, spec.size())
            batch = inputs.choose(fresh, dim, wanted, size, kind)
        return _groups(spec, batch, fresh), batch, carried

    def _carried(self, tensors: list) -> tuple[dict[int, Mark], Knowledge | None]:
        """What earlier forwards know of this call's tensors, by identity, and the one that knows where the batch is."""
        carried: dict[int, Mark] = {}
        earlier: list[Knowledge] = []
        graphed = [(name, t) for name, t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
        inside = self._inside_checkpointed() if graphed else {}
        for name, tensor in graphed:
            met: list[Knowledge] = []
            known = lambda node, number, met=met: self._known_before(node, number, inside, met)
            mark = history.mark_of(tensor, lambda met=met: met[0].groups.num_units, known)
            sizes = {k.groups.num_units for k in (*earlier, *met)}
            if len(sizes) > 1:
                raise ValueError(
                    f"argument {name!r} comes from forwards of "
                    f"{' and '.join(map(str, sorted(sizes)))} examples: whose "
                    "rows are whose cannot be told. Remedy: run the calls of one step inside `with "
                    "handle.forward(batch):`"
                )
            if isinstance(mark, Derived) and mark.source is None:
                mark = Derived(mark.parameters, tensor)
            if isinstance(mark, (OfBatch, Derived)):
                carried[id(tensor)] = mark
                earlier += met
        return carried, earlier[0] if earlier else None

    def _inside_checkpointed(self) -> dict[tuple[int, int], tuple]:
        """In a backward, the nodes of forwards of which a checkpoint may run parts again by themselves."""
        if torch._C._current_graph_task_id() == -1:
            return {}
        return {
            (id(node), number): (node, mark, Knowledge(mode.groups, mode.spec, mode.batch.source))
            for mode in self._checkpointed
            for node, number, mark in mode.marks.nodes()
        }

    def _known_before(self, node, number: int, inside: dict, met: list[Knowledge]) -> Mark | None:
        """The mark of a node's output by what earlier forwards noted, of this handle or another."""
        found = inside.get((id(node), number))
        if found is not None:
            met.append(found[2])
            return found[1]
        noted = history.remembered(node, number)
        if noted is not None:
            met.append(noted[0])
            return noted[1]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return self.own_marks.get(id(leaf))
        voters = history.voters_of(node)
        if voters is not None:  # inside an earlier forward, which did not return this tensor
            met.append(Knowledge(voters.groups, UNKNOWN, "the batch of an earlier forward"))
            return voters.place
        return None

    def _remember(self, graph: bool) -> Voting | None:
        """Who votes in the forward that starts now, kept for the time activation checkpointing runs it again.

        graph:  whether gradients are on; a reentrant checkpoint runs its first forward without, as an evaluation does.
        """
        if torch._C._current_graph_task_id() != -1:
            if len(self._specs) > 1 and _in_reentrant_checkpoint():
                raise RuntimeError(
                    "a reentrant activation checkpoint runs a forward again, but since the last backward there were "
                    "forwards with different groups() or packed(): whose votes these are cannot be told. Call "
                    "backward() before the next forward, or torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            return self._last_spec
        if graph:
            self.passes.forget()
        if self._differentiated:
            self._specs, self._differentiated, self._last_spec, self._sizes = [], False, None, set()
            self._checkpointed.clear()
        if graph or self._spec is not None:
            self._last_spec = self._spec
            if len(self._specs) < 2 and not any(_same_spec(self._spec, spec) for spec in self._specs):
                self._specs.append(self._spec)
        return self._spec

    def settled(self) -> None:
        """A backward has reached a parameter: the forwards before it are taken to be done with."""
        self._differentiated = True


PASSES.add(Handle.run.__code__)


def _fitting(size: int, dim: int, tensors: list, source: str) -> Batch:
    """The tensors of a call that have a size known before; none of them says by itself what the batch is."""
    batch = inputs.Batch(size, Place(dim), source=source)
    for name, t in tensors:
        if isinstance(t, PackedSequence):
            raise UnsupportedError(f"argument {name!r} is a PackedSequence beside a batch that comes from elsewhere")
        if t.layout == torch.strided and not t.is_nested and t.dim() > dim and t.shape[dim] == size:
            batch.members.append((name, t, batch.home, False))
        else:
            batch.constants.append(t)
    return batch


def _groups(spec: Voting | None, batch: Batch, tensors: list) -> Groups:
    size, dim = batch.num_units, batch.home.dim
    if spec is None:
        return Groups.each(size, dim)
    if spec.kind == "rows":
        return Groups.each_row(size, dim, spec.value)
    sequences = [t for _, t in tensors if isinstance(t, PackedSequence)]
    if spec.kind == "packed":
        if sequences:
            raise UnsupportedError("packed() speaks of rows one after another, not of a PackedSequence: leave it out")
        return Groups.packed(spec.value, size, dim, spec.weight)
    ids = spec.value
    if sequences and len(ids) != size:
        ids = inputs.ids_of_examples(torch.as_tensor(ids), batch)
    return Groups.by_id(ids, size, dim, spec.weight)


def _in_reentrant_checkpoint() -> bool:
    """Whether the backward pass under way is in the node of a reentrant activation checkpoint."""
    return "Checkpoint" in type(torch._C._current_autograd_node()).__name__


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _same_spec(a: Voting | None, b: Voting | None) -> bool:
    if a is None or b is None:
        return a is b
    if (a.kind, a.weight) != (b.kind, b.weight) or a.value is None or b.value is None:
        return (a.kind, a.weight) == (b.kind, b.weight) and a.value is b.value
    return a.value is b.value or torch.equal(torch.as_tensor(a.value), torch.as_tensor(b.value))
