"""Every test starts from the same random state."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)
