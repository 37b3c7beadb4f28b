"""The demo from start to end: train every variant, measure what each costs, report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from htv.data import Dataset
from htv.demo import cost, report
from htv.demo.training import Setup, Task, make_task, train
from htv.demo.variants import Variant
from htv.tools import env_info


def run(data: Dataset, variants: list[Variant], setup: Setup, out: Path, console: Console) -> dict:
    """Returns the record it also writes to ``out/demo.json``; the curves go to ``out/demo.png``.

    variants: plain first.
    """
    task = make_task(data, setup)
    console.print(
        f"{data.name}: {len(task.x)} training images, {int(task.wrong.sum())} of them wrongly "
        f"labelled, and {len(task.test_x)} test images. Network "
        f"{task.x.shape[1]}-{setup.width}-{setup.width}-{data.num_classes}, {setup.epochs} epochs "
        f"of batches of {setup.batch_size}, seed {setup.seed}, {setup.device}."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[now]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        epochs = [_train(task, variant, setup, progress) for variant in variants]
        costs = _measure(task, variants, setup, progress)
    results = [
        {
            "spec": variant.spec,
            "rule": repr(variant.rule) if variant.rule else None,
            "epochs": records,
            "final": records[-1],
            **cost,
        }
        for variant, records, cost in zip(variants, epochs, costs, strict=True)
    ]
    record = {
        "command": shlex.join(["htv", *sys.argv[1:]]),
        "setup": asdict(setup),
        "data": {
            "name": data.name,
            "classes": data.num_classes,
            "train_images": len(task.x),
            "wrong_labels": int(task.wrong.sum()),
            "test_images": len(task.test_x),
        },
        "network": [task.x.shape[1], setup.width, setup.width, data.num_classes],
        "machine": env_info.describe(setup.device),
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    curves, numbers = out / "demo.png", out / "demo.json"
    report.save_curves(
        curves, results, f"{data.name}, {setup.noise:.0%} wrong labels, seed {setup.seed}"
    )
    report.save_json(numbers, record)
    console.print(report.summary_table(results, setup.noise))
    console.print(report.in_words(results), highlight=False)
    if report.times_are_rough(results):
        console.print(
            "The machine was busy: times varied by more than half. Repeat on a quiet one to trust "
            "them."
        )
    console.print(f"Curves: {curves}\nEvery number: {numbers}", soft_wrap=True)
    return record


def _train(task: Task, variant: Variant, setup: Setup, progress: Progress) -> list[dict]:
    bar = progress.add_task(variant.spec, total=setup.epochs, now="")

    def on_epoch(record: dict) -> None:
        now = f"test {record['test_accuracy']:.1%}, memorised {record['memorised']:.1%}"
        progress.update(bar, completed=record["epoch"], now=now)

    return train(task, variant.rule, setup, on_epoch)


def _measure(task: Task, variants: list[Variant], setup: Setup, progress: Progress) -> list[dict]:
    """Per variant: milliseconds per step and peak bytes, of htv and of the materialising twin (None
    for plain).
    """
    bar = progress.add_task("time and memory", total=2 * len(variants), now="all in turn")
    batch = slice(setup.batch_size)
    times = cost.step_times(variants, setup, task.x[batch], task.noisy[batch], task.num_classes)
    costs = []
    progress.update(bar, completed=1)
    for variant in variants:
        memory = []
        for materialise in (False, True) if variant.rule else (False,):
            progress.update(bar, now=f"{'vmap, ' * materialise}{variant.spec}")
            memory.append(
                cost.peak_memory(variant, materialise, setup, task.x.shape[1], task.num_classes)
            )
            progress.advance(bar)
        timing, twin = times[variant.spec], times.get(f"vmap {variant.spec}")
        costs.append(
            {
                "ms_per_step": timing.median,
                "ms_per_step_quartiles": [timing.lower, timing.upper],
                "vmap_ms_per_step": twin.median if twin else None,
                "peak_bytes": memory[0]["bytes"],
                "vmap_peak_bytes": memory[1]["bytes"] if variant.rule else None,
                "memory_method": memory[0]["method"],
            }
        )
    progress.update(bar, now="")
    return costs
