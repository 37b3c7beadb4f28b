import pytest
import torch

from support import cuda_emulated as emulator


@pytest.fixture(scope="session")
def emulated():
    """`torch.ops.htv_emulated`."""
    if emulator.compiler() is None:
        pytest.skip("needs g++")
    return emulator.operators()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
