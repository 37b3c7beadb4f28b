"""The record as Markdown: every table, each made from the record alone."""

from __future__ import annotations

from htv.bench.baselines import METHODS
from htv.bench.targets import TARGETS, Target
from htv.bench.workloads import RULES

TARGET_HEAD = ["workload", "rule", "number", "target", "measured", ""]
NUMBERS = {
    "ratio": "time over plain",
    "peak_ratio": "peak memory over plain",
    "of_copy": "share of copy bandwidth",
}


def markdown(record: dict, pictures: dict[str, str]) -> str:
    """The whole report. pictures: name of a plot -> its file beside the report."""
    shown = {
        name: f"![{title}]({pictures[name]})"
        for name, title in (
            ("ratio", "Time of a step over plain"),
            ("memory", "Peak memory of a step over plain"),
            ("scaling", "Time over plain as batch, width and rows per example grow"),
        )
        if name in pictures
    }
    settings = record["settings"]
    sections = [
        (
            "# Benchmark",
            f"`{record['command']}`, {machine(record)}; {record['took_seconds'] / 60:.0f} minutes.",
        ),
        ("## Training steps", steps(record)),
        ("", shown.get("ratio")),
        ("", shown.get("memory")),
        ("## Beside others", peers(record)),
        ("", failures(record)),
        ("## Stacked gradients", stacked(record)),
        ("## Scaling", scaling(record)),
        ("", shown.get("scaling")),
        ("## Targets", targets(record)),
        (
            "## How it is measured",
            "The variants of a workload take turns in one process; medians, and in the JSON the "
            "quartiles and the number of calls. Baselines leave after "
            f"{settings['peer_seconds']:g} s. Peak memory is what model, batch and steps add in a "
            "process of their own, whose allocator keeps nothing of what is freed. Baselines form "
            "the gradients of all examples and reduce them by PyTorch; their median is "
            "`torch.median`, the lower of two.",
        ),
    ]
    return (
        "\n\n".join("\n\n".join(filter(None, section)) for section in sections if section[1]) + "\n"
    )


def machine(record: dict) -> str:
    """Where, when and with what it was measured."""
    facts = record["machine"]
    versions = {"torch": facts["versions"]["torch"], **record.get("peers", {})}
    libraries = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version != "not installed"
    )
    return (
        f"{record['date'][:10]}, {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['cpu_capability']}, {libraries}"
    )


def _of_kind(record: dict, kind: str, with_axis: bool = False) -> dict[str, dict]:
    return {
        name: workload
        for name, workload in record["workloads"].items()
        if workload["kind"] == kind and ("axis" in workload) == with_axis
    }


def table(head: list[str], rows: list[list[str]]) -> str | None:
    """None without rows."""
    if not rows:
        return None
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)
    )


def times(value: float) -> str:
    """A ratio in three digits or so: 1.15x, 24.3x, 360x."""
    if value < 10:
        return f"{value:.2f}x"
    if value < 100:
        return f"{value:.1f}x"
    return f"{value:.0f}x"


def cell(row: dict | None) -> str:
    """Time and memory over plain."""
    if row is None:
        return "-"
    if "error" in row:
        return "fails"
    memory = f", {times(row['peak_ratio'])}" if "peak_ratio" in row else ""
    return f"{times(row['ratio'])}{memory}"


def steps(record: dict) -> str | None:
    """Workload by rule: time and peak memory of a whole step over plain."""
    rows = []
    for name, workload in _of_kind(record, "step").items():
        variants = workload["variants"]
        plain = variants["plain"]
        memory = f", {plain['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in plain else ""
        rows.append(
            [
                name,
                f"{plain['ms']:.0f} ms{memory}",
                *(cell(variants.get(rule)) for rule in RULES[1:]),
            ]
        )
    return table(["forward and backward", *RULES], rows)


def peers(record: dict) -> str | None:
    """Workload and rule by method: htv first, then those who form all examples' gradients."""
    rows = []
    for name, workload in _of_kind(record, "step").items():
        for rule in RULES[1:]:
            others = [workload["variants"].get(f"{method}:{rule}") for method in METHODS]
            if any(others):
                rows.append([name, rule, cell(workload["variants"].get(rule)), *map(cell, others)])
    return table(["time and peak memory over plain", "rule", "htv", *METHODS], rows)


def failures(record: dict) -> str | None:
    """Every error, in the words of the library that raised it."""
    said: dict[str, list[str]] = {}
    for name, workload in record["workloads"].items():
        for variant, row in workload["variants"].items():
            for key in ("error", "memory_error"):
                if key in row:
                    who = (
                        f"memory of {name} {variant}"
                        if key == "memory_error"
                        else f"{name} {variant}"
                    )
                    said.setdefault(row[key], []).append(who)
    return "\n".join(f"- {', '.join(who)}: `{error}`" for error, who in said.items()) or None


def stacked(record: dict) -> str | None:
    """Per number of groups: bandwidth, as a share of a copy's, and torch's own functions in the
    same way.
    """
    rows = []
    for workload in _of_kind(record, "stacked").values():
        copy = workload["variants"]["copy"]
        for variant, row in workload["variants"].items():
            shape = f"({workload['groups']}, {workload['coordinates'] / (1 << 20):g} Mi)"
            if "error" in row:
                rows.append([shape, variant, "fails", "", "", ""])
            elif variant != "copy":
                rate = (
                    f"{row['gb_per_s']:.2g}" if row["gb_per_s"] < 10 else f"{row['gb_per_s']:.0f}"
                )
                rows.append([shape, variant, f"{row['ms']:.1f} ms", rate, f"{row['of_copy']:.1%}",
                             f"{copy['gb_per_s']:.0f}"])  # fmt: skip
    return table(["float32", "statistic", "time", "GB/s", "of the copy's", "copy GB/s"], rows)


def scaling(record: dict) -> str | None:
    """The MLP whose batch, width or rows per example grow."""
    rows = [
        [f"{workload['axis']} {workload['value']}", f"{workload['variants']['plain']['ms']:.1f} ms"]
        + [cell(workload["variants"].get(rule)) for rule in RULES[1:]]
        for workload in _of_kind(record, "step", with_axis=True).values()
    ]
    return table(["three linear layers", *RULES], rows)


def targets(record: dict) -> str | None:
    """Every target that was measured: wanted, measured, met or not."""
    rows = []
    for target in TARGETS:
        value = target.measured(record)
        if value is not None:
            rows.append(
                [
                    *target_cells(target),
                    f"{value:.2f}",
                    "met" if target.met(record) else "**not met**",
                ]
            )
    return table(TARGET_HEAD, rows)


def target_cells(target: Target) -> list[str]:
    """Workload, rule, number and bound."""
    sign, bound = ("<=", target.most) if target.most is not None else (">=", target.least)
    return [
        target.workload,
        target.variant,
        NUMBERS.get(target.number, target.number),
        f"{sign} {bound:g}",
    ]


def on_screen(text: str) -> str:
    """The report for a terminal: tables in columns, without pictures."""
    lines, table = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            del table[1]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for row in table:
                lines.append(
                    "  ".join(
                        cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                    ).rstrip()
                )
            table = []
        if not line.startswith("!["):
            lines.append(line)
    return "\n".join(lines)
