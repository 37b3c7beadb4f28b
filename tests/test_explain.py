"""htv.explain agrees with what really serves."""

import pytest
import torch
from torch import nn

import htv
from models import whole_models


@pytest.mark.parametrize("name", whole_models())
def test_the_answer_by_class_agrees_with_a_run(name):
    model, batch = whole_models()[name]()
    by_class, by_run = htv.explain(model), htv.explain(model, batch)
    assert not by_run.unsupported and not by_class.unsupported
    assert [row.parameter for row in by_run.rows] == [n for n, _ in model.named_parameters()]
    for guess, seen in zip(by_class.rows, by_run.rows, strict=True):
        if guess.use != "own forward" and guess.parameter != "positions.weight":  # looked up by torch.arange
            assert guess == seen


def test_tied_weights_and_positions():
    model, batch = whole_models()["language model"]()
    rows = {row.parameter: row for row in htv.explain(model, batch).rows}
    assert rows["tokens.weight"].use == "embedding + linear"
    assert rows["positions.weight"].use == "elementwise"


def test_unsupported_modules_are_listed_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.BatchNorm1d(4))
    assert htv.explain(model).unsupported == ("1.weight", "2.weight", "2.bias")
    model[2].eval()
    explanation = htv.explain(model, torch.randn(3, 4))
    assert explanation.unsupported == ("1.weight",)
    assert "prelu" in str(explanation)
    model(torch.randn(3, 4)).sum().backward()  # nothing stays attached


def test_prints_one_line_per_parameter():
    model, _ = whole_models()["mlp"]()
    lines = str(htv.explain(model)).splitlines()
    assert len(lines) == 1 + len(list(model.parameters()))
    assert lines[0].split() == ["parameter", "shape", "use", "streaming", "rules", "order", "rules"]
