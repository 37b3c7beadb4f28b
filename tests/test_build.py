"""What installs: a pure-Python wheel, the package map, clear refusals of wrong settings."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "htv",
    "bench",
    "triton_kernels",
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="not run from a source tree"
)


@pytest.fixture
def tree(tmp_path):
    """A clean copy of the sources, so that no build touches the working tree."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build")
            )
        elif source.is_file():
            shutil.copy(source, copy / name)
    return copy


def run(tree, *arguments, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HTV_")} | settings
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def names_in_wheel(tree, tmp_path, **settings):
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    target = tmp_path / "wheel"
    command = (
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
        "-w",
        target,
        ".",
    )
    done = run(tree, *command, **settings)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_a_wheel_without_compiled_code(tree, tmp_path):
    wheel, names = names_in_wheel(tree, tmp_path, HTV_BUILD="0")
    assert wheel == "hard_to_vary-0.1.0-py3-none-any.whl"
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu", ".h"))]
    assert {name.split("/")[0] for name in names} == {"htv", "hard_to_vary-0.1.0.dist-info"}
    assert "htv/rules.py" in names and "htv/ops/schema.py" in names
    assert "htv/triton_kernels/__init__.py" in names
    assert "htv/py.typed" in names and "htv/cli/commands.py" in names
    benched = {name for name in names if name.startswith("htv/bench/")}
    sources = (*(ROOT / "bench").glob("*.py"), *(ROOT / "bench" / "gpu").glob("*.py"))
    assert benched == {
        f"htv/{path.relative_to(ROOT)}" for path in sources
    }  # no pytest/, no results/


def test_the_source_distribution_is_typed_too(tree):
    pytest.importorskip("setuptools")
    done = run(tree, "setup.py", "--quiet", "sdist", HTV_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"htv/py.typed", "htv/rules.py", "bench/run.py", "triton_kernels/__init__.py"} <= names


def test_what_is_imported_is_typed():
    """Editable or not: type checkers look for the file beside the package that Python imports."""
    import htv

    assert Path(htv.__file__).with_name("py.typed").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HTV_CUDA": "yes"}, "HTV_CUDA must be one of auto, 0, 1; got 'yes'"),
        ({"HTV_BUILD": "no"}, "HTV_BUILD must be one of 1, 0; got 'no'"),
        ({"HTV_CUDA": "1", "CUDA_HOME": "/nowhere"}, "HTV_CUDA=1, but no nvcc was found"),
        ({"HTV_BUILD": "0", "HTV_CUDA": "2"}, "HTV_CUDA must be one of auto, 0, 1; got '2'"),
    ],
)
def test_wrong_settings_say_so(tree, settings, message):
    done = run(tree, "setup.py", "--version", **settings)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_new_kernels_and_ops_are_found_by_their_names(tree, tmp_path):
    pytest.importorskip("setuptools")
    (tree / "csrc" / "cpu" / "new_kernel.cpp").touch()
    (tree / "csrc" / "cpu" / "new.cpp").touch()
    ninja = tmp_path / "bin" / "ninja"  # so that nothing is compiled
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\nexit 1\n")
    ninja.chmod(0o755)
    path = f"{ninja.parent}{os.pathsep}{os.environ['PATH']}"
    done = run(tree, "setup.py", "build_ext", HTV_BUILD="1", HTV_CUDA="0", PATH=path)
    (written,) = tree.glob("build/*/build.ninja")
    assert f"the commands stand in {written}" in done.stderr
    edges = [line.split()[1] for line in written.read_text().splitlines() if line[:6] == "build "]
    known = {edge.split(".")[1] for edge in edges if edge.startswith("cpu/select_kernel.")}
    assert "baseline" in known
    assert {edge for edge in edges if edge.startswith("cpu/new")} == {
        "cpu/new.cpp.o:",
        *(f"cpu/new_kernel.{isa}.o:" for isa in known),
    }
