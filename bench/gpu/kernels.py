"""Step 4: what this GPU allows, and the kernels beside it: a weight gradient's statistic beside the
product alone.

Variants of a problem take turns; each call starts with a cold L2 cache, its launches made
beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import htv
from htv.bench.gpu import step
from htv.bench.gpu.clock import clock, synchronise
from htv.bench.rows import bandwidth, times_over
from htv.bench.workloads import Stacked
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops import aggregate
from htv.ops.factors import ConvFactors, ConvGeometry, EmbeddingFactors
from htv.rules import Rule
from htv.tools.timing import Step, Timing, one_line, take_turns

RULES = {"and-mask": htv.AndMask(0.4), "median": htv.Median()}
SECONDS = 1.5  # for the turns of a problem
SLOW = 1000.0  # milliseconds: called once
ROUNDS = (5, 50)
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """plain: what the same gradient costs without a statistic. ruled: the gradient by a rule.

    multiply_adds: of plain; bytes: factors read and result written once.
    """

    name: str
    dtype: torch.dtype
    plain: Step
    ruled: Callable[[Rule], Tensor]
    multiply_adds: float
    bytes: float
    servers: tuple[str, ...] = ("triton",)


def linear(
    name: str, device: str, dtype: torch.dtype, groups: int, rows: int, outputs: int, inputs: int
) -> Problem:
    """`rows` per group."""
    x, g = (torch.randn(groups * rows, n, device=device, dtype=dtype) for n in (inputs, outputs))
    bounds = torch.arange(groups + 1) * rows
    ruled = lambda rule: htv.linear_grad(x, g, rule, cu_seqlens=bounds)
    moved = x.element_size() * (x.numel() + g.numel() + outputs * inputs)
    servers = ("cuda", "triton") if rows == 1 else ("triton",)
    return Problem(
        name, dtype, lambda: g.t() @ x, ruled, groups * rows * outputs * inputs, moved, servers
    )


def conv(
    name: str,
    device: str,
    dtype: torch.dtype,
    groups: int,
    channels: int,
    size: int,
    kernel: int,
    depthwise: bool = False,
) -> Problem:
    """A convolution that keeps the size, channels last; one image is a group."""
    x, g = (torch.randn(groups, channels, size, size, device=device, dtype=dtype) for _ in range(2))
    x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    parts, pad = channels if depthwise else 1, kernel // 2
    weight = torch.empty(channels, channels // parts, kernel, kernel, device=device, dtype=dtype)
    options = ((1, 1), (pad, pad), (1, 1), False, (0, 0), parts, (False, True, False))
    plain = lambda: torch.ops.aten.convolution_backward(g, x, weight, None, *options)[1]
    factors = ConvFactors(
        x,
        g,
        (kernel, kernel),
        ConvGeometry(1, pad, 1, parts, 2),
        GroupedRows(Groups.each(groups), BatchLayout(0)),
    )
    moved = x.element_size() * (x.numel() + g.numel() + weight.numel())
    products = groups * size**2 * weight.numel()
    return Problem(
        name, dtype, plain, lambda rule: aggregate.aggregate([factors], rule), products, moved
    )


def embedding(
    name: str, device: str, dtype: torch.dtype, groups: int, rows: int, tokens: int, width: int
) -> Problem:
    """`rows` lookups per group."""
    ids = torch.randint(0, tokens, (groups * rows,), device=device)
    grad = torch.randn(groups * rows, width, device=device, dtype=dtype)
    plain = lambda: torch.ops.aten.embedding_dense_backward(grad, ids, tokens, -1, False)
    bounds = torch.arange(groups + 1) * rows
    ruled = lambda rule: aggregate.aggregate([EmbeddingFactors(ids, grad, bounds, tokens)], rule)
    return Problem(
        name, dtype, plain, ruled, 0.0, grad.element_size() * (grad.numel() + tokens * width)
    )


def problems(dry: bool) -> list[Callable[[], Problem]]:
    """Each made when its turn comes. The first is what a target is about."""
    device, half, single = "cpu" if dry else "cuda", torch.bfloat16, torch.float32
    groups, rows, many, images = (16, 1024, 1024, 128) if not dry else (3, 5, 6, 2)
    wide, narrow, tokens = (4096, 768, 50257) if not dry else (24, 8, 11)
    few, more, deep = (64, 256, 512) if not dry else (4, 4, 8)  # channels
    large, middle, small = (56, 14, 7) if not dry else (6, 4, 3)  # images
    return [
        partial(linear, "weight-gradient", device, half, groups, rows, wide, wide),
        partial(linear, "weight-gradient-fp32", device, single, groups, rows, wide, wide),
        partial(linear, "weight-gradient-768", device, half, groups, rows, narrow, narrow),
        partial(linear, "one-row", device, half, many, 1, wide, wide),
        partial(linear, "one-row-fp32", device, single, many, 1, wide, wide),
        partial(conv, "conv-3x3", device, half, images, few, large, 3),
        partial(conv, "conv-3x3-deep", device, half, images, deep, small, 3),
        partial(
            conv, "conv-depthwise", device, half, images, more, middle, 7 if not dry else 3, True
        ),
        partial(embedding, "embedding", device, half, groups, rows, tokens, narrow),
    ]


def stacked(dry: bool) -> list[Stacked]:
    return [
        Stacked(groups, 64 << 20, "cuda") if not dry else Stacked(groups, 300, "cpu")
        for groups in (3, 16, 64)
    ]


def measure(job: step.Job) -> None:
    """Saves {"ceilings", "workloads"} after every workload."""
    names = [
        "ceilings",
        *(w.name for w in stacked(job.dry)),
        *(make.args[0] for make in problems(job.dry)),
    ]
    found = {
        "workloads": {
            name: {"kind": "kernel", "error": step.NO_TIME, "variants": {}} for name in names[1:]
        }
    }

    def took(name: str, rows: dict) -> None:
        if name == "ceilings":
            found["ceilings"] = rows
        else:
            found["workloads"][name] = {"kind": "kernel", "variants": {}} | rows
            if "ceilings" in found and "multiply_adds" in rows:
                add_floor(found["workloads"][name], found["ceilings"])
        job.save(found)

    step.one_by_one(job, "htv.bench.gpu.kernels", names, took)


def add_floor(workload: dict, rates: dict) -> None:
    """What its products and bytes take at the rates of large ones, and how near the variants come
    to that.
    """
    rate = rates.get(f"multiply_adds_per_s_{workload['dtype']}")
    if rate is None or "bytes_per_s" not in rates:
        return
    workload["floor_ms"] = 1e3 * max(
        workload["multiply_adds"] / rate, workload["bytes"] / rates["bytes_per_s"]
    )
    for row in workload["variants"].values():
        if "ms" in row:
            row["of_floor"] = workload["floor_ms"] / row["ms"]


# ---- in the process of a workload ----


class Turns:
    """Steps called once; those that fail are left out. One that takes a second is called less."""

    def __init__(self, steps: dict[str, Step], dry: bool):
        self.dry, self.device, self.steps, self.errors = dry, "cpu" if dry else "cuda", {}, {}
        for name, run in steps.items():
            try:
                run()  # compiles
                synchronise(self.device)
                self.steps[name] = run
            except Exception as error:
                self.errors[name] = {"error": one_line(error), "dry": dry}
        if not dry:
            torch.cuda.empty_cache()

    def times(self) -> dict[str, Timing]:
        timed = clock(self.device, alone=True)
        once = {name: timed(run) for name, run in self.steps.items()}
        often = {name: run for name, run in self.steps.items() if once[name] < SLOW}
        seconds, rounds = (SECONDS, ROUNDS) if not self.dry else (0.0, (2, 2))
        return {name: Timing.of([once[name]]) for name in once} | take_turns(
            often, seconds, rounds, clock=timed
        )


class Ceilings:
    """Multiply-adds and bytes per second, of large products of torch's and a large copy."""

    def __init__(self, dry: bool):
        self.dry = dry

    def measure(self) -> dict:
        device = "cpu" if self.dry else "cuda"
        size, length = (8192, 1 << 30) if not self.dry else (32, 1 << 12)
        source, target = torch.randn(length, device=device), torch.empty(length, device=device)
        found = {
            "bytes_per_s": 8e3 * length / self._milliseconds(lambda: target.copy_(source)),
            "dry": self.dry,
        }
        allowed = torch.backends.cuda.matmul.allow_tf32
        for name, dtype in (
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
            ("tf32", None),
            ("fp32", torch.float32),
        ):
            torch.backends.cuda.matmul.allow_tf32 = dtype is None
            a, b = (
                torch.randn(size, size, device=device, dtype=dtype or torch.float32)
                for _ in range(2)
            )
            found[f"multiply_adds_per_s_{name}"] = 1e3 * size**3 / self._milliseconds(lambda: a @ b)
        torch.backends.cuda.matmul.allow_tf32 = allowed
        return found

    def _milliseconds(self, run: Step) -> float:
        return Turns({"it": run}, self.dry).times()["it"].median


class OfProblem:
    def __init__(self, problem: Problem, dry: bool, few: bool):
        self.problem, self.dry = problem, dry
        steps: dict[str, Step] = {"plain": problem.plain}
        for name, rule in list(RULES.items())[: 1 if few else None]:
            steps[name] = self._by("auto", rule)
            steps |= {
                f"{name}@{server}": self._by(server, rule) for server in problem.servers if not few
            }
        self.turns = Turns(steps, dry)

    def _by(self, server: str, rule: Rule) -> Step:
        def run() -> Tensor:
            with htv.use_backend(server):
                return self.problem.ruled(rule)

        return run

    def measure(self) -> dict:
        problem, times = self.problem, self.turns.times()
        if "plain" not in times:
            raise RuntimeError(f"plain failed: {self.turns.errors['plain']['error']}")
        rows = {
            name: times_over(times["plain"], time)
            | {
                "tflop_per_s": 2e-9 * problem.multiply_adds / time.median,
                "gb_per_s": 1e-6 * problem.bytes / time.median,
                "dry": self.dry,
            }
            for name, time in times.items()
        }
        facts = {
            "dtype": SHORT[problem.dtype],
            "multiply_adds": problem.multiply_adds,
            "bytes": problem.bytes,
        }
        return {"kind": "kernel", "unit": "plain", **facts, "variants": rows | self.turns.errors}


class OfStacked:
    def __init__(self, workload: Stacked, dry: bool):
        self.workload, self.dry = workload, dry
        wanted = ["copy", *workload.rules(), "torch:mean"] + ["torch:median"] * (
            workload.groups < 10
        )
        self.turns = Turns({variant: workload.prepare(variant) for variant in wanted}, dry)

    def measure(self) -> dict:
        workload, times = self.workload, self.turns.times()
        rows = {
            variant: times_over(times["copy"], time)
            | bandwidth(workload, variant, times)
            | {"dry": self.dry}
            for variant, time in times.items()
        }
        facts = {"kind": workload.kind, "unit": "copy", **workload.facts()}
        return facts | {
            "variants": {
                v: rows.get(v) or self.turns.errors[v] for v in [*rows, *self.turns.errors]
            }
        }


def prepared(name: str, dry: bool, few: bool) -> step.Prepared:
    if name == "ceilings":
        return Ceilings(dry)
    for workload in stacked(dry):
        if workload.name == name:
            return OfStacked(workload, dry)
    return OfProblem(next(make for make in problems(dry) if make.args[0] == name)(), dry, few)


if __name__ == "__main__":
    if "--answer" in sys.argv:
        step.answer_preparations(
            lambda name: prepared(name, "--dry" in sys.argv, "--few" in sys.argv)
        )
    else:
        step.main(measure)
