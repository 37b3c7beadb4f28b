"""One vote over the examples of many ranks, beside torch.distributed's own ways to train.

What it has is loaded when it is asked for: torch may come without torch.distributed, and takes long
to load its sharding.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htv.distributed.data_parallel import ddp
    from htv.distributed.fully_sharded import fsdp
    from htv.distributed.pipelined import pipeline

__all__ = ["ddp", "fsdp", "pipeline"]

_HOMES = {
    "ddp": "htv.distributed.data_parallel",
    "fsdp": "htv.distributed.fully_sharded",
    "pipeline": "htv.distributed.pipelined",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
