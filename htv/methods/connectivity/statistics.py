"""BatchNorm's running statistics for weights they were not collected with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["batchnorms", "in_eval_mode", "inputs_of", "reestimate_batchnorm", "require_repeatable"]

HALF = (torch.bfloat16, torch.float16)


def batchnorms(model: nn.Module) -> dict[str, _NormBase]:
    """The BatchNorms, and InstanceNorms, that have running statistics, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _NormBase) and m.running_mean is not None
    }


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Set the running statistics of every BatchNorm to averages over data, in place.

    On a path, and after averaging weights, those of the model are of other weights: a barrier that
    is seen with them may be one of the statistics alone. Each is reset and becomes the mean over
    the batches, weighted by their sizes, of the batches' means and unbiased variances. Momenta,
    training flags and all else are as before; dropout is off meanwhile. BatchNorms that no forward
    reaches keep theirs. Nothing happens to a model without BatchNorm. InstanceNorms with running
    statistics are treated alike.

    model:    changed in place.
    data:     batches: a tensor of inputs, or a tuple that begins with it, such as ``(x, y)``. They
              are moved to the device of the model. Large ones are best: the mean of variances
              within batches lacks that between them. Batches without examples count for nothing.
    forward:  (model, batch) -> anything, for batches of other kinds.

    Raises ValueError if there is no batch, none of them holds examples, or one gives a BatchNorm a
    single value per channel, which has no variance.

    >>> model = torch.nn.BatchNorm1d(1)
    >>> htv.methods.reestimate_batchnorm(model, [torch.tensor([[1.0], [3.0]])])
    >>> model.running_mean, model.running_var
    (tensor([2.]), tensor([2.]))
    """
    found = batchnorms(model)
    if not found:
        return
    forward = forward or (lambda model, batch: model(inputs_of(model, batch)))
    batches = 0
    with in_eval_mode(model), _averaging(found):
        for batch in data:
            forward(model, batch)
            batches += 1
    if not batches:
        raise ValueError(
            f"data gives no batch to re-estimate the statistics of {next(iter(found))!r} from"
        )


def inputs_of(model: nn.Module, batch: Any) -> Tensor:
    """The input in a batch, on the model's device."""
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a batch must be a tensor of inputs or begin with one, got {type(x).__name__}: pass "
            "forward="
        )
    parameter = next(model.parameters(), None)
    return x if parameter is None else x.to(parameter.device)


def require_repeatable(role: str, data: Iterable[Any]) -> None:
    """Raise TypeError for an iterator: the second time nothing would be left of it."""
    if iter(data) is data:
        raise TypeError(
            f"{role} is an iterator, which can be gone through only once: pass a list or a "
            "DataLoader"
        )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _running(module: _NormBase) -> tuple[Tensor, Tensor]:
    assert module.running_mean is not None and module.running_var is not None
    return module.running_mean, module.running_var


def _in_half(module: _NormBase) -> bool:
    return _running(module)[0].dtype in HALF


@contextmanager
def _averaging(named: Mapping[str, _NormBase]) -> Iterator[None]:
    """Every call of these weighs as much as its batch in the running statistics.

    In half precision an average soon stops to move: there it is taken here, of what every batch
                                                     says.
    """
    names, modules = {module: name for name, module in named.items()}, list(named.values())
    momenta = [module.momentum for module in modules]
    seen: dict[_NormBase, int] = {}
    sums: defaultdict[_NormBase, list[Any]] = defaultdict(lambda: [0.0, 0.0])

    def before(module: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        size = len(x)
        if x.numel() == module.num_features:
            raise ValueError(
                f"a batch gives {type(module).__name__} {names[module]!r} a single value per "
                "channel, which has no variance: use larger batches, and drop a last one of a "
                "single example"
            )
        if size and not seen.get(module):
            module.reset_running_stats()
        seen[module] = seen.get(module, 0) + size
        module.momentum = size / max(1, seen[module])
        if size and _in_half(module):
            module.momentum = 1.0

    def after(module: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if module.momentum == 1.0 and _in_half(module):
            for index, kept in enumerate(_running(module)):
                sums[module][index] += len(y) * kept.float()

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    for one in modules:
        one.train()
    try:
        yield
        empty = next((names[module] for module, size in seen.items() if not size), None)
        if empty is not None:
            raise ValueError(
                f"the batches hold no examples to re-estimate the statistics of {empty!r} from"
            )
    finally:
        for hook in hooks:
            hook.remove()
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
        for module, totals in sums.items():
            for kept, total in zip(_running(module), totals, strict=True):
                kept.copy_(total / seen[module])
