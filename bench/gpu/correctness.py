"""Step 2: the cases of tests/device_suite, many processes at a time.

A case that crashes its process, or hangs, is recorded, and the next process goes on behind it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback

from htv.bench.gpu import step
from htv.tools.timing import one_line

PATIENCE = 100.0  # seconds for a case, of which most is compilation
MODULE = "htv.bench.gpu.correctness"


def check(job: step.Job) -> None:
    """Saves {"correctness": counts, wrong, skipped, dropped}."""
    found: dict[str, dict] = {}
    first = step.Child(MODULE, "--answer", dry=job.dry)
    parts = first.ask("list", min(60.0, job.left()))
    absent = "skipped" if job.dry else "failed"
    found |= {
        f"{part}/all": {"status": absent, "error": error} for part, error in parts["absent"].items()
    }
    found |= {
        f"{part}/all": {"status": "failed", "error": error}
        for part, error in parts["errors"].items()
    }
    names = spread(parts["cases"])
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    workers = 2 if job.dry else max(1, min(12, (os.cpu_count() or 4) - 3))
    children = [first] + [None] * (workers - 1)
    threads = [
        threading.Thread(target=work, args=(job, waiting, found, child)) for child in children
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1.0)
        job.save(summary(names, dict(found), job.dry))
    job.save(summary(names, found, job.dry))


def spread(cases: dict[str, list[str]]) -> list[str]:
    """Every part's first cases before any part's last, for time may end before they do."""
    placed = [(at / len(names), name) for names in cases.values() for at, name in enumerate(names)]
    return [name for _, name in sorted(placed, key=lambda item: item[0])]


def work(
    job: step.Job, waiting: queue.SimpleQueue, found: dict[str, dict], child: step.Child | None
) -> None:
    """Asks a process, and another where that is lost, until nothing waits or no time is left."""
    while job.left() > 3:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            break
        child = child or step.Child(MODULE, "--answer", dry=job.dry)
        begin, patience = time.monotonic(), min(PATIENCE, job.left() - 2)
        try:
            answer = child.ask(name, patience)
        except step.Lost as lost:
            child, late = None, patience < PATIENCE
            if late and str(lost).startswith("hung"):
                continue  # it might have ended: dropped
            answer = {"status": "failed", "error": str(lost)}
        found[name] = answer | {"seconds": round(time.monotonic() - begin, 2)}
        if child and answer.pop("unusable", False):
            child.end()
            child = None
    if child:
        child.end()


def summary(names: list[str], found: dict[str, dict], dry: bool) -> dict:
    of = lambda status: {name: row for name, row in found.items() if row["status"] == status}
    wrong, skipped = of("failed"), of("skipped")
    dropped = [name for name in names if name not in found]
    counts = {
        "passed": len(of("passed")),
        "failed": len(wrong),
        "skipped": len(skipped),
        "dropped": len(dropped),
    }
    parts = {
        name.partition("/")[0]: {"passed": 0, "failed": 0, "skipped": 0, "dropped": 0}
        for name in [*names, *found]
    }
    for name in {*names, *found}:
        parts[name.partition("/")[0]][found.get(name, {}).get("status", "dropped")] += 1
    slowest = sorted(found, key=lambda name: -found[name].get("seconds", 0))[:10]
    return {
        "correctness": {
            "dry": dry,
            "counts": counts,
            "parts": parts,
            "wrong": {name: row["error"] for name, row in wrong.items()},
            "skipped": {name: row["error"] for name, row in skipped.items()},
            "dropped": dropped,
            "slowest": {name: found[name].get("seconds", 0) for name in slowest},
        }
    }


# ---- in the processes that are asked ----


def answer_questions() -> None:
    """Either "list", or the name of a case to run."""
    import torch
    from device_suite import PARTS, cases

    dry = not torch.cuda.is_available()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # what convolutions of a plain model are compared with
    torch.backends.cudnn.deterministic = True
    known: dict[str, dict] = {}
    for question, answer in step.questions():
        if question == "list":
            answer(listing(PARTS, lambda part: [case.name for case in cases(part, dry)]))
            continue
        part = question.partition("/")[0]
        if part not in known:
            known[part] = {case.name: case for case in cases(part, dry)}
        answer(outcome(known[part][question].run, dry))


def listing(parts, names_of) -> dict:
    """The names of every part's cases; parts that need what is not installed, and parts that are
    broken.
    """
    found = {"cases": {}, "absent": {}, "errors": {}}
    for part in parts:
        try:
            found["cases"][part] = names_of(part)
        except ModuleNotFoundError as error:
            found["absent"][part] = one_line(error)
        except Exception as error:
            found["errors"][part] = one_line(error)
    return found


def outcome(run, dry: bool) -> dict:
    import torch
    from device_suite import Skipped

    try:
        run()
        if not dry:
            torch.cuda.synchronize()
        return {"status": "passed"}
    except Skipped as reason:
        return {"status": "skipped", "error": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": one_line(error), "unusable": not dry and broken()}
    finally:
        if not dry and not broken():
            torch.cuda.empty_cache()


def broken() -> bool:
    """Whether the device reports an error that stays."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["--answer"]:
        answer_questions()
    else:
        step.main(check)
