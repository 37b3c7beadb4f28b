"""Fixtures of the tests of compiled kernels."""

import importlib

import pytest
import torch

from support.quick import quick

LEVELS = ("baseline", "avx2", "avx512", "icelake", "zen4")


@pytest.fixture
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best() -> str:
    """The level this machine takes by itself."""
    try:
        return importlib.import_module("htv._host").cpu_capability()
    except ImportError:  # built without
        return LEVELS[0]


@pytest.fixture(params=["own", "torch"])
def product(request, monkeypatch):
    """Whose matrix product takes plain sums."""
    monkeypatch.setenv("HTV_CPU_PRODUCT", request.param)
    return request.param


@pytest.fixture(params=quick(LEVELS, ("avx2", best())))
def level(request, monkeypatch):
    monkeypatch.setenv("HTV_CPU_CAPABILITY", request.param)
    if importlib.import_module("htv._host").cpu_capability() != request.param:
        pytest.skip(f"no {request.param} here")
    return request.param
