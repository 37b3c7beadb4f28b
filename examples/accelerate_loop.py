"""Train with a loop of your own on Accelerate: one vote per step.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

Four micro-batches and all processes make one step, and gradients are clipped once all have voted.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import htv
from htv.integrations.accelerate import measurements, prepare


def classification(count: int, wrong: float, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 20, generator=generator)
    labels = x[:, :4].argmax(1)
    noise = torch.randint(0, 4, (count,), generator=generator)
    spoilt = torch.rand(count, generator=generator) < wrong
    return TensorDataset(x, torch.where(spoilt, noise, labels))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads only get in the way of a tiny model
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(classification(2048, wrong=0.4, seed=0), batch_size=16, shuffle=True)
    handle, model, optimizer, loader = prepare(
        accelerator, model, optimizer, loader, rule=htv.AndMask(0.2), stats=True
    )
    for epoch in range(4):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:  # all have voted
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        x, y = classification(1000, wrong=0.0, seed=1).tensors
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).float().mean()
        accelerator.print(f"epoch {epoch}: accuracy on clean labels {accuracy:.3f}")
    voters = 16 * 4 * accelerator.num_processes
    accelerator.print(f"{voters} examples voted per step")
    # To a logger: accelerator.log(measurements(handle), step=step)
    for name, value in measurements(handle).items():
        if "0.weight" in name:
            accelerator.print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
