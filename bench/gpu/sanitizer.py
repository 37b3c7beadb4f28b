"""Step 3: compute-sanitizer on one small call per CUDA kernel: memory accesses, then races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from htv.bench.gpu import step

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the status by which the tool says that it found something
OURS = "kns=htv"  # kernels with this in their names: torch's own are not looked at


def sanitize(job: step.Job) -> None:
    """Saves {"sanitizer": counts, wrong}; both tools run at once."""
    reason = "a dry run: the emulator's own checks stand for it" if job.dry else why_not()
    if reason:
        calls = run_all(job.dry) if job.dry else {}
        wrong = {name: error for name, error in calls.items() if error}
        job.save(
            {"skipped": reason, "sanitizer": {"dry": job.dry, "calls": list(calls), "wrong": wrong}}
        )
        return
    running = {tool: start(tool) for tool in TOOLS}
    wrong, counts = {}, {}
    for tool, process in running.items():
        try:
            words, _ = process.communicate(timeout=max(1.0, job.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            words, _ = process.communicate()
            counts[f"{tool}: out of time"] = 1
        print(words)
        done = re.findall(r"^called: (.*)$", words, re.MULTILINE)
        counts[f"calls under {tool}"] = len(done)
        summary = re.findall(r"={9} ((?:ERROR|RACECHECK) SUMMARY: .*)", words)
        if process.returncode == FOUND:
            wrong[tool] = summary[-1] if summary else "found errors: see the log"
        elif failed := re.findall(r"^wrong: (.*)$", words, re.MULTILINE):
            wrong[tool] = "; ".join(failed)[:500]
        elif process.returncode != 0 and f"{tool}: out of time" not in counts:
            lines = [line for line in words.splitlines() if line.strip()] or ["it said nothing"]
            counts[f"{tool} did not run: {lines[-1][:200]}"] = 1
    job.save({"sanitizer": {"dry": False, "counts": counts, "wrong": wrong}})


def why_not() -> str | None:
    return None if tool_path() else "compute-sanitizer is not installed"


def tool_path() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )


def start(tool: str) -> subprocess.Popen:
    command = [tool_path(), "--tool", tool, "--kernel-name", OURS, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "htv.bench.gpu.sanitizer", "--call"]
    # every tensor in memory of its own: an address beyond it is then nobody's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def run_all(dry: bool) -> dict[str, str | None]:
    """Every kernel's call -> what is wrong with it, or None."""
    from device_suite import ops

    found = {}
    for name in ops.KERNELS:
        try:
            ops.kernel_call(name, dry)
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        print(
            f"called: {name}" if found[name] is None else f"wrong: {name}: {found[name]}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--call"]:
        sys.exit(1 if any(run_all(dry=False).values()) else 0)
    step.main(sanitize)
