"""Which GPU, which versions, which kernels: as the library built or carried lets it see."""

from __future__ import annotations

import re
import subprocess

import torch

from htv.bench.gpu import step
from htv.bench.gpu.build import nvcc
from htv.ops import backend, registry
from htv.tools import env_info


def save(job: step.Job) -> None:
    found = facts(job.dry)
    job.save(found)
    if not job.dry and not found["gpu"]["cuda_ops"]:
        raise SystemExit(
            f"no CUDA kernels: {backend.NOT_BUILT or 'the library was built without them'}"
        )


def facts(dry: bool) -> dict:
    built = sorted(registry.ops("cuda")) if backend.CUDA_BUILT else []
    gpu = {"name": "none", "cuda_ops": built, "not_built": backend.NOT_BUILT}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        gpu |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            **asked("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"),
        }
    if nvcc():
        words = subprocess.run(
            [nvcc(), "--version"], capture_output=True, text=True, check=False
        ).stdout
        gpu["nvcc"] = next(iter(re.findall(r"release ([\d.]+)", words)), "unknown")
    return {"machine": env_info.describe("cpu" if dry else "cuda"), "gpu": gpu}


def asked(*fields: str) -> dict[str, str]:
    """What nvidia-smi says; nothing where it does not answer."""
    try:
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader",
            "--id=0",
        ]
        words = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in words.strip().split(",")), strict=False))


if __name__ == "__main__":
    step.main(save)
