"""What the numbers should be, on two cores with AVX-512: where good engineering should land."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A bound on one number of the record: `most` or `least`."""

    workload: str
    variant: str
    number: str  # a key of the variant's row, or "speed-up over VARIANT"
    most: float | None = None
    least: float | None = None

    def measured(self, record: dict) -> float | None:
        """The number, or None where it was not measured."""
        rows = record["workloads"].get(self.workload, {}).get("variants", {})
        row = rows.get(self.variant, {})
        if self.number.startswith("speed-up over "):
            other = rows.get(self.number.removeprefix("speed-up over "), {})
            return other["ms"] / row["ms"] if "ms" in row and "ms" in other else None
        return row.get(self.number)

    def met(self, record: dict) -> bool | None:
        value = self.measured(record)
        if value is None:
            return None
        return value <= self.most if self.most is not None else value >= self.least


# workload: most for and-mask, median, winsorized, and peak memory of each, as ratios to plain
STEPS = {
    "mlp-relu": (1.15, 2, 8, 1.05),
    "mlp-gelu": (1.15, 8, 10, 1.05),
    "transformer": (1.05, 1.2, 1.25, 1.05),
    "resnet18": (1.15, 1.4, 1.5, 1.10),
}
RULES = ("and-mask", "median", "winsorized")
TARGETS = (
    *(
        Target(workload, rule, "ratio", most=most[RULES.index(rule)])
        for workload, most in STEPS.items()
        for rule in RULES
    ),
    *(
        Target(workload, rule, "peak_ratio", most=most[-1])
        for workload, most in STEPS.items()
        for rule in RULES
    ),
    Target("stacked-32", "median", "speed-up over torch:median", least=25),
    Target("stacked-3", "median", "of_copy", least=0.5),
)
