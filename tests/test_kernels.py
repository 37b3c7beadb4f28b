"""What the compiled part says about itself: one ops library, its build info, the CPU level in force."""

import importlib
from pathlib import Path

import pytest
import torch

import htv
from htv.ops import backend

LEVELS = ("baseline", "avx2", "avx512")

pytestmark = pytest.mark.skipif(backend.NOT_BUILT is not None, reason="htv was built without compiled kernels")


@pytest.fixture
def host():
    return importlib.import_module("htv._host")


def test_one_ops_library_serves_every_python():
    (library,) = Path(htv.__file__).parent.glob("_C*.so")
    assert library.name == "_C.abi3.so"


def test_kernels_are_registered_for_the_cpu():
    for op in ("htv::stacked", "htv::linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"), op


def test_build_info(host):
    info = host.build_info()
    assert set(info) == {"compiler", "flags", "cpu_levels", "torch", "torch_target", "cuda", "cuda_archs"}
    assert "baseline" in info["cpu_levels"] and set(info["cpu_levels"]) <= set(LEVELS)
    assert info["torch_target"] == "0x020b000000000000"
    assert "-ffast-math" not in info["flags"] and "-march=native" not in info["flags"]
    assert info["cuda"] == bool(info["cuda_archs"])


def test_the_environment_lowers_the_level(host, monkeypatch):
    monkeypatch.delenv("HTV_CPU_CAPABILITY", raising=False)
    best = host.cpu_capability()
    assert best in host.build_info()["cpu_levels"]
    for wanted in LEVELS:
        monkeypatch.setenv("HTV_CPU_CAPABILITY", wanted)
        assert host.cpu_capability() == min(wanted, best, key=LEVELS.index)


def test_an_unknown_level_is_an_error(host, monkeypatch):
    monkeypatch.setenv("HTV_CPU_CAPABILITY", "avx1024")
    with pytest.raises(RuntimeError, match=r"HTV_CPU_CAPABILITY must be baseline, avx2 or avx512, got 'avx1024'"):
        host.cpu_capability()
    with pytest.raises(RuntimeError, match="got 'avx1024'"):
        torch.ops.htv.stacked(torch.ones(2, 3), "mean", 0, 0.0, 0.0)
