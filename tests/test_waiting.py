"""No step waits for its GPU unnoticed, shown without one: see `pretended_gpu.py`."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import htv
from support import patience
from support.pretended_gpu import build_guard

RUN = (
    "import ctypes, sys\n"
    "for library in sys.argv[1].split(';'):\n"
    "    library and ctypes.CDLL(library, ctypes.RTLD_GLOBAL)\n"
    "import pytest\n"
    "sys.exit(pytest.main(sys.argv[2:]))"
)


@pytest.mark.parametrize(
    "some", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_steps_wait_for_nothing(some, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("autograd's engine of torch for CUDA asks the driver for the pretended GPU")
    folder = Path(__file__).parent
    search = [str(Path(htv.__file__).parents[1]), str(folder), os.environ.get("PYTHONPATH", "")]
    interpreted = importlib.util.find_spec("triton") is not None
    environment = {"PYTHONPATH": os.pathsep.join(search), "HTV_TUNED": "", "HTV_BACKEND": "auto"}
    environment["TRITON_INTERPRET"] = str(int(interpreted))
    options = [
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-m",
        some,
        str(folder / "check_waiting.py"),
    ]
    command = [sys.executable, "-c", RUN, ";".join(build_guard(tmp_path)), *options]
    status, words = patience.run(command, 3600, environment)
    assert status == 0, words
