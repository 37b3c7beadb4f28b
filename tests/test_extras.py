"""What works without the extras, and how a command or function that needs one says so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from htv.errors import MissingExtraError, require

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("typer", "rich", "matplotlib", "sklearn", "scipy")

# Without these packages, whatever is installed: the finders overlook them. One that raises instead
# would break torch, which asks for some of them to see whether they are there.
BLOCKED = """
import sys

class WithoutSome:
    names = {names!r}

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(WithoutSome, sys.meta_path)
for name in WithoutSome.names:
    assert name not in sys.modules
"""


# Importing torch takes longer than all else here: one process does, and forks one for each program.
FORKS = """
import contextlib, json, os, sys, tempfile, traceback
import torch

def status_of(program, arguments):
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            status = status_of(*json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """Run a program in a process that cannot import `without`."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as forks:

        def run(program, *arguments, without=()):
            code = BLOCKED.format(names=tuple(without)) + program
            print(json.dumps([code, [*map(str, arguments)]]), file=forks.stdin, flush=True)
            answer = json.loads(forks.stdout.readline())
            return subprocess.CompletedProcess(arguments, *answer)

        yield run


TRAINERS = ("transformers", "accelerate", "lightning", "trl", "datasets")


def test_import_htv_loads_no_extra(run):
    program = "import htv, htv.methods, htv.data, htv.cli\n"
    done = run(program + f"print([name for name in {EXTRAS!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_import_htv_loads_no_trainer(run):
    done = run(
        f"import sys, htv, htv.integrations; print([n for n in {TRAINERS!r} if n in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("module", ["huggingface", "trl", "lightning"])
def test_an_integration_names_the_extra_it_needs(module, run):
    done = run(f"import htv.integrations.{module}", without=TRAINERS)
    assert 'pip install "hard-to-vary[trainers]"' in done.stderr


def test_training_works_without_any_extra(run):
    done = run(
        """
import torch, htv, htv.methods, htv.data

torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
start = model.weight.detach().clone()
with htv.attach(model, htv.Median()):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
assert not torch.equal(start, model.weight)
htv.check(model, torch.randn(4, 3), htv.AndMask(0.5))
htv.methods.RM3(optimizer, decay_first=True)
htv.data.spirals(2, 8, 8, 2)
""",
        without=EXTRAS,
    )
    assert done.returncode == 0, done.stderr


MAIN = "from htv.cli import main; sys.argv[0] = 'htv'; main()"


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        ([], EXTRAS, 'htv needs typer: pip install "hard-to-vary[cli]"'),
        (["demo"], EXTRAS, 'htv needs typer: pip install "hard-to-vary[cli]"'),
        (["--help"], ["typer"], 'htv needs typer: pip install "hard-to-vary[cli]"'),
        (
            ["demo"],
            ["rich", "sklearn", "matplotlib"],
            'htv demo needs rich, matplotlib, scikit-learn: pip install "hard-to-vary[cli]"',
        ),
        (["demo", "--data", "."], ["matplotlib", "sklearn"], "htv demo needs matplotlib: "),
        (["bench"], ["matplotlib"], 'htv bench needs matplotlib: pip install "hard-to-vary[cli]"'),
        (["info"], ["rich"], 'htv info needs rich: pip install "hard-to-vary[cli]"'),
        (["tune", "--dry"], ["rich"], 'htv tune needs rich: pip install "hard-to-vary[cli]"'),
        (["experiment", "linear"], ["matplotlib"], "htv experiment needs matplotlib: "),
        (["experiment", "mat-toy"], ["rich"], "htv experiment needs rich: "),
        (["experiment", "winsorized"], ["sklearn"], "htv experiment needs scikit-learn: "),
        (
            ["experiment", "paths"],
            ["scipy"],
            'htv experiment paths needs scipy: pip install "hard-to-vary[cli,methods]"',
        ),
    ],
)
def test_a_command_names_the_extra_it_lacks(arguments, without, message, tmp_path, run):
    done = run(f"import os; os.chdir({str(tmp_path)!r})\n{MAIN}", *arguments, without=without)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_experiments_are_listed_with_typer_alone(run):
    done = run(MAIN, "experiment", without=EXTRAS[1:])
    assert done.returncode == 0, done.stderr
    assert "mat-toy" in done.stdout


def test_functions_name_the_extra_they_lack(monkeypatch):
    from htv.data import digits

    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = r'digits needs scikit-learn: pip install "hard-to-vary\[cli\]"'
    with pytest.raises(MissingExtraError, match=message):
        digits()


def test_what_is_required_may_be_there():
    require("the test", "test", "pytest", "torch")
    with pytest.raises(ImportError, match=r"needs no_such_module, no_such.module: "):
        require("the test", "test", "pytest", "no_such_module", "no_such.module")


in_source = pytest.mark.skipif(
    tomllib is None or not (ROOT / "pyproject.toml").is_file(),
    reason="needs the sources and Python 3.11",
)


@in_source
def test_what_an_installation_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda wanted: {re.split(r"[ ;<>=!\[]", requirement)[0] for requirement in wanted}
    extras = {extra: names(wanted) for extra, wanted in project["optional-dependencies"].items()}
    assert names(project["dependencies"]) == {"torch", "numpy", "triton"}
    assert {"typer", "rich", "matplotlib", "scikit-learn"} <= extras["cli"]
    assert extras["methods"] == {"scipy"}


@in_source
def test_the_extras_that_messages_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "".join(path.read_text() for path in sorted((ROOT / "htv").rglob("*.py")))
    named = re.findall(r'\brequire\(f?"[^"]*", "([a-z,]+)"', sources)
    assert len(named) >= 8
    named = {extra for extras in named for extra in extras.split(",")}
    assert named <= set(project["optional-dependencies"])
