"""Steps that take turns, and peak memory."""

from types import SimpleNamespace

import pytest
import torch

from htv.tools import timing


def test_steps_take_turns_and_slow_ones_leave(monkeypatch):
    calls = []
    clock = iter(range(100_000))  # a second per look
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.take_turns(steps, seconds=1, rounds=(5, 100), leave_after={"b": 3.0})
    assert "".join(calls) == 3 * "ab" + 2 * "a"
    assert times == {
        "a": timing.Timing(1000, 1000, 1000, runs=5, least=1000),
        "b": timing.Timing(1000, 1000, 1000, runs=3, least=1000),
    }


def test_as_many_rounds_as_the_time_allows(monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    steps = {"a": lambda: None, "b": lambda: None}
    assert (
        timing.take_turns(steps, seconds=7, rounds=(2, 100))["a"].runs == 4
    )  # two seconds a round
    assert timing.take_turns(steps, seconds=7, rounds=(2, 3))["a"].runs == 3
    assert timing.take_turns(steps, seconds=0, rounds=(2, 100))["a"].runs == 2


def test_median_quartiles_and_minimum():
    assert timing.Timing.of([3.0, 1.0, 2.0, 5.0, 4.0]) == timing.Timing(3.0, 2.0, 4.0, 5, 1.0)
    assert timing.Timing.of([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1, 3.0)


def test_a_process_of_its_own_returns_json_or_its_words(monkeypatch, tmp_path):
    (tmp_path / "answer.py").write_text(
        "import sys\nprint('noise')\nprint('{\"said\": \"' + sys.argv[1] + '\"}')\n"
    )
    (tmp_path / "fails.py").write_text("raise SystemExit('out of beads')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert timing.in_own_process("answer", "yes") == {"said": "yes"}
    with pytest.raises(RuntimeError, match="out of beads"):
        timing.in_own_process("fails")


def test_peak_memory_is_that_of_the_step():
    meter = timing.PeakMeter("cpu")
    block = torch.ones(16 << 20)  # 64 MiB, freed before the end
    del block
    if meter.method == "ru_maxrss":
        pytest.skip("this system cannot reset a process's peak")
    assert 64e6 < meter.grown() < 80e6
