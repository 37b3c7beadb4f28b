"""Versions, build and hardware: what numbers were measured on."""

from __future__ import annotations

import platform
import shlex
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

NOT_BUILT = "not built (HTV_BUILD=0, or run from the source folder)"


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {
        "htv": version("hard-to-vary"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "Python": platform.python_version(),
    }


def build() -> dict[str, object] | None:
    """How the compiled part was built; None in a pure-Python install."""
    try:
        from htv import _host
    except ImportError:
        return None
    return _host.build_info()


def cpu_capability() -> str:
    """The instruction set the CPU kernels use, or that there are none."""
    try:
        from htv import _host
    except ImportError:
        return NOT_BUILT
    return _host.cpu_capability()


def cpu_traits() -> dict[str, str]:
    """Return what is taken to be faster on this CPU; empty where nothing is compiled.

    `product`: whose matrix product takes the plain sums of large layers, "torch" or "own".
    `order`: as what order statistics compare values, "floats" or "integers".
    """
    try:
        from htv import _host
    except ImportError:
        return {}
    return _host.cpu_traits()


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = (
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    )
    return [
        f"{d.name}, compute capability {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB"
        for d in devices
    ]


def describe(device: str) -> dict[str, object]:
    """The above for the JSON of a run on `device`."""
    return {
        "versions": versions(),
        "build": build(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cpu_capability": cpu_capability(),
        "cpu_traits": cpu_traits(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
    }


def stamp(*command: str) -> dict[str, object]:
    """How, when and on what a record was measured."""
    return {
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe("cpu"),
    }
