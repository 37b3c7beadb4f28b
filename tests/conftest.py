"""Every test starts from the same random state, and none is judged by how long it takes."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("htv", deadline=None)
hypothesis.settings.load_profile("htv")

# Where pytest-xdist runs files side by side, they share the cores.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)
