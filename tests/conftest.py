"""Every test starts from the same random state, and none is judged by how long it takes."""

import gc
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


# The files that take longest: where several processes share the tests, they come first, so that
# none is left with one of them at the end.
LONGEST = (
    "test_interpreted.py", "test_compile.py", "test_cli.py", "test_layers.py",
    "test_factors.py", "test_gpu_bench.py", "test_huggingface.py", "test_fully_sharded.py",
    "test_data_parallel.py", "test_extras.py", "test_waiting.py", "test_stacked_cpp.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))  # stable


def pytest_collection_finish(session):
    """What was imported and collected stays: Python need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)
