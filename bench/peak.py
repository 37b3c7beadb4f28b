"""Peak memory of one variant: `python -m htv.bench.peak WORKLOAD VARIANT THREADS` prints it as
JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from torch import nn

from htv.bench.workloads import WORKLOADS, TrainingStep
from htv.tools.timing import PeakMeter


def peak(workload: TrainingStep, variant: str) -> dict:
    """Bytes that model, batch and steps add at their peak in this process: two steps, one of a
    baseline.
    """
    small = replace(
        workload,
        model=lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        batch=lambda: (torch.randn(32, 8), torch.randint(0, 8, (32,))),
    )
    small.prepare(variant)()  # libraries load their code on first use: not what is measured
    meter = PeakMeter("cpu")
    step = workload.prepare(variant)
    for _ in range(1 if variant in workload.peers else 2):
        step()
    return {"bytes": meter.grown(), "method": meter.method}


if __name__ == "__main__":
    workload, variant, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(peak(WORKLOADS[workload], variant)))
