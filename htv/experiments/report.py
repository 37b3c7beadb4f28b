"""What an experiment leaves behind: tables, findings, a picture, every number as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from htv.bench.plots import canvas
from htv.bench.report import machine, table
from htv.experiments.experiment import Experiment, Records, Summary
from htv.experiments.records import dumps
from htv.tools.files import replace_text, replacing


def record(experiment: Experiment, common: dict, stamp: dict, records: Records) -> dict:
    """Everything, of plain values; tables and findings are made from the runs."""
    summary: Summary = experiment.summarise(records)
    return {
        **common,
        "title": experiment.title,
        "paper": experiment.paper,
        **stamp,
        "seeds": 1 + max(run["seed"] for run in records.runs),
        **asdict(summary),
        "records": records.runs,
    }


def markdown(record: dict, picture: str) -> str:
    """The report, from the record alone. picture: the path of the plot beside it."""
    return f"# {record['title']}\n\n{block(record, picture)}\n"


def block(record: dict, picture: str) -> str:
    """The report without its heading, for a page of the docs."""
    seconds = sum(run["seconds"] for run in record["records"])
    took = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    sections = []
    for part in record["tables"]:
        sections += [part["title"], table(part["head"], part["rows"])]
    found = [
        [f["claim"], f["here"], "yes" if f["agrees"] else "**no**"] for f in record["findings"]
    ]
    sections.append(table([f"{record['paper']}", "here", "agrees"], found))
    sections.append(f"![{record['title']}]({picture})")
    sections.append(
        f"`{record['command']}`, seeds: {record['seeds']}, runs of {took} in all, on "
        f"{machine(record)}."
    )
    return "\n\n".join(filter(None, sections))


def save(experiment: Experiment, record: dict, records: Records, folder: Path) -> list[Path]:
    """Writes NAME.png, NAME.md and NAME.json; returns their paths."""
    picture, text, numbers = (
        folder / f"{experiment.name}.{suffix}" for suffix in ("png", "md", "json")
    )
    figure = canvas(*experiment.size)
    experiment.plot(records, figure)
    figure.suptitle(experiment.title)
    with replacing(picture) as part:
        figure.savefig(part, dpi=120)
    replace_text(text, markdown(record, picture.name))
    fields = [
        f"  {dumps(key)}: {dumps(value)}" for key, value in record.items() if key != "records"
    ]
    runs = ",\n".join(f"    {dumps(run)}" for run in record["records"])
    parts = [*fields, f'  "records": [\n{runs}\n  ]']  # a line per run
    replace_text(numbers, "{\n" + ",\n".join(parts) + "\n}\n")
    return [picture, text, numbers]
