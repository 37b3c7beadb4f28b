"""Every finished run is a line of a file, so that an interrupted experiment goes on where it was.

The first line says what the runs have in common; a file made with other settings is refused.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


class RecordsError(ValueError):
    """A file of records is not what it should be; the message names it, and the remedy."""


class Store:
    """The runs of one experiment on disk.

    path:    the file, NAME.jsonl; made with its folder if missing.
    common:  what all runs have in common, of plain values: the experiment, its settings, the data.

    Raises RecordsError if the file holds runs with something else in common, or is damaged before
    its last line; it is left as it was then. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, common: dict):
        self.path = path
        self.common = json.loads(dumps(common))  # as it reads back
        self._runs: dict[tuple[str, int], dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.read_bytes() if path.is_file() else b""
        whole = found[: found.rfind(b"\n") + 1]
        if whole:
            lines = enumerate(whole.split(b"\n")[:-1], start=1)
            first, *runs = (self._parse(number, line) for number, line in lines)
            self._compare(first)
            for number, run in enumerate(runs, start=2):
                self._require_run(number, run)
                self._runs.setdefault((run["variant"], run["seed"]), run)
        elif not dumps(self.common).encode().startswith(found):
            raise RecordsError(
                f"{path} does not begin as a file of these records does: name another folder with "
                "--out, or delete the file"
            )
        if whole != found:  # cut where it is, for there may be no room for another copy
            os.truncate(path, len(whole))
        if not whole:
            self._append(self.common)

    def __contains__(self, run: tuple[str, int]) -> bool:
        return run in self._runs

    def add(self, variant: str, seed: int, seconds: float, result: dict) -> None:
        run = json.loads(
            dumps(
                {"variant": variant, "seed": seed, "seconds": round(seconds, 3), "result": result}
            )
        )
        self._append(run)
        self._runs[variant, seed] = run

    def of(self, runs: list[tuple[str, int]]) -> list[dict]:
        """The records of these runs, in this order."""
        return [self._runs[run] for run in runs]

    def _append(self, line: dict) -> None:
        """All of it, on the disk, or nothing."""
        data = dumps(line).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, before)
                raise

    def _parse(self, number: int, line: bytes) -> object:
        try:
            return json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise self._damaged(number, error) from error

    def _require_run(self, number: int, run: object) -> None:
        kinds = {"variant": str, "seed": int, "seconds": (int, float), "result": dict}
        if not isinstance(run, dict) or run.keys() != kinds.keys():
            raise self._damaged(number, "it is no run")
        for name, kind in kinds.items():
            if not isinstance(run[name], kind) or isinstance(run[name], bool):
                raise self._damaged(number, f"its {name} is a {type(run[name]).__name__}")

    def _damaged(self, number: int, what: object) -> RecordsError:
        where = f"line {number} of {self.path}"
        return RecordsError(f"{where} is damaged ({what}): delete the line or file")

    def _compare(self, found: object) -> None:
        if not isinstance(found, dict):
            raise self._damaged(1, "it does not say what the runs have in common")
        if found != self.common:
            differences = "; ".join(_differences(found, self.common)) or "other fields"
            raise RecordsError(
                f"{self.path} holds runs made with other settings ({differences}): name another "
                "folder with --out, or delete the file"
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
        return [
            line
            for key in keys
            for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}")
        ]
    return [] if found == wanted else [f"{name.lstrip('.')} was {found!r}, now {wanted!r}"]
