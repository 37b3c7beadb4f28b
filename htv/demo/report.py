"""What the demo leaves behind: a table on the screen, curves as PNG, every number as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.table import Table

from htv.tools.files import replace_text, replacing


def summary_table(results: list[dict], noise: float) -> Table:
    """One row per variant; the fields of a result are those of the JSON. Fits 80 columns."""
    compact = {"padding": (0, 1), "pad_edge": False, "show_edge": False, "collapse_padding": True}
    title = f"Trained on {noise:.0%} wrong labels"
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, **compact
    )
    table.caption = (
        "memorised: wrongly labelled training images predicted as their wrong label. Peak MB: "
        "what network, optimizer and three steps add. vmap: the same rule by "
        "torch.func.vmap(grad), which holds the gradients of all examples of the batch."
    )
    table.add_column("rule", no_wrap=True)
    for name in ("test\nacc.", "\nmemorised", "ms/step\n(x plain)", "peak MB\n(x plain)",
                 "vmap\nms/step", "vmap\npeak MB"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    plain = results[0]
    for result in results:
        final, time, memory = result["final"], result["ms_per_step"], result["peak_bytes"]
        vmap_time, vmap_memory = result["vmap_ms_per_step"], result["vmap_peak_bytes"]
        table.add_row(
            result["spec"],
            f"{final['test_accuracy']:.1%}",
            f"{final['memorised']:.1%}",
            f"{time:.1f} ({_times(time, plain['ms_per_step'])})",
            f"{memory / 1e6:.1f} ({_times(memory, plain['peak_bytes'])})",
            "" if vmap_time is None else f"{vmap_time:.0f}",
            "" if vmap_memory is None else f"{vmap_memory / 1e6:.0f}",
        )
    return table


def _times(value: float, base: float) -> str:
    ratio = value / base
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def in_words(results: list[dict]) -> str:
    """The result in one line per variant."""
    plain = results[0]["final"]
    lines = [f"plain learnt {plain['memorised']:.1%} of the wrong labels by heart;"]
    for result in results[1:]:
        points = 100 * (result["final"]["test_accuracy"] - plain["test_accuracy"])
        lines.append(
            f"{result['spec']} {result['final']['memorised']:.1%}, test accuracy {points:+.1f} "
            "points"
        )
    return "\n".join(lines)


def times_are_rough(results: list[dict]) -> bool:
    """Whether the middle half of some variant's times spans more than a factor of 1.5."""
    return any(
        upper > 1.5 * lower
        for lower, upper in (result["ms_per_step_quartiles"] for result in results)
    )


def save_curves(path: Path, results: list[dict], title: str) -> None:
    """Test accuracy and memorised share after every epoch, one line per variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    panels = figure.subplots(1, 2, sharex=True)
    titles = {
        "test_accuracy": "Accuracy on test images",
        "memorised": "Wrong labels learnt by heart",
    }
    for axes, (key, name) in zip(panels, titles.items(), strict=True):
        for index, result in enumerate(results):
            epochs = [record["epoch"] for record in result["epochs"]]
            values = [record[key] for record in result["epochs"]]
            plain = index == 0
            axes.plot(epochs, values, label=result["spec"],
                      color="black" if plain else f"C{index - 1}", linestyle="--" if plain else "-",
                      marker="." if len(epochs) < 20 else None)  # fmt: skip
        axes.set(title=name, xlabel="epoch", ylabel="share of images", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.suptitle(title)
    with replacing(path) as part:
        figure.savefig(part, dpi=150)


def save_json(path: Path, record: dict) -> None:
    replace_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
