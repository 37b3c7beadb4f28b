"""The steps of bench/gpu.sh, one after another within a deadline; by Python's library alone, for
torch may be broken.

Every step is a process of its own with a time limit, and writes what it has found so far to a file:
a crash, a hang or a kill costs what comes later in that step, never another step. The record is
written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds that a step may take beyond what it was told
REPORTING = 15.0  # seconds kept for the report
MINUTES, DRY_MINUTES = 8.5, 60.0  # for everything, by the `Clock`
SLACK = 20.0  # seconds by the wall that pass for one of the processors in a dry run; see `Clock`
LOOK = 0.5  # seconds between two looks at a process of a dry run


@dataclass(frozen=True)
class Step:
    """A file beside this one.

    least: seconds that earlier steps leave to it; most: those it may take. They are a `Clock`'s.
    """

    name: str
    least: float
    most: float
    dry: float = 600.0  # most in a dry run
    decides: bool = False  # whether its failure is the command's


STEPS = (
    Step("build", 20, 220, decides=True),
    Step("correctness", 60, 170, decides=True),
    Step("sanitizer", 25, 50, decides=True),
    Step("kernels", 50, 90),
    Step("training", 110, 230),
)


class Clock:
    """Seconds since it was made: by the wall, for a GPU is lent by the minute.

    In a dry run: of the processors, by a process and all it started, so that nothing depends on
                  what
    else the machine does; as a last resort, for what sleeps for ever, those by the wall over SLACK.
    process: whose seconds count in a dry run; default: this one.
    """

    def __init__(self, dry: bool, process: int | None = None):
        self._dry, self._process, self._most = dry, process or os.getpid(), 0.0
        self._begin = time.monotonic()
        self._before = processor_seconds(self._process) if dry else 0.0

    def spent(self) -> float:
        wall = time.monotonic() - self._begin
        if not self._dry:
            return wall
        # what nobody waited for is forgotten when it ends, but not here
        self._most = max(self._most, processor_seconds(self._process) - self._before, wall / SLACK)
        return self._most


def processor_seconds(process: int) -> float:
    """What a process and all it started have used of processors; 0 where there is no /proc."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # a name may hold blanks
        except OSError:  # it has ended
            continue
        own = int(path.parent.name)
        parents[own] = int(fields[1])
        used[own] = sum(map(int, fields[11:15]))  # its own time, and that of children it waited for
    found, more = set(), {process} & used.keys()
    while more:
        found |= more
        more = {own for own, parent in parents.items() if parent in more} - found
    return sum(used[own] for own in found) / os.sysconf("SC_CLK_TCK") if found else 0.0


def wait(child: subprocess.Popen, seconds: float, dry: bool) -> int:
    """Its status; raises subprocess.TimeoutExpired where a `Clock` says so."""
    clock = Clock(dry, child.pid)
    while (left := seconds - clock.spent()) > 0:
        try:
            return child.wait(timeout=min(left, LOOK) if dry else left)
        except subprocess.TimeoutExpired:
            continue
    raise subprocess.TimeoutExpired(child.args, seconds)


def main() -> int:
    options = parsed()
    out = Path(
        os.environ.get("OUT")
        or options.out
        or ROOT / ("bench-results" if options.dry else "bench/results")
    )
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["bench/gpu.sh", *sys.argv[1:]]),
        "dry": options.dry,
        "date": now(),
        "steps": {},
    }
    clock = Clock(options.dry)
    minutes = options.minutes or (DRY_MINUTES if options.dry else MINUTES)
    with tempfile.TemporaryDirectory() as scratch:
        for index, step in enumerate(STEPS):
            if options.only and step.name not in options.only:
                record["steps"][step.name] = {"status": "left out"}
                continue
            later = sum(
                s.least for s in STEPS[index + 1 :] if not options.only or s.name in options.only
            )
            left = 60 * minutes - clock.spent() - later - REPORTING
            seconds = min(step.dry if options.dry else step.most, left)
            if seconds < min(step.least, 10):
                outcome, found = {"status": "dropped", "error": "no time was left"}, {}
            else:
                outcome, found = run(step, seconds, options.dry, Path(scratch), scratch_log(out))
            record["steps"][step.name] = outcome
            record |= found | {
                "workloads": record.get("workloads", {}) | found.get("workloads", {})
            }
            say(step.name, outcome, found)
            write(record, out)
        logged(out, record)
    report = [sys.executable, "-m", "htv.bench.gpu.report", str(out / f"{stem(record)}.json")]
    patience = 60 * SLACK if options.dry else 60
    try:
        subprocess.run(report, cwd=ROOT, env=environment(), check=False, timeout=patience)
    except subprocess.TimeoutExpired:
        print(f"the report took too long; the record is there: {' '.join(report)}")
    return 0 if succeeded(record) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description="Build, check and measure on a GPU; write a record."
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="no GPU: tiny sizes, emulator and interpreter; no number counts",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"within which it ends (default: {MINUTES}; dry: {DRY_MINUTES:.0f}, of processor "
        "time)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in STEPS], help="these steps alone"
    )
    parser.add_argument("--out", help="folder for the record, unless OUT names one")
    return parser.parse_args()


def run(step: Step, seconds: float, dry: bool, scratch: Path, log: Path) -> tuple[dict, dict]:
    """How it ended, and what it found, a part of the record."""
    result = scratch / f"{step.name}.json"
    arguments = [str(result), f"{seconds:.0f}", *["--dry"] * dry]
    begin = time.monotonic()
    with log.open("a") as words:
        words.write(f"\n==== {step.name} ====\n")
        words.flush()
        start = words.tell()
        # a session of its own, so that whatever it started ends with it
        child = subprocess.Popen(
            [sys.executable, *program(step), *arguments], stdin=subprocess.DEVNULL, stdout=words,
            stderr=words, cwd=ROOT, env=environment(dry), start_new_session=True,
        )  # fmt: skip
        try:
            status, error = wait(child, seconds + GRACE, dry), None
        except subprocess.TimeoutExpired:
            status, error = None, f"ended after {seconds + GRACE:.0f} s"
        finally:
            end(child)
    outcome = {"status": "done", "seconds": round(time.monotonic() - begin, 1)}
    if status != 0:
        outcome |= {
            "status": "failed",
            "error": error or f"status {status}: {last_line(log, start)}",
        }
    found = json.loads(result.read_text()) if result.is_file() else {}
    if found.get("skipped"):
        outcome |= {"status": "skipped", "error": found.pop("skipped")}
    return outcome, found


def program(step: Step) -> list[str]:
    """The first as a script: a module of htv would load the library that it is to replace."""
    return ["bench/gpu/build.py"] if step.name == "build" else ["-m", f"htv.bench.gpu.{step.name}"]


def end(child: subprocess.Popen) -> None:
    """With everything it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def environment(dry: bool = False) -> dict[str, str]:
    paths = [
        ROOT,
        ROOT / "tests",
        ROOT / "tests" / "triton_kernels",
        os.environ.get("PYTHONPATH", ""),
    ]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
        "PYTHONUNBUFFERED": "1",
    }
    found.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # several processes compile at once
    if dry:
        found |= {"TRITON_INTERPRET": "1", "HTV_TUNED": "", "CUDA_VISIBLE_DEVICES": ""}
        found["OMP_NUM_THREADS"] = "1"  # threads that wait for each other take processor time
    return found


def last_line(log: Path, start: int) -> str:
    with log.open() as words:
        words.seek(start)
        lines = [line.strip() for line in words.read()[-4000:].splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


# ---- the record ----


def stem(record: dict) -> str:
    """gpu-h200 for an "NVIDIA H200"."""
    name = "dry" if record["dry"] else record.get("gpu", {}).get("name", "unknown")
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def write(record: dict, out: Path) -> None:
    """At once, or not at all; as `htv.files` does, which cannot be imported here."""
    path = out / f"{stem(record)}.json"
    with path.with_suffix(".part").open("w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)
    if stem(record) != "gpu-unknown":
        (out / "gpu-unknown.json").unlink(missing_ok=True)


def scratch_log(out: Path) -> Path:
    return out / f"gpu-{os.getpid()}.log"


def logged(out: Path, record: dict) -> None:
    if scratch_log(out).is_file():
        scratch_log(out).replace(out / f"{stem(record)}.log")


def succeeded(record: dict) -> bool:
    """Whether every step that decides was done and found nothing wrong; targets decide nothing."""
    asked = [
        step
        for step in STEPS
        if step.decides and record["steps"].get(step.name, {}).get("status") != "left out"
    ]
    ended = all(
        record["steps"].get(step.name, {}).get("status") in ("done", "skipped") for step in asked
    )
    wrong = record.get("correctness", {}).get("wrong") or record.get("sanitizer", {}).get("wrong")
    return ended and not wrong


def say(name: str, outcome: dict, found: dict) -> None:
    """A line or a few: a machine may keep no more than the end of what was printed."""
    seconds = f"{outcome['seconds']:6.1f} s" if "seconds" in outcome else " " * 8
    print(
        f"{name:12} {seconds}  {outcome['status']}"
        + (f": {outcome['error']}" if "error" in outcome else ""),
        flush=True,
    )
    part = found.get(name, {})
    if "counts" in part:
        print(
            " " * 23 + ", ".join(f"{number} {what}" for what, number in part["counts"].items()),
            flush=True,
        )
    for case, error in list(part.get("wrong", {}).items())[:10]:
        print(f"{'':23}{case}: {error[:200]}", flush=True)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
