"""`htv.explain`: how each parameter of a model would be served."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from htv.attach import attach
from htv.engine.handlers import FACTORS, USES
from htv.ops import dispatch
from htv.ops.factors import Factors, GroupwiseFactors, StackedFactors
from htv.rules import AndMask, Median, Rule

__all__ = ["Explanation", "Row", "explain"]

COMPUTED = " (computed)"
Uses = dict[str, tuple[list[str], str | None]]  # by parameter: kinds of use, and why none is served
RULES = AndMask(0.5), Median()  # one that streams, one that ranks


@dataclass(frozen=True)
class Row:
    """One parameter.

    use:               the kinds of layer that use it, joined by " + ".
    streaming, order:  the path that serves streaming rules (masks) and order rules (median, ...),
                       or why none does.
    extra:             for both, an estimate of the arithmetic beside that of the plain gradient, as
                       a share of it; None where no batch was given, and for small vectors (biases,
                       norms), whose work does not matter.
    """

    parameter: str
    shape: tuple[int, ...]
    use: str
    streaming: str
    order: str
    extra: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Explanation:
    """Tell how each parameter of a model is served; prints as a table.

    rows:   one `Row` per parameter: name, shape, use, and the paths of streaming and order rules.
    batch:  which argument was taken for the batch; "" where the model was not run.
    lost:   the calls at which it was lost which example is whose, where a parameter needed it:
            "call at file:line".

    >>> explanation = htv.explain(torch.nn.Linear(3, 2), torch.randn(4, 3))
    >>> [row.use for row in explanation.rows], explanation.batch, explanation.unsupported
    (['linear', 'linear bias'], "'input' of shape (4, 3), examples in dim 0", ())
    """

    rows: tuple[Row, ...]
    batch: str = ""
    lost: tuple[str, ...] = ()

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Names of the parameters no path serves."""
        return tuple(row.parameter for row in self.rows if row.streaming.startswith("unsupported"))

    def __str__(self) -> str:
        lines = [["parameter", "shape", "use", "streaming rules", "order rules"]]
        for row in self.rows:
            paths = (
                f"{path}{_share(extra)}"
                for path, extra in zip((row.streaming, row.order), row.extra, strict=True)
            )
            lines.append([row.parameter, "x".join(map(str, row.shape)) or "()", row.use, *paths])
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
            ).rstrip()
            for line in lines
        ]
        notes = [f"the batch: {self.batch}"] if self.batch else []
        notes += [f"which example is whose was lost by {call}" for call in self.lost]
        return "\n".join(table + notes)


def _share(extra: float | None) -> str:
    if extra is None:
        return ""
    return f" +{extra:.0%}" if extra < 10 else f" +{extra:.0f}x"


def explain(
    model: nn.Module,
    batch: Any = None,
    batch_argument: str | tuple[str, ...] | list[str] = (),
    batch_dim: int = 0,
) -> Explanation:
    """Tell which path serves each parameter of a model, and how much work that adds.

    model:           as for `htv.attach`; it is left as it is.
    batch:           optional; what the model is called with (a tensor, a tuple or a dict of
                     arguments). One forward and backward (of the sum of its outputs) then show how
                     each parameter is really used; gradients stay as they are. Without it the
                     answer goes by the class of the module that owns the parameter, and a parameter
                     of a module of your own is listed as "own forward".
    batch_argument:  as `batch` of `htv.attach`.
    batch_dim:       as for `htv.attach`.

    Returns an `Explanation`, which also says which argument was taken for the batch, and at which
    calls of the model's code it was lost.

    >>> explanation = htv.explain(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> [(row.parameter, row.use) for row in explanation.rows]
    [('0.weight', 'linear'), ('0.bias', 'linear bias')]
    """
    if batch is None:
        used = _uses_by_class(model)
        return Explanation(
            tuple(_row_by_class(name, p, *used[name]) for name, p in model.named_parameters())
        )
    used, recorded, source, lost = _uses_by_running(model, batch, batch_argument, batch_dim)
    rows = [
        _row_by_run(name, p, *used[name], recorded.get(name))
        for name, p in model.named_parameters()
    ]
    return Explanation(tuple(rows), source, lost)


def _row_by_class(name: str, parameter: nn.Parameter, kinds: list[str], refusal: str | None) -> Row:
    paths = (refusal, "-") if refusal else (_path(kinds, rule, parameter.device) for rule in RULES)
    return Row(name, tuple(parameter.shape), " + ".join(kinds) or "-", *paths)


def _row_by_run(
    name: str,
    parameter: nn.Parameter,
    kinds: list[str],
    refusal: str | None,
    plans: list[tuple[str, float | None]] | None,
) -> Row:
    use = " + ".join(kinds) or "-"
    if refusal or plans is None:
        paths = (refusal, "-") if refusal else ("not used in this forward",) * 2
        return Row(name, tuple(parameter.shape), use, *paths)
    (streaming, work), (order, ranking) = plans
    return Row(name, tuple(parameter.shape), use, streaming, order, (work, ranking))


def _path(kinds: list[str], rule: Rule, device: torch.device) -> str:
    if len(kinds) > 1:
        return f"summed per group, then {dispatch.path(Factors, rule, device)}"
    (kind,) = kinds
    if kind.endswith(" bias"):
        return dispatch.path(StackedFactors, rule, device)
    factors = FACTORS[kind.removesuffix(COMPUTED)]
    if not kind.endswith(COMPUTED) or factors is StackedFactors:
        return dispatch.path(factors, rule, device)
    views, others = (dispatch.path(f, rule, device) for f in (factors, GroupwiseFactors))
    return others if others == views else f"{others}; views: {views}"


def _uses_by_class(model: nn.Module) -> Uses:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    parametrized = {
        id(parametrizations): module
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for parametrizations in cast(nn.ModuleDict, module.parametrizations).values()
    }
    used = {}
    for name, parameter in model.named_parameters():
        modules = owners[id(parameter)]
        refusal = next(filter(None, map(_refusal, modules)), None)
        kinds = []
        for module in modules:
            kind = _kind(parametrized.get(id(module), module), name, parameter)
            if kind is not None:
                kinds.append(f"{kind}{COMPUTED}" if id(module) in parametrized else kind)
        kinds = list(dict.fromkeys(kinds))
        if refusal is None and len(kinds) == 0:
            kinds = ["own forward"]
            refusal = "served where used elementwise or by a served function; pass batch= to see"
        used[name] = (kinds, refusal)
    return used


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The class in USES whose forward a module runs, as classes derived by torch (parametrized
    ones) do; or None.
    """
    return next(
        (c for c in type(module).__mro__ if c in USES and type(module).forward is c.forward), None
    )


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    """How a module uses its parameter; a layer's bias is told from its weight, as the handlers
    do when it runs.
    """
    base = _base(module)
    if base is None:
        return None
    if name.rpartition(".")[2] in ("bias_k", "bias_v"):  # of attention: one more key and value
        return "elementwise"
    kind = USES[base]
    return f"{kind} bias" if parameter.dim() == 1 and FACTORS[kind] is not StackedFactors else kind


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (
        module.max_norm or module.scale_grad_by_freq or module.sparse
    ):
        return "unsupported: max_norm, scale_grad_by_freq or sparse is on"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return "unsupported: BatchNorm in train mode couples the examples"
    if type(module).__module__.startswith("torch.nn.") and _base(module) is None:
        containers = (nn.ParameterList, nn.ParameterDict, parametrize.ParametrizationList)
        return None if isinstance(module, containers) else f"unsupported: {type(module).__name__}"
    return None


def _uses_by_running(
    model: nn.Module,
    batch: Any,
    batch_argument: str | tuple[str, ...] | list[str],
    batch_dim: int,
) -> tuple[Uses, dict[str, list[tuple[str, float | None]]], str, tuple[str, ...]]:
    """Kinds of use and refusals by parameter, plans under both rules, the batch's source, where it
    was lost.
    """
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    used: Uses = {name: ([], "frozen: no gradient") for name in frozen}
    plans: dict[str, list[tuple[str, float | None]]] = {}
    settings: dict[str, Any] = {
        "batch": batch_argument,
        "batch_dim": batch_dim,
        "allow_single": True,
    }
    attached = attach(model, RULES[0], on_unsupported="plain", stats=True, **settings)
    with attached as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = handle._session

        def see(name: str, parts: list[Factors]) -> None:
            plans[name] = [dispatch.plan(parts, rule) for rule in RULES]

        session.examine = see
        results = pytree.tree_leaves(_as_dict(model(*args, **kwargs)))
        outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
        if outputs:
            wanted = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad([t.sum() for t in outputs], wanted, allow_unused=True)
        for tracked in session.tracked():
            used.setdefault(
                tracked.name,
                (sorted(tracked.uses), tracked.refusal and f"unsupported: {tracked.refusal}"),
            )
        lost = tuple(str(loss) for loss in session.losses)
    return used, plans, session.voters.source, lost


def _as_dict(result: Any) -> Any:
    """Models may return a mapping that is no dict."""
    return dict(result) if hasattr(result, "items") else result
