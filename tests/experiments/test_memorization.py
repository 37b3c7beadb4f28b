"""Experiments on memorisation and groups: what they conclude from made-up records, and each of
them, quickly.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from htv.cli.commands import app
from htv.data import digits
from htv.experiments import worst_group
from htv.experiments.experiment import load
from support.findings import agreement

NAMES = ["mat-toy", "good-bad-ugly", "worst-group", "memorisation-scores"]


def test_the_toy_is_judged_by_its_numbers():
    def results(pure=1.0, plain=0.15, mat=0.9, flipped=1.0, shift=-2.3, early=0.0):
        curve = [[0, 0.5, 0.5], [50, 1.0, early], [200, 1.0, 0.7], [1000, 1.0, 1.0]]
        found = {"ERM, no noise": {"minority": pure}, "ERM": {"minority": plain}}
        for temperature in ("0.001", "0.01", "0.1", "1"):
            found[f"MAT, T = {temperature}"] = {"minority": mat, "minority_flipped": flipped,
                                                "majority_flipped": 0.0, "minority_shift": shift,
                                                "majority_shift": -0.1}  # fmt: skip
        return {
            variant: {"majority": 0.98, "curve": curve, **result}
            for variant, result in found.items()
        }

    assert agreement("mat-toy", results()) == [True] * 9
    assert agreement("mat-toy", results(0.9, 0.3, 0.7, 0.5, -1.0, 0.3)) == [False] * 9


def test_good_bad_and_ugly_are_judged_by_their_numbers():
    def results(good, bad, ugly, loss=9e-7):
        errors = {"good": good, "bad": bad, "ugly": ugly}
        return {v: {"loss": loss, "steps": 100, "error": error} for v, error in errors.items()}

    assert agreement("good-bad-ugly", results(0.002, 0.02, 0.007)) == [True] * 4
    assert agreement("good-bad-ugly", results(0.008, 0.006, 0.007, 1e-4)) == [False] * 4


def test_worst_groups_are_judged_by_their_numbers():
    def results(found=1.0, taken=0.0, **worst):
        common = {"worst_average": 0.9, "average_worst": 0.5, "last_worst": 0.5, "train": 1.0}
        values = {
            variant: worst.get(variant.split()[0].strip(","), 0.8)
            for variant in worst_group.METHODS
        }
        values |= {"XRM + GroupDRO": worst["XRM"], "oracle GroupDRO": worst["oracle"]}
        return {variant: {**common, "worst_worst": value, "minority_found": found,
                          "majority_taken": taken}
                for variant, value in values.items()}  # fmt: skip

    assert (
        agreement("worst-group", results(ERM=0.5, MAT=0.8, JTT=0.7, XRM=0.82, oracle=0.83))
        == [True] * 5
    )
    worse = results(0.5, 0.3, ERM=0.5, MAT=0.5, JTT=0.4, XRM=0.7, oracle=0.8)
    assert agreement("worst-group", worse) == [False] * 5


def test_memorisation_scores_are_judged_by_their_numbers():
    def results(memorised, pairs, right, wrong, correlation, norms):
        common = {"memorised": memorised, "pairs": 10, "pairs_memorised": pairs, "right": right,
                  "wrong": wrong, "correlation": correlation, "best_epoch": 4}  # fmt: skip
        return {
            "labels as given": common,
            "10% wrong labels": {**common, "found_by_scores": 0.98, "found_by_norms": norms},
        }

    assert agreement("memorisation-scores", results(0.05, 8, 0.1, 0.9, 0.7, 0.97)) == [True] * 6
    assert agreement("memorisation-scores", results(0.0, 2, 0.3, 0.3, 0.2, 0.6)) == [False] * 6


def grouped_problem():
    settings = replace(load("worst-group").quick, images=150, epochs=1, draw_epochs=1, jtt_epochs=1)
    return settings, digits()


def test_each_method_trains_on_what_it_is_told(monkeypatch):
    settings, data = grouped_problem()
    train = worst_group.problem(settings, data, 0).train
    inferred = torch.arange(len(train)) % 4
    draw = SimpleNamespace(
        held_out=torch.randn(len(train), 2), targets=train.y, groups=lambda: inferred
    )
    monkeypatch.setattr(worst_group, "held_out", lambda *arguments: draw)
    plain = worst_group.correct(
        worst_group.Training(settings, worst_group.Method(), data, 0).new_network(), train
    )
    assert plain.dtype == torch.bool
    losses, x = {}, torch.arange(8)
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for name, method in worst_group.METHODS.items():
        training = worst_group.Training(settings, method, data, 0)
        groups = {"inferred": inferred, "true": train.groups, "none": train.groups}[method.groups]
        assert torch.equal(training.groups, groups)
        losses[name] = training.loss(logits, train.y[x], x).item()
        sampler = training.sampler()
        if method.sampler == "groups":
            shares = torch.bincount(groups[sampler(torch.Generator())], minlength=4) / len(train)
            assert (shares - 0.25).abs().max() < 0.15
        elif method.sampler == "subset":
            drawn = groups[sampler(torch.Generator())]
            assert (torch.bincount(drawn) == torch.bincount(groups).min()).all()
        else:
            assert (sampler is None) == (method.sampler == "shuffled")
        assert (training.rule() is None) == (method.rule == "")
    assert losses["ERM"] == losses["JTT"] == losses["oracle RWG"] == losses["oracle SUBG"]
    assert (
        len(
            {
                losses[name]
                for name in ("ERM", "MAT", "XRM + GroupDRO", "oracle GroupDRO", "oracle IRM")
            }
        )
        == 5
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_quick_ones_run_and_report(name, tmp_path):
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["findings"] and record["tables"]
    assert all(
        finding["here"] in (tmp_path / f"{name}.md").read_text() for finding in record["findings"]
    )
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "mat-toy":
        assert all(finding["agrees"] for finding in record["findings"])
