"""What connectivity-based fine-tuning is compared with: plain fine-tuning, and a new last layer on
frozen features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.methods.cbft import head_of
from htv.methods.connectivity.statistics import require_repeatable

__all__ = ["NAIVE_RATES", "fine_tune", "reset_parameters", "retrain_last_layer"]

NAIVE_RATES = {
    "S": 0.001,
    "M": 0.01,
    "L": 0.1,
}  # learning rates of naive fine-tuning in Lubana et al. 2023


class Loader(Sized, Protocol):
    """What a DataLoader is: batches (x, y), as many as `len` says, anew in every epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def fine_tune(
    model: nn.Module,
    batches: Loader,
    epochs: int,
    lr: float = NAIVE_RATES["M"],
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    on_epoch: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Train all that is not frozen by SGD on the cross-entropy, the learning rate falling to 0.

    It falls along a cosine. The model's mode is left as it is; under `htv.attach` its rule holds.

    model:         gives logits (N, K).
    batches:       (x, y) each, as many as `len` says, anew in every epoch: a list or DataLoader.
    epochs:        0 leaves the model as it is.
    lr:            the learning rate at the start; `NAIVE_RATES` has those of the paper.
    momentum:      of SGD.
    weight_decay:  of SGD.
    on_epoch:      called with the number of epochs done and the last batch's loss.

    Raises ValueError for empty `batches`, epochs below 0 and a model that is frozen, and TypeError
    for an iterator.

    Lubana et al. 2023, "Mechanistic mode connectivity", arXiv 2211.08422.

    >>> model = torch.nn.Linear(1, 2)
    >>> batches = [(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))]
    >>> htv.methods.fine_tune(model, batches, epochs=50, lr=1.0)
    >>> model(torch.tensor([[-1.0], [1.0]])).argmax(dim=1)
    tensor([0, 1])
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("every parameter of model is frozen: there is nothing to train")
    _check_length(batches, epochs)
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    for epoch in range(1, epochs + 1):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        if on_epoch is not None:
            on_epoch(epoch, loss.detach())


def _check_length(batches: Loader, epochs: int) -> None:
    require_repeatable("batches", batches)
    if len(batches) == 0:
        raise ValueError("batches is empty: give fewer examples per batch, or more examples")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be an int of at least 0, got {epochs!r}")


def retrain_last_layer(model: nn.Module, batches: Loader, epochs: int, lr: float = 0.01, *,
                       head: str | None = None, **options: Any) -> None:  # fmt: skip
    """Train a new last layer on the features as they are: LLRT; followed by `fine_tune`, LPFT.

    The head starts anew by `reset_parameters`; everything else is frozen meanwhile, and in eval
    mode, so that running statistics stay and features are those of deployment.

    model:    gives logits (N, K).
    batches:  as for `fine_tune`.
    epochs:   likewise.
    lr:       the learning rate at the start.
    head:     name of the module that classifies. Default: the last Linear.
    options:  other arguments of `fine_tune`.

    Raises what `fine_tune` does, and ValueError for a head that cannot start anew.

    Kirichenko et al. 2022, "Last layer re-training is sufficient", arXiv 2204.02937; Kumar et al.
    2022, "Fine-tuning can distort pretrained features", arXiv 2202.10054.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> before = model[0].weight.detach().clone()
    >>> batches = [(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))]
    >>> htv.methods.retrain_last_layer(model, batches, epochs=2)
    >>> torch.equal(model[0].weight, before)
    True
    """
    last = head_of(model, head)
    if not hasattr(last, "reset_parameters"):
        raise ValueError(
            f"the head, a {type(last).__name__}, has no reset_parameters() to start anew by"
        )
    _check_length(batches, epochs)
    reset_parameters(last)
    with _only(model, last):
        fine_tune(model, batches, epochs, lr, **options)


def reset_parameters(model: nn.Module) -> nn.Module:
    """Start every module anew, in place: training from scratch. Randomness is torch's global one.

    Modules come after those inside them, as they are made: attention starts its projections in its
    own way.

    model:  to start anew.

    Returns the model. Raises ValueError, before any change, for a module whose own parameters have
    no `reset_parameters()`.

    >>> model = torch.nn.Linear(3, 2)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> bool((htv.methods.reset_parameters(model).weight != 0).all())
    True
    """
    resets = []
    names = {module: name for name, module in model.named_modules()}
    for module in dict.fromkeys(_parts_first(model)):
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is not None:
            resets.append(reset)
        elif any(p is not None for p in module._parameters.values()):
            raise ValueError(
                f"module {names[module]!r}, a {type(module).__name__}, has no reset_parameters() "
                "to start anew by"
            )
    for reset in resets:
        reset()
    return model


def _parts_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _parts_first(child)
    yield module


@contextmanager
def _only(model: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Inside, all else is frozen and in eval mode."""
    wanted = {id(p) for p in trained.parameters()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        model.eval()
        trained.train()
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
