"""Who serves an op: one readable rule, one switch to override it, one report.

    cpp        C++ kernels for the CPU, when the package was built
    cuda       CUDA C++ kernels, when they were built            } not yet run on hardware, so they
    triton     Triton kernels, when Triton is installed          } serve only when they are named
    reference  plain PyTorch, any device; in bounded memory where an op would form contributions

`HTV_BACKEND` or `use_backend` names a backend; a named backend that cannot serve an op raises instead of falling back.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from htv.ops import schema

NAMES = ("cpp", "cuda", "triton", "reference")
_PACKAGE = Path(__file__).resolve().parent.parent
_named: list[str] = []  # the innermost `use_backend` last


def _load() -> str | None:
    """Load the compiled ops. Returns None, or why there are none; a library that is there but broken raises."""
    if os.environ.get("HTV_BUILD") == "0":
        return "HTV_BUILD=0 is set: compiled kernels are not used even where they were built"
    libraries = sorted(_PACKAGE.glob("_C*.so"))
    if not libraries:
        return "the package was installed without compiled kernels (HTV_BUILD=0, or run from the source folder)"
    torch.ops.load_library(str(libraries[0]))
    return None


NOT_BUILT = _load()  # None, or the reason there are no compiled kernels


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"htv::{op}", key)


def why_not(backend: str, op: str, statistic: str, device: torch.device) -> str | None:
    """None where `backend` serves `op` for `statistic` on `device`, else the reason it does not."""
    if op in ("linear", "conv") and backend != "reference" and statistic not in schema.FUSED[backend]:
        return f"no fused kernel for {statistic}; the sliced path serves it"
    if op == "embedding" and backend != "reference" and statistic not in schema.COUNTED:
        return f"no kernel for {statistic}; PyTorch's sums by token serve it"
    if backend == "cpp":
        return NOT_BUILT or (None if device.type == "cpu" else f"it serves the CPU, not {device.type}")
    if backend == "cuda":
        if NOT_BUILT or not _has_kernel(op, "CUDA"):
            return NOT_BUILT or f"there is no CUDA kernel for {op} in this build (HTV_CUDA=1 builds those there are)"
        return None if device.type == "cuda" else f"it serves CUDA devices, not {device.type}"
    if backend == "triton":
        if op not in schema.TRITON:
            return f"there is no Triton kernel for {op}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device.type == "cuda" or interpreted else f"it serves CUDA devices, not {device.type}"
    return None


def named() -> str | None:
    """The backend named by `use_backend` or HTV_BACKEND, or None."""
    name = _named[-1] if _named else os.environ.get("HTV_BACKEND", "auto")
    if name != "auto" and name not in NAMES:
        raise ValueError(f"HTV_BACKEND={name}: unknown backend, use one of auto, {', '.join(NAMES)}")
    return None if name == "auto" else name


def choose(op: str, statistic: str, device: torch.device) -> str:
    """The backend that serves this op here. Raises RuntimeError if a named one cannot."""
    name = named()
    if name is None:
        return "cpp" if why_not("cpp", op, statistic, device) is None else "reference"
    if name != "reference" and op == "linear" and statistic not in schema.FUSED[name]:
        return "reference"  # the sliced path, whose stacked statistics then come from the named backend
    if op in ("conv", "embedding") and why_not(name, op, statistic, device) is not None:
        return "reference"  # blocks of windows through `linear`, or the sliced path; sums by token
    reason = why_not(name, op, statistic, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was named but cannot serve {op} ({statistic}): {reason}")
    return name


def operator(op: str, server: str) -> Callable:
    """The operator by which a backend serves an op."""
    return getattr(torch.ops.htv, f"{op}_triton" if server == "triton" else op)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block by the backend `name`, or raise where it cannot."""
    if name not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {name!r}, use one of auto, {', '.join(NAMES)}")
    _named.append(name)
    try:
        yield
    finally:
        _named.pop()


def report() -> list[tuple[str, bool, str]]:
    """(backend, serves here, explanation) for every backend."""
    rows = []
    for name in NAMES:
        device = torch.device("cuda" if name in ("cuda", "triton") else "cpu")
        op = "linear" if name == "triton" else "stacked"
        reason = why_not(name, op, "mean", device)
        if reason is None and device.type == "cuda":
            present = torch.cuda.is_available()
            reason = "not yet run on hardware: serves only when named" if present else "no CUDA device is present"
            rows.append((name, present, reason))
        else:
            rows.append((name, reason is None, reason or {"cpp": "serves the CPU"}.get(name, "serves any device")))
    return rows
