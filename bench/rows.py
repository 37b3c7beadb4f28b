"""What the record holds of one variant."""

from __future__ import annotations

from htv.bench.workloads import Workload
from htv.tools.timing import Timing


def times_over(unit: Timing, timing: Timing) -> dict:
    return {
        "ms": timing.median,
        "ms_quartiles": [timing.lower, timing.upper],
        "runs": timing.runs,
        "ratio": timing.median / unit.median,
    }


def bandwidth(workload: Workload, variant: str, times: dict[str, Timing]) -> dict:
    """Of the bytes that have to be moved: GB/s, and that as a share of the copy's."""

    def rate(variant: str) -> float:
        return workload.moved_bytes(variant) / (1e6 * times[variant].median)

    return {"gb_per_s": rate(variant), "of_copy": rate(variant) / rate(workload.unit)}
