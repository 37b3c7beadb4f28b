"""Step 1: the CUDA kernels for the GPU that is here, or a library built elsewhere; then facts about
both.

Run as a script: htv is not imported, for what lies there may be old or broken.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"torch": (2, 11), "triton": (3, 6)}


def main(out: str, seconds: str, *dry: str) -> int:
    problem = None if dry else missing() or provide(float(seconds) - 10)
    facts = [sys.executable, "-m", "htv.bench.gpu.facts", out, seconds, *dry]
    status = subprocess.run(facts, cwd=ROOT, check=False).returncode
    if problem:
        print(problem)
    return 1 if problem or status else 0


def missing() -> str:
    """What has to be there and is not, each with a remedy."""
    found = []
    for name, least in LEAST.items():
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed: install {name} >= {wanted}")
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            found.append(f"{name} {version} is too old: install {name} >= {wanted}")
    if not os.environ.get("HTV_GPU_LIBRARY") and nvcc() is None:
        found.append(
            "no nvcc: put it on PATH, set CUDA_HOME, or name a library built elsewhere in "
            "HTV_GPU_LIBRARY"
        )
    if not os.environ.get("HTV_GPU_LIBRARY") and ninja() is None:
        found.append(
            "no ninja: install ninja, or name a library built elsewhere in HTV_GPU_LIBRARY"
        )
    if not found and capability() is None:
        found.append("torch sees no GPU: look at nvidia-smi, or use --dry")
    return "; ".join(found)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )


def ninja() -> str | None:
    """Where setup.py looks for it."""
    return shutil.which("ninja") or shutil.which(str(Path(sys.executable).with_name("ninja")))


def capability() -> str | None:
    """90 for compute capability 9.0; None without a GPU that torch can use."""
    import torch

    return (
        "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None
    )


def provide(seconds: float) -> str | None:
    """htv/_C.abi3.so with CUDA kernels: a carried one, or one built for this GPU alone. Returns
    what went wrong.
    """
    carried, library = os.environ.get("HTV_GPU_LIBRARY"), ROOT / "htv" / "_C.abi3.so"
    if carried:
        if not Path(carried).is_file():
            return f"HTV_GPU_LIBRARY={carried} is no file"
        if not (library.exists() and library.samefile(carried)):
            shutil.copy(carried, library)
        return None
    environment = {**os.environ, "HTV_BUILD": "1", "HTV_CUDA": "1", "HTV_CUDA_ARCHS": capability()}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return f"the build failed, its words are in the log: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
