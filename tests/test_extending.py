"""docs/extending.md is literal: its recipes are put into a copy of the tree and tested there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import htv

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
COPIED = ("htv", "triton_kernels", "docs", "setup.py", "pyproject.toml")
IGNORED = shutil.ignore_patterns("__pycache__", "results")
EDIT = re.compile(
    r"^\*\*`(?P<file>[^`]+)`\*\*, (?P<where>above|below|at the end|a new file)"
    r"( (?P<ticks>`{1,2}) ?(?P<anchor>.+?) ?(?P=ticks)(?!`))?:\n\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Edit(NamedTuple):
    """One step of a recipe: a text, and where it goes in a file."""

    file: str
    where: str
    anchor: str | None
    text: str


def recipe(heading: str) -> list[Edit]:
    """The edits of one section of the page."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    edits = [Edit(*m.group("file", "where", "anchor", "text")) for m in EDIT.finditer(section)]
    assert len(edits) == len(re.findall(r"^\*\*`", section, re.MULTILINE)), (
        "an edit is not understood"
    )
    return edits


def apply(edit: Edit, tree: Path) -> None:
    path = tree / edit.file
    if edit.where == "a new file":
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edit.text)
        return
    lines, text = path.read_text().splitlines(keepends=True), edit.text
    if edit.where == "at the end":
        path.write_text("".join(lines) + "\n\n" + text)
        return
    found = [number for number, line in enumerate(lines) if line.lstrip().startswith(edit.anchor)]
    assert len(found) == 1, f"{edit.file} has {len(found)} lines that start with {edit.anchor!r}"
    if text.startswith(("@", "def ", "class ")):
        text += "\n\n"
    lines.insert(found[0] + (edit.where == "below"), text)
    path.write_text("".join(lines))


@pytest.fixture
def tree(tmp_path):
    """A copy of what the recipes edit, with the compiled library where there is one."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=IGNORED)
        elif source.exists():
            shutil.copy2(source, tmp_path / name)
    for library in Path(htv.__file__).parent.glob("_*.so"):
        shutil.copy2(library, tmp_path / "htv" / library.name)
    if not (tmp_path / "htv" / "triton_kernels").exists():
        (tmp_path / "htv" / "triton_kernels").symlink_to(tmp_path / "triton_kernels")
    return tmp_path


def run(tree: Path, *arguments: str, **environment: str) -> str:
    """What Python prints in the copy, whose htv is the one that is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rule(tree):
    edits = recipe("A rule")
    assert {edit.file for edit in edits if not edit.file.startswith("tests/")} == {
        "htv/rules.py", "htv/ops/reference.py", "docs/rules.md",
    }  # fmt: skip
    for edit in edits:
        apply(edit, tree)
    program = (
        "import htv, torch; g = torch.randn(9, 4); print(htv.__file__, htv.Midrange());"
        "assert 'Midrange' in htv.__all__ and torch.equal(htv.median(g), g.median(dim=0).values)"
    )
    assert f"{tree / 'htv'}" in run(tree, "-c", program)
    tests = [edit.file for edit in edits if edit.file.startswith("tests/")]
    assert "2 passed" in run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    table = [
        line for line in (tree / "docs/rules.md").read_text().splitlines() if "Midrange" in line
    ]
    assert len(table) == 1 and table[0].count("|") == 4


def test_a_kernel(tree):
    pytest.importorskip("triton")
    edits = recipe("A kernel")
    assert len({edit.file for edit in edits}) == 3
    for edit in edits:
        apply(edit, tree)
    (test,) = [edit.file for edit in edits if edit.file.startswith("tests/")]
    options = {"TRITON_INTERPRET": "1", "HTV_TUNED": "", "HTV_BACKEND": "auto"}
    command = ("-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", test)
    assert "3 passed" in run(tree, *command, **options)
    program = (
        "from htv.ops import registry; import htv.ops.kernels;print('\\n'.join(map(str, "
        "registry.by_op().items())))"
    )
    assert "('norm_sums', {'cpp': 'yes', 'cuda': '-', 'triton': 'yes'})" in run(tree, "-c", program)


NEW_LAYER = """
import torch
from torch import nn
import htv

class Convolution(nn.Module):  # over time, T first
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.conv_tbc(x, self.w, self.b, 1))

torch.manual_seed(0)
model, x = Convolution(), torch.randn(4, 7, 6)
for rule in (htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)):
    assert htv.check(model, x, rule, batch_dim=1).groups == 7
    assert htv.check(model, x, rule, batch_dim=1, groups=torch.arange(7) % 3).groups == 3
assert htv.check(model, x, htv.Median(), batch_dim=1, exclude=("w", "b")).parameters == 4
assert htv.check(model, x, htv.Median(), batch_dim=1, exclude="b").parameters == 4
try:
    htv.check(model, x, htv.Median())  # the batch in time's place
except htv.UnsupportedError as error:
    assert "conv_tbc" in str(error)
else:
    raise AssertionError("examples along time were not refused")
row = htv.explain(model, x, batch_dim=1).rows[0]
print(htv.__file__, row.parameter, row.use)
"""


def test_a_layer(tree):
    edits = recipe("A layer")
    assert {edit.file for edit in edits} == {
        "htv/engine/handlers/conv_tbc.py", "tests/support/layer_table.py",
    }  # fmt: skip
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=IGNORED)
    supported = tree / "docs" / "supported.md"
    before = supported.read_text()
    with pytest.raises(AssertionError, match="parameter 'w', 'b' is used by conv_tbc"):
        run(tree, "-c", NEW_LAYER)
    for edit in edits:
        apply(edit, tree)
    found = run(tree, "-c", NEW_LAYER)
    assert f"{tree / 'htv'}" in found and found.endswith(" w conv_tbc\n")
    run(tree, "-m", "support.supported")
    lines = set(supported.read_text().splitlines()) - set(before.splitlines())
    assert lines == {"| conv_tbc | served exactly | test_layers.py::test_layer |"}
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "conv_tbc or supported")
    assert re.search(r"^\d\d passed", run(tree, *command, "tests/test_layers.py"), re.MULTILINE)


def test_what_is_registered_twice_is_refused():
    import torch

    from htv.engine import handlers
    from htv.engine.handlers.call import handles
    from htv.ops.factors import StackedFactors

    before = [dict(table) for table in (handlers.HANDLERS, handlers.FACTORS, handlers.USES)]
    for registration, words in (
        (handles(torch.nn.functional.linear), "function linear|built-in.* linear"),
        (handles(uses={"linear": StackedFactors}), "'linear' is registered already"),
        (handles(modules={torch.nn.Linear: "embedding"}), "Linear'> is registered already"),
    ):
        with pytest.raises(ValueError, match=words):
            registration(lambda mode, func, args, kwargs: NotImplemented)
    assert before == [handlers.HANDLERS, handlers.FACTORS, handlers.USES]


def test_a_rule_of_ones_own_outside_of_htv():
    """The page's first example, as it stands."""
    import torch

    (code,) = re.findall(
        r"^## A rule of your own.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S
    )
    model = torch.nn.Linear(3, 2, bias=False)
    names = {"model": model}
    exec(code, names)
    x = torch.randn(5, 3)
    with names["handle"]:
        (3 * model(x)).sum().backward()
    expected = 5 * (3 * x).clamp(-1, 1).mean(dim=0).expand(2, 3)
    torch.testing.assert_close(model.weight.grad, expected)
    assert os.environ.get("HTV_BUILD") == "0" or htv.check(model, x, names["Clipped"]())
