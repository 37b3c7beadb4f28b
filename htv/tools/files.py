"""Result files that take the place of older ones: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_text", "replacing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside this one, of the same suffix, to write to; it replaces `path` in the end.

    What was there stays where the block raises, the disk is full, or the process is killed. A link
    stays one, and what is no file, such as /dev/null, is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _keep_names(path.parent)


def replace_text(path: str | Path, text: str) -> None:
    """Write a file of text by `replacing`, in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _keep_names(folder: Path) -> None:
    """Let the folder itself reach the disk; some systems do that by themselves, or not at all."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(opened)
    except OSError:
        pass
    finally:
        os.close(opened)
