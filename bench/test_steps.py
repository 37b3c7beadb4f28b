"""Whole training steps; `python bench/steps.py` compares them side by side."""

import pytest

from workloads import WORKLOADS


@pytest.mark.parametrize("rule", ["plain", "mean", "and_mask", "median", "winsorized_mean"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark, workload, rule):
    benchmark(WORKLOADS[workload].step(WORKLOADS[workload].rules()[rule]))
