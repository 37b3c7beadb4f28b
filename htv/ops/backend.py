"""Who serves an op: one readable rule, one switch to override it, one report.

    cpp        C++ kernels for the CPU, when the package was built
    cuda       CUDA C++ kernels, when they were built     } NVIDIA GPUs of compute capability 8.0
    triton     Triton kernels, when Triton is installed   } and above; not yet run on hardware
    reference  plain PyTorch, any device; in bounded memory where an op would form contributions

`HTV_BACKEND` or `use_backend` names a backend; a named backend that is not there raises instead of
falling back, and so does one without a kernel for a stacked statistic. What it has no kernel for
among factors (a statistic, several rows per group on CUDA, float64 in Triton) goes through the
general paths, whose stacked statistics then come from it.

The choice looks at shapes, dtype and device alone: it may be traced, and never waits for a device.
Which kernels there are is told by `htv.ops.kernels`; of two that serve a problem, the first of
`NAMES` is taken. A choice is made once and kept, as long as nothing it depends on changes
(`setting`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from htv.ops import kernels, registry, statistics
from htv.ops.registry import BACKENDS as NAMES
from htv.ops.registry import DEVICES, forget_choices

__all__ = [
    "NAMES",
    "NOT_BUILT",
    "TRITON_INSTALLED",
    "Problem",
    "choose",
    "forget_choices",
    "kernels",
    "named",
    "operator",
    "report",
    "setting",
    "use_backend",
    "why_not",
]

_PACKAGE = Path(__file__).resolve().parent.parent
_named: list[str] = []  # the innermost `use_backend` last


def _load() -> str | None:
    """Load the compiled ops. Returns None, or why there are none.

    A library that is there but broken raises, and ImportError says to rebuild one that knows
    statistics by other numbers.
    """
    if os.environ.get("HTV_BUILD") == "0":
        return "HTV_BUILD=0 is set: compiled kernels are not used even where they were built"
    libraries = sorted(_PACKAGE.glob("_C*.so"))
    if not libraries:
        return (
            "the package was installed without compiled kernels (HTV_BUILD=0, or run from the "
            "source folder)"
        )
    needed = registry.statistics_of("cpp", "cuda")
    statistics.require_agreement(_exported_statistics(libraries[0]), needed, str(libraries[0]))
    torch.ops.load_library(str(libraries[0]))
    return None


def _exported_statistics(library: Path) -> dict[str, int]:
    """Return the numbers by which a compiled library knows statistics, as it exports them."""
    try:
        listed = ctypes.CDLL(str(library)).htv_statistics
    except AttributeError:
        raise ImportError(
            f"{library} is older than this version of htv: it does not tell by which numbers it "
            f"knows statistics. Remedy: {statistics.REBUILD}"
        ) from None
    listed.restype = ctypes.c_char_p
    return statistics.parsed(listed().decode())


def _has_cuda() -> bool:
    """Tell whether the loaded library has the CUDA kernels that are registered."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has_kernel(f"htv::{op}", "CUDA") for op in registry.ops("cuda"))


NOT_BUILT = _load()  # None, or the reason there are no compiled kernels
CUDA_BUILT = _has_cuda()
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Problem(NamedTuple):
    """What a choice depends on.

    statistic:  its name; of no account for an op without one.
    dtype:      that contributions are computed in: float32 for half precision.
    longest:    the most rows that a group of a linear layer has; None stands for many. Matters on
                CUDA devices alone.
    """

    op: str
    statistic: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    longest: int | None = None


def _too_old(device: torch.device) -> str | None:
    """Why a GPU is not one that kernels are compiled for; nothing is known of one that was never
    used.
    """
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_initialized():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def _absent(backend: str, device: torch.device) -> str | None:
    """None where `backend` is there and serves `device`, else the reason it does not."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return NOT_BUILT or (
            None if device.type == "cpu" else f"it serves the CPU, not {device.type}"
        )
    if backend == "cuda" and (NOT_BUILT or not CUDA_BUILT):
        return NOT_BUILT or "there are no CUDA kernels in this build (HTV_CUDA=1 builds them)"
    if backend == "triton" and not TRITON_INSTALLED:
        return "Triton is not installed"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return (
            None
            if device.type == "cpu"
            else f"TRITON_INTERPRET=1 is set: it serves the CPU, not {device.type}"
        )
    return (
        _too_old(device) if device.type == "cuda" else f"it serves CUDA devices, not {device.type}"
    )


def _lacks(backend: str, problem: Problem) -> str | None:
    """None where `backend` has a kernel for a problem, else what it has none for."""
    if backend == "reference":
        return None
    kernel = registry.kernel(problem.op, backend)
    if kernel is None:
        return f"there is no {backend} kernel for {problem.op}"
    return kernel.lacks(problem.statistic, problem.dtype, problem.longest)


def why_not(backend: str, problem: Problem) -> str | None:
    """None where `backend` serves a problem, else the reason it does not."""
    return _absent(backend, problem.device) or _lacks(backend, problem)


def named() -> str | None:
    """The backend named by `use_backend` or HTV_BACKEND, or None."""
    name = _named[-1] if _named else os.environ.get("HTV_BACKEND") or "auto"  # empty is unset
    if name != "auto" and name not in NAMES:
        raise ValueError(
            f"HTV_BACKEND={name}: unknown backend, use one of auto, {', '.join(NAMES)}"
        )
    return None if name == "auto" else name


# The process's environment itself: what depends on it is asked at every step, and os.environ.get
# takes as long as a small operator.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLES = ("HTV_BACKEND", "TRITON_INTERPRET")
if _environment is not os.environ:
    _VARIABLES = tuple(os.environ.encodekey(name) for name in _VARIABLES)


def setting() -> tuple:
    """Return what choices depend on beside the problem: the backend that is named, and how.

    Whoever keeps a choice keeps it by this, in a dict of `htv.ops.registry.kept_choices`.
    """
    backend, interpret = _VARIABLES
    inner = _named[-1] if _named else None
    if backend not in _environment and interpret not in _environment:
        return inner, None, None
    return inner, _environment.get(backend), _environment.get(interpret)


_choices = registry.kept_choices()


def keep(kept: dict, key: tuple, choice: object, device: torch.device) -> None:
    """Keep a decision that concerns a device, unless it may still change."""
    if device.type == "cuda" and not torch.cuda.is_initialized():
        return  # nothing is known of this GPU yet
    if len(kept) >= registry.MOST_CHOICES:
        kept.clear()
    kept[key] = choice


def choose(problem: Problem) -> str:
    """The backend that serves a problem here. Raises RuntimeError if a named one cannot."""
    if torch.compiler.is_compiling():
        return _choose(problem)
    key = problem, setting()
    found = _choices.get(key)
    if found is None:
        found = _choose(problem)
        keep(_choices, key, found, problem.device)
    return found


def _choose(problem: Problem) -> str:
    name = named()
    if name is None:
        for backend, device in DEVICES.items():
            if device == problem.device.type and why_not(backend, problem) is None:
                return backend
        return "reference"
    reason = _absent(name, problem.device)
    if reason is None:
        reason = _lacks(name, problem)
        if reason is not None and problem.op != "stacked":
            return "reference"  # the general paths
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} was named but cannot serve {problem.op} ({problem.statistic}): "
            f"{reason}. Remedy: name another, or auto"
        )
    return name


def operator(op: str, server: str) -> Callable:
    """Return the operator by which a backend serves an op: its overload, twice as fast to call."""
    return getattr(torch.ops.htv, f"{op}_triton" if server == "triton" else op).default


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block by one backend, or raise where it cannot.

    name:  "cpp", "cuda", "triton" or "reference"; or "auto", the choice outside of any block.

    Raises ValueError for another name, and RuntimeError at the first op that it cannot serve.

    >>> with htv.use_backend("reference"):
    ...     htv.median(torch.tensor([[1.0], [2.0], [6.0]]))
    tensor([2.])
    """
    if name not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {name!r}, use one of auto, {', '.join(NAMES)}")
    _named.append(name)
    try:
        yield
    finally:
        _named.pop()


_SERVES = {
    "cpp": "serves {} on the CPU",
    "cuda": "not yet run on hardware: serves {}; linear layers with one row per group",
    "triton": "not yet run on hardware: serves {}; what cuda does not",
    "reference": "serves any device, and what no other backend serves",
}


def report() -> list[tuple[str, bool, str]]:
    """(backend, serves here, explanation) for every backend."""
    rows = []
    if torch.cuda.is_available():
        torch.cuda.init()
    for name in NAMES:
        on_gpu = name in ("cuda", "triton")
        reason = _absent(name, torch.device("cuda" if on_gpu else "cpu"))
        if reason is None and on_gpu and not torch.cuda.is_available():
            reason = "no CUDA device is present"
        told = _SERVES[name].format(", ".join(registry.ops(name)))
        rows.append((name, reason is None, reason or told))
    return rows
