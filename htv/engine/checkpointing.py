"""Activation checkpointing: parts of a forward that run again inside a backward."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from htv.engine.protocols import ForwardLike, ModeLike
from htv.engine.provenance import Mark

__all__ = ["RecentForwards", "in_backward", "in_first_run", "in_reentrant_checkpoint"]

MOST_FORWARDS = 16
_FIRST_RUN = CheckpointFunction.forward.__code__


def in_backward() -> bool:
    """Tell whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Tell whether the backward pass under way is in the node of a reentrant checkpoint."""
    return "Checkpoint" in type(torch._C._current_autograd_node()).__name__


def in_first_run() -> bool:
    """Tell whether a reentrant checkpoint runs its part for the first time, without gradients."""
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _FIRST_RUN:
            return True
        frame = frame.f_back
    return False


class RecentForwards:
    """Remembers the last forwards, of which a checkpoint may run parts again.

    modes: of them, the newest last.
    """

    def __init__(self) -> None:
        self.modes: deque[ModeLike] = deque(maxlen=MOST_FORWARDS)

    def note(self, mode: ModeLike, forward: ForwardLike, args: tuple, kwargs: dict) -> None:
        """Remember that `forward` ran under `mode` with `args` and `kwargs`, in case a checkpoint
        runs that part of it again.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            if mode not in self.modes:
                self.modes.append(mode)
        if not torch.is_grad_enabled() and not forward.batch_misplaced:  # a reentrant one
            leaves = pytree.tree_leaves((args, kwargs))
            forward.batch_misplaced = any(
                mode.batch_misplaced(t) for t in leaves if isinstance(t, Tensor)
            )

    def run_again(self, forward: ForwardLike, tensors: list[Tensor]) -> ModeLike | None:
        """Find the forward of which `forward` runs a part again, as far as `tensors`, the part's
        inputs, show it.
        """
        if not in_backward():
            return None
        if forward.batch_misplaced and in_reentrant_checkpoint():
            raise RuntimeError(
                "a reentrant activation checkpoint runs a module again whose inputs do not have "
                "the batch where the model's have it, or come from parameters: which part is "
                "whose cannot be told. Call torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )
        for mode in reversed(self.modes):
            if any(mode.marks.get(t) is not None for t in tensors):
                return mode
        return None

    def nodes(self) -> Iterator[tuple[object, int, Mark, ModeLike]]:
        """Yield (autograd node, output, mark, forward) of what these forwards marked."""
        for mode in self.modes:
            for node, number, mark in mode.marks.nodes():
                yield node, number, mark, mode
