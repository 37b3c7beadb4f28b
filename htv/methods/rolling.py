"""RM3 and RA3: the coordinate-wise median, or mean, of the last three minibatch gradients, under
any optimizer.

Zielinski, Krishnan, Chatterjee 2020, "Weak and strong gradient directions", arXiv 2003.07422.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from htv.methods.resuming import HALF, load_as_kept, require_state_of, state_dtype

__all__ = ["RA3", "RM3", "median_of_three"]

_ADDS_DECAY_TO_GRADIENT = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.ASGD,
)  # fmt: skip
_DECAYS_WEIGHTS = (
    torch.optim.AdamW,
    torch.optim.Adafactor,
    *filter(None, [getattr(torch.optim, "Muon", None)]),
)
_FORMAT = "htv.rolling"


def median_of_three(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """Element by element; each result is one of the three values, and NaN where one is."""
    high = torch._foreach_maximum(a, b)
    torch._foreach_minimum_(high, c)
    return list(torch._foreach_maximum(torch._foreach_minimum(a, b), high))


def mean_of_three(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    total = torch._foreach_add(a, b)
    torch._foreach_add_(total, c)
    torch._foreach_div_(total, 3)
    return list(total)


def _adds_decay(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether an optimizer adds weight decay to the gradient; None for those not of torch."""
    if group.get("decoupled_weight_decay", False) or type(optimizer) in _DECAYS_WEIGHTS:
        return False
    return True if type(optimizer) in _ADDS_DECAY_TO_GRADIENT else None


class _Rolling(Optimizer):
    """Hands the wrapped optimizer a statistic of each parameter's last three gradients in place of
    the last one.
    """

    _combine: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]

    def __init__(
        self, optimizer: Optimizer, allow_momentum: bool = False, decay_first: bool | None = None
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer to wrap, such as "
                f"torch.optim.SGD(parameters, lr=.1); got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, _Rolling | torch.optim.LBFGS):
            raise TypeError(
                f"{type(self).__name__} cannot wrap {type(optimizer).__name__}: a step must be one "
                "update by a gradient"
            )
        self.optimizer, self.allow_momentum, self.decay_first = (
            optimizer,
            allow_momentum,
            decay_first,
        )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups  # one list: schedulers may be given either
        self._check_groups()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("optimizer", "allow_momentum", "decay_first")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which are updated from their third gradient on.

        param_group:  as for any optimizer.

        Raises what the constructor does, and nothing is added then.
        """
        if self.param_groups is not self.optimizer.param_groups:  # this is being made
            self.param_groups.append(param_group)
            return
        self.optimizer.add_param_group(param_group)
        try:
            self._check_groups()
        except (ValueError, TypeError):
            self.optimizer.param_groups.pop()
            raise

    def _check_groups(self) -> None:
        name = type(self).__name__
        for group in self.param_groups:
            momentum = group.get("momentum", 0) or (group["betas"][0] if "betas" in group else 0)
            if momentum and not self.allow_momentum:
                raise ValueError(
                    f"{name} is defined without momentum, which averages over the steps it takes "
                    "the median of: got "
                    f"{'momentum' if group.get('momentum', 0) else 'betas[0]'}={momentum}. Set it "
                    "to 0, or pass allow_momentum=True if that is what you mean"
                )
            if any(p.is_complex() for p in group["params"]):
                raise TypeError(
                    f"{name} ranks real numbers: a parameter is complex. Give it to another "
                    "optimizer"
                )
            self._decay(group)

    def _decay(self, group: dict[str, Any]) -> float:
        """What to add to the group's gradients before they are kept, in units of the weights."""
        decay = group.get("weight_decay", 0)
        if not decay:
            return 0.0
        first = _adds_decay(self.optimizer, group) if self.decay_first is None else self.decay_first
        if first is None:
            raise ValueError(
                f"{type(self).__name__} cannot tell whether {type(self.optimizer).__name__} adds "
                f"weight_decay={decay} to the gradient (as SGD does) or decays the weights by "
                "themselves (as AdamW does): pass decay_first=True for the former, False for the "
                "latter"
            )
        return float(decay) if first else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Keep the gradients, and update parameters that have had three of them.

        A parameter whose gradient is None sits the step out: it is not updated, and what is kept of
        it stays. `.grad` is left as it was found.

        closure:  runs the forward and backward anew; its loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        present = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if any(p.grad.is_sparse for p, _ in present):
            raise RuntimeError(
                f"{type(self).__name__} needs dense gradients: make embeddings with sparse=False"
            )
        raw = [p.grad for p, _ in present]
        given = {p: p.grad.dtype for p, _ in present}
        fresh = dict(zip((p for p, _ in present), self._with_decay(present), strict=True))
        ready = [p for p in fresh if "older" in self.state[p]]
        try:
            for p in fresh:
                p.grad = None
            if ready:
                older, newer = ([self.state[p][key] for p in ready] for key in ("older", "newer"))
                combined = type(self)._combine(older, newer, [fresh[p] for p in ready])
                for p, value in zip(ready, combined, strict=True):
                    p.grad = value.to(given[p])
                self._inner_step()
        finally:
            for (p, _), grad in zip(present, raw, strict=True):
                p.grad = grad
        for p, grad in fresh.items():
            self._keep(self.state[p], grad)
        return loss

    def _with_decay(self, present: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """What is kept: in float32 for half precision, where a decay may be too small to count."""
        found = []
        for p, group in present:
            decay = self._decay(group)
            sign = (
                -1.0 if group.get("maximize", False) else 1.0
            )  # the wrapped optimizer turns the whole around
            grad = p.grad
            assert grad is not None
            if p.dtype in HALF:
                grad = grad.to(state_dtype(p))
            found.append(grad.add(p, alpha=sign * decay) if decay else grad)
        return found

    def _inner_step(self) -> None:
        """A step of the wrapped optimizer, without the decay that the gradients contain."""
        decays = [
            (group, group["weight_decay"]) for group in self.param_groups if self._decay(group)
        ]
        try:
            for group, _ in decays:
                group["weight_decay"] = 0
            self.optimizer.step()
        finally:
            for group, decay in decays:
                group["weight_decay"] = decay

    @staticmethod
    def _keep(state: dict[str, Tensor], grad: Tensor) -> None:
        if "older" in state:
            state["older"].copy_(grad)
            state["older"], state["newer"] = state["newer"], state["older"]
            return
        if "newer" in state:
            state["older"] = state.pop("newer")
        state["newer"] = grad.detach().clone(memory_format=torch.preserve_format)

    def state_dict(self) -> dict[str, Any]:
        """Return an optimizer's state, the kept gradients, and the wrapped one's state."""
        kind = {
            "format": _FORMAT,
            "rule": type(self).__name__,
            "wraps": type(self.optimizer).__name__,
        }
        return {**super().state_dict(), "kind": kind, "wrapped": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the optimizer whose state it is would.

        state_dict:  what that returned.

        Raises ValueError, before any change, if it is of another optimizer or model.
        """
        self._check_state(state_dict)
        own = {key: state_dict[key] for key in ("state", "param_groups")}
        super().load_state_dict(own)
        load_as_kept(self, own, ("older", "newer"))
        self.optimizer.load_state_dict(state_dict["wrapped"])
        self.param_groups = self.optimizer.param_groups

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        kind = state_dict.get("kind")
        mine = f"{type(self).__name__} around {type(self.optimizer).__name__}"
        if not isinstance(kind, dict) or kind.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict is not of {mine}, but of another optimizer: resume with what wrote it"
            )
        if (kind["rule"], kind["wraps"]) != (type(self).__name__, type(self.optimizer).__name__):
            raise ValueError(
                f"state_dict is of {kind['rule']} around {kind['wraps']}, this is {mine}: resume "
                "with what wrote it"
            )
        require_state_of(state_dict, self.param_groups)


class RM3(_Rolling):
    """Take steps by the median, coordinate by coordinate, of the last three minibatch gradients.

    This is the rolling median of three, around any optimizer. What only one minibatch in three asks
    for gets nothing. The first two steps update nothing. Weight decay that the wrapped optimizer
    would add to the gradient is added before the gradient is kept, so it passes through the median
    too; decoupled decay stays the wrapped optimizer's. The median is a true one: no sum minus
    extremes, which loses bits and turns infinities into NaN. Memory: two gradients per parameter
    beside `.grad`, in float32 for parameters of half precision; the wrapped optimizer's state has
    the type that it chooses.

    optimizer:       any torch optimizer but LBFGS. Call step(), state_dict() and the rest on the
                     wrapper, and give it to schedulers: the parameter groups are shared.
    allow_momentum:  momentum (betas[0] of Adam's kind) is refused unless this is True: the authors
                     found that it does not go with the rolling median.
    decay_first:     whether weight_decay is to be added to the gradient before it is kept. Known
                     for torch's own optimizers; must be told for others that have any.

    Raises TypeError or ValueError for what it cannot wrap.

    Zielinski, Krishnan, Chatterjee 2020, "Weak and strong gradient directions", arXiv 2003.07422.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = htv.methods.RM3(torch.optim.SGD([weight], lr=1.0))
    >>> for gradient in (1.0, 9.0, 2.0):
    ...     weight.grad = torch.tensor([gradient])
    ...     optimizer.step()
    >>> weight.data
    tensor([-2.])
    """

    _combine = staticmethod(median_of_three)


class RA3(_Rolling):
    """Take steps by the mean of the last three minibatch gradients: the control for `RM3`.

    It lags and averages as that does, without its median.

    optimizer:       any torch optimizer but LBFGS, as for `RM3`.
    allow_momentum:  momentum is refused unless this is True.
    decay_first:     whether weight_decay is to be added to the gradient before it is kept.

    Raises TypeError or ValueError for what it cannot wrap.

    Zielinski, Krishnan, Chatterjee 2020, "Weak and strong gradient directions", arXiv 2003.07422.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = htv.methods.RA3(torch.optim.SGD([weight], lr=1.0))
    >>> for gradient in (1.0, 9.0, 2.0):
    ...     weight.grad = torch.tensor([gradient])
    ...     optimizer.step()
    >>> weight.data
    tensor([-4.])
    """

    _combine = staticmethod(mean_of_three)
