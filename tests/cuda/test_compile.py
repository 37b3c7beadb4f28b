"""Compiles every CUDA source for GPUs that need not be present, and holds each kernel to its budget
of registers.

A register spilled to memory is slow and silent, and so is one too many for the blocks that should
share a multiprocessor. Not yet run on hardware: these are the compiler's own numbers.
"""

import ast
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from support import cuda_emulated

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = 65536  # of a multiprocessor

# Per kernel: threads of a block, and least blocks that fit a multiprocessor's registers; then the
# same for doubles.
BUDGET = {
    "streaming": (256, 2, 2),
    "by_network": (128, 3, 2),
    "buckets_by_network": (128, 5, 3),
    "by_counting": (256, 4, 2),
    "by_counting_alone": (256, 3, 2),
    "pack": (256, 3, 3),
    "vote": (256, 2, 1),
    "decide": (256, 1, 1),
    "rank_by_network": (128, 3, 2),
    "sum_parts": (1024, 1, 1),
}
HEAVY = {"13GeometricMean": 1}  # statistics with more state: least blocks


def setting(name: str):
    """A constant of setup.py."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == name:
            return ast.literal_eval(statement.value)
    raise KeyError(name)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )


def compilations():
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for element in setting("ELEMENTS") if source.stem.endswith("_kernel") else ("",):
            for arch in ("80", "90", "100"):
                marks = () if element in ("", "float") and arch == "90" else (pytest.mark.slow,)
                yield pytest.param(
                    source, element, arch, marks=marks, id=f"{source.stem}-{element}-sm_{arch}"
                )


@cache
def version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def compiled(flags: list[str], out: Path) -> str:
    """What nvcc says, once for the sources as they are: a quarter of a minute each."""
    kept = cuda_emulated.kept("nvcc", version(), *flags) / "said.txt"
    if not kept.is_file():
        command = [nvcc(), *flags, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kept.parent.mkdir(exist_ok=True)
        kept.with_name("copy").write_text(done.stderr)
        os.replace(kept.with_name("copy"), kept)
    return kept.read_text()


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(("source", "element", "arch"), list(compilations()))
def test_within_budget(source, element, arch, tmp_path):
    flags = [
        *setting("NVCC"),
        f"-arch=sm_{arch}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-Xptxas",
        "-v",
    ]
    flags += [f"-DHTV_ELEMENT={element}", "-c", str(source)]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    said = compiled(flags, tmp_path / "out.o")
    assert "warning" not in said, said
    pattern = (
        r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) "
        r"registers"
    )
    kernels = re.findall(pattern, said, re.DOTALL)
    assert kernels or not element
    for mangled, stack, spilled, registers in kernels:
        (name,) = [name for name in BUDGET if re.search(rf"\d{name}I", mangled)]
        threads, *blocks = BUDGET[name]
        least = min(
            blocks[element == "double"],
            *(n for word, n in HEAVY.items() if word in mangled),
            blocks[0],
        )
        assert (stack, spilled) == ("0", "0"), f"{mangled} spills"
        assert least * threads * int(registers) <= REGISTERS, (
            f"{mangled} takes {registers} registers"
        )
