"""Bars for the CPU kernels that need one machine only: each compares two times of one process.

`python -m htv.bench.bars --out FOLDER` writes bars-PROCESSOR-LEVEL.json for the best instruction
set of this machine, with `--all-levels` a file for each that it has, and says which bars are met.
With `--within 2` it fails where a ratio is above twice its bar: a check for faults, not for speed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import htv
from htv.ops import schema
from htv.tools import env_info
from htv.tools.files import replace_text
from htv.tools.timing import Step, take_turns

LEVELS = ("baseline", "avx2", "avx512", "icelake", "zen4")  # each has the ones before it
FORCED = "HTV_CPU_CAPABILITY"


@dataclass(frozen=True)
class Bar:
    """A ratio of two times that should not be above `bound`; `what` says of which."""

    what: str
    bound: float
    measured: Step
    compared: Step


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Let the kernels use this instruction set, and that it has, inside the block."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def levels() -> list[str]:
    """List the instruction sets for which kernels are built that this machine has."""
    found = []
    for level in LEVELS:
        with at_level(level):
            if env_info.cpu_capability() == level:
                found.append(level)
    return found


def _step(x: Tensor, grad: Tensor, groups: int, rule: htv.Rule, level: str = "") -> Step:
    """Return a call that aggregates a linear layer's weight gradient over groups of equally many
    rows, at another level if one is given.
    """
    bounds = torch.arange(groups + 1) * (len(x) // groups)
    run = lambda: htv.linear_grad(x, grad, rule, cu_seqlens=bounds)
    if not level:
        return run

    def run_at_level() -> Tensor:
        with at_level(level):
            return run()

    return run_at_level


def bars(level: str) -> list[Bar]:
    """List the bars of a level; their steps run at the level that is set when they are called."""
    torch.manual_seed(0)
    x, grad = torch.randn(256, 1024), torch.randn(256, 1024)
    half_zero = grad * (torch.rand_like(grad) < 0.5)
    wide_x, wide_grad = torch.randn(2048, 1024), torch.randn(2048, 1024)
    rows_x, rows_grad = torch.randn(2048, 768), torch.randn(2048, 3072)
    bounds, mean = torch.tensor([0, 2048]), (schema.code("mean"), 0, 0.0, 0.0)
    mask, ranked = htv.AndMask(0.4), htv.WinsorizedMean(8)
    against_torch = [
        Bar(
            "sum of 2048 rows, 1024 x 1024 / torch.matmul",
            1.10,
            lambda: torch.ops.htv.linear(wide_x, wide_grad, bounds, *mean),
            lambda: wide_grad.t() @ wide_x,
        ),
        Bar(
            "AndMask, 16 groups of 128 rows, 768 to 3072 / torch.matmul",
            1.20,
            _step(rows_x, rows_grad, 16, mask),
            lambda: rows_grad.t() @ rows_x,
        ),
        Bar(
            "AndMask, 256 groups of one row, 1024 x 1024 / torch.matmul",
            1.35,
            _step(x, grad, 256, mask),
            lambda: grad.t() @ x,
        ),
    ]
    found = [
        Bar(
            "AndMask, 16 groups of 128 rows, 768 to 3072, bfloat16 / float32",
            1.0,
            _step(rows_x.bfloat16(), rows_grad.bfloat16(), 16, mask),
            _step(rows_x, rows_grad, 16, mask),
        ),
        Bar(
            "WinsorizedMean(8), 256 groups of one row, half of grad_output zero / dense",
            0.75,
            _step(x, half_zero, 256, ranked),
            _step(x, grad, 256, ranked),
        ),
    ]
    below = LEVELS[: LEVELS.index(level)][-1:]
    for lower in below:
        for rule in (mask, ranked):
            found.append(
                Bar(
                    f"{type(rule).__name__}, 256 groups of one row / the same at {lower}",
                    1.0,
                    _step(x, grad, 256, rule),
                    _step(x, grad, 256, rule, lower),
                )
            )
    # torch has one level at a time, the machine's best.
    return (against_torch if level == levels()[-1] else []) + found


def measure(level: str, seconds: float) -> dict[str, object]:
    """Time the bars of a level, each pair in turns for its part of `seconds`; return a record."""
    with at_level(level):
        found, results = bars(level), []
        for bar in found:
            steps = {"measured": bar.measured, "compared": bar.compared}
            times = take_turns(steps, seconds / len(found), rounds=(5, 1000))
            ratio = times["measured"].least / times["compared"].least
            results.append(
                {
                    "what": bar.what,
                    "ratio": ratio,
                    "bar": bar.bound,
                    "met": ratio <= bar.bound,
                    "ms": times["measured"].least,
                    "compared_ms": times["compared"].least,
                }
            )
        return {
            **env_info.stamp("python", "-m", "htv.bench.bars", *sys.argv[1:]),
            "level": level,
            "bars": results,
        }


def table(record: dict) -> str:
    """Return the record as Markdown."""
    machine = record["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {record['level']}"
    lines = [f"{where}, {record['date'][:10]}:", "", "| ratio | measured | bar |"]
    lines.append("|---|---|---|")
    for row in record["bars"]:
        missed = "" if row["met"] else " (missed)"
        lines.append(f"| {row['what']} | {row['ratio']:.2f} | {row['bar']:.2f}{missed} |")
    return "\n".join(lines)


def file_name(record: dict) -> str:
    """Return the name of a record's file: of the processor and the level."""
    processor = re.sub(r"\([^)]*\)|processor|cpu|@", " ", record["machine"]["cpu"].lower())
    return "-".join(["bars", *re.findall(r"[a-z0-9.]+", processor), record["level"]]) + ".json"


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder for bars-PROCESSOR-LEVEL.json; none: not written.")
    ] = None,
    all_levels: Annotated[bool, typer.Option(help="Each instruction set there is.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on a level.")] = 30.0,
    within: Annotated[
        float, typer.Option(min=0.0, help="Fail above so many times a bar; 0: never.")
    ] = 0.0,
) -> None:
    failed = False
    for name in levels() if all_levels else levels()[-1:]:
        record = measure(name, seconds)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / file_name(record), json.dumps(record, indent=1) + "\n")
        print(table(record), end="\n\n")
        failed |= bool(within) and any(r["ratio"] > within * r["bar"] for r in record["bars"])
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
