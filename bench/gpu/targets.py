"""What the numbers should be on an H200, as ratios side by side in one run."""

from __future__ import annotations

from htv.bench.targets import Target

# workload: most for and-mask and for median, and peak memory of and-mask, as ratios to plain
STEPS = {
    "gpt2-small": (1.05, 1.3, 1.02),
    "gpt2-small-compiled": (1.05, 1.3, 1.02),
    "llama-1b": (1.05, None, 1.02),
    "mlp-4096": (1.25, 4.0, 1.05),
    "resnet50": (1.25, 1.6, 1.05),
}
TARGETS = (
    Target("weight-gradient", "and-mask", "ratio", most=1.15),
    Target("weight-gradient", "median", "ratio", most=2.5),
    *(Target(workload, "and-mask", "ratio", most=most) for workload, (most, _, _) in STEPS.items()),
    *(
        Target(workload, "median", "ratio", most=most)
        for workload, (_, most, _) in STEPS.items()
        if most
    ),
    *(
        Target(workload, "and-mask", "peak_ratio", most=most)
        for workload, (_, _, most) in STEPS.items()
    ),
    Target("stacked-3", "median", "of_copy", least=0.85),
    Target("stacked-16", "median", "of_copy", least=0.80),
    Target("stacked-64", "median", "of_copy", least=0.60),
)
