"""Fill README.md, docs/performance.md, docs/methods and bench/results/cpu.md from the records.

docs/extending.md is filled from the registry of kernels.

A block stands between <!-- NAME --> and <!-- /NAME -->; tests/test_docs.py checks them all.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from htv.bench import bars, breakdown, distributed, floors, plots, report, simulate
from htv.experiments import report as experiments
from htv.ops import registry
from htv.tools.files import replace_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
DEMO, BENCH = ROOT / "docs/results/demo.json", ROOT / "bench/results/cpu.json"
FLOORS = ROOT / "bench/results/floors-cpu.json"
BREAKDOWN = ROOT / "bench/results/breakdown-resnet18.json"


def machine(facts: dict) -> str:
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['cpu_capability']}, torch "
        f"{facts['versions']['torch']}"
    )


def demo_block() -> str:
    """The demo's table, from its JSON."""
    demo = json.loads(DEMO.read_text())
    plain = demo["results"][0]
    lines = [
        "| rule | test accuracy | wrong labels memorised | time per step | peak memory | by vmap: "
        "time, memory |",
        "|---|---|---|---|---|---|",
    ]
    for result in demo["results"]:
        vmap = "-"
        if result["vmap_ms_per_step"] is not None:
            vmap = (
                f"{result['vmap_ms_per_step'] / plain['ms_per_step']:.0f}x, "
                f"{result['vmap_peak_bytes'] / plain['peak_bytes']:.0f}x"
            )
        lines.append(
            f"| {result['spec']} | {result['final']['test_accuracy']:.1%} | "
            f"{result['final']['memorised']:.1%} | "
            f"{result['ms_per_step'] / plain['ms_per_step']:.2f}x | "
            f"{result['peak_bytes'] / plain['peak_bytes']:.2f}x | {vmap} |"
        )
    return "\n".join(
        [*lines, "",
         f"`{demo['command']}`, seed {demo['setup']['seed']}, on {machine(demo['machine'])}; "
         "[every number](docs/results/demo.json). Steps this small show the fixed costs of htv "
         "most."]
    )  # fmt: skip


def bench_block() -> str:
    """Training steps, by rule and beside others, from the benchmark's record."""
    record = json.loads(BENCH.read_text())
    head = (
        "Time and peak memory of one forward and backward with each rule, as multiples of a plain "
        "one (`htv bench`, "
        f"{report.machine(record)}):"
    )
    beside = (
        "The same beside others, who form the gradients of all examples and reduce them by "
        "PyTorch; median is their "
        "`torch.median`."
    )
    closing = (
        "Stacked gradients, scaling, targets and failures: [the whole "
        "report](bench/results/cpu.md)."
    )
    picture = "![Time of a step over plain](bench/results/cpu-ratio.png)"
    others = report.peers(record)
    sections = [head, report.steps(record), *([beside, others] if others else []), picture, closing]
    return "\n\n".join(sections)


def floors_block() -> str:
    """What every path needs, its floor and its time."""
    return floors.table(json.loads(FLOORS.read_text()))


def calls_block() -> str:
    """Of every committed breakdown: calls and time of a plain step and of one under AndMask."""
    lines = [
        "| step | processor | date | calls: plain | AndMask | ms: plain | AndMask |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "bench/results").rglob("breakdown-*.json")):
        record = json.loads(path.read_text())
        cells = [record["workload"], record["machine"]["cpu"], record["date"][:10]]
        cells += [f"{record['calls'][v]:,}" for v in ("plain", "and-mask")]
        plain, masked = (record["wall_ms"][v] for v in ("plain", "and-mask"))
        cells += [f"{plain:.1f}", f"{masked:.1f} ({masked / plain:.2f}x)"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars_block() -> str:
    """What one machine alone can judge, of every processor and instruction set measured."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("bars-*.json"))]
    return "\n\n".join(bars.table(r) for r in records)


def scale_block() -> str:
    """What one vote costs on many GPUs, by count."""
    models, clusters = list(simulate.MODELS.values()), list(simulate.CLUSTERS.values())
    return simulate.report(models, clusters, 4, 4096)


def ranks_block() -> str:
    """What one vote of several processes costs, of every committed record."""
    sections = []
    for path in sorted((ROOT / "bench/results").rglob("distributed.json")):
        record = json.loads(path.read_text())
        where = f"{machine(record['machine'])}, {record['date'][:10]}, `{record['command']}`."
        sections += [where, distributed.report(record)]
    return "\n\n".join(sections)


def breakdown_block() -> str:
    """Where the time of a step goes that misses its target."""
    return breakdown.table(json.loads(BREAKDOWN.read_text()))


def experiment_block(name: str) -> str:
    """What `htv experiment` found. name: of the record under docs/results, "digits/memorisation" in
    a folder there.
    """
    return experiments.block(
        json.loads((ROOT / f"docs/results/{name}.json").read_text()), f"../results/{name}.png"
    )


def experiment_blocks(*names: str) -> tuple:
    records = {name: ROOT / f"docs/results/{name}.json" for name in names}
    return tuple(
        (name.replace("/", "-"), record, partial(experiment_block, name))
        for name, record in records.items()
    )


def kernels_block() -> str:
    """Every kernel there is, from their registry."""
    columns = registry.COLUMNS
    rows = [columns, ("---",) * len(columns), *(k.row() for k in registry.kernels())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


BLOCKS = {
    "README.md": (("demo", DEMO, demo_block), ("bench", BENCH, bench_block)),
    "docs/performance.md": (
        ("floors", FLOORS, floors_block),
        ("breakdown", BREAKDOWN, breakdown_block),
        ("calls", BREAKDOWN, calls_block),
        ("bars", ROOT / "bench/bars.py", bars_block),
    ),
    "docs/scale.md": (
        ("scale", ROOT / "bench/simulate.py", scale_block),
        ("ranks", ROOT / "bench/distributed.py", ranks_block),
    ),
    "docs/extending.md": (("kernels", ROOT / "htv/ops/registry.py", kernels_block),),
    "docs/methods/ilc.md": experiment_blocks("linear", "spirals", "correlation"),
    "docs/methods/coherence.md": experiment_blocks(
        "memorisation",
        "digits/memorisation",
        "winsorized",
        "rolling",
        "attribution",
        "coherence",
        "difficulty",
    ),
    "docs/methods/connectivity.md": experiment_blocks("cbft", "paths"),
    "docs/methods/memorization.md": experiment_blocks(
        "mat-toy", "good-bad-ugly", "worst-group", "memorisation-scores"
    ),
}


def filled(document: str) -> str:
    """The text of a document with its blocks replaced."""
    text = (ROOT / document).read_text()
    for name, record, block in BLOCKS[document]:
        if not record.is_file():  # nothing newer was measured
            continue
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n{block()}\n<!-- /{name} -->{after}"
    return text


def bench_report() -> str:
    """bench/results/cpu.md."""
    return report.markdown(
        json.loads(BENCH.read_text()), {kind: f"cpu-{kind}.png" for kind in plots.KINDS}
    )


if __name__ == "__main__":
    if BENCH.is_file():
        replace_text(BENCH.with_suffix(".md"), bench_report())
    for document in BLOCKS:
        replace_text(ROOT / document, filled(document))
