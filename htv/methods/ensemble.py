"""Networks of one architecture, run side by side or as one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

__all__ = ["Ensemble"]


class Ensemble:
    """M networks of one architecture.

    stacked:  their parameters are stacked, (M, *shape) each, and one forward serves all
              (`torch.func.vmap`). An optimizer of `parameters()` must then treat each number by
              itself, as SGD and Adam do.

    Raises ValueError for networks that share parameters to be trained, and for what cannot be
    stacked: buffers, dropout, parameters shared between modules.
    """

    def __init__(self, nets: list[nn.Module], stacked: bool):
        _refuse_to_share(nets)
        self.nets, self.stacked = nets, stacked
        if stacked:
            _refuse_to_stack(nets[0])
            self._leaves, _ = stack_module_state(nets)
            self._base = copy.deepcopy(nets[0]).to("meta")

    def __len__(self) -> int:
        return len(self.nets)

    def parameters(self) -> list[Tensor]:
        """What an optimizer changes."""
        if self.stacked:
            return list(self._leaves.values())
        return list(
            {id(p): p for net in self.nets for p in net.parameters()}.values()
        )  # frozen ones may be shared

    def __call__(self, x: Any, training: bool, own: bool = False) -> Tensor:
        """The networks' outputs, (M, *output). x is for all of them, or with `own` has one input
        for each, (M, ...).
        """
        if not self.stacked:
            inputs = x if own else [x] * len(self)
            return torch.stack(
                [net.train(training)(part) for net, part in zip(self.nets, inputs, strict=True)]
            )
        self._base.train(training)
        forward = lambda leaves, part: functional_call(self._base, leaves, part)
        outputs: Tensor = vmap(forward, in_dims=(0, 0 if own else None))(self._leaves, x)
        return outputs

    def each(self) -> list[nn.Module]:
        """The networks by themselves, as they are now."""
        if self.stacked:
            with torch.no_grad():
                for index, net in enumerate(self.nets):
                    for name, parameter in net.named_parameters():
                        parameter.copy_(self._leaves[name][index])
        return self.nets

    def state(self) -> list[dict[str, Any]]:
        """A copy of every network's `state_dict`."""
        return [copy.deepcopy(net.state_dict()) for net in self.each()]

    def load(self, state: list[dict[str, Any]]) -> None:
        for net, part in zip(self.nets, state, strict=True):
            net.load_state_dict(part)
        with torch.no_grad():
            for name, leaf in self._leaves.items() if self.stacked else ():
                leaf.copy_(torch.stack([dict(net.named_parameters())[name] for net in self.nets]))


def _refuse_to_share(nets: list[nn.Module]) -> None:
    seen: set[int] = set()
    for net in nets:
        trained = {
            id(parameter): name
            for name, parameter in net.named_parameters()
            if parameter.requires_grad
        }
        shared = [name for key, name in trained.items() if key in seen]
        if shared:
            raise ValueError(
                "factory must make a new network at every call: two of them share the parameter "
                f"{shared[0]!r}, and would be trained on each other's examples. Copy or freeze it"
            )
        seen |= trained.keys()


def _refuse_to_stack(net: nn.Module) -> None:
    for name, _ in net.named_buffers():
        raise ValueError(
            f"stacked=True cannot serve the buffer {name!r}, which a forward may change: "
            "stacked=False"
        )
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"stacked=True cannot serve the dropout {name!r}, which draws at random: "
                "stacked=False"
            )
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(net.parameters())):
        raise ValueError(
            "stacked=True cannot serve parameters that are shared between modules: stacked=False"
        )
