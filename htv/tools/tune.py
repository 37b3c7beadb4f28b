"""Measures the tiles of the Triton products on this GPU, and writes the table that `HTV_TUNED`
names.

Only ever on buffers of its own, by the command `htv tune`: training looks tiles up and never tries
any. CUDA kernels have no such choice. The table's format and who reads it:
`triton_kernels/configs.py`.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from htv.rules import Statistic
from htv.tools.files import replace_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One for every row of the static table: contributions, two, three and seven words of state.
STATISTICS = {
    "median": Statistic("median"),
    "and-mask": Statistic("and_mask", 1),
    "sand-mask": Statistic("sand_mask", votes=0.5, k=0.5),
    "winsorized": Statistic("winsorized_mean", 2),
}
STAGES, SPLITS = (2, 3, 4), (1, 2, 4, 8, 16)
WARM_UP, REPEATS = 2, 7


class Shape(NamedTuple):
    """A linear layer's weight (O, I), E groups of T rows each."""

    outputs: int
    inputs: int
    groups: int
    rows: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Of "OxIxExT". Raises ValueError."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
            raise ValueError(
                f"shape {text!r} must be OxIxExT: outputs, inputs, groups and rows per group"
            )
        return Shape(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = tuple(
    Shape(outputs, inputs, 16, 1024)
    for outputs, inputs in (
        (768, 768),
        (2304, 768),
        (3072, 768),
        (768, 3072),
        (4096, 4096),
        (11008, 4096),
    )
)
DRY_SHAPES = (Shape(16, 16, 5, 4),)


@dataclass(frozen=True)
class Result:
    """What was found for one shape and statistic: the table's entry, its time in ms and that of the
    choice without.
    """

    shape: Shape
    statistic: str
    entry: dict
    best: float
    usual: float
    tried: int


def why_not(dry: bool) -> str | None:
    """None where tiles can be measured, else what is missing."""
    from htv.ops import backend

    if not backend.TRITON_INSTALLED:
        return "htv tune measures Triton kernels, and Triton is not installed: pip install triton"
    if not dry and not torch.cuda.is_available():
        return (
            f"htv tune needs an NVIDIA GPU, and torch {torch.__version__} sees none: install a "
            "CUDA build of torch and check the driver with nvidia-smi, or try every step on the "
            "CPU with --dry"
        )
    return None


def tune(
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    names: tuple[str, ...],
    dry: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """The fastest tiles for shapes and statistics (of `STATISTICS`) on the current device.

    dry: on the CPU, under Triton's interpreter, with few tiles; times mean nothing then. note: told
    what comes next.
    """
    found = []
    for shape, name in itertools.product(shapes, names):
        note(f"{shape} {name}")
        if fits(shape, STATISTICS[name]):
            found.append(_one(shape, dtype, name, dry))
    return found


def fits(shape: Shape, statistic: Statistic) -> bool:
    """Whether there are groups enough."""
    from htv.ops import statistics

    definition = statistics.of(statistic.name)
    low, high = definition.counts(shape.groups)
    return shape.groups >= definition.least and low <= statistic.count <= high


def _one(shape: Shape, dtype: torch.dtype, name: str, dry: bool) -> Result:
    from htv.triton_kernels import configs, device, linear

    statistic, total = STATISTICS[name], shape.groups * shape.rows
    generator = torch.Generator().manual_seed(0)
    # Small integers: sums are exact, so all tiles must agree.
    x, grad_output = (
        torch.randint(-2, 3, (total, features), generator=generator).to(dtype).to(device.DEVICE)
        for features in (shape.inputs, shape.outputs)
    )
    offsets = torch.arange(0, total + 1, shape.rows)
    problem, merges = linear.problem(x, grad_output, offsets, statistic)
    usual = configs.choose(problem, configs.MOST_SPLITS if merges else 1, entries=())
    choices = _choices(configs.candidates(problem), shape.groups if merges else 1, dry)

    def run(choice):
        return linear.linear(x, grad_output, offsets, statistic, choice)[0]

    wanted, times = run(usual), {}
    for choice in dict.fromkeys((usual, *choices)):
        try:
            if torch.allclose(run(choice), wanted, rtol=1e-4, atol=1e-4):
                times[choice] = _milliseconds(lambda choice=choice: run(choice), dry)
        except (
            Exception
        ) as error:  # more registers or shared memory than there are; Triton has several kinds
            if choice == usual or "resource" not in f"{type(error).__name__} {error}".lower():
                raise
    config, splits = best = min(times, key=times.get)
    entry = {key: getattr(problem, key) for key in (*configs.KEY, *configs.SIZES)}
    entry |= {"config": config._asdict(), "splits": splits}
    return Result(shape, name, entry, times[best], times[usual], len(times))


def _choices(candidates: list, most_splits: int, dry: bool) -> list:
    stages, splits = ((2,), (1, 2)) if dry else (STAGES, SPLITS)
    return [
        (config._replace(num_stages=stage), split)
        for config, stage, split in itertools.product(
            candidates[-1:] if dry else candidates, stages, splits
        )
        if split <= most_splits
    ]


def _milliseconds(run: Callable[[], object], dry: bool) -> float:
    """The median of several runs, of the device's own clock where there is one."""
    if dry:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(WARM_UP):
        run()
    taken = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def write(results: list[Result], path: Path) -> int:
    """Write the table, keeping its entries of other problems; return how many it has now."""
    from htv.triton_kernels import configs

    place = lambda entry: tuple(entry[name] for name in (*configs.KEY, *configs.SIZES))
    entries = {place(entry): entry for entry in (configs.load(path) if path.is_file() else ())}
    entries |= {place(result.entry): result.entry for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": 1, "entries": list(entries.values())}, indent=1)
    replace_text(path, text + "\n")
    configs.load.cache_clear()
    return len(entries)
