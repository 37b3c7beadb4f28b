"""Processes that stand for the ranks of a training run, and what one process gets for all of them.

`Ranks` keeps its processes between jobs, and forks them from one that has imported torch and htv,
for that takes seconds. A job is a function of (rank, world, *args) that can be imported; it runs
inside a fresh process group of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = 30  # seconds that ranks wait for each other
IMPORTS = 120  # seconds that a process may take to start


@dataclass(frozen=True)
class Raised:
    """What a job raised on one rank."""

    kind: str
    message: str
    trace: str


class Ranks:
    """Processes that run jobs together, as many as a job has ranks."""

    def __init__(self):
        self._processes: list = []
        self._pipes: list = []

    def outcomes(self, job, world: int, *args: Any, patience: float = PATIENCE) -> list:
        """Run a job on `world` ranks; return what each returned, or `Raised`; None for one that
        died.
        """
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank in range(world):
                self._pipes[rank].send((job, rank, world, args, store, patience))
            found, lost = [], False
            for pipe in self._pipes[:world]:
                try:
                    found.append(pipe.recv() if pipe.poll(IMPORTS + 2 * patience) else None)
                except EOFError:
                    found.append(None)
                lost |= found[-1] is None
        if lost:
            self.close()
        return found

    def run(self, job, world: int, *args: Any) -> list:
        """Run a job on `world` ranks; return what each returned. Raises AssertionError if any
        raised.
        """
        found = self.outcomes(job, world, *args)
        for rank, result in enumerate(found):
            assert result is not None, f"rank {rank} died"
            if isinstance(result, Raised):
                raise AssertionError(f"rank {rank}: {result.trace}")
        return found

    def _start(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "htv", "htv.distributed"])
        for _ in range(len(self._processes), world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe) -> None:
    """Run jobs in one process until the other end closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job, rank, world, args, store, patience = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(job, rank, world, args, store, patience))


def _run(job, rank: int, world: int, args: tuple, store: str, patience: float):
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=patience),
    )
    try:
        return job(rank, world, *args)
    except BaseException as error:
        return Raised(type(error).__name__, str(error), traceback.format_exc())
    finally:
        dist.destroy_process_group()
