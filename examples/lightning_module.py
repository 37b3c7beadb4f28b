"""Train a LightningModule with gradients that enough examples agree on.

    python examples/lightning_module.py             # 1 process
    python examples/lightning_module.py --devices 2

The module and its Trainer are as always; the callback attaches the rule while `fit` runs.
"""

import argparse
import logging
import tempfile

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import htv
from htv.integrations.lightning import HtvCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def classification(count: int, wrong: float, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 20, generator=generator)
    labels = x[:, :4].argmax(1)
    noise = torch.randint(0, 4, (count,), generator=generator)
    spoilt = torch.rand(count, generator=generator) < wrong
    return TensorDataset(x, torch.where(spoilt, noise, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    devices = parser.parse_args().devices
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads only get in the way of a tiny model
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_epochs=4,
            accumulate_grad_batches=4,
            gradient_clip_val=1.0,
            callbacks=[HtvCallback(htv.AndMask(0.2), stats=True)],
            logger=CSVLogger(folder),
            log_every_n_steps=4,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        training = DataLoader(classification(2048, wrong=0.4, seed=0), batch_size=16, shuffle=True)
        clean = DataLoader(classification(1000, wrong=0.0, seed=1), batch_size=200)
        trainer.fit(Classifier(), training, clean)
    if trainer.is_global_zero:
        found = {name: float(value) for name, value in trainer.logged_metrics.items()}
        print(f"{16 * 4 * devices} examples voted per step")
        print(f"accuracy on clean labels: {found['accuracy']:.3f}")
        for name, value in found.items():
            if "net.0.weight" in name:
                print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
