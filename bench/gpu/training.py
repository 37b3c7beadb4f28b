"""Step 5: whole training steps beside plain ones, eager and compiled: time, and peak memory of the
device's allocator.

Every workload has a process of its own. All prepare at once, which is mostly compilation; then they
measure one by one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import htv
from htv.bench import models
from htv.bench.baselines import DISTRIBUTIONS
from htv.bench.gpu import step
from htv.bench.gpu.clock import clock, synchronise
from htv.bench.rows import times_over
from htv.bench.workloads import TrainingStep
from htv.tools.env_info import version
from htv.tools.timing import Step, Timing, milliseconds, one_line, take_turns

SECONDS = 6.0  # for the turns of a workload
SLOW = 3000.0  # milliseconds after which a variant is not called again
RULES = ("plain", "and-mask", "median")
PEERS = ("vmap:and-mask", "vmap:median", "opacus:and-mask")


@dataclass(frozen=True)
class DeviceStep(TrainingStep):
    """The same on a device, in a type, maybe compiled. A variant may name its backend:
    and-mask@triton.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    compiler: str | None = None
    measured: tuple[str, ...] = RULES

    @property
    def variants(self) -> tuple[str, ...]:
        return self.measured

    def prepare(self, variant: str) -> Step:
        rule, _, server = variant.partition("@")
        step_ = super().prepare(rule)

        def run() -> None:
            with htv.use_backend(server or "auto"):
                step_()

        return run

    def called(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return (
            torch.compile(model, fullgraph=True, backend=self.compiler) if self.compiler else model
        )

    def _seeded(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        with torch.device(self.device):
            model, (x, targets) = self.model(), self.batch()
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        x = x.to(self.dtype, memory_format=layout) if x.is_floating_point() else x
        return model.to(self.dtype).to(memory_format=layout), x, targets


@dataclass(frozen=True)
class Sizes:
    """Of every model and batch."""

    language: tuple[int, ...] = (
        50257,
        768,
        12,
        12,
        1024,
        4,
    )  # vocabulary, width, heads, layers, context, expansion
    text: tuple[int, int] = (16, 1024)
    llama: tuple[int, ...] = (2048, 32, 8192)  # width, heads, hidden
    layers: int = 16
    passages: tuple[int, int] = (4, 2048)
    mlp: int = 4096
    vectors: int = 1024
    resnet: tuple[int, ...] = (64, 1000, 32)  # width, classes, groups of a norm
    images: tuple[int, ...] = (128, 3, 224, 224)


TINY = Sizes(
    (29, 16, 2, 1, 8, 2), (4, 8), (16, 2, 24), 2, (3, 8), 12, 6, (4, 10, 2), (2, 3, 32, 32)
)


def workloads(dry: bool) -> dict[str, DeviceStep]:
    """What targets are about first."""
    size, common = (
        (TINY, {"device": "cpu", "winsorize": 1})
        if dry
        else (Sizes(), {"device": "cuda", "winsorize": 1})
    )
    compiled = common | {"compiler": "aot_eager" if dry else "inductor"}
    single = {"dtype": torch.float32}
    by = ("and-mask@cuda", "and-mask@triton", "median@cuda", "median@triton")

    language = lambda tied=True: models.LanguageModel(*size.language, tied=tied, scaled=False)
    llama = lambda: nn.Sequential(*(models.LlamaBlock(*size.llama) for _ in range(size.layers)))
    mlp = lambda: models.mlp((size.mlp,) * 4, nn.ReLU, norm=False)
    resnet = lambda: models.ResNet50(*size.resnet)
    text = lambda: tuple(torch.randint(0, size.language[0], size.text) for _ in range(2))
    passages = lambda: (
        torch.randn(*size.passages, size.llama[0]),
        torch.randint(0, size.llama[0], size.passages),
    )
    vectors = lambda: (
        torch.randn(size.vectors, size.mlp),
        torch.randint(0, size.mlp, (size.vectors,)),
    )
    images = lambda: (torch.randn(size.images), torch.randint(0, size.resnet[1], size.images[:1]))

    found = (
        DeviceStep("gpt2-small", language, text, **common, measured=(*RULES, *PEERS)),
        DeviceStep("mlp-4096", mlp, vectors, **common, **single, measured=(*RULES, *by, *PEERS)),
        DeviceStep(
            "resnet50", resnet, images, **common, channels_last=True, measured=(*RULES, *PEERS)
        ),
        DeviceStep("llama-1b", llama, passages, **common, measured=(*RULES, "vmap:and-mask")),
        DeviceStep("gpt2-small-compiled", language, text, **compiled),
        DeviceStep("mlp-4096-bf16", mlp, vectors, **common, measured=(*RULES, *by)),
        DeviceStep("gpt2-small-untied", lambda: language(tied=False), text, **common),
        DeviceStep("mlp-4096-compiled", mlp, vectors, **compiled, **single),
    )
    return {workload.name: workload for workload in (found[:5] if dry else found)}


def measure(job: step.Job) -> None:
    """Saves {"workloads", "peers"} after every workload."""
    names = list(workloads(job.dry))
    found = {
        name: {"kind": "step", "unit": "plain", "error": step.NO_TIME, "variants": {}}
        for name in names
    }
    peers = {name: version(distribution) for name, distribution in DISTRIBUTIONS.items()}

    def took(name: str, rows: dict) -> None:
        found[name] = {key: value for key, value in found[name].items() if key != "error"} | rows
        job.save({"workloads": found, "peers": peers})

    job.save({"workloads": found, "peers": peers})
    step.one_by_one(job, "htv.bench.gpu.training", names, took)


# ---- in the process of a workload ----


class Prepared:
    """The variants of a workload, called a few times each; errors and peak memory of each by the
    way.
    """

    def __init__(self, workload: DeviceStep, dry: bool, few: bool):
        self.workload, self.dry = workload, dry
        self.steps: dict[str, Step] = {}
        self.times: dict[str, Timing] = {}  # a single call of those that take long
        self.rows: dict[str, dict] = {}
        own = [variant for variant in workload.variants if variant not in workload.peers]
        self.peers = [
            variant for variant in workload.variants if variant in workload.peers and not few
        ]
        workload.prepare(
            "plain"
        )()  # libraries allocate their workspaces at first use: not what is measured
        for variant in own[: 2 if few else None]:
            self._prepare(variant)

    def _prepare(self, variant: str) -> None:
        device = self.workload.device
        gc.collect()
        before, row = _allocated(device), {"dry": self.dry}
        self.rows[variant] = row
        try:
            run = self.workload.prepare(variant)
            run()
            synchronise(device)
            _reset_peak(device)
            took = milliseconds(run, lambda: synchronise(device))
        except Exception as error:
            row["error"] = one_line(error)
            return
        finally:
            _empty(device)
        if device != "cpu":
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            row["memory_method"] = "torch.cuda.max_memory_allocated"
        if took > SLOW:
            self.times[variant] = Timing.of([took])
        else:
            self.steps[variant] = run

    def measure(self) -> dict:
        self._take_turns(self.steps, SECONDS, (5, 60))
        return self._workload() | {"more": bool(self.peers)}

    def more(self) -> dict:
        """Baselines, each alone with plain and then gone: they need all the memory."""
        for variant in self.peers:
            self._prepare(variant)
            if variant in self.steps:
                self._take_turns({variant: self.steps.pop(variant)}, 1.0, (2, 5))
        return self._workload()

    def _take_turns(self, steps: dict[str, Step], seconds: float, rounds: tuple[int, int]) -> None:
        if self.dry:
            seconds, rounds = 0.0, (2, 2)
        self.times |= take_turns(steps, seconds, rounds, clock=clock(self.workload.device))

    def _workload(self) -> dict:
        plain = self.rows["plain"]
        for variant, row in self.rows.items():
            if variant in self.times and "plain" in self.times:
                row |= times_over(self.times["plain"], self.times[variant])
                if "peak_bytes" in row and "peak_bytes" in plain:
                    row["peak_ratio"] = row["peak_bytes"] / plain["peak_bytes"]
        facts = {
            "dtype": str(self.workload.dtype).removeprefix("torch."),
            "compiler": self.workload.compiler,
        }
        return {"kind": "step", "unit": "plain", **facts, "variants": self.rows}


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _empty(device: str) -> None:
    """What other processes may want."""
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    if "--answer" in sys.argv:
        dry = "--dry" in sys.argv
        step.answer_preparations(
            lambda name: Prepared(workloads(dry)[name], dry, "--few" in sys.argv)
        )
    else:
        step.main(measure)
