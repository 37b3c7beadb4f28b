"""Train under DistributedDataParallel with one vote of the examples of all ranks.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py

Each step has four micro-batches per rank: three under no_sync(), and a last one in which the ranks
meet. Then the gradient is compared with that of one process that has all examples in one batch.
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import htv

RULE, MICRO, SIZE = htv.AndMask(0.2), 4, 16


def batch(step: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples of a step, those of all ranks and micro-batches."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(MICRO * SIZE * world, 20, generator=generator)
    labels = x[:, :4].argmax(1)
    noise = torch.randint(0, 4, labels.shape, generator=generator)
    return x, torch.where(torch.rand(len(x), generator=generator) < 0.4, noise, labels)


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    expected = one_process(copy.deepcopy(net), *batch(0, world))
    dist.init_process_group("gloo")
    handle = htv.attach(net, RULE)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        x, y = (t.chunk(world)[rank].chunk(MICRO) for t in batch(step, world))
        with model.no_sync():
            for i in range(MICRO - 1):
                (F.cross_entropy(model(x[i]), y[i]) / MICRO).backward()
        (F.cross_entropy(model(x[-1]), y[-1]) / MICRO).backward()
        handle.finish()  # checks that the ranks have met
        if step == 0:
            compare([p.grad for p in net.parameters()], expected)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 and rank == 0:
            x, _ = batch(10_000 + step, world)
            with torch.no_grad():
                accuracy = (net(x).argmax(1) == x[:, :4].argmax(1)).float().mean()
            print(f"step {step + 1}: accuracy on clean labels {accuracy:.3f}")
    dist.destroy_process_group()


def one_process(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of one process, for all examples in one batch."""
    with htv.attach(net, RULE):
        F.cross_entropy(net(x), y).backward()
    return [p.grad for p in net.parameters()]


def compare(grads: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    pairs = list(zip(grads, expected, strict=True))
    error = max(float((g - e).abs().max() / e.abs().max()) for g, e in pairs)
    same = all(torch.equal(g == 0, e == 0) for g, e in pairs)
    kept = sum(int((e != 0).sum()) for e in expected) / sum(e.numel() for e in expected)
    if dist.get_rank() == 0:
        print(
            f"{MICRO * SIZE * dist.get_world_size()} examples voted and kept {kept:.0%} of all "
            f"coordinates; the same ones as in one process: {same}; largest difference {error:.0e}"
        )


if __name__ == "__main__":
    main()
