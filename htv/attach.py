"""Serving a whole model: `attach` makes every backward put the aggregated gradient into `.grad`."""

from __future__ import annotations

import fnmatch
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htv import layers
from htv.autograd.accumulation import MicroBatches, refuse_unless_streaming
from htv.autograd.ledger import Passes
from htv.errors import UnsupportedError
from htv.groups import Groups
from htv.intercept import Intercept
from htv.marks import Derived
from htv.ops.agreement import Agreement
from htv.ops.factors import Factors
from htv.rules import Rule
from htv.served import Served, share_hubs
from htv.watched import Watched, register

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
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), _ServedForward):
            raise RuntimeError(
                f"{'the model' if name == '' else f'module {name!r}'} is attached already: call detach() on its "
                "handle before attaching another rule"
            )
    rules = _choose_rules(model, rule, exclude)
    _refuse_shared(model, rules)
    return Handle(model, rules, on_unsupported, stats, batch_dim, batch_norm)


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


def _members(module: nn.Module) -> list[int]:
    """Its parameters and parts by identity, in less time than to list those of the whole tree."""
    return [*map(id, module._parameters.values()), *map(id, module._modules.values())]


@dataclass(frozen=True, eq=False)
class Voting:
    """Who votes in a forward, as asked for by `Handle.groups`, `packed` or `tokens`: kind "ids", "packed" or "rows"."""

    kind: str
    value: Tensor | None
    weight: str


class _ServedForward:
    """Stands in for a module's forward while it is attached; the outermost one enters the intercepting mode.

    Copies of the module, by copy.deepcopy, pickle or torch.save, are made as if it were not attached.
    """

    def __init__(self, handle: Handle, module: nn.Module, path: str):
        self.handle, self.module, self.path = handle, module, path
        self.inner = module.forward
        self.astray = False  # whether it ran without gradients on inputs unlike those of the model
        self.parameters = [id(p) for p in module.parameters()]
        self._tree = [(m, _members(m)) for m in module.modules()]
        self.batch_norms = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._ours = {"forward": self, "__reduce_ex__": self._reduce_module}
        self.key, self.watched = register(self), Watched(module)  # for torch.compile
        # Instance attributes of the user's, if any.
        self._own = {key: module.__dict__[key] for key in self._ours if key in module.__dict__}

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            from htv import compiled

            return compiled.call(self, args, kwargs)
        try:
            return self.handle.run(self, args, kwargs)
        except UnsupportedError as error:
            error.locate(self.path, type(self.module).__name__)
            raise

    def install(self) -> None:
        self.module.__dict__.update(self._ours)

    def check(self) -> None:
        """Refuse before anything runs: replaced parameters; a BatchNorm, which counts its batches first."""
        if any(_members(m) != known for m, known in self._tree) and (
            [id(p) for p in self.module.parameters()] != self.parameters
        ):
            known = set(self.parameters)
            new = (repr(n) for n, p in self.module.named_parameters() if id(p) not in known)
            raise RuntimeError(
                f"the model's parameters changed while attached: {next(new, 'some')} is not what it was, or is gone (a "
                "module was exchanged, load_state_dict(assign=True) or functional_call was used, ...): detach and "
                "attach again"
            )
        self.check_batch_norm()

    def check_batch_norm(self) -> None:
        """Refuse a BatchNorm in train mode, unless the handle was told what to do about it."""
        for name, module in self.batch_norms if self.handle.batch_norm == "error" else ():
            if module.training:
                raise UnsupportedError(layers.batch_norm_refusal(f"module {name!r}"))

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Run BatchNorm modules on their running statistics, where the handle was told to."""
        frozen = self.batch_norms if self.handle.batch_norm == "frozen" else ()
        training = [module for _, module in frozen if module.training and module.running_mean is not None]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def restore(self) -> None:
        """Take out what `install` put in, unless the user has replaced it since."""
        attributes = self.module.__dict__
        for key, value in self._ours.items():
            if attributes.get(key) is value:
                del attributes[key]
                if key in self._own:
                    attributes[key] = self._own[key]

    def _reduce_module(self, protocol):
        """The module's `__reduce_ex__`, as it would be without htv."""
        attributes = self.module.__dict__
        before = {key: attributes[key] for key in self._ours if key in attributes}
        self.restore()
        try:
            result = self.module.__reduce_ex__(protocol)
            if isinstance(result, tuple) and len(result) > 2 and result[2] is attributes:
                result = (*result[:2], dict(attributes), *result[3:])
            return result
        finally:
            attributes.update(before)

    def __reduce_ex__(self, protocol):
        raise RuntimeError("this module cannot be copied or pickled while attached: call detach() on its handle first")


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
    ):
        self.model, self.attached = model, True
        self._batch_dim, self.batch_norm = batch_dim, batch_norm
        self.collects_stats, self._on_unsupported = stats, on_unsupported
        self.examine: Callable[[str, list[Factors]], None] | None = (
            None  # shown what is recorded, instead of statistics
        )
        self._spec: Voting | None = None  # who votes, while a block of groups() or packed() is open
        self._last_spec = self._spec
        self._specs: list[Voting | None] = []  # since the last backward; at most two different ones
        self._differentiated = self._accumulates = False
        self._thread = threading.local()  # .running: the mode of the forward under way in this thread, or True
        self._checkpointed: deque[Intercept] = deque(maxlen=16)  # forwards that may be run again in parts
        self.passes = Passes()
        parameters = dict(model.named_parameters())
        self._served = {
            id(p): Served(self, name, p, rules[name]) for name, p in parameters.items() if rules[name] is not None
        }
        self.own_marks = {key: Derived((served,), served.parameter) for key, served in self._served.items()}
        self._hubs: dict[int, dict[Served, tuple[Served, ...]]] = {}  # by the number of groups, who shares one
        self._rules = {served.rule for served in self._served.values()}
        self._plain = [p for name, p in parameters.items() if rules[name] is None]
        self._modules = list(model.modules())
        self.settlements: list = []  # what compiled backwards of this model look up
        self._attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
        for served in self._served.values():
            served.watch()
        # Modules without parameters run plainly, but a checkpoint may run a frozen BatchNorm again by itself.
        also = nn.modules.batchnorm._BatchNorm if batch_norm == "frozen" else ()
        self._forwards = [
            _ServedForward(self, module, path)
            for path, module in model.named_modules()
            if next(module.parameters(), None) is not None or isinstance(module, also)
        ]
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
        for forward in self._forwards:
            forward.restore()
        for served in self._served.values():
            served.unwatch()

    @contextmanager
    def groups(self, ids: Tensor, weight: str = "size") -> Iterator[None]:
        """Forwards inside the block let examples with equal ids vote together.

        ids:     (N,) integers, one per index of the batch's dim; any values in any order.
        weight:  "size": a group's contribution is the sum of its examples', as the loss has it; "equal": it is scaled
                 as if every group had N / E examples, so that the mean of every group (environment) counts once.
        """
        with self._voters(Voting("ids", ids, weight)):
            yield

    @contextmanager
    def packed(self, cu_seqlens: Tensor, weight: str = "size") -> Iterator[None]:
        """Forwards inside the block take packed sequences: inputs of shape (total, ...) or (1, total, ...).

        cu_seqlens: (E + 1,) integers from 0 to total; rows cu_seqlens[e]:cu_seqlens[e + 1] vote together.
        weight:     as for `groups`.
        """
        with self._voters(Voting("packed", cu_seqlens, weight)):
            yield

    @contextmanager
    def tokens(self, mask: Tensor | None = None) -> Iterator[None]:
        """Forwards inside the block let every row a layer sees vote by itself: every token of every example.

        The contribution of a token is its row's part of the parameter's gradient, including what other tokens draw from
        it through attention. Layers on (..., features) can be served so; convolutions and parameters that differ from
        token to token (positions) are refused.

        mask: (N, T) booleans, True where a token votes; what the others (padding) contribute is left out.
        """
        with self._voters(Voting("rows", mask, "size")):
            yield

    @contextmanager
    def _voters(self, spec: Voting) -> Iterator[None]:
        if spec.weight not in ("size", "equal"):
            raise ValueError(f"weight must be 'size' or 'equal', got {spec.weight!r}")
        if self._spec is not None:
            raise RuntimeError("groups(), packed() and tokens() blocks cannot be nested")
        if isinstance(spec.value, Tensor):  # the one time that a device is waited for
            spec = replace(spec, value=spec.value.cpu())
        self._spec = spec
        try:
            yield
        finally:
            self._spec = None

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
        if self._accumulates:
            raise RuntimeError("accumulate() blocks cannot be nested")
        for served in self._served.values():
            refuse_unless_streaming(served.rule, served.name)
        batches = MicroBatches()
        for served in self._served.values():
            served.accumulate(batches)
        self._accumulates = True
        try:
            yield
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
        before = self.collects_stats, self.examine
        self.collects_stats, self.examine = True, see
        try:
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

    def run(self, forward: _ServedForward, args: tuple, kwargs: dict):
        """Run a module's forward, under the mode if it is the outermost one and gradients are wanted."""
        running = getattr(self._thread, "running", None)
        if running:
            if isinstance(running, Intercept):
                self._note_checkpoint(running, forward, args, kwargs)
            return forward.inner(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._remember(graph=False)
            with forward.frozen_statistics():
                return forward.inner(*args, **kwargs)
        forward.check()
        inputs = _tensors(args, kwargs)
        again = self._forward_run_again(forward, inputs)
        groups = self._groups(inputs) if again is None else again.groups
        for served in self._served.values():
            served.watch()
        if not groups.rows_vote and not self._accumulates:
            for rule in self._rules:
                rule.statistic(groups.count)  # refuse too few groups before anything runs
        mode = self._thread.running = Intercept(self, groups, inputs, again)
        self._note_checkpoint(mode, forward, args, kwargs)
        try:
            with mode, forward.frozen_statistics():
                return forward.inner(*args, **kwargs)
        finally:
            self._thread.running = None

    def _note_checkpoint(self, mode: Intercept, forward: _ServedForward, args: tuple, kwargs: dict) -> None:
        """Remember what activation checkpointing may ask for when it runs this part of a forward again."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None and mode not in self._checkpointed:
            self._checkpointed.append(mode)
        if not torch.is_grad_enabled():  # a reentrant one
            forward.astray = forward.astray or any(mode.astray(t) for t in _tensors(args, kwargs))

    def _forward_run_again(self, forward: _ServedForward, inputs: list[Tensor]) -> Intercept | None:
        """The forward of which activation checkpointing runs a part again, as far as its inputs show it."""
        if torch._C._current_graph_task_id() == -1:
            return None
        if forward.astray and _in_reentrant_checkpoint():
            raise RuntimeError(
                "a reentrant activation checkpoint runs a module again whose inputs do not have the batch where the "
                "model's have it, or come from parameters: which part is whose cannot be told. Call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        known = (mode for mode in reversed(self._checkpointed) if any(mode.marks.get(t) is not None for t in inputs))
        return next(known, None)

    def _groups(self, inputs: list[Tensor]) -> Groups:
        spec = self._remember(graph=True)
        dim = self._batch_dim
        batch = next((t for t in inputs if t.dim() > dim), None)
        size = None if batch is None else batch.shape[dim]
        if spec is None or spec.kind == "rows":
            if batch is None:
                raise ValueError(
                    f"the forward has no tensor argument whose dim {dim} could be the batch: say who votes with "
                    "`with handle.groups(ids)`"
                )
            return Groups.each(size, dim) if spec is None else Groups.each_row(size, dim, spec.value)
        if spec.kind == "ids":
            return Groups.by_id(spec.value, len(spec.value) if batch is None else size, dim, spec.weight)
        total = int(spec.value[-1]) if len(spec.value) else 0
        if batch is not None and batch.dim() > 1 and tuple(batch.shape[:2]) == (1, total):
            dim, size = 1, total
        return Groups.packed(spec.value, total if batch is None else size, dim, spec.weight)

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
            self._specs, self._differentiated, self._last_spec = [], False, None
            self._checkpointed.clear()
        if graph or self._spec is not None:
            self._last_spec = self._spec
            if len(self._specs) < 2 and not any(_same_spec(self._spec, spec) for spec in self._specs):
                self._specs.append(self._spec)
        return self._spec

    def settled(self) -> None:
        """A backward has reached a parameter: the forwards before it are taken to be done with."""
        self._differentiated = True


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
