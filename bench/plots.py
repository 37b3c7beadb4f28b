"""The record as pictures."""

from __future__ import annotations

from pathlib import Path

from htv.bench import report
from htv.bench.baselines import METHODS
from htv.bench.workloads import RULES
from htv.tools.files import replacing

COLORS = dict(zip(RULES[1:], ("#777777", "C0", "C1", "C2"), strict=True))
MARKERS = dict(zip(METHODS, "osD^", strict=True))
KINDS = ("ratio", "memory", "scaling")
AXES = {"groups": "batch size E", "width": "width", "rows": "rows per example T"}


def save(record: dict, folder: Path, stem: str) -> dict[str, str]:
    """Writes the plots there is something to plot for; name -> file name."""
    steps = {
        n: w for n, w in record["workloads"].items() if w["kind"] == "step" and "axis" not in w
    }
    grows = [w for w in record["workloads"].values() if "axis" in w]
    written = {}
    if _any(steps.values(), "ratio"):
        written["ratio"] = _save(
            _bars(steps, "ratio", "time of a step over plain"), folder / f"{stem}-ratio.png"
        )
    if _any(steps.values(), "peak_ratio"):
        title = "peak memory of a step over plain"
        written["memory"] = _save(_bars(steps, "peak_ratio", title), folder / f"{stem}-memory.png")
    if _any(grows, "ratio"):
        written["scaling"] = _save(_lines(grows), folder / f"{stem}-scaling.png")
    return written


def _any(workloads, number: str) -> bool:
    return any(
        number in row
        for w in workloads
        for variant, row in w["variants"].items()
        if variant != "plain"
    )


def canvas(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    return figure


def _save(figure, path: Path) -> str:
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    return path.name


def _bars(steps: dict[str, dict], number: str, title: str):
    """A bar per workload and rule for htv, a mark above it for each baseline; a log scale."""
    figure = canvas(2.5 + 1.7 * len(steps), 4.4)
    axes = figure.subplots()
    width = 0.8 / len(COLORS)
    named = set()
    for at, workload in enumerate(steps.values()):
        for index, (rule, color) in enumerate(COLORS.items()):
            x = at + (index - (len(COLORS) - 1) / 2) * width
            ours = workload["variants"].get(rule, {})
            if number in ours:
                label = f"htv, {rule}" if rule not in named else None
                axes.bar(x, ours[number] - 1, width, bottom=1, color=color, label=label)
                above = report.times(ours[number]).removesuffix("x")
                axes.text(x, max(ours[number], 1), above, ha="center", va="bottom", fontsize=7)
                named.add(rule)
            for method, marker in MARKERS.items():
                theirs = workload["variants"].get(f"{method}:{rule}", {})
                if number in theirs:
                    label = method if method not in named else None
                    style = {"color": color, "markersize": 5, "markeredgecolor": "black"}
                    axes.plot(x, theirs[number], marker, label=label, **style)
                    named.add(method)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel=title, xticks=range(len(steps)), xticklabels=list(steps))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _lines(grows: list[dict]):
    """One panel per axis: ratio to plain of every rule."""
    names = list(dict.fromkeys(workload["axis"] for workload in grows))
    figure = canvas(1 + 3.6 * len(names), 3.6)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        points = [workload for workload in grows if workload["axis"] == name]
        for rule, color in COLORS.items():
            ratios = [(w["value"], w["variants"].get(rule, {}).get("ratio")) for w in points]
            if known := [point for point in ratios if point[1] is not None]:
                axes.plot(*zip(*known, strict=True), marker="o", color=color, label=rule)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel=AXES[name])
        axes.set_xticks(
            [w["value"] for w in points], [str(w["value"]) for w in points], minor=False
        )
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.yaxis.set_minor_formatter("{x:g}x")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of a step over plain")
    panels[0].legend(fontsize=8)
    return figure
