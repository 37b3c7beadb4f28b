"""Experiments on memorisation and groups: what they conclude from made-up records, and each of them, quickly."""

import json

import pytest
from typer.testing import CliRunner

from htv.cli import app
from htv.experiments.experiment import Records, load

NAMES = ["mat-toy", "good-bad-ugly"]


def agreement(name: str, results: dict[str, dict]) -> list[bool]:
    experiment = load(name)
    assert set(results) == set(experiment.variants(experiment.full))
    runs = [{"variant": v, "seed": s, "seconds": 1.0, "result": results[v]} for s in range(2) for v in results]
    summary = experiment.summarise(Records(experiment.full, runs))
    assert all(len(row) == len(table.head) for table in summary.tables for row in table.rows)
    return [finding.agrees for finding in summary.findings]


def test_the_toy_is_judged_by_its_numbers():
    def results(pure=1.0, plain=0.15, mat=0.9, flipped=1.0, shift=-2.3, early=0.0):
        curve = [[0, 0.5, 0.5], [50, 1.0, early], [200, 1.0, 0.7], [1000, 1.0, 1.0]]
        found = {"ERM, no noise": {"minority": pure}, "ERM": {"minority": plain}}
        for temperature in ("0.001", "0.01", "0.1", "1"):
            found[f"MAT, T = {temperature}"] = {"minority": mat, "minority_flipped": flipped, "majority_flipped": 0.0,
                                                "minority_shift": shift, "majority_shift": -0.1}  # fmt: skip
        return {variant: {"majority": 0.98, "curve": curve, **result} for variant, result in found.items()}

    assert agreement("mat-toy", results()) == [True] * 9
    assert agreement("mat-toy", results(0.9, 0.3, 0.7, 0.5, -1.0, 0.3)) == [False] * 9


def test_good_bad_and_ugly_are_judged_by_their_numbers():
    def results(good, bad, ugly, loss=9e-7):
        errors = {"good": good, "bad": bad, "ugly": ugly}
        return {v: {"loss": loss, "steps": 100, "error": error} for v, error in errors.items()}

    assert agreement("good-bad-ugly", results(0.002, 0.02, 0.007)) == [True] * 4
    assert agreement("good-bad-ugly", results(0.008, 0.006, 0.007, 1e-4)) == [False] * 4


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_ones_run_and_report(name, tmp_path):
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["findings"] and record["tables"]
    assert all(finding["here"] in (tmp_path / f"{name}.md").read_text() for finding in record["findings"])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "mat-toy":
        assert all(finding["agrees"] for finding in record["findings"])
