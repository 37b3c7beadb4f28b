"""A guard against checkpoints in the middle of a vote: what waits for it would be lost."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

__all__ = ["UnfinishedVoteGuard"]


class UnfinishedVoteGuard:
    """Refuses state_dict() of a model while contributions wait for a vote.

    waiting:  returns how many backwards do; a bound method, which is not kept alive.

    A copy of the model, or a pickle, has one that refuses nothing.
    """

    def __init__(self, waiting: Callable[[], int] | None = None):
        self._waiting = (lambda: None) if waiting is None else weakref.WeakMethod(waiting)
        self._hook = None

    def put_on(self, model: nn.Module) -> None:
        """Guard a model, once."""
        if self._hook is None:
            self._hook = model.register_state_dict_pre_hook(self)

    def take_off(self) -> None:
        """Guard it no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        waiting = self._waiting()
        count = 0 if waiting is None else waiting()
        if count:
            raise RuntimeError(
                f"state_dict() in the middle of a step: {count} backward"
                f"{'s have' if count > 1 else ' has'} left contributions that wait for their vote, "
                "and a checkpoint would be without them. Remedy: save after the step's last "
                "backward (and handle.finish() inside accumulate())"
            )

    def __deepcopy__(self, memo: dict) -> UnfinishedVoteGuard:
        return UnfinishedVoteGuard()

    def __reduce__(self):
        return UnfinishedVoteGuard, ()
