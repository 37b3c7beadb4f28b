"""Whole training steps by rule; `htv bench` compares them side by side, with baselines."""

import pytest

from htv.bench.workloads import RULES, WORKLOADS

STEPS = [
    name
    for name, workload in WORKLOADS.items()
    if workload.kind == "step" and workload.axis is None
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workload", STEPS)
def test_step(benchmark, workload, rule):
    benchmark(WORKLOADS[workload].prepare(rule))
