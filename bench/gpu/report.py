"""The record of bench/gpu.sh as Markdown, made from the record alone: `python -m
htv.bench.gpu.report FILE.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from htv.bench import report
from htv.bench.gpu.targets import TARGETS
from htv.tools.files import replace_text

DRY = (
    "**A dry run: tiny sizes, no GPU. It shows that everything runs; no number here means "
    "anything.**"
)


def markdown(record: dict) -> str:
    sections = [
        ("# GPU benchmark", f"`{record['command']}`, {machine(record)}."),
        ("", DRY if record["dry"] else None),
        ("## Targets", targets(record)),
        ("## Steps", steps(record)),
        ("## Correctness", correctness(record)),
        ("## Ceilings", ceilings(record)),
        ("## Stacked gradients", report.stacked(record)),
        ("## Weight gradients beside the product alone", kernels(record)),
        ("## Training steps beside plain ones", training(record)),
        ("## What failed", report.failures(record)),
    ]
    return (
        "\n\n".join("\n\n".join(filter(None, section)) for section in sections if section[1]) + "\n"
    )


def machine(record: dict) -> str:
    gpu, facts = record.get("gpu", {}), record.get("machine", {})
    versions = (
        ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton"))
        if facts
        else "no versions"
    )
    known = {"driver_version": "driver", "cuda": "CUDA", "nvcc": "nvcc", "clocks.max.sm": "at most"}
    more = "".join(f", {words} {gpu[key]}" for key, words in known.items() if gpu.get(key))
    return f"{record['date'][:10]}, {gpu.get('name', 'GPU unknown')}, {versions}{more}"


def targets(record: dict) -> str | None:
    """Every target: met or not where it was measured, and that it was not where it was not. A dry
    run meets none.
    """
    rows = []
    for target in TARGETS:
        value = target.measured(record)
        if value is None:
            verdict = "not measured"
        elif record["dry"]:
            verdict = "dry run"
        else:
            verdict = "met" if target.met(record) else "**not met**"
        rows.append(
            [*report.target_cells(target), "-" if value is None else f"{value:.2f}", verdict]
        )
    return report.table(report.TARGET_HEAD, rows)


def steps(record: dict) -> str | None:
    rows = [
        [
            name,
            row["status"],
            f"{row['seconds']:.0f} s" if "seconds" in row else "",
            row.get("error", ""),
        ]
        for name, row in record["steps"].items()
    ]
    return report.table(["step", "", "took", ""], rows)


def correctness(record: dict) -> str | None:
    if "correctness" not in record:
        return None
    found = record["correctness"]
    head = ["part", *found["counts"]]
    text = report.table(
        head, [[part, *map(str, counts.values())] for part, counts in found["parts"].items()]
    )
    wrong = [f"- {name}: `{error}`" for name, error in found["wrong"].items()]
    wrong += [
        f"- {tool}: `{error}`"
        for tool, error in record.get("sanitizer", {}).get("wrong", {}).items()
    ]
    return "\n".join([text or "No case ran.", "", *wrong]).strip()


def ceilings(record: dict) -> str | None:
    if "ceilings" not in record:
        return None
    found = record["ceilings"]
    rates = [f"{name.removeprefix('multiply_adds_per_s_')} {2e-12 * rate:.3g} TFLOP/s"
             for name, rate in found.items() if name.startswith("multiply_adds")]  # fmt: skip
    return (
        f"A copy moves {1e-9 * found['bytes_per_s']:.4g} GB/s, read and written. Products: "
        f"{', '.join(rates)}."
    )


def kernels(record: dict) -> str | None:
    rows = []
    for name, workload in record.get("workloads", {}).items():
        if workload["kind"] != "kernel":
            continue
        for variant, row in workload["variants"].items():
            numbers = ["fails", "", "", ""]
            if "error" not in row:
                numbers = [
                    f"{row['ms']:.3g} ms",
                    report.times(row["ratio"]),
                    f"{row['of_floor']:.0%}",
                    str(row["runs"]),
                ]
            rows.append([f"{name} ({workload['dtype']})", variant, *numbers])
        if "error" in workload:
            rows.append([name, workload["error"], "", "", "", ""])
    return report.table(["gradient", "rule", "time", "over plain", "of the floor", "calls"], rows)


def training(record: dict) -> str | None:
    """One row per variant: time and peak memory, over plain."""
    rows = []
    for name, workload in record.get("workloads", {}).items():
        if workload["kind"] != "step":
            continue
        for variant, row in workload["variants"].items():
            if "ms" in row:
                spread = "-".join(f"{ms:.4g}" for ms in row["ms_quartiles"])
                memory = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else "-"
                over = report.times(row["peak_ratio"]) if "peak_ratio" in row else "-"
                rows.append(
                    [
                        name,
                        variant,
                        f"{row['ms']:.4g} ms",
                        spread,
                        report.times(row["ratio"]),
                        memory,
                        over,
                    ]
                )
            else:
                rows.append([name, variant, "fails", "", "", "", ""])
        if "error" in workload:
            rows.append([name, workload["error"], "", "", "", "", ""])
    return report.table(
        ["step", "rule", "time", "quartiles", "over plain", "peak memory", "over plain"], rows
    )


def main(path: Path) -> None:
    """Writes FILE.md beside FILE.json, and prints the targets."""
    record = json.loads(path.read_text())
    replace_text(path.with_suffix(".md"), markdown(record))
    print(report.on_screen(targets(record) or ""))
    print(
        DRY.strip("*") if record["dry"] else "",
        f"Written: {path.with_suffix('.md')}, {path}",
        sep="\n",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
