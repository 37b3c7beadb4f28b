"""What one vote over several ranks costs beside plain training: `htv bench --distributed`.

Processes of this machine stand for the ranks, and gloo brings them together by the loopback
interface, whose counters tell the bytes. The variants take turns in the same processes; a step is
timed from a barrier to a barrier. On one machine ranks share cores and memory: what is told here is
how much is sent, and that it overlaps with nothing; not how fast a cluster is.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import htv
from htv.bench.report import table
from htv.tools import env_info
from htv.tools.files import replace_text

__all__ = ["measure", "report", "run"]

EXAMPLES, WIDTH, CLASSES = 24, 1024, 10  # examples per rank; one byte counts those of 4 ranks
WARM_UP, ROUNDS, QUICK_ROUNDS = 3, 20, 3
PLAIN = "plain"

Variant = tuple[str, htv.Rule | None, str]


def variants(world: int) -> dict[str, Variant]:
    """Return name -> (stack, rule or None for plain, vote) of what is compared."""
    found: dict[str, Variant] = {}
    for stack in ("DDP", "FSDP2"):
        found[f"{stack} {PLAIN}"] = stack, None, "examples"
        found[f"{stack} AndMask"] = stack, htv.AndMask(0.4), "examples"
        found[f"{stack} SandMask"] = stack, htv.SandMask(0.4, k=1.0), "examples"
        found[f"{stack} MedianOfMeans"] = stack, htv.MedianOfMeans(world), "examples"
        found[f"{stack} AndMask of ranks"] = stack, htv.AndMask(0.4), "ranks"
    return found


def made() -> nn.Module:
    """Return the model: two large layers and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def step_of(stack: str, rule: htv.Rule | None, vote: str, rank: int) -> Callable[[], None]:
    """Return a training step without its optimizer."""
    model = made()
    if stack == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if rule is not None:
        handle = htv.attach(model, rule)
    wrapped = DistributedDataParallel(model) if stack == "DDP" else model
    if rule is not None:
        serve = htv.distributed.ddp if stack == "DDP" else htv.distributed.fsdp
        serve(wrapped, handle, vote=vote)
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(EXAMPLES, 256, generator=random)
    y = torch.randint(0, CLASSES, (EXAMPLES,), generator=random)

    def step() -> None:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()

    return step


def _sent() -> float:
    """Bytes that left by the loopback interface so far; NaN where the system does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return math.nan
    counters = next((line for line in lines if line.strip().startswith("lo:")), None)
    return math.nan if counters is None else float(counters.partition(":")[2].split()[8])


def _rank(rank: int, world: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    steps = {name: step_of(*variant, rank) for name, variant in variants(world).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            dist.barrier()
            before, start = _sent(), time.perf_counter()
            step()
            dist.barrier()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - start)
                sent[name].append((_sent() - before) / world)
    if rank == 0:
        found = {
            name: {
                "milliseconds": 1e3 * statistics.median(times[name]),
                "bytes": statistics.median(sent[name]),
            }
            for name in steps
        }
        Path(folder, f"found{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(worlds: list[int], quick: bool) -> dict:
    """Measure all variants on so many ranks each; return the record."""
    record = {
        **env_info.stamp("htv", "bench", "--distributed"),
        "parameters": sum(p.numel() for p in made().parameters()),
        "examples per rank": EXAMPLES,
        "rounds": QUICK_ROUNDS if quick else ROUNDS,
        "ranks": {},
    }
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_rank, (world, folder, record["rounds"]), nprocs=world)
            record["ranks"][str(world)] = json.loads(Path(folder, f"found{world}.json").read_text())
    return record


def report(record: dict) -> str:
    """Return the record as Markdown."""
    lines = [
        f"{record['parameters']:,} float32 parameters, {record['examples per rank']} examples per "
        f"rank, medians of {record['rounds']} steps in turn. Bytes are those of one rank and step "
        "on the loopback interface; on one machine all ranks share its cores.",
    ]
    for world, found in record["ranks"].items():
        rows = []
        for name, numbers in found.items():
            plain = found[f"{name.split()[0]} {PLAIN}"]
            rows.append(
                [
                    name,
                    f"{numbers['milliseconds']:.1f}",
                    f"{numbers['milliseconds'] / plain['milliseconds']:.2f}",
                    f"{numbers['bytes'] / 1e6:.2f}",
                    f"{numbers['bytes'] / plain['bytes'] - 1:+.1%}",
                ]
            )
        head = ["variant", "ms", "over plain", "MB sent", "more than plain"]
        lines += ["", f"**{world} ranks**", "", table(head, rows) or ""]
    return "\n".join(lines)


def run(worlds: list[int], quick: bool, out: Path) -> str:
    """Measure, write distributed.json and distributed.md into `out`, and return the report."""
    record = measure(worlds, quick)
    text = report(record)
    replace_text(out / "distributed.json", json.dumps(record, indent=1) + "\n")
    replace_text(out / "distributed.md", f"# Several ranks\n\n{text}\n")
    return text
