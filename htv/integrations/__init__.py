"""Trainers that many use, and what makes their steps one vote each. docs/trainers.md tells how.

Each module needs its trainer: ``pip install "hard-to-vary[trainers]"``. None is imported before it
is asked for.
"""

import importlib
from types import ModuleType

__all__ = ["accelerate", "huggingface", "lightning", "trl"]  # noqa: F822 -- see __getattr__


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
