"""The registry of kernels: what serves which op, told by whoever adds a kernel.

`register_kernel` is called beside the wrappers of a backend, in `htv/ops/kernels/`. Routing
(`htv.ops.backend`), `htv info` and docs/extending.md read what it was told, and nothing else knows
which kernels there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from htv.ops import schema, statistics

BACKENDS = ("cpp", "cuda", "triton", "reference")  # of two that serve a problem, the first is taken
DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}  # where each is taken unasked


@dataclass(frozen=True, eq=False)
class Kernel:
    """What one kernel serves.

    op:          of `htv.ops.schema`.
    backend:     "cpp", "cuda" or "triton".
    reason:      why it is the one to take, in a line.
    statistics:  names of those it has, or None for an op without one.
    dtypes:      that it computes in: float32 stands for half precision, too.
    longest:     the most rows that a group may have, or None for any number.
    otherwise:   what serves the statistics it does not have.
    """

    op: str
    backend: str
    reason: str
    statistics: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    longest: int | None
    otherwise: str

    def lacks(self, statistic: str, dtype: torch.dtype, longest: int | None) -> str | None:
        """Return None where it serves such a problem, else what there is no kernel for."""
        if self.statistics is not None and statistic not in self.statistics:
            return f"no kernel for {statistic}; {self.otherwise}"
        if self.longest is not None and (longest is None or longest > self.longest):
            rows = "several rows" if self.longest == 1 else f"more than {self.longest} rows"
            return f"no kernel for groups of {rows}; {self.otherwise}"
        if dtype not in self.dtypes:
            return f"no kernel for {dtype}, but for {', '.join(self.types())}"
        return None

    def row(self) -> tuple[str, ...]:
        """Return what it serves in words, by `COLUMNS`."""
        names = self.statistics
        told = "-" if names is None else ", ".join(names)
        without = [name for name in statistics.names() if names is not None and name not in names]
        if names is not None and len(without) < len(names):
            told = "all" if not without else f"all but {', '.join(without)}"
        if self.longest is not None:
            told += f"; groups of at most {self.longest} row{'s' * (self.longest > 1)}"
        return self.backend, self.op, told, ", ".join(self.types()), self.reason

    def types(self) -> tuple[str, ...]:
        """Return the names of the types its operands may have."""
        found = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        if torch.float32 in self.dtypes:
            found += ["bfloat16", "float16"]
        return tuple(found)


COLUMNS = ("backend", "op", "statistics", "types", "why")
_kernels: dict[tuple[str, str], Kernel] = {}  # by op and backend


def register_kernel(
    op: str,
    backend: str,
    *,
    reason: str,
    statistics: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype],
    longest: int | None = None,
    otherwise: str = "the general paths serve it",
) -> None:
    """Tell that a backend has a kernel for an op; see `Kernel`.

    Nothing is imported or compiled for it. Raises ValueError for an unknown op, backend or
    statistic, for an op of a statistic without any, and for a kernel that was told of before.
    """
    if op not in schema.OPS:
        raise ValueError(f"unknown op {op!r}, have {', '.join(schema.OPS)}: see htv/ops/schema.py")
    if backend not in DEVICES:
        raise ValueError(f"unknown backend {backend!r}, have {', '.join(DEVICES)}")
    if (op, backend) in _kernels:
        raise ValueError(f"there is a {backend} kernel for {op} already")
    if schema.takes_a_statistic(op) != (statistics is not None):
        wanted = "the statistics it has" if schema.takes_a_statistic(op) else "no statistics"
        raise ValueError(f"a kernel for {op} must be registered with {wanted}")
    names = None if statistics is None else tuple(statistics)
    _require_known(names or ())
    _kernels[op, backend] = Kernel(op, backend, reason, names, tuple(dtypes), longest, otherwise)
    forget_choices()


def _require_known(names: tuple[str, ...]) -> None:
    for name in names:
        statistics.of(name)


def kernel(op: str, backend: str) -> Kernel | None:
    """Return what was told of one kernel, or None."""
    return _kernels.get((op, backend))


def kernels() -> tuple[Kernel, ...]:
    """Return all kernels, by backend and op."""
    layout = {op: number for number, op in enumerate(schema.OPS)}
    return tuple(sorted(_kernels.values(), key=lambda k: (BACKENDS.index(k.backend), layout[k.op])))


def ops(backend: str) -> tuple[str, ...]:
    """Return the ops that a backend has kernels for."""
    return tuple(k.op for k in kernels() if k.backend == backend)


def by_op() -> dict[str, dict[str, str]]:
    """Return op -> backend -> which statistics: "all", "9 of 11", "yes", or "-" for no kernel."""
    total = len(statistics.names())

    def told(found: Kernel | None) -> str:
        if found is None:
            return "-"
        if found.statistics is None:
            return "yes"
        have = len(found.statistics)
        return "all" if have == total else f"{have} of {total}"

    return {op: {backend: told(kernel(op, backend)) for backend in DEVICES} for op in schema.OPS}


def statistics_of(*backends: str) -> tuple[str, ...]:
    """Return the statistics that any kernel of some backends has."""
    known = {
        name for k in _kernels.values() if k.backend in backends for name in k.statistics or ()
    }
    return tuple(name for name in statistics.names() if name in known)


# -- what follows from all this, decided once ------------------------------------------------------

MOST_CHOICES = 4096  # that one dict holds
_kept: list[dict] = []


def kept_choices() -> dict:
    """Return a new dict for decisions that follow from the kernels there are.

    `forget_choices` clears it. Its keys hold whatever else a decision depends on.
    """
    _kept.append({})
    return _kept[-1]


def forget_choices() -> None:
    """Have all decisions made anew: what is built, installed or registered has changed."""
    for kept in _kept:
        kept.clear()
