"""Measuring what steps cost: time, where they take turns, and peak memory of a process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, quartiles and minimum of `runs` calls."""

    median: float
    lower: float
    upper: float
    runs: int
    least: float

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        several = values if len(values) > 1 else 2 * values
        lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, lower, upper, len(values), min(values))


def milliseconds(step: Step, synchronise: Step) -> float:
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def take_turns(
    steps: Mapping[str, Step],
    seconds: float = 10.0,
    rounds: tuple[int, int] = (10, 100),
    leave_after: Mapping[str, float] | None = None,
    synchronise: Step = lambda: None,
    clock: Callable[[Step], float] | None = None,
) -> dict[str, Timing]:
    """Time every step once per round, so that whatever else the machine does hits all alike; warm
    up before.

    rounds: at least and at most so many, between them as many as `seconds` allow. leave_after: name
    -> seconds after which a slow step takes no further part. What these take is not counted. clock:
    the milliseconds of one call; default: by the wall, between two calls of `synchronise`.
    """
    leave_after, clock = leave_after or {}, clock or (lambda step: milliseconds(step, synchronise))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds[1]):
        for name, step in steps.items():
            if sum(taken[name]) < 1e3 * leave_after.get(name, float("inf")):
                taken[name].append(clock(step))
        counted = sum(sum(values) for name, values in taken.items() if name not in leave_after)
        if turn + 1 >= rounds[0] and counted > 1e3 * seconds:
            break
    return {name: Timing.of(values) for name, values in taken.items()}


def one_line(error: Exception, last: bool = False) -> str:
    """The type and the first line of an error's words; the last line of the words alone, where they
    are a traceback.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    words = lines[-1] if last else f"{type(error).__name__}: {lines[0]}"
    return words if len(words) <= 200 else f"{words[:197]}..."


def in_own_process(module: str, *arguments: str) -> dict:
    """Run `python -m module arguments`; the JSON object it prints last. RuntimeError with its words
    where it fails.

    Its allocator (glibc's) gives every freed tensor's memory back at once: else a peak would show,
    besides what is alive, what it happens to keep.
    """
    command, environment = (
        [sys.executable, "-m", module, *arguments],
        {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        # as one killed for its memory does
        ended = f"it ended with status {done.returncode} and no message"
        raise RuntimeError(done.stderr.strip() or ended)
    return json.loads(done.stdout.splitlines()[-1])


class PeakMeter:
    """Peak memory above that at construction: of the device's allocator, or of the process as the
    system sees it.
    """

    def __init__(self, device: str):
        self._device = device
        if device != "cpu":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
            self.method = "VmHWM, reset before"
        except OSError:
            self.method = "ru_maxrss"  # a peak while importing may hide that of the steps
        self._start = self._peak()

    def grown(self) -> int:
        return self._peak() - self._start

    def _peak(self) -> int:
        if self._device != "cpu":
            return torch.cuda.max_memory_allocated(self._device)
        if self.method == "ru_maxrss":
            import resource  # not on Windows

            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
