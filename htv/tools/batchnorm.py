"""`htv.replace_batchnorm`: GroupNorm, which takes its statistics inside one example, in the place
of BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from htv.engine.forward import ForwardStandIn
from htv.errors import UnsupportedError

__all__ = ["replace_batchnorm"]

Replacement = Callable[[str, nn.Module], nn.Module | None]

MOST_GROUPS = 32
# Fewest channels of a group by default. BatchNorm1d and SyncBatchNorm may get (N, C), where a group
# of one channel is always 0 and one of two channels +-1, whatever the input.
CHANNELS_WITH_SPACE, CHANNELS_ALONE = 4, 16

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replace_batchnorm(
    model: nn.Module, num_groups: int | None = None, replace: Replacement | None = None
) -> nn.Module:
    """Exchange, in place, every BatchNorm1d, 2d, 3d and SyncBatchNorm for an `nn.GroupNorm`.

    BatchNorm in train mode couples the examples of a batch; GroupNorm computes each by itself, so
    that `htv.attach` can serve it. The model becomes another function and must be trained or
    fine-tuned with it: running statistics are dropped.

    model:       not attached. Its parameters stay the same objects, under the same names and in the
                 same order: weight and bias of a BatchNorm are now those of its GroupNorm, so
                 optimizers made before stay valid. eps, device, dtype and training flag are kept.
                 From its state_dict `running_mean`, `running_var` and `num_batches_tracked`
                 disappear: load checkpoints that have them before the exchange.
    num_groups:  the most groups of a GroupNorm; it gets the largest divisor of its channels that is
                 not above. 1 takes statistics over all channels. Default: 32, and at least 4
                 channels in a group; 16 for BatchNorm1d and SyncBatchNorm, whose inputs may be
                 (N, C): there a group of few channels keeps little of them, and one of a single
                 channel nothing.
    replace:     a callable (name, module) -> what takes the module's place, for every BatchNorm:
                 another module, the module itself to keep it, or None for the GroupNorm described
                 here.

    Returns the model; if it is a BatchNorm itself, what replaces it. A module registered in several
    places is exchanged in all of them for the same one; a model without BatchNorm comes back as it
    is.

    Raises TypeError or ValueError for bad arguments, RuntimeError if the model or a part of it is
    attached or if a lazy BatchNorm does not know its channels, and `UnsupportedError` for a
    BatchNorm that does more: a subclass with its own forward (a fused activation, say), hooks, a
    parametrization. The model is then as it was.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16))
    >>> htv.replace_batchnorm(model)[1]
    GroupNorm(4, 16, eps=1e-05, affine=True...)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if num_groups is not None and (type(num_groups) is not int or num_groups < 1):
        raise ValueError(
            f"num_groups must be a positive int, or None for the default; got {num_groups!r}"
        )
    if replace is not None and not callable(replace):
        raise TypeError(
            f"replace must be a callable (name, module) -> module or None, got {replace!r}"
        )
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module.__dict__.get("forward"), ForwardStandIn):
            raise RuntimeError(
                f"{_called(name)} is attached: call detach() on its handle, replace, and attach "
                "again"
            )
    norms = [(name, module) for name, module in modules if isinstance(module, _BatchNorm)]
    exchanged = {
        id(module): _replacement(name, module, num_groups, replace) for name, module in norms
    }
    for _, parent in modules:
        for key, child in parent._modules.items():
            if id(child) in exchanged:
                parent._modules[key] = exchanged[id(child)]
    return exchanged.get(id(model), model)


def _replacement(
    name: str, module: _BatchNorm, num_groups: int | None, replace: Replacement | None
) -> nn.Module:
    """What takes the place of one BatchNorm; raises before anything is changed."""
    made = None if replace is None else replace(name, module)
    if made is not None:
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"replace must return a module or None; for {_called(name)} it returned {made!r}"
            )
        return made
    if (
        isinstance(module, LazyModuleMixin) or module.num_features == 0
    ):  # torch leaves 0 if there is nothing to shape
        raise RuntimeError(
            f"{_called(name)} is a {type(module).__name__} that does not know its channels: a "
            "lazy one gets them from a first batch. Run the model once first, or make it with "
            "num_features"
        )
    more = _does_more(module)
    if more is not None:
        raise UnsupportedError(
            f"{_called(name)} is a {type(module).__name__} {more}, which a GroupNorm in its place "
            "would not do. Remedy: replace=, a callable (name, module) -> what takes its place, "
            "or the module itself to keep it"
        )
    return _group_norm(module, num_groups)


def _does_more(module: _BatchNorm) -> str | None:
    """What a BatchNorm does beside normalising, scaling and shifting; None if nothing."""
    if (
        type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        or "forward" in module.__dict__
    ):
        return "with a forward of its own"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "with hooks"
    if set(module._parameters) != {"weight", "bias"} or module._modules:
        return "with parameters or submodules beside weight and bias (a parametrization, say)"
    return None


def _group_norm(module: _BatchNorm, num_groups: int | None) -> nn.GroupNorm:
    channels = module.num_features
    if num_groups is None:
        has_space = isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d))
        num_groups = min(
            MOST_GROUPS, channels // (CHANNELS_WITH_SPACE if has_space else CHANNELS_ALONE)
        )
    largest = next(n for n in range(max(1, min(num_groups, channels)), 0, -1) if channels % n == 0)
    norm = nn.GroupNorm(largest, channels, module.eps, affine=False)
    norm.weight, norm.bias = module.weight, module.bias
    norm.affine, norm.training = module.weight is not None, module.training
    return norm


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the model"
