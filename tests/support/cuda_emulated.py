"""The CUDA ops on a machine without a GPU: their sources, compiled for the CPU with an emulator of
the device.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parents[1] / "cuda"
CSRC = HERE.parents[1] / "csrc"
ELEMENTS = ("double", "float", "BFloat16", "Float16")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def compile_library(folder: Path) -> Path:
    flags = [
        "-std=c++20",
        "-O1",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    flags += [
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        "-DHTV_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    flags += [
        f"-I{HERE}",
        f"-I{CSRC}",
        *(flag for path in include_paths() for flag in ("-isystem", path)),
    ]
    sources = [(HERE / "library.cpp", "")]
    for source in sorted(CSRC.glob("cuda/*.cu")):
        if source.stem != "library":
            sources += [
                (source, e) for e in (ELEMENTS if source.stem.endswith("_kernel") else ("",))
            ]

    def compile(unit) -> str:
        source, element = unit
        out = str(folder / f"{source.stem}{element}.o")
        command = [
            compiler(),
            *flags,
            f"-DHTV_ELEMENT={element}",
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            out,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:10_000]
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    lib = Path(torch.__file__).with_name("lib")
    library = folder / "emulated.so"
    subprocess.run(
        [compiler(), "-shared", *objects, "-o", library, f"-L{lib}", "-ltorch", "-ltorch_cpu"],
        check=True,
    )
    return library


def kept(what: str, *settings: str) -> Path:
    """A folder for what is made of the sources as they are, with these settings."""
    digest = hashlib.sha256("\n".join((torch.__version__, *settings)).encode())
    for path in sorted(
        (
            *CSRC.glob("*.h"),
            *CSRC.glob("cuda/*"),
            *(HERE / n for n in ("emulator.h", "library.cpp")),
        )
    ):
        if path.is_file():
            digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"htv-{what}-{os.getuid()}-{digest.hexdigest()[:16]}"


def library() -> Path:
    """Compiled once for the sources as they are: minutes on one core, nothing afterwards. Wants a
    `compiler`.
    """
    folder = kept("emulated")
    library = folder / "emulated.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            built = compile_library(Path(scratch))
            folder.mkdir(exist_ok=True)
            shutil.copy(built, folder / "copy")
            os.replace(folder / "copy", library)
    return library


def operators():
    """`torch.ops.htv_emulated`."""
    torch.ops.load_library(str(library()))
    return torch.ops.htv_emulated
