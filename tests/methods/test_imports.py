"""The methods are for training scripts: they bring nothing of the command line with them."""

import subprocess
import sys

import htv.methods


def test_nothing_but_torch_is_imported():
    names = ("typer", "rich", "matplotlib", "sklearn", "scipy")
    program = f"import sys, htv.methods; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert [name for name in htv.methods.__all__ if not hasattr(htv.methods, name)] == []
    assert len(set(htv.methods.__all__)) == len(htv.methods.__all__)
