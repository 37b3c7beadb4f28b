"""What all experiments share: runs that resume, records that refuse others' settings, reports made
of the records.
"""

import json
import os
import signal
from contextlib import contextmanager
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
        return {
            "value": settings.factor * seed + (variant == "b"),
            "bad": float("nan"),
            "curve": [1.0, 2.0],
        }

    def summarise(found):
        rows = [[variant, f"{found.mean(variant, 'value'):.2f}"] for variant in found.variants]
        return Summary(
            [Table(["variant", "value"], rows)], [Finding("b is above a", "it is", True)]
        )

    def plot(found, figure):
        figure.subplots().plot(found.values("a", "value"))

    return Experiment(
        name="tiny", title="A tiny one", paper="Nobody 2020", full=Settings(),
        quick=Settings(factor=3), variants=lambda settings: settings.names, run_one=run_one,
        summarise=summarise, plot=plot, seeds=2,
    )  # fmt: skip


def go(tmp_path, chosen, quick=False, seeds=None):
    return run(chosen, quick, seeds, None, tmp_path, 1, Console(quiet=True))


def test_runs_are_kept_and_reported(tmp_path):
    calls = []
    record = go(tmp_path, experiment(calls))
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny.json",
        "tiny.jsonl",
        "tiny.md",
        "tiny.png",
    ]
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


def finished(tmp_path, count=20):
    path = tmp_path / "tiny.jsonl"
    store = records.Store(path, {"a": 1})
    for n in range(count):
        store.add(f"v{n}", 0, 1.0, {"x": [n] * 1000})
    return path


@pytest.fixture
def full_disk():
    """Every write beyond byte 0 of a file fails, as where a quota is reached."""
    resource = pytest.importorskip("resource")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def full(after=0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield full
    signal.signal(signal.SIGXFSZ, handler)


def test_a_cut_line_is_dropped_without_writing(tmp_path, full_disk):
    path = finished(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"variant": "v20", "se')
    with full_disk():
        store = records.Store(path, {"a": 1})
    assert path.read_bytes() == whole and ("v19", 0) in store


@pytest.mark.parametrize("room", [0, 100])
def test_a_run_that_does_not_fit_leaves_nothing(tmp_path, full_disk, room):
    path = finished(tmp_path)
    whole = path.read_bytes()
    store = records.Store(path, {"a": 1})
    with full_disk(len(whole) + room), pytest.raises(OSError):
        store.add("v20", 0, 1.0, {"x": [0] * 1000})
    assert path.read_bytes() == whole and ("v20", 0) not in store
    store.add("v20", 0, 1.0, {"x": []})
    assert ("v20", 0) in records.Store(path, {"a": 1})


RUN = b'{"variant": "b", "seed": 0, "seconds": 1.0, "result": {}}\n'
DAMAGED = {
    "not text": lambda raw: b"\xff" + raw,
    "no run": lambda raw: raw + b"{}\n",
    "a number": lambda raw: raw + b"3\n",
    "an empty line": lambda raw: raw + b"\n",
    "nested deeply": lambda raw: raw + b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "a number of many digits": lambda raw: raw + b"9" * 5000 + b"\n",
    "a variant that is a list": lambda raw: raw + RUN.replace(b'"b"', b"[]"),
    "a seed that is a text": lambda raw: raw + RUN.replace(b"0,", b'"0",'),
    "no result": lambda raw: raw + RUN.replace(b"{}", b"null"),
    "seconds that are a flag": lambda raw: raw + RUN.replace(b"1.0", b"true"),
    "nothing in common": lambda raw: b"3\n" + raw,
    "something else": lambda raw: b"a page of mine, without a line's end",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_records_are_named_and_left_alone(tmp_path, name):
    path = finished(tmp_path, 2)
    damaged = DAMAGED[name](path.read_bytes())
    path.write_bytes(damaged + b'{"cut' * (name != "something else"))
    before = path.read_bytes()
    with pytest.raises(records.RecordsError, match="tiny.jsonl") as caught:
        records.Store(path, {"a": 1})
    assert path.read_bytes() == before and "delete the" in str(caught.value)


def test_a_first_line_cut_off_is_written_anew(tmp_path):
    path = finished(tmp_path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:4])
    records.Store(path, {"a": 1})
    assert path.read_bytes() == whole


def test_reports_replace_older_ones_whole(tmp_path, monkeypatch):
    go(tmp_path, experiment([]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    found = Records(None, [{"variant": "a", "seed": 0, "seconds": 1, "result": {"value": 1}}])
    record = json.loads((tmp_path / "tiny.json").read_text()) | {"title": "Another"}
    with pytest.raises(OSError, match="No space"):
        report.save(experiment([]), record, found, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_over_seeds():
    found = Records(
        None,
        [
            {"variant": "a", "seed": s, "seconds": 1, "result": {"x": x}}
            for s, x in enumerate((1, 3))
        ],
    )
    assert (
        found.variants == ["a"] and found.values("a", "x") == [1, 3] and found.mean("a", "x") == 2
    )
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
