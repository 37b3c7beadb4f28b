"""What a step is given; processes that answer questions; preparing at once what is then measured
one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from htv.bench.gpu import run
from htv.tools.timing import one_line


@dataclass(frozen=True)
class Job:
    """out: the file for its part of the record. seconds: within which it ends. dry: tiny sizes, no
    GPU.

    clock: a `run.Clock`, by which all seconds here are counted.
    """

    out: Path
    seconds: float
    dry: bool
    clock: run.Clock = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "clock", run.Clock(self.dry))

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        return self.seconds - self.clock.spent()

    def save(self, found: dict) -> None:
        """What is known so far, in place of what was."""
        self.out.with_suffix(".part").write_text(json.dumps(found, allow_nan=False))
        self.out.with_suffix(".part").replace(self.out)


def main(do: Callable[[Job], None]) -> None:
    """The command line of a step: FILE SECONDS [--dry]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry", action="store_true")
    do(Job(**vars(parser.parse_args())))


class Lost(Exception):
    """A process that did not answer: it ended, or took too long."""


class Child:
    """A process that answers lines by lines of JSON; the rest of what it says goes to stderr here.

    dry: whether its seconds are those of a dry run, see `run.Clock`.
    """

    def __init__(self, module: str, *arguments: str, dry: bool = False):
        self._dry = dry
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, question: str, seconds: float) -> dict:
        """Raises Lost where no answer comes; the process is then gone."""
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            line = self._line(seconds)
        except queue.Empty:
            self.end()
            raise Lost(f"hung: no answer within {seconds:.0f} s") from None
        except OSError:  # a broken pipe
            line = None
        if line is None:
            raise Lost(f"crashed: its process ended with status {self._process.wait()}")
        return json.loads(line)

    def _line(self, seconds: float) -> str | None:
        clock = run.Clock(self._dry, self._process.pid)
        while (left := seconds - clock.spent()) > 0:
            try:
                return self._lines.get(timeout=min(left, run.LOOK) if self._dry else left)
            except queue.Empty:
                continue
        return self._lines.get_nowait()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def questions() -> Iterator[tuple[str, Callable[[dict], None]]]:
    """In the process of a `Child`: every question with the function that answers it. Prints go to
    stderr meanwhile.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    for line in sys.stdin:
        yield line.rstrip("\n"), answer


# ---- prepared at once, measured one by one ----


class Prepared(Protocol):
    """Everything compiled and called once.

    `measure` returns a workload of the record; with "more" in it, `more` returns it again with what
    takes longer.
    """

    def measure(self) -> dict: ...

    def more(self) -> dict: ...


RETRY = 30.0  # seconds that must be left for it
NO_TIME = "dropped: no time was left"


def one_by_one(job: Job, module: str, names: list[str], took: Callable[[str, dict], None]) -> None:
    """Has every name prepared by a process of its own, all at once, as it is mostly compilation;
    then measured in turn.

    took: called with each name and its workload, maybe more than once; or with {"error"}. Where a
    process was lost, another tries the first few variants alone. A dry run has one process for all
    names.
    """
    groups = [names] if job.dry else [[name] for name in names]
    children: dict[str, Child] = {}
    for group in groups:
        children |= dict.fromkeys(group, Child(module, *flags(job), dry=job.dry))
    lost: dict[str, str] = {}

    def prepare(group: list[str]) -> None:
        for name in group:
            try:
                _asked(children[name], f"prepare {name}", job.left() - kept)
            except Lost as error:
                lost[name] = str(error)

    kept = 0.4 * job.left()  # for measuring
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(prepare, groups))
    for name in names:
        if name not in lost:
            try:
                _measured(job, children[name], name, took)
            except Lost as error:
                lost[name] = str(error)
        if name in lost:
            took(name, {"error": lost[name]})
        if not job.dry:
            children[name].end()  # what it holds of the device
    for child in children.values():
        child.end()
    for name in lost:
        if job.left() > RETRY and not job.dry:
            child = Child(module, *flags(job), "--few")
            try:
                _asked(child, f"prepare {name}", job.left() - 10)
                _measured(
                    job, child, name, lambda name, rows: took(name, rows | {"error": lost[name]})
                )
            except Lost as error:
                took(name, {"error": f"{lost[name]}; then {error}"})
            child.end()


def flags(job: Job) -> list[str]:
    return ["--answer", *["--dry"] * job.dry]


def _asked(child: Child, question: str, seconds: float) -> dict:
    answer = child.ask(question, seconds)
    if "failed" in answer:
        raise Lost(answer["failed"])
    return answer


def _measured(job: Job, child: Child, name: str, took: Callable[[str, dict], None]) -> None:
    if job.left() < 5:
        raise Lost(NO_TIME)
    rows = _asked(child, f"measure {name}", job.left() - 2)
    more = rows.pop("more", False)
    took(name, rows)
    if more and job.left() > 10:
        took(name, _asked(child, f"more {name}", job.left() - 2))


def answer_preparations(make: Callable[[str], Prepared]) -> None:
    """In the process of a `Child`: what `one_by_one` asks for."""
    held: dict[str, Prepared] = {}
    for question, answer in questions():
        verb, _, name = question.partition(" ")
        begin = time.monotonic()
        try:
            if verb == "prepare":
                held[name] = make(name)
            found = {} if verb == "prepare" else getattr(held[name], verb)()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": one_line(error)}
        print(f"{question}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
        answer(found)
