"""What users import passes `mypy --strict`, and README's code passes the type checkers of users."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree"),
]

# Names that README's blocks take from their reader.
READER = """
from torch import Tensor

loader: list[tuple[Tensor, Tensor]] = []
x = y = environment_ids = cu_seqlens = mask = grad_output = grads = Tensor()
"""


def run(module, *arguments):
    """Run a type checker from the source tree, where it finds this htv."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    command = [sys.executable, "-m", module, *map(str, arguments)]
    found = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
    shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, **shown)


@pytest.fixture
def readme(tmp_path):
    """README's blocks of Python as one module; two statements in one line are theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2 and "htv.attach" in blocks[0]
    path = tmp_path / "readme.py"
    path.write_text(READER + "\n".join(blocks))
    return path


def test_what_users_import_passes_mypy_strict(tmp_path):
    done = run("mypy", "--cache-dir", tmp_path)
    assert done.returncode == 0, done.stdout


def mypy(path, folder):
    """As a user runs it: htv is another's package, whose own errors are not shown."""
    cache = ("--cache-dir", folder / "cache")
    return run("mypy", "--config-file", os.devnull, "--follow-imports", "silent", *cache, path)


def pyright(path):
    """The errors it finds."""
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable, path)
    assert done.stdout.startswith("{"), done.stdout
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [problem for problem in found if problem["severity"] == "error"]


@pytest.fixture
def wrong(tmp_path):
    """Two mistakes; a checker that takes htv for untyped would accept them."""
    path = tmp_path / "wrong.py"
    path.write_text("import htv\nimport htv.data\n\nhtv.AndMask('a')\nhtv.data.digits(seed='b')\n")
    return path


def test_mypy_accepts_readme_and_sees_mistakes(readme, wrong, tmp_path):
    done = mypy(readme, tmp_path)
    assert done.returncode == 0, done.stdout
    done = mypy(wrong, tmp_path)
    assert done.returncode == 1 and done.stdout.count("[arg-type]") == 2, done.stdout


def test_pyright_accepts_readme_and_sees_mistakes(readme, wrong):
    errors = pyright(readme)
    assert not errors, json.dumps(errors, indent=1)
    rules = [problem["rule"] for problem in pyright(wrong)]
    assert rules == ["reportArgumentType"] * 2
