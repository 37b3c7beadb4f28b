"""Imports run one way: cli, demo, methods -> attach, check, explain -> intercept -> autograd -> ops -> rules."""

import ast
from pathlib import Path

import pytest

import htv
from htv import bench

ROOT = Path(htv.__file__).parent
LAYERS = [
    ["htv.rules", "htv.errors", "htv.machine", "htv.measure", "htv.files"],
    ["htv.groups"],
    ["htv.triton_kernels"],
    ["htv.ops"],
    ["htv.autograd"],
    ["htv.inputs", "htv.ranks"],
    [
        "htv.marks",
        "htv.operations",
        "htv.layout",
        "htv.history",
        "htv.layers",
        "htv.served",
        "htv.intercept",
        "htv.watched",
    ],
    ["htv.traced"],
    ["htv.forward", "htv.compiled"],
    ["htv.attach"],
    ["htv.batchnorm", "htv.check", "htv.explain", "htv.tune"],
    ["htv.data", "htv.methods", "htv.distributed", "htv.integrations"],
    ["htv.bench"],
    ["htv.demo", "htv.experiments"],
    ["htv.cli"],
    ["htv.__main__"],
]


def level(module: str) -> int:
    for height, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    raise AssertionError(f"{module} has no place in the architecture: give it one in LAYERS")


def imports(path: Path) -> set[str]:
    """htv modules imported when `path` is, leaving out those for type checking alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "htv"}
    return {name for name in found if name.startswith("htv.")}


def module(path: Path, folder: Path, package: str) -> str:
    return ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


BENCH = Path(bench.__file__).parent
MODULES = {module(path, ROOT, "htv"): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}
MODULES |= {
    module(path, BENCH, "htv.bench"): path for path in sorted(BENCH.rglob("*.py")) if "pytest" not in path.parts
}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    for imported in imports(MODULES[name]):
        if imported.split(".")[1].startswith("_"):
            continue  # compiled
        assert level(imported) <= level(name), f"{name} imports {imported}"


def test_every_public_name_of_the_contract_is_there():
    names = """attach check explain linear_grad sign_agreement and_mask xor_mask geometric_mean sand_mask median
        trimmed_mean winsorized_mean median_of_means Mean AndMask XorMask GeometricMean SandMask SignSum Median
        MedianOfMeans TrimmedMean WinsorizedMean UnsupportedError CheckError use_backend replace_batchnorm""".split()
    assert [name for name in names if not hasattr(htv, name)] == []
