"""Processes that end, however busy the machine is: their deadlines are of processor time."""

import os
import subprocess
import tempfile

from htv.bench.gpu.run import end, wait


def run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Its status, None where it was ended by a dry run's `Clock`, and all it said."""
    with tempfile.TemporaryFile("w+") as words:
        options = {"env": {**os.environ, **environment}, "start_new_session": True}
        child = subprocess.Popen(command, stdout=words, stderr=words, **options)
        try:
            status = wait(child, seconds, dry=True)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(child)
        words.seek(0)
        return status, words.read()
