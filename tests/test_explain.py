"""htv.explain agrees with what really serves."""

import pytest
import torch
from torch import nn

import htv
from htv.bench.models import whole_models
from support.layer_table import LAYERS, Lora, Module, Tied


@pytest.mark.parametrize("name", whole_models())
def test_the_answer_by_class_agrees_with_a_run(name):
    model, batch = whole_models()[name]()
    by_class, by_run = htv.explain(model), htv.explain(model, batch)
    assert not by_run.unsupported and not by_class.unsupported
    assert [row.parameter for row in by_run.rows] == [n for n, _ in model.named_parameters()]
    for guess, seen in zip(by_class.rows, by_run.rows, strict=True):
        if (
            guess.use != "own forward" and guess.parameter != "positions.weight"
        ):  # looked up by torch.arange
            assert_alike(guess, seen)


def assert_alike(guess, seen):
    """By class and by run; how convolutions are served depends on sizes no class tells."""
    assert (guess.parameter, guess.shape, guess.use) == (seen.parameter, seen.shape, seen.use)
    if not guess.use.startswith("conv") and "computed" not in guess.use:
        assert (guess.streaming, guess.order) == (seen.streaming, seen.order)


def test_tied_weights_and_positions():
    model, batch = whole_models()["language model"]()
    rows = {row.parameter: row for row in htv.explain(model, batch).rows}
    assert rows["tokens.weight"].use == "embedding + linear"
    assert rows["positions.weight"].use == "elementwise"


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_served_as_it_is_explained(layer):
    model, batch = LAYERS[layer]()
    by_class, by_run = htv.explain(model), htv.explain(model, batch)
    assert not by_run.unsupported
    assert all(
        row.use != "-" and row.streaming and row.order
        for row in by_run.rows
        if "frozen" not in row.streaming
    )
    for guess, seen in zip(by_class.rows, by_run.rows, strict=True):
        assert not guess.streaming.startswith("unsupported")
        # What a module of one's own does with others (a second use, a chunk of their weights) no
        # class tells.
        if (
            guess.use != "own forward"
            and type(model) not in (Module, Tied, Lora)
            and "frozen" not in seen.streaming
        ):
            assert_alike(guess, seen)


LIKE_ITS_CLASS = {
    nn.MultiheadAttention: lambda: (
        nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True),
        3,
    ),
    nn.LSTM: lambda: (nn.LSTM(6, 4, batch_first=True, proj_size=2), 1),
    nn.Bilinear: lambda: (nn.Bilinear(6, 6, 2), 2),
}


@pytest.mark.parametrize("kind", LIKE_ITS_CLASS)
def test_modules_in_a_model_of_ones_own(kind):
    layer, inputs = LIKE_ITS_CLASS[kind]()
    model = Module(lambda m, x: m.layer(*[x] * inputs), layer=layer)
    rows = {row.parameter: row for row in htv.explain(model, torch.randn(3, 4, 6)).rows}
    uses = {row.parameter: row.use for row in htv.explain(model).rows}
    assert uses == {name: row.use for name, row in rows.items()}
    if kind is nn.MultiheadAttention:
        assert uses["layer.bias_k"] == "elementwise" and uses["layer.in_proj_bias"] == "linear bias"
    if kind is nn.Bilinear:
        assert uses == {"layer.weight": "bilinear", "layer.bias": "bilinear bias"}


def test_computed_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    for explanation, path in (
        (htv.explain(model), "by group; views: fused (cpp)"),
        (htv.explain(model, torch.randn(5, 4)), "by group"),
    ):
        rows = {row.parameter: row for row in explanation.rows}
        assert rows["0.bias"].use == "linear bias"
        for number in (0, 1):
            row = rows[f"0.parametrizations.weight.original{number}"]
            assert row.use == "linear (computed)" and row.streaming in (
                path,
                path.replace("fused", "sliced"),
            )


def test_unsupported_modules_are_listed_with_the_reason():
    bag = nn.EmbeddingBag(4, 4, max_norm=1.0)
    model = nn.ModuleList([nn.Linear(4, 4), bag, nn.BatchNorm1d(4)])
    explanation = htv.explain(model)
    assert explanation.unsupported == ("1.weight", "2.weight", "2.bias")
    assert "max_norm" in str(explanation) and "BatchNorm in train mode" in str(explanation)
    model = Module(lambda m, x: torch.cdist(m.l(x), m.w), l=nn.Linear(4, 4), w=torch.randn(2, 4))
    explanation = htv.explain(model, torch.randn(3, 4))
    assert explanation.unsupported == ("w",)
    assert "used by cdist" in str(explanation)
    model(torch.randn(3, 4)).sum().backward()  # nothing stays attached


def test_the_extra_work_is_estimated():
    """E updates of a coordinate against 2 R operations of its product; ranking takes more."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    before = [p.grad for p in model.parameters()]
    rows = {row.parameter: row for row in htv.explain(model, torch.randn(7, 50, 6)).rows}
    assert rows["0.bias"].extra == (None, None)
    streaming, order = rows["0.weight"].extra
    if rows["0.weight"].streaming.startswith("fused"):
        assert streaming == pytest.approx(7 / (2 * 7 * 50))
        assert rows["0.weight"].streaming + " +1%" in str(htv.explain(model, torch.randn(7, 50, 6)))
    assert order > streaming > 0
    few = {row.parameter: row for row in htv.explain(model, torch.randn(7, 2, 6)).rows}
    assert few["0.weight"].extra[1] > order
    assert [p.grad for p in model.parameters()] == before


def test_prints_one_line_per_parameter():
    model, _ = whole_models()["mlp"]()
    lines = str(htv.explain(model)).splitlines()
    assert len(lines) == 1 + len(list(model.parameters()))
    assert lines[0].split() == ["parameter", "shape", "use", "streaming", "rules", "order", "rules"]
