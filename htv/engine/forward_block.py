"""The block in which code outside a model's forward is served: `with handle.forward(batch):`."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from htv.engine.forward import thaw
from htv.engine.mode import ServingMode
from htv.engine.protocols import BlockSession

__all__ = ["ForwardBlock"]


class ForwardBlock:
    """Runs code under the mode of a forward: the context manager that `Handle.forward` returns."""

    def __init__(self, session: BlockSession, args: tuple, kwargs: dict):
        self._session, self._args, self._kwargs = session, args, kwargs
        self._mode: ServingMode | None = None
        self._frozen: list[nn.Module] = []

    def __enter__(self) -> None:
        session = self._session
        session.require_attached("forward")
        if session.running() is not None:
            raise RuntimeError(
                "handle.forward() inside another forward of the same handle: it is served already"
            )
        if not torch.is_grad_enabled():
            return
        names: tuple[str, ...] = ("batch",)
        if len(self._args) > 1:
            names = tuple(f"batch[{i}]" for i in range(len(self._args)))
        try:
            self._mode = session.open(session.root, self._args, self._kwargs, names)
            self._mode.block = weakref.ref(self)
            session.thread.running = self._mode
            session.root.freeze(self._frozen)
            self._mode.enter()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        mode, self._mode = self._mode, None
        try:
            self._session.close(mode, None)
        finally:
            thaw(self._frozen)

    def handles(self, mode: ServingMode) -> bool:
        """Tell whether the block is open and `mode` its own."""
        return self._mode is mode
