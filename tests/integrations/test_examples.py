"""The examples of training run on two ranks, and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "torchrun_ddp": (),
    "torchrun_fsdp": (),
    "accelerate_loop": ("accelerate",),
    "hf_trainer": ("transformers", "accelerate"),
    "trl_sft": ("trl", "transformers", "accelerate", "datasets"),
    "lightning_module": ("lightning",),
}


def run(*command):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_on_two_ranks(name):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package}: hard-to-vary[trainers]")
    script = str(EXAMPLES / f"{name}.py")
    if name == "lightning_module":
        shown = run(script, "--devices", "2")
    else:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        shown = run(*torchrun, script)
    assert re.search(r"(64|128) examples voted", shown), shown
    if name.startswith("torchrun"):
        assert "the same ones as in one process: True" in shown
        assert float(re.search(r"largest difference (\S+)", shown)[1]) < 1e-5
