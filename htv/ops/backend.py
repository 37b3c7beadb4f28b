"""Who serves an op: one readable rule, one switch to override it, one report.

    cpp        C++ kernels for the CPU, when the package was built
    cuda       CUDA C++ kernels, when they were built           } NVIDIA GPUs of compute capability 8.0 and above;
    triton     Triton kernels, when Triton is installed         } not yet run on hardware
    reference  plain PyTorch, any device; in bounded memory where an op would form contributions

`HTV_BACKEND` or `use_backend` names a backend; a named backend that is not there raises instead of falling back, and so
does one without a kernel for a stacked statistic. What it has no kernel for among factors (a statistic, several rows
per group on CUDA, float64 in Triton) goes through the general paths, whose stacked statistics then come from it.

The choice looks at shapes, dtype and device alone: it may be traced, and never waits for a device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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


def _ops_for(key: str) -> frozenset[str]:
    """The ops that the loaded library has kernels of for a dispatch key."""
    return frozenset(op for op in schema.OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"htv::{op}", key))


NOT_BUILT = _load()  # None, or the reason there are no compiled kernels
CUDA_OPS = _ops_for("CUDA")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Problem(NamedTuple):
    """What a choice depends on.

    statistic:  its name.
    dtype:      that contributions are computed in: float32 for half precision.
    longest:    the most rows that a group of a linear layer has; None stands for many. Matters on CUDA devices alone.
    """

    op: str
    statistic: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    longest: int | None = None


def preferred(problem: Problem) -> tuple[str, ...]:
    """The backends for a problem, the best first. Counts and bytes behind each line are in docs/performance.md."""
    one_row = problem.longest is not None and problem.longest <= 1
    match problem.device.type, problem.op:
        case "cpu", _:
            return ("cpp",)
        case "cuda", "stacked":
            return "cuda", "triton"  # the same bytes; beyond 64 groups values are read once, where Triton reads 8 times
        case "cuda", "linear" if one_row:
            return "cuda", "triton"  # votes are int8 products and ranks recomputed; Triton pads every row to 16
        case "cuda", "linear" | "conv":
            return ("triton",)  # products in half precision, statistics in registers: contributions are never stored
        case "cuda", "embedding":
            return ("triton",)  # sorted once, a program per token; PyTorch's sums by pairs wait for the device
        case "cuda", "shifted_cross_entropy" | "shifted_cross_entropy_grad":
            return ("triton",)  # logits are read once each way, and nothing of their size is stored but the gradient
    return ()


def _too_old(device: torch.device) -> str | None:
    """Why a GPU is not one that kernels are compiled for; nothing is known of one that was never used."""
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
        return NOT_BUILT or (None if device.type == "cpu" else f"it serves the CPU, not {device.type}")
    if backend == "cuda" and (NOT_BUILT or not CUDA_OPS):
        return NOT_BUILT or "there are no CUDA kernels in this build (HTV_CUDA=1 builds them)"
    if backend == "triton" and not TRITON_INSTALLED:
        return "Triton is not installed"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 is set: it serves the CPU, not {device.type}"
    return _too_old(device) if device.type == "cuda" else f"it serves CUDA devices, not {device.type}"


def _lacks(backend: str, problem: Problem) -> str | None:
    """None where `backend` has a kernel for a problem, else what it has none for."""
    op, statistic = problem.op, problem.statistic
    if backend == "reference":
        return None
    if op in ("linear", "conv") and statistic not in schema.FUSED[backend]:
        return f"no fused kernel for {statistic}; the sliced path serves it"
    if op == "embedding" and backend != "triton" and statistic not in schema.COUNTED:
        return f"no kernel for {statistic}; PyTorch's sums by token serve it"
    if backend == "cuda":
        if op not in CUDA_OPS:
            return f"there is no CUDA kernel for {op}"
        if op == "linear" and (problem.longest is None or problem.longest > 1):
            return "no kernel for groups of several rows; the sliced path serves them"
    if backend == "triton":
        if op not in schema.TRITON:
            return f"there is no Triton kernel for {op}"
        if problem.dtype != torch.float32:
            return f"no kernel for {problem.dtype}, but for float32, bfloat16 and float16"
    return None


def why_not(backend: str, problem: Problem) -> str | None:
    """None where `backend` serves a problem, else the reason it does not."""
    return _absent(backend, problem.device) or _lacks(backend, problem)


def named() -> str | None:
    """The backend named by `use_backend` or HTV_BACKEND, or None."""
    name = _named[-1] if _named else os.environ.get("HTV_BACKEND") or "auto"  # empty is unset
    if name != "auto" and name not in NAMES:
        raise ValueError(f"HTV_BACKEND={name}: unknown backend, use one of auto, {', '.join(NAMES)}")
    return None if name == "auto" else name


def choose(problem: Problem) -> str:
    """The backend that serves a problem here. Raises RuntimeError if a named one cannot."""
    name = named()
    if name is None:
        for backend in preferred(problem):
            if why_not(backend, problem) is None:
                return backend
        return "reference"
    reason = _absent(name, problem.device)
    if reason is None:
        reason = _lacks(name, problem)
        if reason is not None and problem.op != "stacked":
            return "reference"  # the general paths
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} was named but cannot serve {problem.op} ({problem.statistic}): {reason}. Remedy: name "
            "another, or auto"
        )
    return name


def operator(op: str, server: str) -> Callable:
    """The operator by which a backend serves an op; the overload, which is called in half the time."""
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
    "cpp": "serves the CPU",
    "cuda": "not yet run on hardware: serves stacked statistics, and linear layers with one row per group",
    "triton": "not yet run on hardware: serves layers, embeddings and losses; stacked statistics without cuda",
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
        rows.append((name, reason is None, reason or _SERVES[name]))
    return rows
