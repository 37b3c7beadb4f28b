"""Numbers in the README and in the benchmark's report are those of the committed records, and these
are complete.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from htv.bench import plots
from htv.bench.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


committed = pytest.mark.skipif(
    not (RESULTS / "cpu.json").is_file(), reason="no complete run yet: make bench"
)


@pytest.fixture
def fill_readme():
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs" / "fill_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS = [
    "README.md",
    "docs/performance.md",
    "docs/extending.md",
    "docs/scale.md",
    *(f"docs/methods/{name}.md" for name in ("ilc", "coherence", "connectivity", "memorization")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_measured_blocks_are_up_to_date(fill_readme, document):
    text = (ROOT / document).read_text()
    assert fill_readme.filled(document) == text, "run: python docs/fill_readme.py"
    names = [name for name, _, _ in fill_readme.BLOCKS[document]]
    assert names and all(
        f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text for name in names
    )


@committed
def test_the_report_is_of_the_record(fill_readme):
    assert (RESULTS / "cpu.md").read_text() == fill_readme.bench_report(), (
        "run: python docs/fill_readme.py"
    )
    assert all((RESULTS / f"cpu-{kind}.png").is_file() for kind in plots.KINDS)


@committed
def test_the_committed_benchmark_is_of_everything():
    measured = json.loads((RESULTS / "cpu.json").read_text())["workloads"]
    assert list(measured) == list(WORKLOADS), "run: make bench"
    for name, workload in WORKLOADS.items():
        left_out = set(workload.variants) - set(measured[name]["variants"])
        assert left_out <= set(workload.peers), f"{name} without {left_out}: run make bench"
