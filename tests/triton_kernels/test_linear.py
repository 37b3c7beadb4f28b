"""Runs `check_linear.py` under Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import htv

pytest.importorskip("triton")


def check(interpret: bool):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": str(int(interpret)),
        "PYTHONPATH": os.pathsep.join([str(Path(htv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*pytest_, str(Path(__file__).with_name("check_linear.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_under_the_interpreter():
    check(interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    check(interpret=False)
