"""What all experiments share: runs that resume, records that refuse others' settings, reports made of the records."""

import json
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

from htv.experiments import NAMES, records, report
from htv.experiments.experiment import Experiment, Finding, Records, Summary, Table, load, spread
from htv.experiments.run import run


@dataclass(frozen=True)
class Settings:
    factor: int = 2
    names: tuple[str, ...] = ("a", "b")


class Interrupted(Exception):
    pass


def experiment(calls, fail_at=None):
    def run_one(settings, variant, seed, data, progress):
        if (variant, seed) == fail_at:
            raise Interrupted
        calls.append((variant, seed))
        progress(0.5, "half")
        return {"value": settings.factor * seed + (variant == "b"), "bad": float("nan"), "curve": [1.0, 2.0]}

    def summarise(found):
        rows = [[variant, f"{found.mean(variant, 'value'):.2f}"] for variant in found.variants]
        return Summary([Table(["variant", "value"], rows)], [Finding("b is above a", "it is", True)])

    def plot(found, figure):
        figure.subplots().plot(found.values("a", "value"))

    return Experiment(
        name="tiny", title="A tiny one", paper="Nobody 2020", full=Settings(), quick=Settings(factor=3),
        variants=lambda settings: settings.names, run_one=run_one, summarise=summarise, plot=plot, seeds=2,
    )  # fmt: skip


def go(tmp_path, chosen, quick=False, seeds=None):
    return run(chosen, quick, seeds, None, tmp_path, 1, Console(quiet=True))


def test_runs_are_kept_and_reported(tmp_path):
    calls = []
    record = go(tmp_path, experiment(calls))
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.jsonl", "tiny.md", "tiny.png"]
    assert json.loads((tmp_path / "tiny.json").read_text()) == record
    assert record["seeds"] == 2 and record["settings"] == {"factor": 2, "names": ["a", "b"]}
    assert [r["result"]["value"] for r in record["records"]] == [0, 1, 2, 3]
    assert record["records"][0]["result"]["bad"] is None  # JSON has no NaN
    assert record["machine"]["cpu"] and record["date"]
    text = (tmp_path / "tiny.md").read_text()
    assert "| a | 1.00 |" in text and "| b is above a | it is | yes |" in text
    assert "![A tiny one](tiny.png)" in text
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_experiment_goes_on(tmp_path):
    calls = []
    with pytest.raises(Interrupted):
        go(tmp_path, experiment(calls, fail_at=("a", 1)))
    assert len(calls) == 2
    record = go(tmp_path, experiment(calls))
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and len(record["records"]) == 4
    go(tmp_path, experiment(calls), seeds=3)
    assert calls[4:] == [("a", 2), ("b", 2)]
    assert go(tmp_path, experiment(calls), seeds=1)["seeds"] == 1 and len(calls) == 6


def test_other_settings_are_refused(tmp_path):
    go(tmp_path, experiment([]))
    with pytest.raises(records.RecordsError, match=r"settings.factor was 2, now 3.*--out"):
        go(tmp_path, experiment([]), quick=True)
    with pytest.raises(records.RecordsError, match=r"settings.names was \['a', 'b'\], now \['a'\]"):
        go(tmp_path, replace(experiment([]), full=Settings(names=("a",))))


def test_a_line_cut_off_is_run_again_and_a_damaged_one_named(tmp_path):
    calls = []
    go(tmp_path, experiment(calls))
    path = tmp_path / "tiny.jsonl"
    path.write_text(path.read_text()[:-9])
    record = go(tmp_path, experiment(calls))
    assert calls[4:] == [("b", 1)] and len(record["records"]) == 4
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "{damaged", *lines[3:]]) + "\n")
    with pytest.raises(records.RecordsError, match=r"line 3 of .*tiny.jsonl is damaged"):
        go(tmp_path, experiment(calls))


def test_numbers_over_seeds():
    found = Records(None, [{"variant": "a", "seed": s, "seconds": 1, "result": {"x": x}} for s, x in enumerate((1, 3))])
    assert found.variants == ["a"] and found.values("a", "x") == [1, 3] and found.mean("a", "x") == 2
    assert spread([0.5]) == "50.0%" and spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert spread([0.5, float("nan")], ".1f") == "nan"
    lost = Records(None, [{"variant": "a", "seed": 0, "seconds": 1, "result": {"x": None}}])
    assert str(lost.mean("a", "x")) == "nan"


def test_the_report_is_made_of_the_record_alone(tmp_path):
    record = go(tmp_path, experiment([]))
    assert (
        report.markdown(json.loads((tmp_path / "tiny.json").read_text()), "tiny.png")
        == (tmp_path / "tiny.md").read_text()
    )
    disagreeing = {**record, "findings": [{"claim": "c", "here": "h", "agrees": False}]}
    assert "| c | h | **no** |" in report.markdown(disagreeing, "p")


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_whole(name):
    chosen = load(name)
    assert chosen.name == name and chosen.paper and chosen.title
    for settings in (chosen.full, chosen.quick):
        names = list(chosen.variants(settings))
        assert len(set(names)) == len(names) >= 1
        assert all("|" not in variant for variant in names)  # they become cells of Markdown tables


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="unknown experiment 'nope'; choose from linear"):
        load("nope")
