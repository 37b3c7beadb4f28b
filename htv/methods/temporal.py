"""Agreement over time instead of over a batch: a mask from the signs of past gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from htv.methods.resuming import HALF, load_as_kept, require_state_of, state_dtype

__all__ = ["TemporalAndMaskAdam"]

STATE = ("exp_avg", "exp_avg_sq", "exp_sign")
ROUNDING = "rounding"  # what half-precision weights lack of the float32 ones they stand for


class TemporalAndMaskAdam(Optimizer):
    """Step as Adam does, masked where recent gradients disagreed on their sign.

    One batch from one environment, drawn at random, is enough for a step: environments vote one
    after the other. With the gradient g, per coordinate::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        a = beta3 * a + (1 - beta3) * sign(g)
        theta = theta - lr * m * [|a| >= tau] / (sqrt(v) + eps)
        theta = theta - lr * weight_decay * theta

    As in the paper, the moments are not corrected for starting at 0: the first steps are up to
    ``(1 - beta1) / sqrt(1 - beta2)`` times as long as lr, and after t steps |a| is at most
    ``1 - beta3**t``, so that nothing moves before that reaches tau. Weight decay is decoupled and
    comes after the mask, so that masked weights shrink; lr scales it, as in `torch.optim.AdamW`.

    params:        tensors or groups of them, real floating point; each group may have its own
                   hyperparameters.
    lr:            a float, or a tensor without dims, such as ``torch.tensor(1e-3)``, on the
                   parameters' device.
    betas:         (beta1, beta2, beta3), each in [0, 1): the memories of gradients, squares and
                   signs.
    eps:           >= 0.
    tau:           in [0, 1]; 0 masks nothing, 1 nearly everything for ever (a warning says so).
    weight_decay:  >= 0.
    maximize:      follow the gradient upwards.

    A parameter whose grad is None in a step is left as it is, decay included. The state takes three
    times the memory of the parameters. For bfloat16 and float16 ones it is float32, as are the
    steps, for an average in half precision soon stops to move; it also holds what was rounded off
    the weights, so that small steps add up: eight times their memory. No count of steps enters the
    update, so it may be captured in a CUDA graph as it is; give lr as a tensor to change it between
    replays.

    Raises TypeError or ValueError naming a wrong hyperparameter or a complex or integer parameter,
    RuntimeError for a sparse gradient, and ValueError for the state of another optimizer or model.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329,
    algorithm 1.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = htv.methods.TemporalAndMaskAdam([weight], tau=0.3, weight_decay=0.0)
    >>> for sign in (1.0, -1.0, 1.0, -1.0):
    ...     weight.grad = torch.tensor([1.0, sign])
    ...     optimizer.step()
    >>> weight.data != 0, optimizer.kept_fraction()
    (tensor([ True, False]), 0.5)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.8),
        eps: float = 1e-8,
        tau: float = 0.4,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, tau=tau, weight_decay=weight_decay, maximize=maximize
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters.

        param_group:  "params", and hyperparameters that differ from the defaults.

        Raises TypeError or ValueError for these as the constructor does.
        """
        merged = {**self.defaults, **param_group}
        _check_hyperparameters(merged)
        params = merged["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for entry in params:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and not parameter.dtype.is_floating_point:
                raise TypeError(
                    "params must be real floating point, for signs to vote; got one of "
                    f"{parameter.dtype}"
                )
        super().add_param_group({**param_group, "params": params})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; returns the closure's loss, or None.

        closure:  runs the forward and backward anew and returns the loss.

        Raises RuntimeError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(
                    params, **{key: value for key, value in group.items() if key in self.defaults}
                )
        return loss

    def _update(
        self,
        params: list[Tensor],
        lr: float | Tensor,
        betas: tuple[float, float, float],
        eps: float,
        tau: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise RuntimeError(
                "TemporalAndMaskAdam keeps signs of every coordinate and takes no sparse "
                "gradients: make the embedding with sparse=False"
            )
        averages, squares, signs = ([self._state(p)[name] for p in params] for name in STATE)
        grads = [g.float() if g.dtype in HALF else g for g in grads]
        weights = [p.float() + self.state[p][ROUNDING] if p.dtype in HALF else p for p in params]
        if maximize:
            grads = list(torch._foreach_neg(grads))
        beta1, beta2, beta3 = betas
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        torch._foreach_lerp_(signs, torch._foreach_sign(grads), 1 - beta3)
        steps = torch._foreach_abs(signs)
        torch._foreach_sub_(steps, tau)
        torch._foreach_sign_(steps)
        torch._foreach_add_(steps, 1)
        torch._foreach_clamp_max_(steps, 1)  # now [|a| >= tau]
        torch._foreach_mul_(steps, averages)  # a NaN stays one: the mask does not hide it
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, eps)
        torch._foreach_div_(steps, scales)
        torch._foreach_mul_(steps, lr)
        torch._foreach_sub_(weights, steps)
        if weight_decay != 0:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        for p, weight in zip(params, weights, strict=True):
            if p is not weight:
                p.copy_(weight)
                self.state[p][ROUNDING].copy_(torch.where(p.isfinite(), weight - p, 0))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        dtype = state_dtype(parameter)
        for name in (*STATE, *[ROUNDING] * (parameter.dtype in HALF)):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        return state

    @torch.no_grad()
    def kept_fraction(self) -> float:
        """Return the share of coordinates whose step is not masked; NaN before the first step."""
        kept = total = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    signs = self.state[parameter]["exp_sign"]
                    kept += int((signs.abs() >= group["tau"]).sum())
                    total += signs.numel()
        return kept / total if total else float("nan")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the optimizer whose state it is would.

        state_dict:  what that returned.

        Raises ValueError, before any change, if it is of another optimizer or model.
        """
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "state_dict is not an optimizer's: pass what TemporalAndMaskAdam.state_dict() "
                "returned"
            )
        missing = {
            name
            for group in state_dict["param_groups"]
            for name in self.defaults
            if name not in group
        }
        missing |= {
            name for state in state_dict["state"].values() for name in STATE if name not in state
        }
        if missing:
            raise ValueError(
                "state_dict is of another optimizer than TemporalAndMaskAdam: it has no "
                f"{', '.join(sorted(missing))}. Resume with the optimizer that saved it, or start "
                "this one anew"
            )
        require_state_of(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        load_as_kept(self, state_dict, (*STATE, ROUNDING))


def _check_hyperparameters(group: dict[str, Any]) -> None:
    def number(name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number {wanted}, got {value!r}")
        if not fits(float(value)):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")

    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.dim() != 0:
        raise ValueError(
            f"lr must be a number or a tensor without dims, got shape {tuple(lr.shape)}"
        )
    number(
        "lr", lr.item() if isinstance(lr, Tensor) else lr, ">= 0", lambda x: 0 <= x < float("inf")
    )
    if not isinstance(betas, tuple | list) or len(betas) != 3:
        raise ValueError(f"betas must be (beta1, beta2, beta3), got {betas!r}")
    for index, beta in enumerate(betas):
        number(f"betas[{index}]", beta, "in [0, 1)", lambda x: 0 <= x < 1)
    number("eps", group["eps"], ">= 0", lambda x: 0 <= x < float("inf"))
    number("tau", group["tau"], "in [0, 1]", lambda x: 0 <= x <= 1)
    number("weight_decay", group["weight_decay"], ">= 0", lambda x: 0 <= x < float("inf"))
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize must be True or False, got {group['maximize']!r}")
    if group["tau"] == 1 and betas[2] > 0:
        warnings.warn(
            "tau = 1: the memory of signs stays below 1, so nothing but the decay is trained",
            stacklevel=5,
        )
