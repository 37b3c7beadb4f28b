"""Whole training steps side by side: `python bench/steps.py --out bench/results`.

For every workload all rules take turns in one process, so that whatever else the machine does hits them alike; medians,
as ratios to plain forward and backward. Peak memory is measured in a process of its own for each. Writes steps-cpu.json
(or steps-cuda.json) and the same as a Markdown table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

import htv
from htv.demo.cost import PeakMeter, time_steps
from htv.demo.machine import describe
from workloads import WORKLOADS

RULES = ("plain", "mean", "and_mask", "median", "winsorized_mean")


def measure(name: str, seconds: float) -> dict[str, dict]:
    """rule -> median and quartiles of milliseconds, ratio to plain, peak MB above the start and its ratio to plain."""
    workload = WORKLOADS[name]
    steps = {rule: workload.step(workload.rules()[rule]) for rule in RULES}
    times = time_steps(steps, set(), lambda: None, patience=seconds)
    peaks = {rule: _peak_elsewhere(name, rule) for rule in RULES}
    return {
        rule: {
            "ms": times[rule].median,
            "ms_quartiles": [times[rule].lower, times[rule].upper],
            "time_ratio": times[rule].median / times["plain"].median,
            "peak_mb": peaks[rule],
            "memory_ratio": peaks[rule] / peaks["plain"],
        }
        for rule in RULES
    }


def _peak_elsewhere(workload: str, rule: str) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", f"{workload}:{rule}"], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def peak(workload: str, rule: str) -> float:
    """MB that model, batch and three steps add at their peak in this process."""
    warm_up = torch.nn.Linear(8, 8)
    with htv.attach(warm_up, htv.AndMask(0.5)):  # libraries load their code on first use: not what is measured
        warm_up(torch.randn(8, 8)).sum().backward()
    meter = PeakMeter("cpu")
    step = WORKLOADS[workload].step(WORKLOADS[workload].rules()[rule])
    for _ in range(3):
        step()
    return meter.grown() / 1e6


def table(results: dict) -> str:
    """The time and memory ratios as Markdown."""
    lines = ["| workload | " + " | ".join(r.replace("_", " ") for r in RULES) + " |", "|---" * (len(RULES) + 1) + "|"]
    for name, row in results["workloads"].items():
        cells = [f"{row['plain']['ms']:.0f} ms, {row['plain']['peak_mb']:.0f} MB"]
        cells += [f"{row[r]['time_ratio']:.2f}x, {row[r]['memory_ratio']:.2f}x" for r in RULES[1:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = Path("bench/results"),
    workload: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to spend on each workload's steps.")] = 30.0,
    peak_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if peak_of:
        print(peak(*peak_of.split(":")))
        return
    names = list(workload or WORKLOADS)
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise typer.BadParameter(f"unknown workload {unknown[0]!r}, use {', '.join(WORKLOADS)}")
    results = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "machine": describe("cpu"),
        "workloads": {name: measure(name, seconds) for name in track(names, "measuring")},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "steps-cpu.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
