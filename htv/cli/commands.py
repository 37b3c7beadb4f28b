"""The commands of `htv`: a demo to see the rules at work, their cost, what this installation can.

They import what they need when they run, so that `htv --help` stays quick, and say at once which
extra they lack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htv.errors import require

app = typer.Typer(
    help="Gradients that keep only what the examples agree on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors on one line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from htv.tools.env_info import version

        typer.echo(f"htv {version('hard-to-vary')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of idx files (MNIST's format), plain or .gz. Default: scikit-learn's "
            "digits."
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="Rule to compare with plain; repeat it or separate by commas. and-mask[:TAU], "
            "median, winsorized[:COUNT_OR_FRACTION], trimmed[:COUNT_OR_FRACTION], "
            "median-of-means[:K]. Default: and-mask,median,winsorized."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 50,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides split, wrong labels, initial weights and order.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for demo.png and demo.json; made if missing.")
    ] = Path("demo"),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    train_limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train on at most so many images. Default: 3000 with --data, else all."
        ),
    ] = None,
) -> None:
    """Train on real images of which a quarter carry wrong labels, and see which rules learn those
    by heart.

    Plain training and the rules start from the same weights and see the same batches. Ends with a
    table of accuracy, memorisation, time and memory, curves as PNG, and every number as JSON.
    """
    require("htv demo", "cli", "rich", "matplotlib", *_for_digits(data))
    from rich.console import Console

    from htv.data import DataError, digits, idx_folder
    from htv.demo.run import run
    from htv.demo.training import Setup
    from htv.demo.variants import parse_all

    setup = Setup(epochs=epochs, seed=seed, device=_checked_device(device))
    try:
        variants = parse_all(rule, setup.batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rule") from error
    _check_folder(out)
    try:
        images = digits(seed) if data is None else idx_folder(data)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    if data is not None or train_limit is not None:
        images = images.subset(train_limit or 3000, seed)
    if len(images.train_labels) < setup.batch_size:
        raise typer.BadParameter(
            f"{len(images.train_labels)} training images do not fill one batch of "
            f"{setup.batch_size}",
            param_hint="--data" if train_limit is None else "--train-limit",
        )
    run(images, variants, setup, out, Console())


@app.command()
def bench(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure; repeat it or separate by commas. mlp-relu, mlp-gelu, "
            "transformer, resnet18, llama-block, convnext-stage, stacked-E, scaling-groups, "
            "scaling-width, scaling-rows; the beginning of several names stands for all of them, "
            "as in `stacked`. Default: everything: some fifteen minutes."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Which to compare with plain; repeat it or separate by commas. mean, and-mask, "
            "median, winsorized; or a baseline and a rule, as in vmap:median, opacus:and-mask. "
            "Default: all."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: what torch takes.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=3600.0, help="Time for the turns of one workload; 10, if not quick."
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            help="Also the baselines: a loop, vmap, and Opacus and BackPACK where they are "
            "installed."
        ),
    ] = True,
    memory: Annotated[
        bool, typer.Option(help="Also peak memory, each variant in a process of its own.")
    ] = True,
    quick: Annotated[
        bool,
        typer.Option(
            help="A look within a minute: few calls; mlp-relu and stacked-3, no baselines, unless "
            "named."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for cpu.md, cpu.json and the plots; made if missing.")
    ] = Path("bench-results"),
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Instead: time and bytes of one vote over 2 and 4 processes, on gloo, beside "
            "plain DistributedDataParallel and FSDP2. Writes distributed.json and distributed.md.",
        ),
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Instead: print bytes, memory and time of a step on many GPUs, by count.",
        ),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="For --simulate: 1B, 8B, 70B, or a JSON file of width, hidden, layers, keys and "
            "vocabulary; repeat it or separate by commas. Default: all three."
        ),
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(help="For --simulate: how many GPUs, 8 per machine. Default: 8,64,512."),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="For --simulate: per GPU and step, each a group.")
    ] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="For --simulate: per sequence.")] = 4096,
) -> None:
    """Measure what the rules cost on this machine: time and peak memory of whole training steps
    over plain ones.

    The variants of a workload take turns in one process. Beside htv stand baselines that form the
    gradients of all examples: a loop, torch.func's vmap, Opacus and BackPACK (the extra `peers`).
    One that fails is reported with its error.
    """
    if simulate:
        _simulate(_split(model), _split(gpus), sequences, tokens)
        return
    require("htv bench", "cli", "rich", "matplotlib")
    if distributed:
        _check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        from htv.bench import distributed as of_ranks

        typer.echo(of_ranks.run([2, 4], quick, out))
        return
    from dataclasses import replace

    import torch
    from rich.console import Console

    from htv.bench import run as benchmark
    from htv.bench import workloads

    try:
        chosen = workloads.selected(_split(workload) or (list(workloads.QUICK) if quick else None))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--workload") from error
    try:
        variants = workloads.checked_variants(chosen, _split(variant))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--variant") from error
    _check_folder(out)
    try:
        out.mkdir(
            parents=True, exist_ok=True
        )  # what access rights do not tell should show now, not at the end
    except OSError as error:
        raise typer.BadParameter(f"{out} cannot be made: {error}", param_hint="--out") from error
    settings = benchmark.Settings(threads or torch.get_num_threads(), memory=memory)
    if quick:
        settings = replace(settings, **benchmark.QUICK)
    if seconds is not None:
        settings = replace(settings, seconds=seconds)
    peers = peers and not (quick and variants is None)
    if not benchmark.run(chosen, settings, variants, peers, out, Console()):
        raise typer.Exit(1)


def _simulate(
    models: list[str] | None, gpus: list[str] | None, sequences: int, tokens: int
) -> None:
    from htv.bench import simulate

    try:
        chosen = [simulate.model_of(name) for name in models or simulate.MODELS]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    try:
        clusters = [simulate.Cluster(_count(text)) for text in gpus or simulate.CLUSTERS]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpus") from error
    typer.echo(simulate.report(chosen, clusters, sequences, tokens))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(f"{text!r} is no number of GPUs from 2 on")
    return int(text)


@app.command()
def experiment(
    name: Annotated[
        str | None, typer.Argument(help="Which; without a name, all are listed.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A smaller version, within two minutes, to see that it works.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many; each experiment has a default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what it writes. Default: experiments, or experiments/quick."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of idx files (MNIST's format) or of CIFAR's Python batches, for "
            "experiments on images. Default: the digits."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs side by side, in processes that share the threads.")
    ] = 1,
) -> None:
    """Reproduce a result of the papers: the claim beside what is found here.

    Every finished run is kept in NAME.jsonl, and the same command goes on where it was interrupted.
    Ends with tables, a picture (NAME.png), a report (NAME.md) and every number (NAME.json).
    """
    from htv.experiments import NAMES
    from htv.experiments.experiment import load

    if name is None:
        width = max(map(len, NAMES))
        for known, title in NAMES.items():
            typer.echo(f"{known:{width}}  {title}")
        return
    try:
        chosen = load(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    if data is not None and not chosen.images:
        raise typer.BadParameter(
            f"{name} makes its own data and takes no images", param_hint="--data"
        )
    images = _for_digits(data) if chosen.images else ()
    require("htv experiment", "cli", "rich", "matplotlib", *images)
    require(f"htv experiment {name}", "cli,methods", *chosen.needs)
    from rich.console import Console

    from htv.data import DataError
    from htv.experiments.records import RecordsError
    from htv.experiments.run import run

    out = out or Path("experiments", "quick" if quick else "")
    _check_folder(out)
    try:
        run(chosen, quick, seeds, data, out, jobs, Console())
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    except RecordsError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


@app.command()
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="OxIxExT: outputs and inputs of a linear layer, groups and rows of each, such as "
            "4096x4096x16x1024; repeat it or separate by commas. Default: layers of transformers, "
            "768 to 4096 wide."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    statistic: Annotated[
        list[str] | None,
        typer.Option(
            help="median, and-mask, sand-mask, winsorized: one for every kind of tile. "
            "Default: all."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The table to write or add to. Default: htv/tuned.json in the user's cache, which "
            "is found."
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option(
            help="Every step on the CPU, by Triton's interpreter: shows that it works, not what is "
            "fast."
        ),
    ] = False,
) -> None:
    """Measure which tiles the Triton products are fastest with on this GPU, and write the table
    they are looked up in.

    Works on buffers of its own and is never run by training. HTV_TUNED names another table than the
    default one.
    """
    require("htv tune", "cli", "rich")
    import os
    import subprocess
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from htv.tools import tune as tuning

    try:
        shapes = tuple(map(tuning.Shape.parse, _split(shape) or ())) or (
            tuning.DRY_SHAPES if dry else tuning.SHAPES
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from error
    names = tuple(_split(statistic) or tuning.STATISTICS)
    for given, known, hint in (
        *((name, tuning.STATISTICS, "--statistic") for name in names),
        (dtype, tuning.DTYPES, "--dtype"),
    ):
        if given not in known:
            raise typer.BadParameter(f"unknown {given!r}; use {', '.join(known)}", param_hint=hint)
    missing = tuning.why_not(dry)
    if missing:
        raise typer.BadParameter(missing, param_hint="htv tune")
    if dry and os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
        options = (
            [f"--shape={s}" for s in shapes]
            + [f"--statistic={name}" for name in names]
            + [f"--dtype={dtype}"]
        )
        command = [
            sys.executable,
            "-m",
            "htv",
            "tune",
            "--dry",
            *options,
            *([f"--out={out}"] if out else []),
        ]
        raise typer.Exit(
            subprocess.run(
                command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False
            ).returncode
        )

    from htv.triton_kernels import configs

    path = out or (None if dry else configs.user_table())
    if path is not None:
        _check_folder(path.parent)
        if path.is_file():
            try:
                configs.load(path)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--out") from error
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes) * len(names), completed=-1)
        note = lambda text: progress.update(task, description=text, advance=1)
        results = tuning.tune(shapes, tuning.DTYPES[dtype], names, dry, note)
    table = Table("shape", "statistic", "tile", "splits", "ms", "without", "tried")
    for result in results:
        config = result.entry["config"]
        tile = "x".join(str(config[name]) for name in ("BLOCK_O", "BLOCK_I", "BLOCK_R"))
        numbers = result.entry["splits"], f"{result.best:.3f}", f"{result.usual:.3f}", result.tried
        table.add_row(str(result.shape), result.statistic, tile, *map(str, numbers))
    console.print(table)
    if path is None:
        console.print("A dry run: nothing is written without --out.")
    else:
        console.print(f"{tuning.write(results, path)} entries in {path}", soft_wrap=True)


@app.command()
def info() -> None:
    """Show versions, how the package was built, and which backends serve here, or why not."""
    require("htv info", "cli", "rich")
    from rich.console import Console
    from rich.table import Table

    from htv.ops import backend, registry
    from htv.tools import env_info

    facts = Table.grid(padding=(0, 2))
    built = env_info.build()
    rows = {
        **env_info.versions(),
        "CPU": env_info.cpu_name(),
        "CPU kernels": env_info.cpu_capability(),
        **{f"CPU {trait}": choice for trait, choice in env_info.cpu_traits().items()},
        "CUDA": "; ".join(env_info.cuda_devices()) or "no device",
        **({f"build: {key}": _in_one_line(value) for key, value in built.items()} if built else {}),
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    backends = Table("backend", "serves", "why", title="Backends", title_justify="left")
    for name, serves, reason in backend.report():
        backends.add_row(name, "yes" if serves else "no", reason)
    title = "Kernels, and how many statistics they have"
    kernels = Table("op", *registry.DEVICES, title=title, title_justify="left")
    for op, of_backends in registry.by_op().items():
        kernels.add_row(op, *of_backends.values())
    console = Console()
    for part in (facts, backends, kernels):
        console.print(part, highlight=False)


def _for_digits(data: Path | None) -> tuple[str, ...]:
    """The modules that images need: where no folder is given, they are scikit-learn's digits."""
    return ("sklearn",) if data is None else ()


def _split(given: list[str] | None) -> list[str] | None:
    """Options that may be repeated or separated by commas."""
    return (
        [part.strip() for text in given for part in text.split(",") if part.strip()]
        if given
        else None
    )


def _in_one_line(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (" ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


def _checked_device(name: str) -> str:
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise typer.BadParameter(
            f"unknown device {name!r}; use cpu, cuda or cuda:N", param_hint="--device"
        )
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter(
                f"no CUDA device is available to torch {torch.__version__}; install a CUDA build "
                "of torch and check the driver with nvidia-smi, or use --device cpu",
                param_hint="--device",
            )
        if int(index or 0) >= torch.cuda.device_count():
            raise typer.BadParameter(
                f"{name} does not exist; this machine has {torch.cuda.device_count()} CUDA "
                "device(s)",
                param_hint="--device",
            )
    return name


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before any time is spent, without creating it yet."""
    import os

    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is a file; name a folder", param_hint="--out")
    if not os.access(nearest, os.W_OK):
        raise typer.BadParameter(f"{nearest} cannot be written", param_hint="--out")
