"""Every finished run is a line of a file, so that an interrupted experiment goes on where it was.

The first line says what the runs have in common; a file made with other settings is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path


class RecordsError(ValueError):
    """A file of records is not what it should be; the message names it, and the remedy."""


class Store:
    """The runs of one experiment on disk.

    path:    the file, NAME.jsonl; made with its folder if missing.
    common:  what all runs have in common, of plain values: the experiment, its settings, the data.

    Raises RecordsError if the file holds runs with something else in common, or is damaged before its last line. A last
    line that was cut off is dropped.
    """

    def __init__(self, path: Path, common: dict):
        self.path = path
        self.common = json.loads(dumps(common))  # as it reads back
        self._runs: dict[tuple[str, int], dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        if not whole:
            self._append(self.common)
            return
        first, *runs = (self._parse(number, line) for number, line in enumerate(whole.splitlines(), start=1))
        self._compare(first)
        for run in runs:
            self._runs.setdefault((run["variant"], run["seed"]), run)

    def __contains__(self, run: tuple[str, int]) -> bool:
        return run in self._runs

    def add(self, variant: str, seed: int, seconds: float, result: dict) -> None:
        run = json.loads(dumps({"variant": variant, "seed": seed, "seconds": round(seconds, 3), "result": result}))
        self._append(run)
        self._runs[variant, seed] = run

    def of(self, runs: list[tuple[str, int]]) -> list[dict]:
        """The records of these runs, in this order."""
        return [self._runs[run] for run in runs]

    def _append(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(dumps(line) + "\n")

    def _parse(self, number: int, line: str) -> dict:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordsError(f"line {number} of {self.path} is damaged ({error}): delete the line or file") from error

    def _compare(self, found: dict) -> None:
        if found != self.common:
            differences = "; ".join(_differences(found, self.common)) or "other fields"
            raise RecordsError(
                f"{self.path} holds runs made with other settings ({differences}): name another folder with --out, "
                "or delete the file"
            )


def dumps(value: object) -> str:
    """On one line; numbers that are not finite become null, for JSON has none."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(found: object, wanted: object, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = list(dict.fromkeys([*found, *wanted]))
        return [line for key in keys for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    return [] if found == wanted else [f"{name.lstrip('.')} was {found!r}, now {wanted!r}"]
