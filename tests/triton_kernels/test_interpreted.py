"""Runs the `check_*.py` beside this file under Triton's interpreter, and on a GPU where there is
one.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

import htv
from support import patience

pytest.importorskip("triton")
PATHS = sorted(Path(__file__).parent.glob("check_*.py"))
CHECKS = [path.name for path in PATHS]
# pytest fails where it finds no test.
SLOW = [p.name for p in PATHS if re.search(r"slow\(|HALF_SLOW|mark\.slow", p.read_text())]


def check(name: str, interpret: bool, *arguments: str):
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
    status, words = patience.run([*pytest_, str(folder / name), *arguments], 3600, environment)
    assert status == 0, words


@pytest.mark.parametrize("name", CHECKS)
def test_under_the_interpreter(name):
    check(name, True, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_slow_under_the_interpreter(name):
    check(name, True, "-m", "slow")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    check(name, False)
