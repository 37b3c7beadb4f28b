"""Functions compiled by themselves run eagerly inside a forward that runs eagerly.

htv sees what they call then; otherwise torch.compile would trace htv's own bookkeeping in them.
"""

from __future__ import annotations

import sys
import threading

import torch

_lock = threading.RLock()
_holders = 0
_stance = None  # what puts torch's own back, while somebody holds it


class HeldEager:
    """Keeps compiled functions eager, in the whole process, as long as one of these lives.

    Dropping it ends that, so that an interrupt leaves nothing behind.
    """

    def __init__(self):
        global _holders, _stance
        self._counts = False
        with _lock:
            if not _holders:
                _stance = torch.compiler.set_stance("force_eager")
            _holders += 1
            self._counts = True

    def __del__(self):
        global _holders, _stance
        if not self._counts:
            return
        with _lock:
            _holders -= 1
            if not _holders:
                _stance.__exit__(None, None, None)
                _stance = None


def hold_eager() -> HeldEager | None:
    """Keep compiled functions eager until the result is dropped. None where nothing can be
    compiled yet, or torch.compile itself is at work.
    """
    if "torch._dynamo" not in sys.modules:
        return None
    try:
        return HeldEager()
    except RuntimeError:
        return None
