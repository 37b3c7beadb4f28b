"""bench/gpu.sh: its dry run from end to end, steps and cases that fail, crash or hang, and its
report.
"""

import copy
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from htv.bench.gpu import build, clock, correctness, kernels, report, run, step, training
from htv.bench.gpu.targets import TARGETS
from htv.tools import timing
from support import cuda_emulated

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ceilings", "correctness", "gpu", "machine", "sanitizer", "steps", "workloads")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The record of a dry run, what it printed, and its report."""
    if cuda_emulated.compiler() is not None:
        cuda_emulated.library()  # compiled once, for minutes: not a part of the run
    out = tmp_path_factory.mktemp("out")
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    command = [ROOT / "bench/gpu.sh", "--dry"]
    # It has deadlines of its own.
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    log = (out / "gpu-dry.log").read_text()
    assert done.returncode == 0, done.stdout + log[-10_000:]
    assert {path.name for path in out.iterdir()} == {"gpu-dry.json", "gpu-dry.md", "gpu-dry.log"}
    return (
        json.loads((out / "gpu-dry.json").read_text()),
        done.stdout,
        (out / "gpu-dry.md").read_text(),
    )


@pytest.mark.slow
def test_a_dry_run_is_complete(dry):
    record, printed, _ = dry
    assert record["dry"] is True and set(PARTS) <= set(record)
    assert {name: row["status"] for name, row in record["steps"].items()} == {
        "build": "done", "correctness": "done", "sanitizer": "skipped", "kernels": "done",
        "training": "done",
    }  # fmt: skip
    counts = record["correctness"]["counts"]
    assert counts["failed"] == counts["dropped"] == 0 and counts["passed"] >= 20
    assert len(printed) < 6000 and "dry run" in printed
    if cuda_emulated.compiler() is not None:
        assert record["correctness"]["parts"]["cuda-stacked"]["passed"] > 10
    wanted = {*kernels_named(), *training.workloads(dry=True)}
    assert set(record["workloads"]) == wanted
    for name, workload in record["workloads"].items():
        assert "error" not in workload, name
        assert (
            "ms" in workload["variants"][workload["unit"]]
            and "ms" in workload["variants"]["median"]
        ), name
        assert all("error" in row or row["runs"] >= 1 for row in workload["variants"].values())


def kernels_named():
    return [
        *(w.name for w in kernels.stacked(dry=True)),
        *(make.args[0] for make in kernels.problems(dry=True)),
    ]


@pytest.mark.slow
def test_every_number_of_a_dry_run_is_marked(dry):
    record, _, text = dry
    rows = [
        row for workload in record["workloads"].values() for row in workload["variants"].values()
    ]
    assert all(
        row["dry"] is True
        for row in (*rows, record["ceilings"], record["correctness"], record["sanitizer"])
    )
    assert report.DRY in text and "| met |" not in text and "not met" not in text
    fulfilled = copy.deepcopy(record)
    for row in (
        row for workload in fulfilled["workloads"].values() for row in workload["variants"].values()
    ):
        row |= {"ratio": 0.5, "peak_ratio": 0.5, "of_copy": 1.0}
    assert (
        "met" not in report.targets(fulfilled) and report.targets(fulfilled).count("dry run") >= 15
    )
    assert report.targets(fulfilled | {"dry": False}).count("| met |") == report.targets(
        fulfilled
    ).count("dry run")


def test_targets_are_about_what_is_measured():
    names = {
        workload.name: workload.variants for workload in training.workloads(dry=False).values()
    }
    names |= {name: ("plain", *kernels.RULES) for name in kernels_named()}
    for target in TARGETS:
        assert target.variant in names[target.workload], target


def test_the_report_tells_met_from_not_met():
    rows = {"plain": {"ms": 1.0, "ms_quartiles": [1, 1], "runs": 5, "ratio": 1.0, "of_floor": 0.9},
            "and-mask": {"ms": 1.1, "ms_quartiles": [1, 1], "runs": 5, "ratio": 1.1,
                         "of_floor": 0.8},
            "median": {"ms": 3.0, "ms_quartiles": [3, 3], "runs": 5, "ratio": 3.0,
                       "of_floor": 0.3}}  # fmt: skip
    record = {
        "command": "bench/gpu.sh", "date": "2026-01-02T03:04:05+00:00", "dry": False,
        "gpu": {"name": "NVIDIA H200", "driver_version": "580.1"},
        "steps": {"training": {"status": "dropped"}},
        "workloads": {"weight-gradient": {"kind": "kernel", "dtype": "bf16", "variants": rows}},
    }  # fmt: skip
    text = report.markdown(record)
    assert "| weight-gradient | and-mask | time over plain | <= 1.15 | 1.10 | met |" in text
    assert "| weight-gradient | median | time over plain | <= 2.5 | 3.00 | **not met** |" in text
    assert "| gpt2-small | and-mask | time over plain | <= 1.05 | - | not measured |" in text
    assert "NVIDIA H200" in text and "driver 580.1" in text and run.stem(record) == "gpu-h200"


# ---- the steps of the command ----


def main(monkeypatch, tmp_path, steps, minutes=5.0):
    """The command with other steps, name: program; returns its status and record."""
    programs = {name: textwrap.dedent(program) for name, program in steps.items()}
    decides = ("correctness",)
    monkeypatch.setattr(
        run, "STEPS", tuple(run.Step(n, 1, 3, dry=3, decides=n in decides) for n in programs)
    )
    monkeypatch.setattr(run, "program", lambda step: ["-c", programs[step.name]])
    monkeypatch.setattr(run, "GRACE", 0.0)
    monkeypatch.setattr(run, "REPORTING", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--dry", "--minutes", str(minutes)])
    monkeypatch.setenv("OUT", str(tmp_path))
    status = run.main()
    return status, json.loads((tmp_path / "gpu-dry.json").read_text())


WRITES = "import json, sys; json.dump({found}, open(sys.argv[1], 'w'))"


def test_a_step_that_fails_or_hangs_does_not_end_the_run(monkeypatch, tmp_path):
    lock, survived = tmp_path / "lock", tmp_path / "survived"
    started = f"""
        import fcntl, time
        file = open({str(lock)!r}, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        print(flush=True)
        time.sleep(60)
        open({str(survived)!r}, "w")
    """
    hangs = f"""
        import subprocess, sys
        {WRITES.format(found={"ceilings": {"bytes_per_s": 1.0, "dry": True}})}
        command = [sys.executable, "-c", {textwrap.dedent(started)!r}]
        subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()
        while True:
            pass
    """
    steps = {
        "crashes": "import os; os.abort()",
        "raises": "raise ValueError('what it says')",
        "hangs": hangs,
        "works": WRITES.format(found={"workloads": {"a": {"kind": "none", "variants": {}}}}),
    }
    status, record = main(monkeypatch, tmp_path, steps)
    assert status == 0
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # once what the step started has ended
    assert not survived.exists()
    outcomes = record["steps"]
    assert [outcomes[name]["status"] for name in steps] == ["failed", "failed", "failed", "done"]
    assert (
        "status -6" in outcomes["crashes"]["error"]
        and "what it says" in outcomes["raises"]["error"]
    )
    assert "ended after" in outcomes["hangs"]["error"] and record["ceilings"]["bytes_per_s"] == 1.0
    assert "a" in record["workloads"]


def test_steps_that_no_time_is_left_for_are_dropped(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "REPORTING", 1e6)
    steps = {"one": "", "two": ""}
    programs = tuple(run.Step(n, 20, 30) for n in steps)
    monkeypatch.setattr(run, "STEPS", programs)
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--dry"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert run.main() == 0
    record = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert {row["status"] for row in record["steps"].values()} == {"dropped"}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"correctness": {"wrong": {}}}, 0),
        ({"correctness": {"wrong": {"a/b": "AssertionError"}}}, 1),
        (None, 1),
    ],
    ids=["right", "wrong", "failed"],
)
def test_the_status_is_that_of_correctness(monkeypatch, tmp_path, found, status):
    counted = {"dry": True, "counts": {}, "parts": {}}
    program = (
        WRITES.format(found={"correctness": counted | found["correctness"]})
        if found
        else "raise ValueError"
    )
    assert main(monkeypatch, tmp_path, {"correctness": program})[0] == status


# ---- processes that answer ----


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that a `Child` can run; returns its name."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    )

    def write(text):
        (tmp_path / "answers.py").write_text(textwrap.dedent(text))
        return "answers"

    return write


CASES = """
    import os, pathlib, time
    from htv.bench.gpu import step

    names = ["a/1", "a/crashes", "a/2", "b/hangs", "b/3", "b/wrong"]
    for question, answer in step.questions():
        print("this is no answer")
        if question == "list":
            cases = {p: [n for n in names if n[0] == p] for p in "ab"}
            answer({"cases": cases, "absent": {"c": "no c"}, "errors": {}})
        elif question == "a/crashes":
            os.abort()
        elif question == "b/hangs":
            pathlib.Path(os.environ["HANGS"]).write_text(str(os.getpid()))
            time.sleep(600)
        elif "wrong" in question:
            answer({"status": "failed", "error": "no"})
        else:
            answer({"status": "passed"})
"""


@pytest.fixture
def hang(monkeypatch, tmp_path):
    """Makes time pass when a case begins to hang, for its process and the job, and never else."""
    path = tmp_path / "hangs"

    def lasting(seconds):
        class Clock:
            def __init__(self, dry, process=None):
                self.process, self.before = process, process is None and path.exists()

            def spent(self):
                """A process may hang before its clock is made; the job's clock is made before all
                of them.
                """
                concerned = path.exists() and self.process in (None, int(path.read_text() or 0))
                return seconds if concerned and not self.before else 0.0

        monkeypatch.setattr(run, "Clock", Clock)

    monkeypatch.setenv("HANGS", str(path))
    return lasting


def test_cases_that_crash_or_hang_cost_themselves_alone(module, monkeypatch, tmp_path, hang):
    monkeypatch.setattr(correctness, "MODULE", module(CASES))
    hang(correctness.PATIENCE + 1)
    job = step.Job(tmp_path / "out.json", 3 * correctness.PATIENCE, dry=True)
    correctness.check(job)
    found = json.loads(job.out.read_text())["correctness"]
    assert found["counts"] == {"passed": 3, "failed": 3, "skipped": 1, "dropped": 0}
    assert "crashed" in found["wrong"]["a/crashes"] and "hung" in found["wrong"]["b/hangs"]
    assert found["wrong"]["b/wrong"] == "no" and found["skipped"] == {"c/all": "no c"}


@pytest.mark.slow
def test_cases_that_no_time_is_left_for_are_dropped(module, monkeypatch, tmp_path, hang):
    monkeypatch.setattr(correctness, "MODULE", module(CASES))
    seconds = correctness.PATIENCE / 2
    hang(seconds)
    job = step.Job(tmp_path / "out.json", seconds, dry=True)
    correctness.check(job)
    found = json.loads(job.out.read_text())["correctness"]
    assert "b/hangs" in found["dropped"] and "b/hangs" not in found["wrong"]


def test_every_part_comes_early():
    spread = correctness.spread({"a": [f"a/{n}" for n in range(4)], "b": ["b/0", "b/1"]})
    assert spread == ["a/0", "b/0", "a/1", "a/2", "b/1", "a/3"]


WORKLOADS = """
    import os, sys
    from htv.bench.gpu import step

    class Prepared:
        def __init__(self, name):
            self.name, self.few = name, "--few" in sys.argv
            if name == "refuses":
                raise ValueError("not this one")
            if name == "crashes" and not self.few:
                os.abort()

        def measure(self):
            return {"variants": {"few": self.few}, "more": self.name == "rich"}

        def more(self):
            return {"variants": {"more": True}}

    step.answer_preparations(Prepared)
"""


@pytest.mark.slow
def test_a_lost_process_is_tried_again_with_less(module, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "RETRY", 0.0)
    took = {}
    names = ["works", "crashes", "refuses", "rich"]
    job = step.Job(tmp_path / "out.json", 3600.0, dry=False)
    step.one_by_one(
        job, module(WORKLOADS), names, lambda name, rows: took.setdefault(name, []).append(rows)
    )
    assert took["works"] == [{"variants": {"few": False}}]
    assert took["rich"] == [{"variants": {"few": False}}, {"variants": {"more": True}}]
    assert "crashed" in took["crashes"][0]["error"]
    assert (
        took["crashes"][1]["variants"] == {"few": True} and "crashed" in took["crashes"][1]["error"]
    )
    assert took["refuses"][0]["error"] == "ValueError: not this one"


# ---- what a machine has to have ----


def test_what_is_missing_is_named_with_a_remedy(monkeypatch):
    versions = {"torch": "2.10.1", "triton": "3.6.0"}
    monkeypatch.setattr(build.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setattr(build, "ninja", lambda: None)
    monkeypatch.delenv("HTV_GPU_LIBRARY", raising=False)
    assert (
        "torch 2.10.1 is too old: install torch >= 2.11" in build.missing()
        and "no nvcc" in build.missing()
    )
    assert "no ninja" in build.missing()
    versions["torch"] = "2.11.0+cu130"
    monkeypatch.setenv("HTV_GPU_LIBRARY", "somewhere.so")
    monkeypatch.setattr(build, "capability", lambda: None)
    assert build.missing() == "torch sees no GPU: look at nvidia-smi, or use --dry"
    monkeypatch.setattr(build, "capability", lambda: "90")
    assert build.missing() == ""


def test_a_carried_library_takes_the_place_of_a_build(monkeypatch, tmp_path):
    carried = tmp_path / "carried.so"
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("HTV_GPU_LIBRARY", str(carried))
    assert build.provide(1.0) == f"HTV_GPU_LIBRARY={carried} is no file"
    carried.write_text("code")
    (tmp_path / "htv").mkdir()
    assert build.provide(1.0) is None and (tmp_path / "htv" / "_C.abi3.so").read_text() == "code"


def test_time_by_the_wall(monkeypatch):
    now = [7.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert clock.clock("cpu", alone=True)(lambda: now.__setitem__(0, 9.5)) == 2500.0


# ---- deadlines ----

BURNS = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\ninput()"
STARTS = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURNS.format(0.5)!r}])"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("program", [BURNS.format(0.5), STARTS], ids=["itself", "what it started"])
def test_a_dry_run_counts_processor_time(monkeypatch, program):
    """Of a process and what it started; however long it slept, or waited for a processor."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        clock_ = run.Clock(True, child.pid)
        child.stdout.readline()
        wall = run.time.monotonic()
        monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: wall))
        assert 0.4 <= clock_.spent() < 5
        spent, wall = clock_.spent(), wall + 10
        assert clock_.spent() - spent < 0.4
        wall += 20 * run.SLACK
        assert clock_.spent() >= 20
        child.stdin.close()
    assert run.processor_seconds(child.pid) == 0


def test_a_real_run_counts_seconds_by_the_wall(monkeypatch):
    wall = 5.0
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: wall))
    clock_ = run.Clock(False)
    wall = 12.0
    assert clock_.spent() == 7.0


def test_a_report_that_takes_too_long_ends_nothing(monkeypatch, tmp_path, capsys):
    def slow(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", slow)
    assert main(monkeypatch, tmp_path, {"works": ""})[0] == 0
    assert "the record is there" in capsys.readouterr().out
