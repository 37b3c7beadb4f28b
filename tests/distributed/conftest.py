import pytest
import torch.distributed as dist

from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    processes = Ranks()
    yield processes
    processes.close()
