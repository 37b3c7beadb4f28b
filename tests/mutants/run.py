"""Break htv one line at a time and see which test notices: `make test-mutants`.

python tests/mutants/run.py [--only TEXT] [--workers 2] [--out tests/results/mutants.json]

Every mutant of mutants.py runs in a copy of the tree. Exits with 1 if one survives, or breaks the
import; with 2 if a line is not there exactly once, or the tests fail unmutated.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from mutants import MUTANTS, TESTS  # noqa: E402

from htv.tools.env_info import stamp  # noqa: E402

COPIED = ["htv", "tests", "pyproject.toml"]
LIMIT = 240  # seconds: a mutant that never ends is noticed as well


def mutated(text: str, line: str, by: str) -> str | None:
    """The text with its only such line replaced; None if there is not exactly one."""
    lines = text.split("\n")
    found = [i for i, candidate in enumerate(lines) if candidate.strip() == line]
    if len(found) != 1:
        return None
    (at,) = found
    indentation = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "\n".join([*lines[:at], indentation + by, *lines[at + 1 :]])


def copy_of_tree(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy2(source, folder / name)
    return folder


def run(tree: Path, tests: list[str]) -> tuple[str, str]:
    """("passed", ""), ("failed", the first test that did) or ("broken", what was printed last)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a cached file may be as old as the line that replaces it
        "OMP_NUM_THREADS": "1",
    }
    try:
        printed = {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=tree, env=environment, timeout=LIMIT, **printed)
    except subprocess.TimeoutExpired:
        return "failed", f"none in {LIMIT} s"
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode == 0:
        return "passed", ""
    failed = [line.split()[1] for line in lines if line.startswith("FAILED ")]
    if done.returncode == 1 and failed:
        return "failed", failed[0]
    return "broken", next((line for line in reversed(lines) if line.startswith("E ")), lines[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="mutants whose file, line or reason has this text; writes nothing",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/results/mutants.json")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in " ".join(mutant)]

    texts = {file: (ROOT / file).read_text() for file, *_ in chosen}
    absent = [(f, line) for f, line, by, _ in chosen if mutated(texts[f], line, by) is None]
    for file, line in absent:
        print(f"{file}: not there exactly once: {line}", file=sys.stderr)
    if absent:
        return 2

    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(options.workers):
            trees.put(copy_of_tree(Path(folder) / str(number)))
        tests = sorted({test for file, *_ in chosen for test in TESTS[file]})
        tree = trees.get()
        started = time.monotonic()
        verdict, what = run(tree, tests)
        seconds = round(time.monotonic() - started, 1)
        trees.put(tree)
        if verdict != "passed":
            print(f"without a mutant: {verdict}: {what}", file=sys.stderr)
            return 2
        print(f"{len(tests)} files of tests pass in {seconds} s; {len(chosen)} mutants", flush=True)

        def judge(mutant) -> dict:
            file, line, by, why = mutant
            tree = trees.get()
            path = tree / file
            original = path.read_text()
            try:
                path.write_text(mutated(original, line, by))
                verdict, what = run(tree, TESTS[file])
            finally:
                path.write_text(original)
                trees.put(tree)
            result = {"passed": "survived", "failed": "caught", "broken": "broken"}[verdict]
            print(f"{result:8} {file}: {line} -> {by}   {what}", flush=True)
            return {
                "file": file,
                "line": line,
                "mutated": by,
                "why": why,
                "result": result,
                "by": what,
            }

        with ThreadPoolExecutor(options.workers) as pool:
            results = list(pool.map(judge, chosen))

    missed = [r for r in results if r["result"] != "caught"]
    print(f"{len(results) - len(missed)} of {len(results)} caught")
    if not options.only:
        record = {
            **stamp("make", "test-mutants"),
            "tests": tests,
            "seconds_unmutated": seconds,
            "caught": len(results) - len(missed),
            "missed": len(missed),
            "mutants": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = options.out.with_suffix(".tmp")
        written.write_text(json.dumps(record, indent=1) + "\n")
        written.replace(options.out)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
