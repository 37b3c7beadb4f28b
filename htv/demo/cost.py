"""What a rule costs: time per training step, and peak memory.

Time: all variants take turns in one process, so that whatever else the machine does hits them alike; medians.
Memory: each variant trains a few steps in a process of its own; `python -m htv.demo.cost` is that process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from htv.demo.materialised import materialised_step
from htv.demo.training import Setup, aggregating, make_network, make_optimizer, step
from htv.demo.variants import Variant, parse

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def time_steps(steps: dict[str, Step], few: set[str], synchronise: Step, patience: float = 10.0) -> dict[str, Timing]:
    """Time every step in turn, after one untimed call each: 100 rounds, or fewer (10 at least) after `patience` s.

    few: the slow ones that only take part in the first three rounds.
    """
    for run in steps.values():
        run()
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for turn in range(100):
        for name, run in steps.items():
            if turn < 3 or name not in few:
                synchronise()
                start = time.perf_counter()
                run()
                synchronise()
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 9 and time.perf_counter() - begin > patience:
            break
    return {name: Timing.of(values) for name, values in milliseconds.items()}


def step_times(variants: list[Variant], setup: Setup, x: Tensor, labels: Tensor, num_classes: int) -> dict[str, Timing]:
    """A whole training step of each variant, and as "vmap SPEC" of its materialising twin.

    x: (batch, pixels) and labels: (batch,) on the device. The learning rate is 0: the weights stay where they are.
    """
    still = replace(setup, learning_rate=0.0)

    def attached(variant: Variant) -> Step:
        network = make_network(x.shape[1], num_classes, still)
        optimizer = make_optimizer(network, still)
        aggregating(network, variant.rule)  # stays attached as long as the network lives
        return lambda: step(network, optimizer, x, labels)

    def materialising(variant: Variant) -> Step:
        network = make_network(x.shape[1], num_classes, still)
        optimizer = make_optimizer(network, still)
        return lambda: materialised_step(network, optimizer, x, labels, variant.rule)

    steps = {variant.spec: attached(variant) for variant in variants}
    twins = {f"vmap {variant.spec}": materialising(variant) for variant in variants if variant.rule is not None}
    on_cuda = x.device.type == "cuda"
    return time_steps(steps | twins, set(twins), torch.cuda.synchronize if on_cuda else lambda: None)


def peak_memory(variant: Variant, materialise: bool, setup: Setup, pixels: int, num_classes: int) -> dict:
    """Bytes that network, optimizer and three training steps add at their peak, measured in a fresh process.

    Returns {"bytes": int, "method": str}. The images are random: memory depends on their size only.
    """
    job = {"spec": variant.spec, "materialise": materialise, "setup": asdict(setup), "pixels": pixels,
           "num_classes": num_classes}  # fmt: skip
    command = [sys.executable, "-m", "htv.demo.cost", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {variant.spec} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(spec: str, materialise: bool, setup: dict, pixels: int, num_classes: int) -> dict:
    setup = Setup(**setup)
    variant = parse(spec, setup.batch_size)

    def train(setup: Setup, pixels: int) -> None:
        network = make_network(pixels, num_classes, setup)
        optimizer = make_optimizer(network, setup)
        x = torch.randn(setup.batch_size, pixels, device=setup.device)
        labels = torch.randint(0, num_classes, (setup.batch_size,), device=setup.device)
        with aggregating(network, None if materialise else variant.rule):
            for _ in range(3):
                if materialise:
                    materialised_step(network, optimizer, x, labels, variant.rule)
                else:
                    step(network, optimizer, x, labels)

    train(replace(setup, width=8), pixels=8)  # libraries load their code on first use: not what is measured
    meter = PeakMeter(setup.device)
    train(setup, pixels)
    return {"bytes": meter.grown(), "method": meter.method}


class PeakMeter:
    """Peak memory above that at construction: of the device's allocator, or of the process as the system sees it."""

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


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
