"""All runs of an experiment, one after the other or side by side, and the report."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from htv.bench.report import on_screen
from htv.data import Dataset, digits, read_folder
from htv.experiments import report
from htv.experiments.experiment import Experiment, Records, load
from htv.experiments.records import Store
from htv.tools import env_info


def run(
    experiment: Experiment,
    quick: bool,
    seeds: int | None,
    data: Path | None,
    out: Path,
    jobs: int,
    console: Console,
) -> dict:
    """Does the runs ``out/NAME.jsonl`` lacks; returns the record it also writes to
    ``out/NAME.json``.

    Raises DataError for a bad folder of data, and RecordsError if the file holds runs made with
    other settings.
    """
    settings = experiment.settings(quick)
    images = _images(data) if experiment.images else None
    common = {
        "experiment": experiment.name,
        "settings": asdict(settings),
        "data": _described(images),
    }
    store = Store(out / f"{experiment.name}.jsonl", common)
    runs = experiment.runs(
        settings, seeds or (experiment.quick_seeds if quick else experiment.seeds)
    )
    missing = [run for run in runs if run not in store]
    if experiment.images:
        console.print(f"Data: {images.name}, {len(images.train_labels)} training and "
                      f"{len(images.test_labels)} test "
                      f"images{'' if data else ' (--data takes a folder of others)'}.")  # fmt: skip
    if len(missing) < len(runs):
        console.print(
            f"{len(runs) - len(missing)} of {len(runs)} runs are in {store.path} already.",
            soft_wrap=True,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[now]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            experiment.name, total=len(runs), completed=len(runs) - len(missing), now=""
        )
        if jobs > 1 and len(missing) > 1:
            finished = _side_by_side(experiment.name, quick, missing, data, jobs)
        else:
            finished = _in_turn(experiment, settings, missing, images, progress)
        for variant, seed, seconds, result in finished:
            store.add(variant, seed, seconds, result)
            progress.update(bar, advance=1, now=f"{variant}, seed {seed}: {seconds:.1f} s")
        progress.update(bar, now="")
    records = Records(settings, store.of(runs), images.num_classes if images else None)
    record = report.record(experiment, store.common, env_info.stamp("htv", *sys.argv[1:]), records)
    picture, text, numbers = report.save(experiment, record, records, out)
    console.print(
        on_screen(report.markdown(record, picture.name)),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print(f"Report: {text}\nPicture: {picture}\nEvery number: {numbers}", soft_wrap=True)
    return record


Finished = Iterator[tuple[str, int, float, dict]]  # variant, seed, seconds, result


def _in_turn(
    experiment: Experiment, settings, runs, images: Dataset | None, progress: Progress
) -> Finished:
    for variant, seed in runs:
        bar = progress.add_task(f"  {variant}, seed {seed}", total=100, now="")
        on_progress = lambda share, now="": progress.update(
            bar, completed=round(100 * share), now=now
        )
        start = time.perf_counter()
        result = experiment.run_one(settings, variant, seed, images, on_progress)
        progress.remove_task(bar)
        yield variant, seed, time.perf_counter() - start, result


def _side_by_side(name: str, quick: bool, runs, data: Path | None, jobs: int) -> Finished:
    """The same by `jobs` processes, which share the cores."""
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        pending = [
            pool.submit(_in_worker, name, quick, variant, seed, data) for variant, seed in runs
        ]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_worker(
    name: str, quick: bool, variant: str, seed: int, data: Path | None
) -> tuple[str, int, float, dict]:
    experiment = load(name)
    images = _images(data) if experiment.images else None
    start = time.perf_counter()
    result = experiment.run_one(
        experiment.settings(quick), variant, seed, images, lambda share, now="": None
    )
    return variant, seed, time.perf_counter() - start, result


@lru_cache(maxsize=1)
def _images(folder: Path | None) -> Dataset:
    return digits() if folder is None else read_folder(folder)


def _described(data: Dataset | None) -> dict | None:
    if data is None:
        return None
    return {
        "name": data.name,
        "classes": data.num_classes,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
    }
