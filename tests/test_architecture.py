"""Imports run one way: users' commands -> tools, methods -> attach -> engine -> autograd -> ops ->
rules.

Every import counts, also those inside functions and under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import htv
from htv import bench, triton_kernels

# From the ground up; a module may import those of its own line and of the lines before it.
ORDER = [
    ["htv.rules", "htv.errors"],
    ["htv.tools.env_info", "htv.tools.timing", "htv.tools.files"],
    ["htv.groups"],
    ["htv.triton_kernels"],
    ["htv.ops"],
    ["htv.autograd"],
    ["htv.engine.protocols", "htv.engine.usual"],
    ["htv.engine.provenance"],
    ["htv.engine.torch_ops"],
    ["htv.engine.probing"],
    ["htv.engine.propagation"],
    ["htv.engine.function_trials"],
    ["htv.engine.graph_reading"],
    [
        "htv.engine.inputs",
        "htv.engine.ranks",
        "htv.engine.guard_state",
        "htv.engine.unfinished",
        "htv.engine.eager_helpers",
    ],
    ["htv.engine.group_spec"],
    ["htv.engine.checkpointing"],
    ["htv.engine.results", "htv.engine.expansion"],
    ["htv.engine.continuation"],
    ["htv.engine.parameter"],
    ["htv.engine.handlers"],
    ["htv.engine.mode"],
    ["htv.engine.call_plan", "htv.engine.forward"],
    ["htv.engine.voters", "htv.engine.joint_votes", "htv.engine.forward_block"],
    ["htv.engine.compile"],
    ["htv.engine.session"],
    ["htv.distributed"],
    ["htv.attach"],
    ["htv.tools"],
    ["htv.data", "htv.methods"],
    ["htv.integrations.voting"],
    ["htv.integrations.accelerate"],
    ["htv.integrations.huggingface"],
    ["htv.integrations"],
    ["htv.bench"],
    ["htv.demo", "htv.experiments"],
    ["htv.cli"],
    ["htv.__main__"],
]
USERS = {"__init__", "__main__", "attach", "errors", "groups", "rules"}  # the files at htv's root


def named(path: Path, folder: Path, package: str) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *parts]).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in (
        ("htv", htv),
        ("htv.bench", bench),
        ("htv.triton_kernels", triton_kernels),
    ):
        root = Path(folder.__file__).parent
        for path in sorted(root.rglob("*.py")):
            if "pytest" not in path.parts:
                found[named(path, root, package)] = path
    return found


MODULES = modules()
COMPILED = {"htv._host", "htv._C", "htv._engine"}


def imports(path: Path) -> set[str]:
    """Return the modules of htv that a file imports anywhere; those of `from package import module`
    as such.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "htv"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            if node.module.partition(".")[0] == "htv":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in MODULES or inner in COMPILED else node.module)
    return found


def level(module: str) -> int:
    fitting = [
        (len(name), height)
        for height, names in enumerate(ORDER)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fitting, f"{module} has no place in the architecture: give it one in ORDER"
    return max(fitting)[1]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"htv"}))
def test_imports_run_one_way(name):
    for imported in sorted(imports(MODULES[name])):
        if imported in COMPILED:
            continue
        if imported == "htv":  # whose __init__ imports all that is for users
            assert level(name) > level("htv.tools"), f"{name} imports htv, which imports it"
            continue
        assert imported in MODULES, f"{name} imports {imported}, which does not exist"
        assert level(imported) <= level(name), f"{name} imports {imported}"


def test_no_import_circle():
    graph = {
        name: imports(path) & MODULES.keys() - {name}
        for name, path in MODULES.items()
        if name != "htv"
    }
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"an import circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                follow(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        follow(name, ())


def test_order_names_what_exists():
    unknown = [name for names in ORDER for name in names if name not in MODULES]
    assert not unknown


def test_only_what_users_import_lies_at_the_root():
    root = Path(htv.__file__).parent
    assert {path.stem for path in root.glob("*.py")} == USERS


def test_nothing_else_of_the_repository_can_be_imported(tmp_path):
    """Whatever lies beside htv, in the working tree or an editable install, is no part of the
    package.
    """
    names = [
        "setup",
        "tests",
        "tests.oracles",
        "docs",
        "docs.fill_readme",
        "htv",
        "csrc",
        "examples",
    ]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"htv.{name}")
    except ModuleNotFoundError:
        continue
    print(name)
import htv.bench, htv.triton_kernels
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


def test_every_public_name_of_the_contract_is_there():
    names = """attach check explain linear_grad sign_agreement and_mask xor_mask geometric_mean
        sand_mask median trimmed_mean winsorized_mean median_of_means Mean AndMask XorMask
        GeometricMean SandMask SignSum Median MedianOfMeans TrimmedMean WinsorizedMean
        UnsupportedError CheckError use_backend replace_batchnorm""".split()
    assert [name for name in names if not hasattr(htv, name)] == []


def test_a_handle_shows_what_is_for_users():
    handle = htv.attach(htv_model(), htv.Median())
    shown = {name for name in dir(handle) if not name.startswith("_")}
    assert shown == {
        "accumulate", "attached", "detach", "examined", "finish", "forward", "groups", "model",
        "packed", "stats", "tokens",
    }  # fmt: skip


def htv_model():
    import torch

    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_conditional_expression_holds_another(name):
    nested = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse))
    ]
    assert not nested, f"{name}, lines {nested}: unroll them"
