"""bench/bars.py: ratios of two times of one process, with bars."""

import json

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from htv.bench import bars
from htv.tools import env_info

pytest.importorskip("htv._host")
NAME = "Intel(R) Xeon(R) Processor @ 2.80GHz"


def test_levels_are_those_of_this_machine_and_stay_forced_inside_a_block_alone(monkeypatch):
    monkeypatch.delenv(bars.FORCED, raising=False)
    present, best = bars.levels(), env_info.cpu_capability()
    assert present[0] == "baseline" and present[-1] == best
    with bars.at_level("baseline"):
        assert env_info.cpu_capability() == "baseline"
    assert env_info.cpu_capability() == best


def test_every_level_is_compared_with_the_one_below_and_the_best_with_torch():
    present = bars.levels()
    for number, level in enumerate(present):
        names = [bar.what for bar in bars.bars(level)]
        assert any("torch.matmul" in name for name in names) == (level == present[-1])
        below = bars.LEVELS[bars.LEVELS.index(level) - 1]
        assert any(name.endswith(f"the same at {below}") for name in names) == (number > 0)


def test_both_sides_of_the_sum_compute_the_same():
    (sums,) = [bar for bar in bars.bars(bars.levels()[-1]) if bar.what.startswith("sum")]
    torch.testing.assert_close(sums.measured()[0], sums.compared(), rtol=1e-4, atol=1e-3)


@pytest.fixture
def command(monkeypatch):
    """The command, whose one bar is of two steps that take as long."""
    slow = lambda: sum(range(20_000))
    monkeypatch.setattr(bars, "bars", lambda level: [bars.Bar("one / two", 0.1, slow, slow)])
    app = Typer()
    app.command()(bars.main)
    return lambda *given: CliRunner().invoke(app, ["--seconds", "0", *given])


def test_a_file_for_each_level_and_what_was_missed(command, tmp_path, monkeypatch):
    monkeypatch.setattr(env_info, "cpu_name", lambda: NAME)
    done = command("--all-levels", "--out", str(tmp_path))
    assert done.exit_code == 0 and "(missed)" in done.output, done.output
    files = {f"bars-intel-xeon-2.80ghz-{level}.json" for level in bars.levels()}
    assert {path.name for path in tmp_path.iterdir()} == files
    record = json.loads((tmp_path / sorted(files)[0]).read_text())
    (row,) = record["bars"]
    assert row["met"] is False and 0.1 < row["ratio"] == row["ms"] / row["compared_ms"]


@pytest.mark.parametrize("within, status", [("2", 1), ("1000", 0), ("0", 0)])
def test_far_above_a_bar_fails_if_asked(command, within, status):
    assert command("--within", within).exit_code == status
