"""Calls of ops that must be refused, each made in a process of its own; prints what became of them.

Run by `test_hostile.py`, which asserts; also what the fuzz under sanitizers begins with.
"""

import json
import math
import os
import resource
import signal
import sys

import torch

from htv.ops import schema

CLEAR = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
GROUPS = 5
SUMMARIES = ("stacked_summary", "linear_summary", "conv_summary")
MASK = (schema.code("and_mask"), 2, 0.0, 0.0)
FAR = (2**31 - 1, 2**61, 2**62, 2**63 - 1)


def arguments():
    """What every op takes, by name, in order."""
    value, number = torch.randn, lambda *n: torch.tensor(n)
    numbers = dict(zip(("statistic", "count", "votes", "k"), MASK, strict=True))
    summary = {"statistic": schema.code("geometric_mean"), "log_offset": 1e-10}
    ids, group_index = number(0, 1, 2, 1, 0), number(0, 1, 2, 3, 4)
    table = {"grad_output": value(5, 4), "ids": ids, "voter": group_index}
    sizes = {"num_embeddings": 3, "groups": GROUPS}
    window = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    window |= {"groups": 1}
    rows = {"logits": value(4, 7), "targets": number(0, 6, 3, -100), "shift": value(4, 7)}
    rows |= {"temperature": 1.0, "weight": value(7).abs(), "ignore_index": -100, "smoothing": 0.1}
    offsets = {"offsets": torch.arange(GROUPS + 1)}
    images = {"x": value(5, 4, 6, 6), "grad_output": value(5, 8, 6, 6)}
    moments = {"mean": value(4, 3), "rstd": value(4, 3)}
    of_rows = {"grad": value(4), **rows, "peak": value(4), "log_sum": value(4)}
    norm = {"grad": value(4, 6, 5), "x": value(4, 6, 5), "weight": value(6), **moments}
    return {
        "stacked": {"grads": value(GROUPS, 7), **numbers},
        "linear": {"x": value(5, 7), "grad_output": value(5, 3), **offsets, **numbers},
        "together": {
            "grads": [value(GROUPS, 7), value(GROUPS, 2)],
            "x": [value(5, 7), value(5, 4)],
            "grad_output": [value(5, 3), value(5, 1)],
            **offsets,
            **numbers,
        },
        "conv": {**images, **offsets, **window, **numbers},
        "embedding": {**table, **sizes, **numbers},
        "embedding_contributions": {**table, "tokens": number(0, 2), **sizes},
        "norm_sums": {"grad": value(4, 3, 5), "x": value(4, 3, 5), **moments},
        "group_norm_backward": {**norm, "needs_x": True},
        "shifted_cross_entropy": rows,
        "shifted_cross_entropy_grad": of_rows,
        "stacked_summary": {"grads": value(GROUPS, 7), **summary},
        "linear_summary": {"x": value(5, 7), "grad_output": value(5, 3), **offsets, **summary},
        "conv_summary": {**images, **offsets, **window, **summary},
    }


def resized(tensor, elements):
    """The same sizes over a storage that became too short."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(elements * tensor.element_size())
    return tensor


DISTORTED = {
    "freed": lambda t: resized(t, 0),
    "freed, from an offset on": lambda t: resized(torch.cat([t, t])[len(t) :], 0),
    "too short": lambda t: resized(t, t.numel() - 1),
    "sparse": lambda t: t.to_sparse(),
    "of mkldnn": lambda t: t.to_mkldnn(),
    "on another device": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "of a dimension more": lambda t: t.unsqueeze(0),
    "of a row more": lambda t: torch.cat([t, t[:1]]),
    "of other numbers": lambda t: t.int() if t.is_floating_point() else t.double(),
}
ACCEPTED = {  # these are what they should be
    ("stacked", "grads", "on another device"),
    ("stacked", "grads", "of a row more"),
    ("stacked_summary", "grads", "on another device"),
    ("stacked_summary", "grads", "of a row more"),
    ("embedding_contributions", "tokens", "of a row more"),
}
# No kernel of ours serves it on the CPU: the definition checks ids, and torch its own memory.
LOOKUPS = ("ids", "voter", "tokens", "grad_output")
ACCEPTED |= {("embedding_contributions", name, how) for name in LOOKUPS for how in DISTORTED}


def tensors_that_are_not():
    for op, given in arguments().items():
        for name, value in given.items():
            tensors = value if isinstance(value, list) else [value]
            if not isinstance(tensors[0], torch.Tensor):
                continue
            for how, distort in DISTORTED.items():
                if how == "of mkldnn" and tensors[0].dtype != torch.float32:
                    continue
                if (op, name, how) not in ACCEPTED:
                    yield f"{op}: {name} {how}", op, {name: lambda v=value, d=distort: first(v, d)}


def first(value, distort):
    """A tensor, or the first one of a list, distorted."""
    return [distort(value[0]), *value[1:]] if isinstance(value, list) else distort(value)


def lists_that_do_not_fit():
    for name in ("x", "grad_output"):
        for kept in (0, 1):
            tensors = arguments()["together"][name][:kept]
            yield f"together: {name} of {kept} tensors", "together", {name: tensors}
    yield "together: no offsets", "together", {"offsets": None}


def integers_that_do_not_fit():
    for op in ("stacked", "linear", "together", "conv"):
        for name in ("trimmed_mean", "winsorized_mean", "median"):
            for count in (-2, 3, *FAR, -(2**63)):
                changed = {"statistic": schema.code(name), "count": count}
                yield f"{op}: {name} of {count}", op, changed
    for count in (0, -1, 6, *FAR):
        changed = {"statistic": schema.code("median_of_means"), "count": count}
        yield f"stacked: {count} buckets", "stacked", changed
    for code in (-1, -(2**63), 11, *FAR):
        for op in ("stacked", "linear", "together", "conv", "embedding", *SUMMARIES):
            yield f"{op}: statistic {code}", op, {"statistic": code}
    for op in SUMMARIES:
        for name in ("median", "trimmed_mean", "winsorized_mean", "median_of_means"):
            yield f"{op}: of {name}", op, {"statistic": schema.code(name)}
        for bad in (0.0, -1.0, 1e-40, math.inf, math.nan):
            yield f"{op}: log_offset {bad}", op, {"log_offset": bad}
    for op in ("conv", "conv_summary"):
        yield from windows_that_do_not_fit(op)
    for op in ("embedding", "embedding_contributions"):
        for number in (-1, 1, -(2**63)):
            yield f"{op}: {number} rows", op, {"num_embeddings": number}
        for number in (0, -1, 3, -(2**63)):
            yield f"{op}: {number} groups", op, {"groups": number}
        for name in ("ids", "voter"):
            for bad in (-1, 7, 2**62, -(2**63)):
                yield f"{op}: {name} {bad}", op, {name: torch.tensor([0, bad, 1, 1, 0])}
    for number in (2**61, 2**62, 2**63 - 1):
        yield f"embedding: {number} rows", "embedding", {"num_embeddings": number}
        yield f"embedding: {number} groups", "embedding", {"groups": number}
    for bad in (-1, 3, 2**62):
        changed = {"tokens": torch.tensor([0, bad])}
        yield f"embedding_contributions: token {bad}", "embedding_contributions", changed
    for op in ("linear", "together", "conv", "linear_summary", "conv_summary"):
        bounds = [[0, 3, 2, 4, 5, 5], [-1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]]
        for bad in (*bounds, [0, 2**62, 5], [5], []):
            changed = {"offsets": torch.tensor(bad, dtype=torch.int64)}
            yield f"{op}: offsets {bad}", op, changed
        yield f"{op}: offsets apart", op, {"offsets": torch.arange(12)[::2]}
    for op in ("shifted_cross_entropy", "shifted_cross_entropy_grad"):
        for bad in (-1, 7, 2**62, -(2**63)):
            yield f"{op}: class {bad}", op, {"targets": torch.tensor([0, bad, 1, 2])}


def windows_that_do_not_fit(op):
    for name, fine in (("kernel", 0), ("stride", 0), ("dilation", 0), ("padding", -1)):
        for far in (fine, -1, -(2**63)):
            for groups in (1, 4):
                changed = {name: [far, far], "groups": groups}
                yield f"{op}: {name} {far}, {groups} groups", op, changed
    for far in FAR:
        for groups in (1, 4):
            for name in ("kernel", "stride", "dilation"):
                for at in ([far, far], [far, 1], [1, far]):
                    changed = {name: at, "groups": groups}
                    yield f"{op}: {name} {at}, {groups} groups", op, changed
            changed = {"padding": [far, far], "groups": groups}
            yield f"{op}: padding {far}, {groups} groups", op, changed
    for groups in (0, -1, 3, -(2**63), *FAR):
        yield f"{op}: {groups} groups of channels", op, {"groups": groups}


def layouts_that_are_not():
    rows = torch.randn(7, 5).t()
    for of in ("", "_summary"):
        linear, stacked, conv = f"linear{of}", f"stacked{of}", f"conv{of}"
        yield f"{linear}: x transposed", linear, {"x": rows}
        yield f"{stacked}: grads transposed", stacked, {"grads": rows}
        yield f"{stacked}: grads expanded", stacked, {"grads": torch.randn(1, 7).expand(5, 7)}
        yield f"{stacked}: no groups", stacked, {"grads": torch.randn(0, 7)}
        yield f"{conv}: x expanded", conv, {"x": torch.randn(1, 4, 6, 6).expand(5, 4, 6, 6)}
        yield f"{conv}: sees too much", conv, {"padding": [0, 1]}
        window = ("kernel", "stride", "padding", "dilation")
        yield f"{conv}: no spatial dims", conv, dict.fromkeys(window, [])
    apart = torch.randn(4, 14)[:, ::2]
    yield "shifted_cross_entropy: logits apart", "shifted_cross_entropy", {"logits": apart}
    none = torch.randn(4, 0)
    yield "shifted_cross_entropy: no classes", "shifted_cross_entropy", {"logits": none}
    huge = torch.empty(0, 2**62)
    yield "linear: columns without end", "linear", {"x": huge, "grad_output": torch.empty(0, 3)}


def cases():
    yield from tensors_that_are_not()
    yield from lists_that_do_not_fit()
    yield from integers_that_do_not_fit()
    yield from layouts_that_are_not()


def outcome(op: str, changed: dict) -> str:
    """Return "refused", "answered" or what went wrong."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(60)
        try:
            changed = {name: v() if callable(v) else v for name, v in changed.items()}
            getattr(torch.ops.htv, op).default(*(arguments()[op] | changed).values())
            said = "answered"
        except CLEAR as error:
            said = "refused" if str(error).strip() else f"without a word: {type(error).__name__}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(send, said[:500].encode())
        os._exit(0)
    os.close(send)
    said = b"".join(iter(lambda: os.read(receive, 4096), b"")).decode()
    os.close(receive)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return said if os.WEXITSTATUS(status) == 0 else f"ended with {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: outcome(op, changed) for name, op, changed in cases()}, sys.stdout)
