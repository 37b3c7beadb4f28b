"""Runs the `check_*.py` beside this file under Triton's interpreter, and on a GPU where there is
one.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import htv
from support import patience

pytest.importorskip("triton")


def check(interpret: bool, *arguments: str):
    """Run all checks in one process: importing torch and Triton takes as long as some of them."""
    folder = Path(__file__).parent
    environment = {
        "TRITON_INTERPRET": str(int(interpret)),
        "HTV_TUNED": "",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(htv.__file__).parents[1]), str(folder), os.environ.get("PYTHONPATH", "")]
        ),
    }
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    paths = map(str, sorted(folder.glob("check_*.py")))
    status, words = patience.run([*pytest_, *paths, *arguments], 3600, environment)
    assert status == 0, words


def test_under_the_interpreter():
    check(True, "-m", "not slow")


@pytest.mark.slow
def test_the_slow_under_the_interpreter():
    check(True, "-m", "slow")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    check(False)
