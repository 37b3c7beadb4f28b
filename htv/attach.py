"""`htv.attach`: every backward of a model puts the aggregated gradient into `.grad`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from htv.engine import ranks
from htv.engine.forward import ForwardStandIn
from htv.engine.forward_block import ForwardBlock
from htv.engine.group_spec import GroupSpec
from htv.engine.session import Session, Settings, refuse_shared
from htv.errors import UnsupportedError
from htv.ops.agreement import Agreement
from htv.ops.factors import Factors
from htv.rules import Mean, Rule

__all__ = ["Handle", "attach"]

RuleChoice = Rule | Callable[[str, nn.Parameter], Rule | None]
Names = tuple[str, ...] | list[str] | str


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
    allow_single: bool | str = False,
    process_group: Any = None,
) -> Handle:
    """Aggregate the per-group gradients of a model's parameters by a rule.

    From then on ``loss.backward()`` (or `torch.autograd.grad`) gives each parameter
    ``E * stat({c_e})`` over the contributions c_e of the E groups of the batch, and any optimizer
    works unchanged. No class, parameter or state_dict key of the model changes; forwards without
    gradients run as before.

    model:           any module whose parameters are used in ways `htv.explain` lists as served. For
                     what torch.compile returned, the module it was made of; torch.compile may as
                     well be called later.
    rule:            an `htv.Rule` for all parameters, or a callable (name, parameter) -> rule, or
                     None for a plain gradient.
    exclude:         parameters that keep their plain gradient: names, module names, or patterns
                     such as "*.bias".
    on_unsupported:  "error" refuses a use whose contributions cannot be separated; "plain" warns
                     once and lets the contributions of that use be summed plainly.
    stats:           collect what `Handle.stats` returns, at about the price of aggregating every
                     parameter once more.
    batch_dim:       the dim of the model's inputs that holds the examples: 1 for sequence-first
                     models.
    batch_norm:      what becomes of BatchNorm modules in train mode, which couple the examples of a
                     batch: "error" refuses them; "frozen" runs them on their running statistics,
                     which stay as they are; "shared" lets an example's contribution be its rows'
                     part of the plain gradient, with what passes through the shared statistics.
    batch:           the arguments of the forward that hold the examples, by name: "input_ids", or
                     several where examples come in two parts. Without it, all tensor arguments of
                     one size in the batch's dim are taken; tensors of size 1 beside them are
                     constants, and other sizes are refused.
    methods:         other methods of the model, or of its parts ("encoder.embed"), that are called
                     in its place and are to be served as one forward: "training_step",
                     "get_action_and_value".
    allow_single:    let a batch of one group pass, whose aggregate is its plain gradient, under
                     rules that need several; "warn" says so once.
    process_group:   a torch.distributed.ProcessGroup of ranks that vote together, where no
                     DistributedDataParallel or FSDP2 brings gradients together (for these:
                     `htv.distributed`). They meet at the end of
                     `Handle.accumulate` or in `Handle.finish`, where gradients are averaged. All
                     ranks call attach. MedianOfMeans as under `htv.distributed.ddp`.

    Returns a `Handle`, which is also a context manager that detaches. Raises TypeError or
    ValueError for bad arguments, RuntimeError if the model, a part of it or one of its parameters
    is attached already, or if a parameter has no shape yet.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    >>> handle = htv.attach(model, htv.AndMask(1.0))
    >>> model(x).mean().backward()
    >>> model.weight.grad
    tensor([[2., 0.]])
    >>> handle.detach()
    """
    while type(model).__name__ == "OptimizedModule":  # what torch.compile returns
        model = cast(nn.Module, model._orig_mod)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(rule, Rule) or (callable(rule) and not isinstance(rule, type))):
        raise TypeError(
            "rule must be an htv rule such as htv.AndMask(0.4), or a callable (name, parameter) "
            f"-> rule or None; got {rule!r}"
        )
    if on_unsupported not in ("error", "plain"):
        raise ValueError(f"on_unsupported must be 'error' or 'plain', got {on_unsupported!r}")
    if batch_norm not in ("error", "frozen", "shared"):
        raise ValueError(f"batch_norm must be 'error', 'frozen' or 'shared', got {batch_norm!r}")
    if type(batch_dim) is not int or batch_dim < 0:
        raise ValueError(
            f"batch_dim must be a dim counted from the front, 0, 1, ...; got {batch_dim!r}"
        )
    if allow_single not in (True, False, "warn"):
        raise ValueError(f"allow_single must be True, False or 'warn', got {allow_single!r}")
    batch, methods = _as_names("batch", batch), _as_names("methods", methods)
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), ForwardStandIn):
            raise RuntimeError(
                f"{'the model' if name == '' else f'module {name!r}'} is attached already: call "
                "detach() on its handle before attaching another rule"
            )
    rules = _choose_rules(model, rule, exclude)
    refuse_shared(model, rules)
    _refuse_scripted(model, rules)
    sharded = ranks.sharded_by(model)
    if not all(type(r) is Mean for r in rules.values() if r is not None):
        ranks.refuse_sharded(sharded)
    elif sharded is not None:  # Mean() is the plain gradient, which the ranks bring together
        rules = dict.fromkeys(rules)
    tracked = _served_methods(model, methods)
    settings = Settings(on_unsupported, stats, batch_dim, batch_norm, batch, allow_single)
    session = Session(model, rules, settings, tracked)
    if process_group is not None:
        from htv.distributed.process_group import ProcessGroupVotes  # torch may be without

        try:
            session.joint.of_group = ProcessGroupVotes(session, process_group)
        except BaseException:
            session.detach()
            raise
    return Handle(session)


def _as_names(argument: str, value: object) -> tuple[str, ...]:
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
            raise ValueError(
                f"methods={method!r}: {type(model).__name__} has no part {path!r}"
            ) from None
        if (
            name == "forward"
            or not callable(getattr(module, name, None))
            or name in module._modules
        ):
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
            inside = [
                n
                for n, _ in model.named_parameters()
                if n == path or n.startswith(f"{path}.") or not path
            ]
            if any(rules.get(name) is not None for name in inside):
                what = f"its part {path!r}" if path else "it"
                raise UnsupportedError(
                    f"the model cannot be served: {what} was compiled by torch.jit.script or "
                    "trace, and htv does not see what happens inside. Remedy: attach before "
                    f"scripting, keep that part in Python, or exclude={path or '*'!r}"
                )


def _choose_rules(model: nn.Module, rule: RuleChoice, exclude: Names) -> dict[str, Rule | None]:
    """Parameter name -> its rule, or None for a plain gradient; tied parameters go by their first
    name.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    unmatched = set(patterns)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise RuntimeError(
                f"parameter {name!r} is not initialized: it gets its shape from a first batch. Run "
                "the model once first"
            )
    rules: dict[str, Rule | None] = {}
    for name, parameter in model.named_parameters():
        hits = {p for p in patterns for alias in aliases[id(parameter)] if _matches(alias, p)}
        unmatched -= hits
        if hits:
            chosen = None
        elif isinstance(rule, Rule):
            chosen = rule
        else:
            chosen = rule(name, parameter)
        if chosen is not None and not isinstance(chosen, Rule):
            raise TypeError(
                f"the rule for parameter {name!r} must be an htv rule or None, got {chosen!r}"
            )
        if not (
            parameter.dtype.is_floating_point
            or parameter.dtype.is_complex
            or parameter.requires_grad
        ):
            chosen = None  # integers, which never have a gradient
        if chosen is not None and not parameter.dtype.is_floating_point:
            raise TypeError(
                f"parameter {name!r} is {parameter.dtype}: rules rank and count real numbers; "
                f"exclude={name!r}"
            )
        rules[name] = chosen
    if unmatched:
        raise ValueError(
            f"exclude={sorted(unmatched)} matches no parameter; names are those of "
            "model.named_parameters()"
        )
    return rules


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


def served_parameters(handle: Handle) -> dict[str, nn.Parameter]:
    """Return the parameters a handle serves that want a gradient, by name."""
    tracked = handle._session.tracked()
    return {s.name: s.parameter for s in tracked if s.parameter.requires_grad}


class Handle:
    """Say who votes, tell what was measured, and lead back to the plain model.

    `attach` makes it, of a private session; it is not made by hand. As a context manager, it
    detaches at the end of the block.

    >>> model = torch.nn.Linear(2, 1)
    >>> with htv.attach(model, htv.Median()) as handle:
    ...     model(torch.ones(4, 2)).sum().backward()
    ...     print(handle)
    <htv.Handle attached: 2 parameters of Linear served>
    >>> handle
    <htv.Handle detached: 2 parameters of Linear served>
    """

    __slots__ = ("_session", "__weakref__")

    def __init__(self, session: Session):
        self._session = session

    @property
    def model(self) -> nn.Module:
        """Return the attached model."""
        return self._session.model

    @property
    def attached(self) -> bool:
        """Tell whether the model is still attached: `detach` was not called."""
        return self._session.attached

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        count, model = len(self._session.tracked()), type(self.model).__name__
        return f"<htv.Handle {state}: {count} parameters of {model} served>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise RuntimeError(
            "a handle cannot be copied or pickled: copy the model, and attach to the copy"
        )

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model exactly, with nothing left behind. Detaching twice does nothing.

        >>> model = torch.nn.Linear(2, 1)
        >>> htv.attach(model, htv.Median()).detach()
        >>> "forward" in vars(model)
        False
        """
        self._session.detach()

    def groups(
        self,
        ids: Tensor,
        weight: str = "size",
        count: int | None = None,
        also: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Let examples with equal ids vote together, in forwards inside the block.

        Rows of one group may meet: graphs whose nodes are the examples, sets, bags
        (docs/graphs.md).

        ids:     (N,) integers, one per index of the batch's dim; any values in any order. For a
                 PackedSequence one per example, in the order it was packed from, or one per row of
                 its data.
        weight:  "size": a group's contribution is the sum of its examples', as the loss has it;
                 "equal": it is scaled as if every group had N / E examples, so that the mean of
                 every group (environment) counts once.
        count:   how many groups there are, where some have no rows but vote (graphs without
                 nodes): ids are 0 to count - 1 then.
        also:    ids of the rows of other arguments, by their names: `{"edge_attr": ids[source]}`
                 where edges have features, `{"data.edge_attr": ...}` inside an object.

        Raises ValueError for another weight, ids that do not fit the batch and names that are no
        argument's, RuntimeError inside another block of the kind or once detached.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [-4.0]])
        >>> with htv.attach(model, htv.Median()) as handle:
        ...     with handle.groups(torch.tensor([0, 0, 1])):
        ...         model(x).sum().backward()
        >>> model.weight.grad
        tensor([[-1.]])
        """
        self._session.require_attached("groups")
        return self._session.voters.voting(GroupSpec("ids", ids, weight, count, also or {}))

    def packed(self, cu_seqlens: Tensor, weight: str = "size") -> AbstractContextManager[None]:
        """Take packed sequences in forwards inside the block.

        The batch is of shape (total, ...) or (1, total, ...).
        cu_seqlens:  (E + 1,) integers from 0 to total; rows cu_seqlens[e]:cu_seqlens[e + 1] vote
                     together.
        weight:      as for `groups`.

        Raises what `groups` does.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with htv.attach(model, htv.AndMask(1.0)) as handle:
        ...     with handle.packed(torch.tensor([0, 2, 3])):
        ...         model(torch.tensor([[2.0], [-1.0], [1.0]])).sum().backward()
        >>> model.weight.grad
        tensor([[2.]])
        """
        self._session.require_attached("packed")
        return self._session.voters.voting(GroupSpec("packed", cu_seqlens, weight))

    def tokens(self, mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Let every row a layer sees vote by itself inside the block: every token of every example.

        The contribution of a token is its row's part of the parameter's gradient, including what
        other tokens draw from it through attention. Layers on (..., features) can be served so;
        convolutions and parameters that differ from token to token (positions) are refused, and
        layers behind what may take tokens out of their order (torch.cat along them, say).

        mask:  (N, T) booleans, True where a token votes; what the others (padding) contribute is
               left out. Default: all vote.

        Raises RuntimeError inside another block of the kind or once detached.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[[1.0], [2.0]], [[9.0], [0.0]]])
        >>> with htv.attach(model, htv.Median()) as handle:
        ...     with handle.tokens(torch.tensor([[True, True], [True, False]])):
        ...         model(x).sum().backward()
        >>> model.weight.grad
        tensor([[6.]])
        """
        self._session.require_attached("tokens")
        return self._session.voters.voting(GroupSpec("rows", mask, "size"))

    def forward(self, *batch: Any, **named: Any) -> ForwardBlock:
        """Serve all that a block computes as one forward of the model.

        For code that calls parts of the model one by one: a training step, the methods of an agent,
        a loss that uses parameters. What is computed between the calls is followed, too.

        batch:  tensors that hold the examples, in their dim `batch_dim`; tuples, mappings and
                PackedSequences of these as well.
        named:  more of these, by name.

        Returns a context manager. Raises RuntimeError inside another forward, ValueError if the
        tensors' sizes disagree.

        >>> body, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        >>> model, x = torch.nn.ModuleList([body, head]), torch.randn(5, 3)
        >>> with htv.attach(model, htv.Median()) as handle:
        ...     with handle.forward(x):
        ...         loss = head(body(x).relu()).sum()
        ...     loss.backward()
        >>> body.weight.grad.shape
        torch.Size([4, 3])
        """
        self._session.require_attached("forward")
        return ForwardBlock(self._session, batch, named)

    def accumulate(self) -> AbstractContextManager[None]:
        """Let the groups of all backwards inside the block vote together, as those of one batch.

        Inside, served parameters get no gradient; the block's end, or `finish`, adds the
        aggregated one to `.grad`, ready for clipping and the optimizer. Divide the loss by the
        number of micro-batches, as for plain accumulation. If the block raises, or detaches the
        handle, what it gathered since is dropped. Hooks on served parameters do not run for what
        the block adds.

        Exact for streaming rules (masks, sums). Median, TrimmedMean and WinsorizedMean need all
        contributions at once and are refused; MedianOfMeans(k) takes k micro-batches of equally
        many groups as its buckets. With `attach(process_group=...)` these rules take one backward;
        MedianOfMeans(k), with k a multiple of the number of ranks, also k / ranks micro-batches.

        Raises ValueError for such a rule or a group id that occurs in two micro-batches,
        RuntimeError for nested blocks, for torch.autograd.grad() inside, and for a backward while
        `.grad` still holds the aggregate of the vote before.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with htv.attach(model, htv.AndMask(1.0)) as handle:
        ...     with handle.accumulate():
        ...         for x in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])):
        ...             (model(x).mean() / 2).backward()
        >>> model.weight.grad
        tensor([[2.5000]])
        """
        self._session.require_attached("accumulate")
        return self._session.joint.accumulate()

    def finish(self) -> None:
        """Apply the rules to what `accumulate` gathered since the last vote; begin the next one.

        For loops that call the optimizer inside one long block, and for trainers: call it after
        the last backward of a step, before gradients are clipped. Where ranks vote together by
        `htv.distributed`, it checks that they have met.

        Raises RuntimeError outside accumulate(), or where ranks have not met.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with htv.attach(model, htv.AndMask(1.0)) as handle, handle.accumulate():
        ...     for step in range(2):
        ...         for x in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])):
        ...             (model(x).mean() / 2).backward()
        ...         handle.finish()
        ...         print(model.weight.grad)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        tensor([[2.5000]])
        tensor([[2.5000]])
        """
        self._session.require_attached("finish")
        self._session.joint.finish()

    def examined(self, see: Callable[[str, list[Factors]], None]) -> AbstractContextManager[None]:
        """Show a function what backwards record, before it is aggregated.

        Forward and backward go inside the block. `stats` is not updated there.

        see:  called as see(name, parts) once per served parameter and backward; the parameter's
              contributions are the sums of the parts' (`htv.ops.factors`, `htv.ops.agreement`).

        Raises RuntimeError once detached.
        """
        return self._session.examined(see)

    def stats(self) -> dict[str, Agreement]:
        """Return how far the contributions to each parameter's last vote agreed.

        A vote is one backward, or all that vote together: the micro-batches of `accumulate`, and
        those of all ranks (`htv.distributed`), of which the last that ended is told.

        Needs ``attach(..., stats=True)``; RuntimeError otherwise. Votes come from the path that
        serves sign counts, the sum of contributions from the plain gradient, their norms from the
        factors (by Gram matrices where groups have few rows): together about the price of
        aggregating once more. Only parameters used in several ways at once take a full sliced pass.

        Returns an `Agreement` by parameter name; parameters that received no contribution yet are
        absent.

        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> with htv.attach(model, htv.AndMask(1.0), stats=True) as handle:
        ...     model(x).sum().backward()
        ...     handle.stats()["weight"].mean_agreement
        0.5
        """
        session = self._session
        if not session.collects_stats:
            raise RuntimeError(
                "statistics are not collected: attach with stats=True (it costs one more pass)"
            )
        return {s.name: s.measured() for s in session.tracked() if s.measured is not None}
