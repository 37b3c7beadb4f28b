"""Builds the compiled part of htv: what pyproject.toml cannot say.

htv/_C.abi3.so      the ops, on LibTorch's stable ABI: one file serves every torch since 2.11 and
                    every Python
htv/_host.*.so      build information and CPU capability, by pybind11
htv/_engine.*.so    the usual case of what every torch call of a forward passes through, by pybind11

Environment:
HTV_BUILD=1|0       with or without compiled code; without, the reference ops serve
HTV_CUDA=auto|0|1   CUDA kernels: where nvcc is found and torch has CUDA; never;
                    wherever nvcc is, or fail
HTV_CUDA_ARCHS      compute capabilities, "80;90" by default; the last is also embedded as PTX
HTV_SANITIZE=0|1    for `make test-sanitize`: the CPU kernels under ASan and UBSan
CXX, CUDA_HOME      the compilers

Every command of the build stands in <build-temp>/build.ninja, which is why a rebuild compiles only
what changed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
TORCH_TARGET = "0x020b000000000000"  # the ABI of torch 2.11, the oldest served

COMMON = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-fno-math-errno",
    "-fno-trapping-math",
]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer"]
SANITIZED += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EXACT = (
    "-ffp-contract=off"  # a * b + c is rounded once only where a kernel says so: medians stay exact
)
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ICELAKE = [
    *AVX512,
    *(f"-m{f}" for f in ("avx512vpopcntdq", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "gfni")),
]
NOISE = ["-Wno-maybe-uninitialized"]  # from the intrinsics of these in GCC 12
ZEN4 = [*ICELAKE, "-mavx512bf16"]
# In the order of csrc/cpu/isa.h, by its names.
INTEGERS = ["-DHTV_INTEGER_ORDER"]  # compared instead of floats, see csrc/cpu/machine.h
ISAS = {
    "baseline": [],
    "avx2": [*AVX2, *INTEGERS],
    "avx512": [*AVX512, *NOISE],
    "icelake": [*ICELAKE, *NOISE],
    "zen4": [*ZEN4, *NOISE, *INTEGERS],
}

MACHINE = ("isa", "machine")  # sources of csrc/cpu that know of no torch

NVCC = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-fmad=false",
    "-DUSE_CUDA",
]  # -fmad as EXACT
ELEMENTS = ("double", "float", "BFloat16", "Float16")  # cuda/*_kernel.cu are compiled once for each


def choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def wanted_nvcc() -> str | None:
    """The nvcc to build CUDA kernels with, or None to leave them out."""
    wish, nvcc = choice("HTV_CUDA", ("auto", "0", "1")), find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "HTV_CUDA=1, but no nvcc was found: put it on PATH, set CUDA_HOME, or use HTV_CUDA=auto"
        )
    if wish == "auto":
        import torch

        return nvcc if torch.version.cuda else None
    return nvcc if wish == "1" else None


def cuda_archs() -> list[str]:
    archs = os.environ.get("HTV_CUDA_ARCHS", "80;90").split(";")
    if not all(arch.rstrip("af").isdigit() for arch in archs):
        raise SystemExit(f"HTV_CUDA_ARCHS must look like '80;90', got {';'.join(archs)!r}")
    return archs


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]


def pybind11_includes() -> list[str]:
    """pybind11's own headers, or the copy that torch carries."""
    try:
        import pybind11
    except ModuleNotFoundError:
        from torch.utils.cpp_extension import include_paths

        return include_paths()
    return [pybind11.get_include()]


class Ninja:
    """A build file: rules, then one edge per object or library."""

    def __init__(self, folder: Path):
        self.folder, self.lines, self.objects = (
            folder.resolve(),
            ["ninja_required_version = 1.5"],
            [],
        )

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if deps else []

    def build(self, out: Path | str, rule: str, sources: list, flags: list[str]) -> str:
        escaped = [
            str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            for path in [out, *sources]
        ]
        self.lines += [
            f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}",
            f"  flags = {shlex.join(flags)}",
        ]
        return str(out)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        jobs = os.environ.get("MAX_JOBS")
        done = subprocess.run(
            [ninja, "-C", self.folder, *(["-j", jobs] if jobs else [])], check=False
        )
        if done.returncode != 0:
            raise SystemExit(
                "compilation failed, see above; the commands stand in "
                f"{self.folder / 'build.ninja'}"
            )


class BuildExtensions(build_ext):
    """All extensions by one ninja run."""

    def build_extensions(self) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = ISAS if x86 else {"baseline": []}
        x86_define = ["-DHTV_X86"] if x86 else []
        nvcc = wanted_nvcc()
        cxx = os.environ.get("CXX") or shutil.which("g++") or "c++"
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        torch_flags += [flag for path in include_paths() for flag in ("-isystem", path)]

        folder = Path(self.build_temp)
        if getattr(self, "editable_mode", False):
            # pip removes the folder it gives: installing one more extra would compile all again.
            folder = Path("build", f"{sys.implementation.cache_tag}-torch-{torch.__version__}")
        ninja = Ninja(folder)
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out")
        ninja.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out")
        ninja.rule("link", f"{cxx} -shared $in -o $out $flags", deps=False)
        ninja.rule(
            "nvlink", f"{nvcc} -ccbin {cxx} -shared -cudart static $in -o $out $flags", deps=False
        )

        def compiled(
            source: str, flags: list[str], out: str | None = None, rule: str = "cxx"
        ) -> str:
            return ninja.build((out or source) + ".o", rule, [(CSRC / source).resolve()], flags)

        sanitize = choice("HTV_SANITIZE", ("0", "1")) == "1"
        cpu = [*COMMON, *(SANITIZED if sanitize else []), *x86_define]
        # for both libraries
        machine_objects = [compiled(f"cpu/{name}.cpp", cpu) for name in MACHINE]
        objects = [*machine_objects, compiled("library.cpp", cpu)]
        # Kernels are compiled once per instruction set, what calls them once.
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            name = f"cpu/{source.name}"
            if source.stem.endswith("_kernel"):
                for isa, flags in isas.items():
                    flags = [*cpu, *flags, f"-DHTV_ISA={isa}", EXACT]
                    objects.append(compiled(name, flags, f"cpu/{source.stem}.{isa}"))
            elif source.stem not in MACHINE:
                objects.append(compiled(name, [*cpu, *torch_flags]))

        archs = cuda_archs() if nvcc else []
        # libtorch.so, though it holds nothing itself, is what brings torch's CUDA symbols into
        # scope
        lib = Path(torch.__file__).with_name("lib")
        libraries = [f"-L{lib}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
        sanitizers = ["-fsanitize=address,undefined"] if sanitize else []
        if nvcc:
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
            flags = [
                *NVCC,
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-ccbin",
                cxx,
                *codes,
                *torch_flags,
            ]
            for source in sorted(CSRC.glob("cuda/*.cu")):
                name = f"cuda/{source.name}"
                if not source.stem.endswith("_kernel"):
                    objects.append(compiled(name, flags, rule="nvcc"))
                    continue
                for element in ELEMENTS:
                    defined = [*flags, f"-DHTV_ELEMENT={element}"]
                    objects.append(compiled(name, defined, f"{name}.{element}", rule="nvcc"))

        strings = {
            "HTV_COMPILER": first_line([*shlex.split(cxx), "--version"]),
            "HTV_FLAGS": shlex.join(COMMON),
            "HTV_CPU_ISAS": " ".join(isas),
            "HTV_TORCH_VERSION": torch.__version__,
            "HTV_TORCH_TARGET": TORCH_TARGET,
            "HTV_CUDA_ARCHS": " ".join(archs),
        }
        defines = [f'-D{name}="{value}"' for name, value in strings.items()] + [
            f"-DHTV_WITH_CUDA={int(bool(nvcc))}"
        ]
        includes = [flag for path in pybind11_includes() for flag in ("-isystem", path)]
        includes += ["-isystem", sysconfig.get_path("include")]
        host_objects = [compiled("host.cpp", [*cpu, *defines, *includes]), *machine_objects]
        engine_objects = [
            compiled(f"engine/{source.name}", [*cpu, *includes])
            for source in sorted(CSRC.glob("engine/*.cpp"))
        ]

        paths = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        ops, host, engine = paths
        ninja.build(ops, "nvlink" if nvcc else "link", objects, [*libraries, *sanitizers])
        ninja.build(host, "link", host_objects, sanitizers)
        ninja.build(engine, "link", engine_objects, sanitizers)
        ninja.run()


# The kernels are built and tried on Linux; elsewhere the default is to do without.
if choice("HTV_BUILD", ("1", "0") if sys.platform == "linux" else ("0", "1")) == "1":
    wanted_nvcc()  # say what is wrong before anything is compiled
    extensions = {
        "ext_modules": [
            Extension("htv._C", [], py_limited_api=True),
            Extension("htv._host", []),
            Extension("htv._engine", []),
        ],
        "cmdclass": {"build_ext": BuildExtensions},
    }
else:
    choice("HTV_CUDA", ("auto", "0", "1"))
    extensions = {}

setup(
    packages=[
        *find_packages(include=["htv", "htv.*"]),
        "htv.bench",
        "htv.bench.gpu",
        "htv.triton_kernels",
    ],
    package_dir={"htv.bench": "bench", "htv.triton_kernels": "triton_kernels"},
    **extensions,
)
