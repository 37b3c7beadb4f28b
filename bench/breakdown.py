"""Where a step's time goes: `python -m htv.bench.breakdown WORKLOAD --out FOLDER` writes
breakdown-WORKLOAD.json.

Each operation's own time as torch's profiler sees it, medians over steps that took turns; what is
left of a step is Python's, the autograd engine's and the dispatcher's. And how many functions
Python calls in a step, builtins included.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from htv.bench.workloads import POLICY, WORKLOADS, TrainingStep
from htv.tools import env_info
from htv.tools.files import replace_text
from htv.tools.timing import Step, milliseconds

STEPS = {name: one for name, one in WORKLOADS.items() if isinstance(one, TrainingStep)}
STEPS[POLICY.name] = POLICY
OPERATIONS = ("aten::", "htv::")
LEFT = "Python, engine, dispatch"


def own_times(
    steps: dict[str, Step], rounds: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """variant -> milliseconds of a step, and operation -> variant -> those of them that are the
    operation's own.

    Of every variant a plain step and a profiled one in turn: what disturbs this machine then hits
    both alike.
    """
    walls: dict[str, list[float]] = defaultdict(list)
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for variant, step in steps.items():
            walls[variant].append(milliseconds(step, lambda: None))
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step()
            for event in profiled.key_averages():
                if event.key.startswith(OPERATIONS):
                    seen[event.key][variant].append(event.self_cpu_time_total / 1e3)
    operations = {
        name: {v: statistics.median(times) for v, times in by.items()} for name, by in seen.items()
    }
    return {variant: statistics.median(times) for variant, times in walls.items()}, operations


def calls(step: Step) -> int:
    """How many functions Python calls in a step."""
    profiler = cProfile.Profile()
    profiler.runcall(step)
    return pstats.Stats(profiler).total_calls


def measure(name: str, threads: int, rounds: int) -> dict:
    """The record: wall time of every variant, and the operations of at least 1% of some step."""
    torch.set_num_threads(threads)
    workload = STEPS[name]
    steps = {
        variant: workload.prepare(variant)
        for variant in workload.variants
        if variant not in workload.peers
    }
    for step in steps.values():
        step()
    walls, operations = own_times(steps, rounds)
    large = {
        operation: times
        for operation, times in operations.items()
        if any(time > 0.01 * walls[variant] for variant, time in times.items())
    }
    spent = {
        variant: sum(times.get(variant, 0.0) for times in operations.values()) for variant in steps
    }
    listed = {
        variant: sum(times.get(variant, 0.0) for times in large.values()) for variant in steps
    }
    return {
        **env_info.stamp("python", "-m", "htv.bench.breakdown", *sys.argv[1:]),
        "workload": name,
        "wall_ms": walls,
        "operations_ms": dict(sorted(large.items(), key=lambda item: -max(item[1].values()))),
        "other_operations_ms": {variant: spent[variant] - listed[variant] for variant in steps},
        "left_ms": {variant: walls[variant] - spent[variant] for variant in steps},
        "calls": {variant: calls(step) for variant, step in steps.items()},
    }


def table(record: dict) -> str:
    """As Markdown."""
    variants = list(record["wall_ms"])
    rows = {
        "the whole step": record["wall_ms"],
        **{f"`{operation}`": times for operation, times in record["operations_ms"].items()},
        "other operations": record["other_operations_ms"],
        LEFT: record["left_ms"],
    }
    lines = [
        f"Milliseconds of a {record['workload']} step (`{record['command']}`, "
        f"{record['date'][:10]}, {record['machine']['cpu']}, {record['machine']['threads']} "
        f"threads, {record['machine']['cpu_capability']}, torch "
        f"{record['machine']['versions']['torch']}):",
        "",
        f"| | {' | '.join(variants)} |",
        f"|---|{'---|' * len(variants)}",
    ]
    for name, times in rows.items():
        lines.append(
            f"| {name} | {' | '.join(f'{times[v]:.1f}' if v in times else '-' for v in variants)} |"
        )
    counts = ", ".join(f"{variant} {count:,}" for variant, count in record["calls"].items())
    return "\n".join([*lines, "", f"Functions that Python calls in a step: {counts}."])


def main(
    workload: Annotated[str, typer.Argument(help="A training step, by the benchmark's name.")],
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("bench-results"),
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="Steps of every variant.")] = 20,
) -> None:
    if workload not in STEPS:
        raise typer.BadParameter(
            f"{workload} is no training step; choose one of {', '.join(STEPS)}"
        )
    record = measure(workload, threads, rounds)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / f"breakdown-{workload}.json", json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    typer.run(main)
