"""Experiment (a): the numbers of the paper's figure."""

import json

import pytest
from typer.testing import CliRunner

from htv.cli.commands import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)])


@pytest.mark.slow
def test_the_quick_one_meets_the_paper_and_both_ways_of_running_agree(tmp_path):
    first = invoke("linear", "--quick", "--out", tmp_path / "in-turn")
    assert first.exit_code == 0, first.output
    record = json.loads((tmp_path / "in-turn" / "linear.json").read_text())
    assert len(record["findings"]) == 3 and all(finding["agrees"] for finding in record["findings"])
    assert all(finding["here"] in first.output for finding in record["findings"])
    second = invoke("linear", "--quick", "--jobs", 2, "--out", tmp_path / "side-by-side")
    assert second.exit_code == 0, second.output
    again = json.loads((tmp_path / "side-by-side" / "linear.json").read_text())
    for one, other in zip(record["records"], again["records"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_mistakes_are_named(tmp_path):
    for arguments, message in (
        (["nope"], "unknown experiment 'nope'; choose from linear"),
        (["linear", "--data", tmp_path], "makes its own data"),
        (["linear", "--seeds", "0"], "--seeds"),
        (["linear", "--jobs", "0"], "--jobs"),
        (["linear", "--out", tmp_path / "file"], "is a file; name a folder"),
    ):
        (tmp_path / "file").write_text("")
        result = invoke(*arguments)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
        assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_a_folder_of_other_settings_is_refused(tmp_path):
    (tmp_path / "linear.jsonl").write_text(
        '{"experiment": "linear", "settings": {"steps": 3}, "data": null}\n'
    )
    result = invoke("linear", "--quick", "--out", tmp_path)
    assert result.exit_code == 2 and "settings.steps was 3, now 1000" in " ".join(
        result.output.split()
    )


def test_without_a_name_all_are_listed():
    result = invoke()
    assert result.exit_code == 0 and "linear" in result.output and "one mechanism" in result.output
