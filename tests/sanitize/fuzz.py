"""Fuzz the CPU kernels, seeded, under AddressSanitizer and UBSan: `make test-sanitize`.

    HTV_SANITIZE=1 python setup.py build_ext --build-temp build/sanitize --build-lib build/sanitized
    python tests/sanitize/fuzz.py build/sanitized/htv/_C.abi3.so --out tests/results/sanitize.json

First every call of tests/ops/hostile_calls.py, then random ones: all ops, all statistics, odd
shapes, NaN and infinities, views at odd addresses, every CPU level of this machine, and now and
then a hostile integer or tensor. A hit is whatever ends the process: what a sanitizer reports, or a
signal. Nothing is said about values; the tests do that.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
BATCH = 300  # cases of one process; after a hit the rest gets a new one
HUNG = 300  # seconds of a batch
ENOUGH = 25  # hits
DTYPES = ("float64", "float32", "bfloat16", "float16")
HOSTILE = (-(2**63), -1, 0, 1, 2, 7, 2**31 - 1, 2**32, 2**61, 2**62, 2**63 - 1)
SIZES = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100)
LEVELS = {  # what a processor must say that it has
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "icelake": ("avx512_vpopcntdq", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "gfni"),
    "zen4": ("avx512_bf16",),
}


def levels() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    found = []
    for name, wanted in LEVELS.items():
        if not has.issuperset(wanted):
            break
        found.append(name)
    return found


def sanitized(library: str) -> dict[str, str]:
    """The environment in which Python may load a sanitized library."""
    cxx = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run([cxx, f"-print-file-name={n}"], capture_output=True, text=True, check=True)
        for n in names
    ]
    options = "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": f"{options}:max_allocation_size_mb=3000:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "HTV_BUILD": "0",  # the library is loaded by hand
        "HTV_SANITIZED": library,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ops")]),
    }


# -- cases, by number ------------------------------------------------------------------------------


class Case:
    """One call, made from a seed alone."""

    def __init__(self, seed: int):
        import torch

        self.torch, self.random = torch, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = getattr(torch, self.random.choice(DTYPES))
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def size(self, least: int = 0, most: int = 100) -> int:
        return self.random.choice([n for n in SIZES if least <= n <= most])

    def values(self, *shape: int, dtype=None):
        """A tensor of its own memory, to the last byte of it; some begin at an odd address."""
        torch, count = self.torch, math.prod(shape)
        shift = self.random.choice((0, 0, 1, 3))
        whole = torch.randn(shift + count, generator=self.generator)
        if self.random.random() < 0.2:
            whole[torch.rand(len(whole), generator=self.generator) < 0.2] = self.random.choice(
                (math.nan, math.inf, -math.inf, 0.0, 1e-42)
            )
        return whole.to(dtype or self.dtype)[shift:].view(shape)

    def whole(self, low: int, high: int, count: int):
        return self.torch.randint(low, max(high, low + 1), (count,), generator=self.generator)

    def offsets(self, groups: int, longest: int):
        lengths = [self.random.randint(0, longest) for _ in range(groups)]
        return self.torch.tensor([0, *lengths]).cumsum(0)

    def statistic(self, groups: int) -> dict[str, object]:
        from htv.ops import schema, statistics

        name = self.random.choice(statistics.names())
        most = max(0, (groups - 1) // 2)
        count = self.random.randint(0, groups)
        if name in ("trimmed_mean", "winsorized_mean"):
            count = self.random.randint(0, most)
        if name == "median":
            count = self.random.randint(-1, 1)
        if name == "median_of_means":
            count = max(1, count)
        votes = self.random.uniform(-1, groups)
        k = self.random.choice((0.1, 5.0, math.nan, math.inf))
        return {"statistic": schema.code(name), "count": count, "votes": votes, "k": k}

    def stacked(self):
        groups = self.random.choice((1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 130, 300))
        return {"grads": self.values(groups, self.size(most=65)), **self.statistic(groups)}

    def summary_of(self, given):
        """The arguments of an op of a statistic, as those of its summary."""
        kept = {name: v for name, v in given.items() if name not in ("count", "votes", "k")}
        return {**kept, "log_offset": self.random.choice((1e-10, 1e-37, 2.0, 0.0, math.nan))}

    def stacked_summary(self):
        return self.summary_of(self.stacked())

    def linear_summary(self):
        return self.summary_of(self.linear())

    def conv_summary(self):
        return self.summary_of(self.conv())

    def linear(self):
        groups = self.size(1)
        offsets = self.offsets(groups, self.random.choice((1, 1, 3, 40)))
        rows = int(offsets[-1])
        x, g = self.values(rows, self.size()), self.values(rows, self.size())
        return {"x": x, "grad_output": g, "offsets": offsets, **self.statistic(groups)}

    def together(self):
        first = self.linear()
        x, rows = first["x"], len(first["x"])
        pairs = {"x": [x, self.values(rows, self.size())]}
        pairs |= {"grad_output": [first["grad_output"], self.values(rows, self.size())]}
        groups = len(first["offsets"]) - 1
        grads = [self.values(groups, self.size()) for _ in range(self.random.randint(0, 3))]
        return {"grads": grads, **pairs, "offsets": first["offsets"], **self.statistic(groups)}

    def images(self, *shape: int):
        found = self.values(*shape)
        last = self.random.random() < 0.4
        return found.movedim(1, -1).contiguous().movedim(-1, 1) if last else found

    def conv(self):
        pick, dims = self.random, self.random.randint(1, 3)
        parts = pick.choice((1, 1, 2, 3, 8))
        channels, outputs = parts * pick.randint(0, 9), parts * pick.randint(1, 9)
        kernel, stride, dilation = ([pick.randint(1, 3) for _ in range(dims)] for _ in range(3))
        padding = [pick.randint(0, 2) for _ in range(dims)]
        out = [pick.randint(0, 5) for _ in range(dims)]
        space = []
        for o, k, s, p, d in zip(out, kernel, stride, padding, dilation, strict=True):
            seen = (o - 1) * s + (k - 1) * d + 1
            space.append(max(0, seen - 2 * p) + pick.randint(0, 2))
        offsets = self.offsets(self.size(1, 17), 2)
        samples = int(offsets[-1])
        return {
            "x": self.images(samples, channels, *space),
            "grad_output": self.images(samples, outputs, *out),
            "offsets": offsets,
            **{"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation},
            "groups": parts,
            **self.statistic(len(offsets) - 1),
        }

    def embedding(self):
        rows, tokens, groups = self.size(), self.size(), self.size(1)
        rows = rows if tokens else 0
        table = {"grad_output": self.values(rows, self.random.choice((0, 1, 3, 16, 70, 300)))}
        table |= {"ids": self.whole(0, tokens, rows), "voter": self.whole(0, groups, rows)}
        return {**table, "num_embeddings": tokens, "groups": groups, **self.statistic(groups)}

    def norm_sums(self):
        shape = self.size(most=17), self.size(), self.random.choice((0, 1, 7, 64, 1030))
        moments = [self.values(*shape[:2], dtype=self.wide) for _ in range(2)]
        return dict(enumerate((self.values(*shape), self.values(*shape), *moments)))

    def group_norm_backward(self):
        samples, groups, each = self.size(most=8), self.size(1, 8), self.size(1, 8)
        space = [self.size(most=17) for _ in range(self.random.randint(0, 2))]
        shape = samples, groups * each, *space
        weight = self.values(groups * each, dtype=self.wide)
        moments = [self.values(samples, groups, dtype=self.wide) for _ in range(2)]
        needs_x = self.random.random() < 0.5
        images = self.values(*shape), self.values(*shape)
        return dict(enumerate((*images, weight, *moments, needs_x)))

    def shifted_cross_entropy(self):
        rows, classes = self.size(), self.random.choice((1, 2, 7, 16, 33, 257))
        shift = self.values(rows, classes, dtype=self.wide)
        if self.random.random() < 0.3 and rows:
            shift = shift[:1].expand(rows, classes)
        weight = self.random.choice((None, self.values(classes, dtype=self.wide)))
        numbers = {"temperature": self.random.choice((0.5, 1.0, 0.0)), "weight": weight}
        numbers |= {"ignore_index": self.random.choice((-100, 0))}
        numbers |= {"smoothing": self.random.choice((0.0, 0.3))}
        logits, targets = self.values(rows, classes), self.whole(0, classes, rows)
        return {"logits": logits, "targets": targets, "shift": shift, **numbers}

    def shifted_cross_entropy_grad(self):
        given = self.shifted_cross_entropy()
        of_rows = [self.values(len(given["targets"]), dtype=self.wide) for _ in range(3)]
        return {"grad": of_rows[0], **given, "peak": of_rows[1], "log_sum": of_rows[2]}

    OPS = (stacked, stacked, linear, linear, conv, conv, embedding, norm_sums, group_norm_backward)
    OPS += (shifted_cross_entropy, shifted_cross_entropy_grad)
    OPS += (stacked_summary, linear_summary, conv_summary, together)

    def made(self):
        """(op, its arguments)"""
        from hostile_calls import DISTORTED

        op = self.random.choice(self.OPS)
        given = op(self)
        if self.random.random() < 0.25:
            name = self.random.choice(list(given))
            value = given[name]
            if isinstance(value, self.torch.Tensor):
                try:
                    given[name] = self.random.choice(list(DISTORTED.values()))(value)
                except RuntimeError:
                    pass  # there is no such tensor
            elif isinstance(value, list):
                given[name] = [
                    self.random.choice(HOSTILE) if self.random.random() < 0.6 else v for v in value
                ]
            elif isinstance(value, int) and not isinstance(value, bool):
                given[name] = self.random.choice(HOSTILE)
        return op.__name__, list(given.values())


def worker(first: int, last: int, at: int) -> None:
    """Cases first to last - 1, each announced before it is made and after, to a pipe."""
    import torch
    from hostile_calls import CLEAR, arguments, cases

    import htv  # noqa: F401 -- declares the ops

    torch.ops.load_library(os.environ["HTV_SANITIZED"])
    torch.set_num_threads(1)
    fixed, available = list(cases()), levels()
    for number in range(first, last):
        os.write(at, f"{number} begins\n".encode())
        os.environ["HTV_CPU_CAPABILITY"] = available[number % len(available)]
        if number < len(fixed):
            _, op, changed = fixed[number]
            changed = {name: v() if callable(v) else v for name, v in changed.items()}
            given = list((arguments()[op] | changed).values())
        else:
            op, given = Case(number).made()
        try:
            getattr(torch.ops.htv, op).default(*given)
            said = "answered"
        except CLEAR:
            said = "refused"
        os.write(at, f"{number} {said}\n".encode())


def batch(first: int, last: int, environment: dict[str, str]) -> tuple[dict[int, str], str]:
    """What became of the cases of one process, and what it printed."""
    receive, send = os.pipe()
    command = [sys.executable, str(HERE), "--worker", str(first), str(last), str(send)]
    child = subprocess.Popen(
        command, env=environment, pass_fds=[send], stderr=subprocess.PIPE, text=True
    )
    os.close(send)
    try:
        printed = child.communicate(timeout=HUNG)[1]
    except subprocess.TimeoutExpired:
        child.kill()
        printed = "hung\n" + child.communicate()[1]
    lines = os.fdopen(receive).read().splitlines()
    return {int(n): said for n, _, said in (line.partition(" ") for line in lines)}, printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--cases", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=480, help="begin no batch after that long")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    environment = sanitized(str(Path(given.library).resolve()))
    begun, at, hits, said = time.monotonic(), 0, [], {}
    while at < given.cases and time.monotonic() - begun < given.seconds and len(hits) < ENOUGH:
        last = min(at + BATCH, given.cases)
        became, printed = batch(at, last, environment)
        unfinished = [n for n, word in became.items() if word == "begins"]
        said |= {n: word for n, word in became.items() if word != "begins"}
        if not became or (not unfinished and max(became) < last - 1):
            raise SystemExit(f"the fuzz itself failed:\n{printed}")
        for number in unfinished:
            hits.append({"case": number, "printed": printed[:3000]})
            print(f"case {number}:\n{printed[:3000]}", flush=True)
        at = max(became) + 1
    sys.path.insert(0, str(ROOT))
    from htv.tools import env_info

    words = list(said.values())
    cxx = [os.environ.get("CXX", "g++"), "--version"]
    compiler = subprocess.run(cxx, capture_output=True, text=True)
    out = f" --out {given.out}" if given.out else ""
    record = env_info.stamp("python", "tests/sanitize/fuzz.py", given.library, *out.split())
    del record["machine"]["build"]  # is of the library without sanitizers
    record |= {
        "sanitizers": "address, undefined; -fno-sanitize-recover=all",
        "compiler": compiler.stdout.splitlines()[0],
        "levels": levels(),
        "cases": len(said) + len(hits),
        "answered": words.count("answered"),
        "refused": words.count("refused"),
        "hits": len(hits),
        "cases_with_hits": [hit["case"] for hit in hits],
        "seconds": round(time.monotonic() - begun),
    }
    print({name: record[name] for name in ("cases", "answered", "refused", "hits", "seconds")})
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return min(1, len(hits))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*map(int, sys.argv[2:5]))
    else:
        sys.exit(main())
