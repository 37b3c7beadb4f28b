"""What the compiled part says about itself: one ops library, its build info, the CPU level in
force.
"""

import ctypes
import importlib
from pathlib import Path

import pytest
import torch

import htv
from htv.ops import backend, reference, statistics
from htv.rules import Statistic

LEVELS = ("baseline", "avx2", "avx512", "icelake", "zen4")

pytestmark = pytest.mark.skipif(
    backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
)


@pytest.fixture
def host():
    return importlib.import_module("htv._host")


def test_one_ops_library_serves_every_python():
    (library,) = Path(htv.__file__).parent.glob("_C*.so")
    assert library.name == "_C.abi3.so"


def test_kernels_are_registered_for_the_cpu():
    for op in ("htv::stacked", "htv::linear", "htv::norm_sums"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"), op


def exported_statistics() -> dict[str, int]:
    """Return the numbers of statistics by name, as the compiled library lists them."""
    (library,) = Path(htv.__file__).parent.glob("_C*.so")
    listed = ctypes.CDLL(str(library)).htv_statistics
    listed.restype = ctypes.c_char_p
    pairs = [entry.split("=") for entry in listed().decode().split(" ")]
    assert len({name for name, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)
    return {name: int(number) for name, number in pairs}


def test_the_library_lists_its_statistics():
    assert set(exported_statistics()) == set(statistics.names())


def test_a_listed_number_is_that_statistic():
    grads = torch.randn(9, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {}
    for name, number in exported_statistics().items():
        statistic = Statistic(name, count=0 if name == "median" else 3, votes=3.5, k=0.5)
        arguments = (statistic.count, statistic.votes, statistic.k)
        values[name], _ = torch.ops.htv.stacked(grads, number, *arguments)
        torch.testing.assert_close(values[name], reference.stacked(grads, statistic)[0])
    for name, value in values.items():  # so that none passes for another
        assert not any(torch.equal(value, values[other]) for other in values.keys() - {name}), name


def test_numbers_of_no_statistic_are_refused():
    numbers = exported_statistics().values()
    for number in (min(numbers) - 1, max(numbers) + 1, 2**32):
        with pytest.raises((RuntimeError, ValueError), match=f"unknown statistic {number}"):
            torch.ops.htv.stacked(torch.ones(3, 2), number, 1, 0.0, 0.0)


def test_build_info(host):
    info = host.build_info()
    assert set(info) == {
        "compiler",
        "flags",
        "cpu_levels",
        "torch",
        "torch_target",
        "cuda",
        "cuda_archs",
    }
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
    with pytest.raises(
        RuntimeError, match="must be baseline, avx2, avx512, icelake or zen4, got 'avx1024'"
    ):
        host.cpu_capability()
    with pytest.raises(RuntimeError, match="got 'avx1024'"):
        torch.ops.htv.stacked(torch.ones(2, 3), 0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("trait", "variable", "choices"),
    [
        ("product", "HTV_CPU_PRODUCT", ("torch", "own")),
        ("order", "HTV_CPU_ORDER", ("floats", "integers")),
    ],
)
def test_the_environment_chooses_a_trait(host, monkeypatch, trait, variable, choices):
    monkeypatch.delenv(variable, raising=False)
    assert host.cpu_traits()[trait] in choices
    for wanted in choices:
        monkeypatch.setenv(variable, wanted)
        assert host.cpu_traits()[trait] == wanted
    monkeypatch.setenv(variable, "mine")
    message = f"{variable} must be {choices[0]} or {choices[1]}, got 'mine'"
    with pytest.raises(RuntimeError, match=message):
        host.cpu_traits()


def test_calls_leave_no_memory_behind():
    """Not even a few bytes a call: they would keep the heap from giving back what lies between
    them.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    grads, x, offsets = torch.ones(4, 8), torch.ones(4, 2), torch.arange(5)
    libc = ctypes.CDLL(None)

    def resident_after(calls: int) -> int:
        for _ in range(calls):
            torch.ops.htv.stacked(grads, 0, 0, 0.0, 0.0)
            torch.ops.htv.linear(x, x, offsets, 1, 2, 0.0, 0.0)
        getattr(libc, "malloc_trim", lambda _: None)(0)
        return 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])

    before = resident_after(2_000)
    assert resident_after(30_000) - before < 16 * 30_000
