"""Experiments (b) and (c): every method takes part, and conclusions follow from the numbers."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import htv
from htv.cli.commands import app
from htv.experiments import correlation, spirals
from htv.experiments.experiment import Records

TINY = replace(
    spirals.EXPERIMENT.quick, environments=4, per_environment=32, batch=16, epochs=2, width=16
)


def quietly(share, now=""):
    pass


@pytest.mark.parametrize("method", spirals.METHODS)
def test_every_method_trains_from_the_same_start(method):
    problem, first = {}, {}

    def observe(epoch, network, data):
        problem[epoch] = data.x
        first[epoch] = [p.detach().clone() for p in network.parameters()]
        return epoch < 1

    state = torch.get_rng_state()
    spirals.train(TINY, method, 3, observe)
    assert torch.equal(torch.get_rng_state(), state) and sorted(problem) == [0, 1]
    assert any(not torch.equal(a, b) for a, b in zip(first[0], first[1], strict=True))
    assert all(p.isfinite().all() for p in first[1])
    if method != "batch norm":
        begin = {}
        spirals.train(
            TINY,
            "adam",
            3,
            lambda epoch, network, data: begin.update(enumerate(network.parameters())),
        )
        assert all(torch.equal(p, begin[index]) for index, p in enumerate(first[0]))


@pytest.mark.parametrize(
    "method", [name for name in spirals.METHODS if name not in ("adam", "batch norm", "dropout")]
)
def test_every_methods_term_reaches_the_first_layer(method):
    grads = []
    for name in (method, "adam"):
        torch.manual_seed(0)
        trained = spirals.Method(name, TINY, 6)
        x, y = (
            torch.randn(16, 6, generator=torch.Generator().manual_seed(1)),
            torch.arange(16.0) % 2,
        )
        trained.loss(x, y, torch.arange(16) // 4).backward()
        grads.append(next(trained.network.parameters()).grad)
    assert not torch.allclose(*grads, rtol=1e-5, atol=1e-9)


def records(settings, results):
    runs = [
        {"variant": v, "seed": 0, "seconds": 1.0, "result": result} for v, result in results.items()
    ]
    return Records(settings, runs)


def test_conclusions_about_spirals():
    good = {"and-mask": {"train": 1.0, "test": 0.99}, "adam": {"train": 1.0, "test": 0.52}}
    judged = lambda results: [f.agrees for f in spirals.summarise(records(TINY, results)).findings]
    assert judged(good) == [True, True, True]
    assert judged({**good, "and-mask": {"train": 0.6, "test": 0.6}}) == [False, True, True]
    assert judged({**good, "irm": {"train": 0.7, "test": 0.8}}) == [True, False, False]


def test_correlations_of_a_network_that_knows_neither():
    settings = correlation.Settings(TINY, taus=(0.0, 0.5, 1.0))
    found = correlation.run_one(settings, "untrained", 0, None, quietly)
    assert (
        found["epoch"] == 0
        and found["and-mask left"][0] == 1.0
        and found["xor-mask left"][0] == 0.0
    )
    for at in range(3):
        assert found["and-mask left"][at] + found["xor-mask left"][at] == pytest.approx(
            1.0, abs=1e-6
        )
    again = correlation.run_one(settings, "untrained", 0, None, quietly)
    assert str(again) == str(found)  # NaN where nothing is left


def test_gradients_of_environments():
    torch.manual_seed(0)
    network = spirals.Network(5, 8).double()
    x, y = torch.randn(3, 6, 5).double(), torch.randint(0, 2, (3, 6)).double()
    each = []
    for e in range(3):
        loss = spirals.each_loss(network(x[e]), y[e]).mean()
        each.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        )
    for rule, stacked in ((htv.AndMask(1.0), htv.and_mask), (htv.XorMask(1.0), htv.xor_mask)):
        wanted = stacked(torch.stack(each), 1.0)
        torch.testing.assert_close(correlation.gradient(network, x, y, rule), wanted)
    assert correlation.correlation(wanted, 3 * wanted + 1) == pytest.approx(1.0)


def test_conclusions_about_correlations():
    settings = correlation.Settings(TINY, taus=(0.0, 1.0))
    keys = [f"{mask} {name}" for mask in correlation.RULES for name in ("mechanism", "shortcut")]
    curves = dict(zip(keys, ([0.4, 0.9], [0.9, 0.1], [None, 0.3], [None, 0.9]), strict=True))
    point = {"epoch": 3, "test": 0.6, **curves}
    summary = correlation.summarise(records(settings, {"untrained": point, "learning": point}))
    assert [finding.agrees for finding in summary.findings] == [True, True, True]
    assert summary.tables[0].rows[1] == ["mechanism", "xor-mask", "-", "0.30"]
    flat = {**point, "and-mask mechanism": [0.4, 0.4], "xor-mask mechanism": [None, 0.5]}
    summary = correlation.summarise(records(settings, {"untrained": point, "learning": flat}))
    assert [finding.agrees for finding in summary.findings] == [False, True, False]


@pytest.mark.parametrize("name", ["spirals", "correlation"])
def test_from_the_command_line(name, tmp_path, monkeypatch):
    module = {"spirals": spirals, "correlation": correlation}[name]
    tiny = TINY if name == "spirals" else correlation.Settings(TINY, taus=(0.0, 1.0))
    monkeypatch.setattr(module, "EXPERIMENT", replace(module.EXPERIMENT, quick=tiny))
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(record["findings"]) == 3 and (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_quick_spirals_show_the_papers_shape(tmp_path):
    result = CliRunner().invoke(app, ["experiment", "spirals", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "spirals.json").read_text())
    assert all(finding["agrees"] for finding in record["findings"]), record["findings"]
