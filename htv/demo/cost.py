"""What a rule costs: time per training step, and peak memory.

Time: all variants take turns in one process, so that whatever else the machine does hits them
alike; medians. Memory: each variant trains a few steps in a process of its own; `python -m
htv.demo.cost` is that process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from htv.bench import baselines
from htv.demo.training import Setup, aggregating, make_network, make_optimizer, step
from htv.demo.variants import Variant, parse
from htv.rules import Rule
from htv.tools.timing import PeakMeter, Step, Timing, in_own_process, take_turns

TWIN_SECONDS = 3.0  # a materialising twin takes no further part after so long


def twin(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, rule: Rule
) -> Step:
    """A training step the usual way: the same `.grad`, up to rounding, with all examples' gradients
    in memory.
    """
    backward = baselines.step("vmap", network, x, labels, rule)

    def run() -> None:
        backward()
        optimizer.step()

    return run


def step_times(
    variants: list[Variant], setup: Setup, x: Tensor, labels: Tensor, num_classes: int
) -> dict[str, Timing]:
    """A whole training step of each variant, and as "vmap SPEC" of its materialising twin.

    x: (batch, pixels) and labels: (batch,) on the device. The learning rate is 0: the weights stay
    where they are.
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
        return twin(network, optimizer, x, labels, variant.rule)

    steps = {variant.spec: attached(variant) for variant in variants}
    twins = {
        f"vmap {variant.spec}": materialising(variant)
        for variant in variants
        if variant.rule is not None
    }
    for run in (steps | twins).values():
        run()  # warm up
    synchronise = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    return take_turns(
        steps | twins, leave_after=dict.fromkeys(twins, TWIN_SECONDS), synchronise=synchronise
    )


def peak_memory(
    variant: Variant, materialise: bool, setup: Setup, pixels: int, num_classes: int
) -> dict:
    """Bytes that network, optimizer and three training steps add at their peak, measured in a fresh
    process.

    Returns {"bytes": int, "method": str}. The images are random: memory depends on their size only.
    """
    job = {"spec": variant.spec, "materialise": materialise, "setup": asdict(setup),
           "pixels": pixels, "num_classes": num_classes}  # fmt: skip
    try:
        return in_own_process("htv.demo.cost", json.dumps(job))
    except RuntimeError as error:
        raise RuntimeError(f"measuring the memory of {variant.spec} failed:\n{error}") from error


def _measure(spec: str, materialise: bool, setup: dict, pixels: int, num_classes: int) -> dict:
    setup = Setup(**setup)
    variant = parse(spec, setup.batch_size)

    def train(setup: Setup, pixels: int) -> None:
        network = make_network(pixels, num_classes, setup)
        optimizer = make_optimizer(network, setup)
        x = torch.randn(setup.batch_size, pixels, device=setup.device)
        labels = torch.randint(0, num_classes, (setup.batch_size,), device=setup.device)
        ordinary = lambda: step(network, optimizer, x, labels)
        with aggregating(network, None if materialise else variant.rule):
            run = twin(network, optimizer, x, labels, variant.rule) if materialise else ordinary
            for _ in range(3):
                run()

    train(
        replace(setup, width=8), pixels=8
    )  # libraries load their code on first use: not what is measured
    meter = PeakMeter(setup.device)
    train(setup, pixels)
    return {"bytes": meter.grown(), "method": meter.method}


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
