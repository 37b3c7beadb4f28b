"""Compare htv with one example at a time on every architecture of transformers, timm and PEFT.

python tests/zoo_sweep.py [--only PATTERN] [--again OUTCOME] [--jobs 2] [--resume] [--out PATH]

Each is built tiny with random weights (support/sweep_models.py) and judged in a process of its own.
Writes the record and, of tests/results/zoo.json, docs/coverage.md. Exits with 1 if an architecture
is silently wrong or crashes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing import connection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import htv  # noqa: E402
from htv.tools.check import aggregated, one_group_at_a_time  # noqa: E402
from htv.tools.env_info import stamp  # noqa: E402
from htv.tools.files import replace_text  # noqa: E402

RECORD, PAGE = ROOT / "tests/results/zoo.json", ROOT / "docs/coverage.md"
RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
OUTCOMES = {
    "exact": "the gradient is that of one example at a time under every rule",
    "refused": "an error names what cannot be told apart by example",
    "wrong": "a gradient differs, silently",
    "crash": "an error that is not htv's own",
    "timeout": "not done within the limit",
    "could-not-build": "left out of the count: nothing to compare with",
}
SECONDS, MEMORY = 60, 8 << 30  # what one architecture may take
# Of the largest contribution to a parameter, and to any: what counts as equal, by type.
TOLERANCES = {torch.float64: (1e-7, 1e-10), torch.float32: (2e-3, 1e-4)}


class NothingToCompare(Exception):
    """Say why an architecture has no gradient of one example."""


# -- one example at a time -------------------------------------------------------------------------


class Loss:
    """A fixed random projection of those outputs that have the examples in dim 0."""

    def __init__(self, model: nn.Module, batch: dict[str, object], examples: int):
        floats = lambda t: isinstance(t, Tensor) and t.is_floating_point()
        dtype = torch.get_default_dtype()
        self.batch = {key: t.to(dtype) if floats(t) else t for key, t in batch.items()}
        self.model, self.examples = model, examples
        self.buffers = [(b, b.clone()) for b in model.buffers()]
        whole, one = self.outputs(slice(None)), self.outputs(slice(0, 1))
        self.places = [
            place
            for place, (many, single) in enumerate(zip(whole, one, strict=False))
            if many.dim() and many.shape[0] == examples and many.requires_grad
            and single.shape == (1, *many.shape[1:])
        ]  # fmt: skip
        if len(whole) != len(one) or not self.places:
            raise NothingToCompare("no output of it has the examples in dim 0")
        self.directions = [
            torch.randn(whole[place].shape).to(whole[place]) for place in self.places
        ]

    def outputs(self, rows: slice) -> list[Tensor]:
        for buffer, saved in self.buffers:
            buffer.data.copy_(saved)
        torch.manual_seed(0)
        of_batch = lambda t: isinstance(t, Tensor) and t.dim() and t.shape[0] == self.examples
        batch = {key: t[rows] if of_batch(t) else t for key, t in self.batch.items()}
        result = self.model(**batch)
        leaves = pytree.tree_leaves(dict(result) if hasattr(result, "items") else result)
        return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        outputs = self.outputs(rows)
        pairs = zip(self.places, self.directions, strict=True)
        return sum((outputs[place] * direction[rows]).sum() for place, direction in pairs)


def differs(found: Tensor | None, wanted: Tensor | None, budget: Tensor | float) -> float:
    """By how much more than its budget a gradient is off; none of it counts as zeros."""
    if found is None or wanted is None:
        other = wanted if found is None else found
        return 0.0 if other is None else float((other.abs() - budget).max())
    excess = (found - wanted).abs() - budget
    return float("inf") if excess.isnan().any() else float(excess.max())


def prepared(model: nn.Module) -> None:
    """In eval mode, with statistics as if trained, and no parameter of equal elements: a gate of
    zeros would hide what is behind it. Without hooks on parameters: these act on the aggregate, but
    in the oracle on every example's gradient.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        for p in model.parameters():
            if p._backward_hooks:
                p._backward_hooks.clear()
            if p.requires_grad and p.numel() and p.is_floating_point() and p.min() == p.max():
                p.add_(0.1 * torch.randn_like(p))


def rounds(loss: Tensor) -> bool:
    """Whether a model in float64 computes in another type in between, as its graph tells."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if type(node).__name__ == "ToCopyBackward0":
                return True
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def judged(model: nn.Module, loss: Loss, tolerances: tuple[float, float]) -> tuple[str, str]:
    """The outcome, and its reason."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    plain = dict(zip(parameters, grads, strict=True))
    contributions = one_group_at_a_time(lambda e: loss(slice(e, e + 1)), parameters, loss.examples)
    reached = {name: c for name, c in contributions.items() if c is not None and c.numel()}
    of_all = max((float(c.abs().max()) for c in reached.values()), default=0.0)
    if not of_all or of_all != of_all or of_all == float("inf"):
        raise NothingToCompare(f"its largest gradient is {of_all}")
    relative, absolute = tolerances
    budgets = {
        name: relative * float(c.abs().max()) + absolute * of_all for name, c in reached.items()
    }
    for name, c in reached.items():
        if differs(c.sum(dim=0), plain[name], budgets[name]) > 0:
            raise NothingToCompare(
                "its examples are coupled, or it is random: the plain gradient is not the sum of "
                "theirs"
            )
    for rule in RULES:
        model.zero_grad()
        try:
            with htv.attach(model, rule):
                value = loss()
                value.backward()
        except Exception as error:
            return refusal(error)
        for name, parameter in parameters.items():
            c = contributions[name]
            wanted = plain[name] if c is None or rule == htv.Mean() else aggregated(c, rule)
            budget = budgets.get(name, 0.0)
            if c is not None and c.numel() and isinstance(rule, htv.AndMask):
                # The sign of rounding noise means nothing.
                noise = ((c != 0) & (c.abs() <= budget)).any(dim=0)
                budget = torch.where(noise, float("inf"), budget)
            excess = differs(parameter.grad, wanted, budget) if parameter.numel() else 0.0
            if excess > 0:
                return "wrong", f"{rule}: {name} is off by {excess:.2g}"
    return "exact", ""


def told(error: BaseException | None) -> str:
    """An error on one line, without where packages are installed."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"/\S*/site-packages/", "", said)


def refusal(error: Exception) -> tuple[str, str]:
    """htv's own errors are refusals: raised by a `raise` of its code. Others are crashes."""
    said = told(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = str(Path(htv.__file__).parent) in frame.filename and (frame.line or "").startswith(
        "raise"
    )
    if isinstance(error, htv.UnsupportedError) or own:
        return "refused", said
    return "crash", f"{said} ({Path(frame.filename).name}:{frame.lineno})"


def judge(builder: Callable[[], Iterator]) -> dict[str, str]:
    """Build an architecture, in float64 if it can, and compare: its row in the record."""
    first: Exception | None = None
    for dtype in TOLERANCES:
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        ways = builder()
        while True:
            try:
                model, batch, what = next(ways)
                model.to(dtype)
                prepared(model)
                loss = Loss(model, batch, examples())
                outcome, reason = judged(model, loss, TOLERANCES[dtype])
                kind = str(dtype).removeprefix("torch.")
                if outcome == "wrong" and dtype == torch.float64 and rounds(loss()):
                    kind = "float64, parts of it in float32"
                    outcome, reason = judged(model, loss, TOLERANCES[torch.float32])
            except StopIteration:
                break
            except MemoryError:
                raise
            except Exception as error:
                first = first or error
                continue
            row = {"outcome": outcome, "inputs": what, "type": kind}
            return row | ({"reason": reason} if reason else {})
    return {"outcome": "could-not-build", "reason": told(first)}


def examples() -> int:
    from support import sweep_models

    return sweep_models.N


# -- a process for each ----------------------------------------------------------------------------


def child(builder: Callable[[], Iterator], answer: connection.Connection) -> None:
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    try:
        row = judge(builder)
    except BaseException as error:
        row = {"outcome": "could-not-build", "reason": told(error)}
    answer.send(row)


def sweep(
    builders: dict[str, Callable[[], Iterator]],
    jobs: int,
    seconds: float,
    done: Callable[[str, dict[str, object]], None],
) -> None:
    """Judge each in a forked process; done(name, row) is called as they end."""
    context = multiprocessing.get_context("fork")  # which has imported everything already
    waiting, running = list(builders.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, builder = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(builder, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        ready = set(connection.wait(list(running), timeout=1))
        for receiver, (name, process, start) in list(running.items()):
            took = time.monotonic() - start
            if receiver in ready:
                try:
                    row = receiver.recv()
                except EOFError:
                    process.join()
                    row = {"outcome": "crash", "reason": f"its process ended: {process.exitcode}"}
            elif took > seconds:
                process.kill()
                row = {"outcome": "timeout", "reason": f"not done in {seconds:.0f} s"}
            else:
                continue
            del running[receiver]
            process.join(5)
            if process.is_alive():
                process.kill()
            done(name, row | {"seconds": round(took, 1)})


# -- the record, and the page made of it -----------------------------------------------------------


def table(rows: list[list[str]]) -> list[str]:
    lines = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def shortened(reason: str, length: int = 420) -> str:
    """Without the remedy, which is alike in all."""
    reason = reason.partition(" Remedy: ")[0]
    return reason if len(reason) <= length else reason[:length].rpartition(" ")[0] + " ..."


def page(record: dict) -> str:
    """docs/coverage.md, from a record alone."""
    rows = record["architectures"]
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in rows))
    counts = {
        kind: Counter(r["outcome"] for name, r in rows.items() if name.startswith(f"{kind}/"))
        for kind in kinds
    }
    total = Counter(r["outcome"] for r in rows.values())
    built = len(rows) - total["could-not-build"]
    machine, packages = record["machine"], record["packages"]
    lines = [
        "# Coverage",
        "",
        f"Written by `{record['command']}` from tests/results/zoo.json; a test fails where it is",
        "not current.",
        "",
        "Every architecture that transformers, timm and PEFT name is built tiny with random",
        "weights, in eval mode, and its gradients under "
        + ", ".join(f"`{rule}`" for rule in record["rules"]),
        "are compared with those of one example at a time.",
        "",
        f"Of {built} architectures that build, **{total['exact']} are exact "
        f"({total['exact'] / max(1, built):.1%})**, {total['refused']} are refused,",
        f"{total['wrong']} are silently wrong, {total['crash']} crash, {total['timeout']} take "
        f"longer than {record['seconds']} s.",
        "",
        f"{record['date'][:10]}, {machine['cpu']}, torch {machine['versions']['torch']}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + ".",
        "",
        *table(
            [["", *OUTCOMES]]
            + [[kind, *(counts[kind][o] for o in OUTCOMES)] for kind in kinds]
            + [["all", *(total[o] for o in OUTCOMES)]]
        ),
        "",
        *(f"- *{outcome}*: {meaning}" for outcome, meaning in OUTCOMES.items()),
    ]
    alone = sum(r.get("inputs") == "text alone" for r in rows.values())
    single = sum("float32" in r.get("type", "") for r in rows.values())
    lines += [
        "",
        f"{alone} image-text models are given text alone, for their images come in a form of",
        f"their own. {single} models compute in float32, or in parts, and are compared as that",
        "rounds, to 0.002 of the largest contribution to a parameter, where 1e-7 is usual.",
    ]
    for outcome in OUTCOMES:
        found = {name: r for name, r in rows.items() if r["outcome"] == outcome}
        if outcome != "exact" and found:
            lines += ["", f"## {outcome.capitalize().replace('-', ' ')}", ""]
            lines += table(
                [["architecture", "reason"]]
                + [[name, shortened(r["reason"])] for name, r in sorted(found.items())]
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="those whose name this pattern or text fits; others stay")
    parser.add_argument("--again", choices=OUTCOMES, help="those the record says this of")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each")
    parser.add_argument("--resume", action="store_true", help="keep what the record has")
    parser.add_argument("--out", type=Path, default=RECORD)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)

    from support import sweep_models

    fits = lambda name: not chosen.only or chosen.only in name or fnmatch.fnmatch(name, chosen.only)
    builders = {name: b for name, b in sweep_models.catalogue().items() if fits(name)}
    if not builders:
        parser.error(f"--only {chosen.only} fits no architecture")
    places = {name: place for place, name in enumerate(sweep_models.catalogue())}
    kept = {}
    if (chosen.resume or chosen.only or chosen.again) and chosen.out.is_file():
        kept = json.loads(chosen.out.read_text())["architectures"]
    if chosen.again:
        said = lambda name: kept.get(name, {}).get("outcome")
        builders = {name: b for name, b in builders.items() if said(name) == chosen.again}
    elif chosen.resume:
        builders = {name: b for name, b in builders.items() if name not in kept}
    record = stamp("python", "tests/zoo_sweep.py") | {
        "packages": {name: metadata.version(name) for name in ("transformers", "timm", "peft")},
        "rules": [repr(rule) for rule in RULES],
        "seconds": round(chosen.seconds),
    }

    def write() -> None:
        record["architectures"] = dict(sorted(kept.items(), key=lambda item: places[item[0]]))
        replace_text(chosen.out, json.dumps(record, indent=1) + "\n")

    def done(name: str, row: dict[str, object]) -> None:
        kept[name] = row
        write()
        print(f"{row['seconds']:5.1f} s  {row['outcome']:15} {name}  {row.get('reason', '')[:160]}",
              flush=True)  # fmt: skip

    kept = {name: row for name, row in kept.items() if name in places}
    sweep(builders, chosen.jobs, chosen.seconds, done)
    write()
    if chosen.out == RECORD:
        replace_text(PAGE, page(record))
    outcomes = Counter(row["outcome"] for row in kept.values())
    print(", ".join(f"{outcomes[outcome]} {outcome}" for outcome in OUTCOMES))
    return int(bool(outcomes["wrong"] or outcomes["crash"]))


if __name__ == "__main__":
    sys.exit(main())
