"""How far each path is from what this machine allows: `python -m htv.bench.floors --out FOLDER`
writes floors-cpu.json.

A path needs so many multiply-adds, so many other operations on values, and so many bytes from
memory. It cannot take less time than these at this machine's measured rates: multiply-adds at the
best rate of a matrix product, other operations at the same rate (they use the same units), bytes
meanwhile at the rate of a large copy. The gap is measured time over that floor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import htv
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops import aggregate, schema
from htv.ops.factors import ConvFactors, ConvGeometry, EmbeddingFactors
from htv.rules import Rule
from htv.tools import env_info
from htv.tools.files import replace_text
from htv.tools.timing import Step, take_turns

# Operations on one value beside its product; what an implementation with the same idea cannot do
# without.
VOTE = 5  # add, two comparisons, two counts
SIGN_PLANES = 6 / 32  # and, xor, two population counts, two additions for 32 rows at once
SELECT_BITS = 1 + 4 + 10 + 8  # product, key, transposition, and 32 planes for two ranks


def network(n: int) -> float:
    """Operations per value of sorting n values by Batcher's network."""
    rounds = (n - 1).bit_length()
    return rounds * (rounds + 1) / 2


@dataclass(frozen=True)
class Route:
    """One way contributions are aggregated: what it needs, and a call that does it."""

    name: str
    multiply_adds: float
    operations: float
    bytes: float
    run: Step


def linear(
    name: str,
    groups: int,
    rows: int,
    inputs: int,
    outputs: int,
    rule: Rule,
    each: float,
    sparse: bool = False,
) -> Route:
    """rows per group; `each`: operations per contribution; sparse: half of either factor is 0, as
    after ReLU.
    """
    x, grad = torch.randn(groups * rows, inputs), torch.randn(groups * rows, outputs)
    if sparse:
        x, grad = x.relu(), grad * (torch.rand_like(grad) < 0.5)
    bounds = torch.arange(groups + 1) * rows
    contributions = float(groups * inputs * outputs)
    products = 0.0 if rows == 1 and not rule.streaming else contributions * rows
    moved = 4.0 * (x.numel() + grad.numel() + inputs * outputs)
    return Route(
        name,
        products,
        contributions * each,
        moved,
        lambda: htv.linear_grad(x, grad, rule, cu_seqlens=bounds),
    )


def conv(
    name: str,
    groups: int,
    channels: int,
    size: int,
    rule: Rule,
    each: float,
    depthwise: bool = False,
) -> Route:
    """A 3 x 3 convolution (7 x 7 if depthwise) that keeps the size; one example is a group."""
    kernel = 7 if depthwise else 3
    x, grad = torch.randn(2, groups, channels, size, size).unbind()
    geometry = ConvGeometry(1, kernel // 2, 1, channels if depthwise else 1, 2)
    voters = GroupedRows(Groups.each(groups), BatchLayout(0))
    weights = float(channels * (1 if depthwise else channels) * kernel**2)
    run = lambda: aggregate.aggregate(
        [ConvFactors(x, grad, (kernel, kernel), geometry, voters)], rule
    )
    moved = 4.0 * (x.numel() + grad.numel() + weights)
    return Route(name, groups * weights * size**2, groups * weights * each, moved, run)


def stacked(
    groups: int, coordinates: int, function: Callable[[Tensor], Tensor], name: str, each: float
) -> Route:
    grads = torch.randn(groups, coordinates)
    moved = 4.0 * coordinates * (groups + 1)
    return Route(
        f"stacked {name}, E = {groups}",
        0.0,
        groups * coordinates * each,
        moved,
        lambda: function(grads),
    )


def embedding(name: str, rule: Rule, groups: int, rows: int, tokens: int, width: int) -> Route:
    ids, grad = torch.randint(0, tokens, (groups * rows,)), torch.randn(groups * rows, width)
    bounds = torch.arange(groups + 1) * rows
    run = lambda: aggregate.aggregate([EmbeddingFactors(ids, grad, bounds, tokens)], rule)
    moved = 4.0 * (
        3 * grad.numel() + tokens * width
    )  # read, sorted into pairs, read again; the table written
    return Route(name, 0.0, VOTE * grad.numel(), moved, run)


def routes() -> list[Route]:
    torch.manual_seed(0)
    masks, median, winsorized = htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean
    mlp, layer = (256, 1, 1024, 1024), (16, 128, 256, 1024)
    return [
        linear("linear, 256 groups of 1 row: AndMask", *mlp, masks, SIGN_PLANES),
        linear("linear, 256 groups of 1 row: Median", *mlp, median, SELECT_BITS),
        linear("linear, 256 groups of 1 row: WinsorizedMean(8)", *mlp, winsorized(8), SELECT_BITS),
        linear("the same after ReLU: Median", *mlp, median, SIGN_PLANES, sparse=True),
        linear("the same after ReLU: WinsorizedMean(8)", *mlp, winsorized(8), SELECT_BITS / 2,
               sparse=True),
        linear("linear, 16 groups of 128 rows: AndMask", *layer, masks, VOTE),
        linear("linear, 16 groups of 128 rows: Median", *layer, median, network(16)),
        linear("linear, 16 groups of 128 rows: WinsorizedMean(1)", *layer, winsorized(1),
               network(16)),
        conv("conv 3x3, 64 channels, 32 of 16x16: AndMask", 32, 64, 16, masks, VOTE),
        conv("conv 3x3, 64 channels, 32 of 16x16: Median", 32, 64, 16, median, network(32)),
        conv("conv 3x3, 512 channels, 32 of 2x2: AndMask", 32, 512, 2, masks, VOTE),
        conv("conv 3x3, 512 channels, 32 of 2x2: Median", 32, 512, 2, median, network(32)),
        conv("conv 7x7 depthwise, 384 channels, 32 of 14x14: AndMask", 32, 384, 14, masks, VOTE,
             depthwise=True),
        embedding("embedding, 16 groups of 128 tokens of 1000: AndMask", masks, 16, 128, 1000, 256),
        stacked(3, 1 << 22, htv.median, "median", network(3)),
        stacked(32, 1 << 22, htv.median, "median", network(32)),
        stacked(512, 1 << 18, htv.median, "median", SELECT_BITS),
        stacked(32, 1 << 22, lambda grads: htv.and_mask(grads, 0.4), "AndMask", VOTE),
        stacked(32, 1 << 22, lambda grads: htv.winsorized_mean(grads, 1), "WinsorizedMean(1)",
                network(32)),
    ]  # fmt: skip


def ceilings(seconds: float) -> dict[str, float]:
    """multiply_adds: per second, of the best of torch's and our own products; bytes: per second, of
    a copy.
    """
    x, grad, bounds = torch.randn(2048, 1024), torch.randn(2048, 1024), torch.tensor([0, 2048])
    images, weight = torch.randn(16, 128, 28, 28), torch.randn(128, 128, 3, 3)
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    mean = schema.code("mean"), 0, 0.0, 0.0
    times = take_turns(
        {
            "torch": lambda: grad.t() @ x,
            "htv": lambda: torch.ops.htv.linear(x, grad, bounds, *mean),
            "convolution": lambda: torch.nn.functional.conv2d(images, weight, padding=1),
            "copy": lambda: target.copy_(source),
        },
        seconds,
    )
    work = {
        "torch": 2048 * 1024**2,
        "htv": 2048 * 1024**2,
        "convolution": images.numel() * weight[0].numel(),
    }
    products = {
        f"{name}_multiply_adds": 1e3 * each / times[name].lower for name, each in work.items()
    }
    return {
        **products,
        "multiply_adds": max(products.values()),
        "bytes": 1e3 * 8 * source.numel() / times["copy"].lower,
    }


def measure(seconds: float = 60.0, only: str = "") -> dict:
    """The rates of this machine, and of every path what it needs, its floor and its time in
    milliseconds.

    only: the beginning of the names of what to measure.
    """
    rates = ceilings(seconds / 10)
    found = [r for r in routes() if r.name.startswith(only)]
    times = take_turns({route.name: route.run for route in found}, seconds)
    rows = {}
    for route in found:
        needs = {
            "products": route.multiply_adds / rates["multiply_adds"],
            "operations": route.operations / rates["multiply_adds"],
            "bytes": route.bytes / rates["bytes"],
        }
        bound = max(needs, key=needs.get)
        # products and other operations share the units; bytes move meanwhile
        floor = 1e3 * max(needs["products"] + needs["operations"], needs["bytes"])
        rows[route.name] = {
            "multiply_adds": route.multiply_adds,
            "operations": route.operations,
            "bytes": route.bytes,
            "bound": bound,
            "floor_ms": floor,
            "ms": times[route.name].median,
            "ms_quartiles": [times[route.name].lower, times[route.name].upper],
            "gap": times[route.name].median / floor,
        }
    return {
        **env_info.stamp("python", "-m", "htv.bench.floors", *sys.argv[1:]),
        "rates": rates,
        "paths": rows,
    }


def table(record: dict) -> str:
    """As Markdown, under a line that tells the machine's rates."""
    rates = record["rates"]
    lines = [
        f"Matrix products run at {2e-9 * rates['torch_multiply_adds']:.0f} GFLOP/s by torch and "
        f"{2e-9 * rates['htv_multiply_adds']:.0f} by htv's own tiles (2048 rows, 1024 x 1024), "
        "torch's convolution (3 x 3, 128 channels) at "
        f"{2e-9 * rates['convolution_multiply_adds']:.0f}, a copy moves "
        f"{1e-9 * rates['bytes']:.0f} GB/s (`{record['command']}`, {record['date'][:10]}, "
        f"{record['machine']['cpu']}, {record['machine']['threads']} threads, "
        f"{record['machine']['cpu_capability']}, torch {record['machine']['versions']['torch']}).",
        "",
        "| path | Gmultiply-add | other Goperations | MB | bound by | floor, ms | measured, ms | "
        "gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["paths"].items():
        lines.append(
            f"| {name} | {row['multiply_adds'] / 1e9:.2f} | {row['operations'] / 1e9:.2f} | "
            f"{row['bytes'] / 1e6:.0f} | {row['bound']} | {row['floor_ms']:.2f} | {row['ms']:.2f} "
            f"| {row['gap']:.1f}x |"
        )
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for floors-cpu.json.")] = Path("bench-results"),
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend.")] = 60.0,
    only: Annotated[str, typer.Option(help="The beginning of the names of what to measure.")] = "",
) -> None:
    record = measure(seconds, only)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "floors-cpu.json", json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    typer.run(main)
