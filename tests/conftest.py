"""Every test starts from the same random state, and none is judged by how long it takes."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("htv", deadline=None)
hypothesis.settings.load_profile("htv")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)
