"""Everything measured, as one record: the JSON that report and plots read.

Time: the variants of a workload take turns in one process; medians and quartiles. Slow baselines
soon leave. Memory: each variant in a process of its own (`htv.bench.peak`). A variant that fails is
recorded with its error; the others go on.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from htv.bench import baselines, plots, report
from htv.bench.rows import bandwidth, times_over
from htv.bench.workloads import Workload
from htv.tools import env_info
from htv.tools.files import replace_text
from htv.tools.timing import Step, Timing, in_own_process, milliseconds, one_line, take_turns

STEM = "cpu"  # of the files written


@dataclass(frozen=True)
class Settings:
    """seconds: for a workload's turns. peer_seconds: after which a baseline takes no further part
    in them.
    """

    threads: int
    seconds: float = 10.0
    peer_seconds: float = 1.0
    rounds: tuple[int, int] = (5, 100)
    memory: bool = True


QUICK = {"seconds": 0.5, "peer_seconds": 0.5, "rounds": (2, 5)}


def chosen_variants(workload: Workload, names: list[str] | None, peers: bool) -> list[str]:
    """The unit, and those of its variants that are named, in the workload's order; all for None."""
    left_out = () if peers else workload.peers
    wanted = workload.variants if names is None else (workload.unit, *names)
    return [
        variant for variant in workload.variants if variant in wanted and variant not in left_out
    ]


def run(
    workloads: list[Workload],
    settings: Settings,
    variants: list[str] | None,
    peers: bool,
    out: Path,
    console: Console,
) -> bool:
    """Measure with a progress bar, write cpu.json, cpu.md and plots to `out`, print the report.

    False where something of htv's own failed.
    """
    names = [workload.name for workload in workloads]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[doing]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(workloads), doing="")

        def now(workload: str, doing: str) -> None:
            progress.update(bar, completed=names.index(workload), description=workload, doing=doing)

        record = measure_all(workloads, settings, variants, peers, now)
    pictures = plots.save(record, out, STEM)
    replace_text(out / f"{STEM}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    text = report.markdown(record, pictures)
    replace_text(out / f"{STEM}.md", text)
    console.print(report.on_screen(text), soft_wrap=True, highlight=False, markup=False)
    written = (f"{STEM}.md", f"{STEM}.json", *pictures.values())
    console.print(
        "Written: " + ", ".join(str(out / name) for name in written),
        soft_wrap=True,
        highlight=False,
    )
    ours = (
        row
        for workload in workloads
        for variant, row in record["workloads"][workload.name]["variants"].items()
        if variant not in workload.peers
    )
    return not any("error" in row or "memory_error" in row for row in ours)


def measure_all(
    workloads: list[Workload],
    settings: Settings,
    variants: list[str] | None = None,
    peers: bool = True,
    now: Callable[[str, str], None] = lambda workload, doing: None,
) -> dict:
    """Measure; returns the record. `now` is told what is being done."""
    torch.set_num_threads(settings.threads)
    begin = time.perf_counter()
    measured = {}
    for workload in workloads:
        names = chosen_variants(workload, variants, peers)
        measured[workload.name] = {
            "kind": workload.kind,
            "unit": workload.unit,
            **workload.facts(),
            "variants": measure(
                workload, names, settings, lambda doing, of=workload.name: now(of, doing)
            ),
        }
    versions = {
        name: env_info.version(distribution)
        for name, distribution in baselines.DISTRIBUTIONS.items()
    }
    return {
        **env_info.stamp("htv", *sys.argv[1:]),
        "took_seconds": round(time.perf_counter() - begin, 1),
        "settings": asdict(settings),
        "peers": versions,
        "workloads": measured,
    }


def measure(
    workload: Workload, variants: list[str], settings: Settings, now: Callable[[str], None]
) -> dict[str, dict]:
    """variant -> its numbers, or {"error": one line}. The unit comes first, and must not fail."""
    steps: dict[str, Step] = {}
    rows: dict[str, dict] = {}
    only: dict[str, Timing] = {}  # of baselines so slow that their first call is the only one
    for variant in variants:
        now(variant)
        try:
            if variant in workload.peers:
                _check_memory(workload)
            step = workload.prepare(variant)
            first = milliseconds(step, _nothing)
        except Exception as error:  # whatever a library raises is its result here
            if variant == workload.unit:
                raise
            rows[variant] = {"error": one_line(error)}
            continue
        if variant in workload.peers and first > 1e3 * settings.peer_seconds:
            only[variant] = Timing.of([first])
        else:
            steps[variant] = step
    now("taking turns")
    leave_after = {variant: settings.peer_seconds for variant in steps if variant in workload.peers}
    seconds = settings.seconds * workload.patience
    times = only | take_turns(steps, seconds, settings.rounds, leave_after, _nothing)
    del steps, step
    gc.collect()
    unit = times[workload.unit]
    for variant in (v for v in variants if v in times):
        rows[variant] = times_over(unit, times[variant])
        if workload.kind == "stacked":
            rows[variant] |= bandwidth(workload, variant, times)
        elif settings.memory and workload.axis is None:
            now(f"memory of {variant}")
            rows[variant] |= _peak(workload, variant, settings)
            if "peak_bytes" in rows[variant] and "peak_bytes" in rows[workload.unit]:
                rows[variant]["peak_ratio"] = (
                    rows[variant]["peak_bytes"] / rows[workload.unit]["peak_bytes"]
                )
    return {variant: rows[variant] for variant in variants}


def _peak(workload: Workload, variant: str, settings: Settings) -> dict:
    try:
        peak = in_own_process("htv.bench.peak", workload.name, variant, str(settings.threads))
    except RuntimeError as error:
        return {"memory_error": one_line(error, last=True)}
    return {"peak_bytes": peak["bytes"], "memory_method": peak["method"]}


def _check_memory(workload: Workload) -> None:
    """Refuse what would bring the system to swap or kill."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return
    available = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    needed = 2.5 * workload.materialised_bytes()  # the gradients, sorted or stacked
    if needed > available:
        raise MemoryError(
            f"left out: needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        )


def _nothing() -> None:
    """CPU steps are done when they return."""
