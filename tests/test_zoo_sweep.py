"""The sweep over architectures judges them, and docs/coverage.md is what its record gives."""

import inspect
import json
import os
import time

import pytest
import torch
from torch import nn

import htv
import support.torchvision_operators  # noqa: F401, before what imports torchvision

for name in ("peft", "timm", "transformers"):
    pytest.importorskip(name, reason="needs the extra `models`")

import zoo_sweep  # noqa: E402

from support import sweep_models  # noqa: E402

FEW = ["causal/llama", "masked/bert", "vision/vit", "timm/resnet", "peft/lora"]


@pytest.fixture(autouse=True)
def as_before():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("name", FEW)
def test_an_architecture_is_exact(name):
    row = zoo_sweep.judge(sweep_models.catalogue()[name])
    assert row["outcome"] == "exact", row
    assert row["type"] == "float64"


class Scaled(nn.Linear):
    """A layer that computes something else while it is attached."""

    def __init__(self, scale):
        super().__init__(3, 2)
        self.scale = scale

    def forward(self, x):
        out = super().forward(x)
        return out * self.scale if "forward" in vars(self) else out


@pytest.mark.parametrize(
    "model, outcome",
    [
        (Scaled(1.0), "exact"),
        (Scaled(1.001), "wrong"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "could-not-build"),
    ],
)  # fmt: skip
def test_outcomes(model, outcome, monkeypatch):
    if outcome == "could-not-build":  # statistics over the batch: no example's own gradient
        monkeypatch.setattr(zoo_sweep, "prepared", lambda model: model.train())
    first = next(iter(inspect.signature(model.forward).parameters))
    ways = lambda: (way for way in [(model, {first: torch.randn(5, 3)}, "rows")])
    row = zoo_sweep.judge(ways)
    assert row["outcome"] == outcome, row


def test_htvs_errors_are_refusals_and_others_crashes():
    model = nn.Linear(3, 2)
    model.forward = lambda x: x.sum(0, keepdim=True) @ model.weight.T + x[:, :2]
    with pytest.raises(htv.UnsupportedError) as refused, htv.attach(model, htv.Median()):
        model(torch.randn(5, 3))
    assert zoo_sweep.refusal(refused.value)[0] == "refused"
    with pytest.raises(RuntimeError) as crash:
        torch.zeros(3).view(2)
    assert zoo_sweep.refusal(crash.value)[0] == "crash"


def test_an_end_without_an_answer_is_a_crash_and_a_long_one_a_timeout():
    rows = {}
    builders = {"ends": lambda: os._exit(3), "sleeps": lambda: time.sleep(60)}
    zoo_sweep.sweep(builders, 2, 3.0, rows.__setitem__)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "ends": "crash", "sleeps": "timeout",
    }  # fmt: skip


def test_the_page_is_of_the_record():
    record = json.loads(zoo_sweep.RECORD.read_text())
    assert zoo_sweep.PAGE.read_text() == zoo_sweep.page(record), "run: python tests/zoo_sweep.py"
    assert "/site-packages/" not in zoo_sweep.RECORD.read_text()


@pytest.mark.slow
def test_the_whole_sweep(tmp_path):
    """Nothing is silently wrong and nothing crashes."""
    assert zoo_sweep.main(["--out", str(tmp_path / "zoo.json")]) == 0
