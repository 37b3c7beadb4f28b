"""How ops and steps behave on a device: captured, compiled, on other streams, without waiting, on
large tensors.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import htv
from device_suite import Skipped
from htv.bench import models
from htv.ops import backend, reference, schema
from htv.rules import Statistic

Found = Iterator[tuple[str, Callable[[], None]]]
AND_MASK, MEDIAN = Statistic("and_mask", 2), Statistic("median")
HANDLERS = {"cuda": ("stacked", "linear"), "triton": ("stacked", "linear", "conv", "embedding")}


# ---- ops, and steps of attached models ----


def operators(device: str) -> Iterator[tuple[str, str]]:
    """(backend, op) of every op with a kernel of its own on the device."""
    for server, ops in HANDLERS.items():
        yield from ((server, op) for op in ops if server == "triton" or device == "cuda")


def arguments(op: str, device: str, ragged: bool = False) -> list:
    """Of an operator, but for the statistic. Groups of one row each, which every backend serves,
    unless `ragged`.
    """
    x, g = torch.randn(6, 40, device=device), torch.randn(6, 30, device=device)
    offsets = torch.tensor([0, 1, 4, 6]) if ragged else torch.arange(7)
    if op == "stacked":
        return [x]
    if op == "linear":
        return [x, g, offsets]
    if op == "conv":
        return [
            x.view(6, 4, 10),
            torch.randn(6, 5, 10, device=device),
            offsets,
            [3],
            [1],
            [1],
            [1],
            1,
        ]
    ids, group_index = torch.randint(0, 9, (6,), device=device), torch.arange(6, device=device)
    return [g, ids, group_index, 9, 6]


def call(server: str, op: str, given: list, statistic: Statistic) -> list[Tensor]:
    return list(backend.operator(op, server)(*given, *schema.numbers(statistic)))


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


MODELS = {  # models whose forward is the same work for any batch: (model, a batch, classes)
    "mlp": (lambda: models.mlp(), lambda: torch.randn(8, 12), 4),
    "transformer": (
        lambda: models.transformer(29, 16, 2, 2),
        lambda: torch.randint(0, 29, (6, 9)),
        29,
    ),
    "llama block": (lambda: models.LlamaBlock(16, 2, 24), lambda: torch.randn(5, 9, 16), 16),
    "resnet18": (lambda: models.ResNet18(), lambda: torch.randn(4, 3, 32, 32), 5),
}


class AttachedStep:
    """Forward, loss and backward of a model attached to a rule, on a batch that stays in place."""

    def __init__(self, name: str, rule: htv.Rule, device: str, compiler: str | None = None):
        torch.manual_seed(0)
        model, batch, classes = MODELS[name]
        self.model, self.x = model().to(device), batch().to(device)
        self.handle = htv.attach(self.model, rule)
        self.forward = (
            torch.compile(self.model, fullgraph=True, backend=compiler) if compiler else self.model
        )
        shape = self.model(self.x).shape[:-1]
        self.targets = torch.randint(0, classes, shape).to(device)
        self.criterion = nn.CrossEntropyLoss()

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.criterion(self.forward(self.x).flatten(0, -2), self.targets.flatten()).backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters()]

    def draw(self) -> None:
        """Another batch in the same memory."""
        with torch.no_grad():
            self.x.copy_(
                torch.randint_like(self.x, 29)
                if self.x.dtype == torch.int64
                else torch.randn_like(self.x)
            )


def needs_gpu(run: Callable[[], None], dry: bool) -> Callable[[], None]:
    def skip() -> None:
        raise Skipped("needs a GPU")

    return skip if dry else run


# ---- CUDA graphs ----


def captured(dry: bool) -> Found:
    for server, op in operators("cuda"):
        for statistic in (AND_MASK, MEDIAN):
            for ragged in (
                (False, True) if server == "triton" and op in ("linear", "conv") else (False,)
            ):
                what = f"{op} by {server}, {statistic.name}{', ragged' * ragged}"
                run = lambda s=server, o=op, t=statistic, r=ragged: assert_op_is_captured(
                    s, o, t, r
                )
                yield what, needs_gpu(run, dry)
    for name in MODELS:
        for rule in (htv.AndMask(0.4), htv.Median()):
            yield (
                f"step of {name}, {rule}",
                needs_gpu(lambda n=name, r=rule: assert_step_is_captured(n, r), dry),
            )


def require_server(server: str, op: str, statistic: Statistic, device: str = "cuda") -> None:
    reason = backend.why_not(
        server, backend.Problem(op, statistic.name, torch.device(device), longest=1)
    )
    if reason is not None:
        raise Skipped(reason)


def warmed_up(run: Callable[[], object]) -> None:
    """On a side stream, as captures want it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def assert_op_is_captured(server: str, op: str, statistic: Statistic, ragged: bool) -> None:
    require_server(server, op, statistic)
    given = arguments(op, "cuda", ragged)
    warmed_up(lambda: call(server, op, given, statistic))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(server, op, given, statistic)
    given[0].normal_()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    equal(results, call(server, op, given, statistic))


def assert_step_is_captured(name: str, rule: htv.Rule) -> None:
    step = AttachedStep(name, rule, "cuda")
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    step.model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    held = [p.grad for p in step.model.parameters()]  # where replays write
    step.draw()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [grad.clone() for grad in held]
    step()
    for found, wanted in zip(replayed, step.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# ---- torch.compile ----


def compiled(dry: bool) -> Found:
    device, compiler = ("cpu", "aot_eager") if dry else ("cuda", "inductor")
    for server, op in operators(device):
        if not dry or op == "linear":
            yield (
                f"{op} by {server}",
                lambda s=server, o=op: assert_op_is_compiled(s, o, device, compiler),
            )
    for name in MODELS if not dry else ("mlp",):
        for rule in (htv.AndMask(0.4), htv.Median())[: 2 if name == "mlp" and not dry else 1]:
            yield (
                f"step of {name}, {rule}",
                lambda n=name, r=rule: assert_step_is_compiled(n, r, device, compiler),
            )


def assert_op_is_compiled(server: str, op: str, device: str, compiler: str) -> None:
    require_server(server, op, AND_MASK, device)
    given = arguments(op, device)
    torch._dynamo.reset()
    whole = torch.compile(
        lambda *a: call(server, op, list(a), AND_MASK), fullgraph=True, backend=compiler
    )
    equal(list(whole(*given)), call(server, op, given, AND_MASK))


def assert_step_is_compiled(name: str, rule: htv.Rule, device: str, compiler: str) -> None:
    torch._dynamo.reset()
    step, eager = AttachedStep(name, rule, device, compiler), AttachedStep(name, rule, device)
    step(), eager()
    # a sign that rounding decides may differ: what must agree is nearly everything
    for found, wanted in zip(step.gradients(), eager.gradients(), strict=True):
        close = torch.isclose(found, wanted, rtol=1e-3, atol=1e-5)
        assert close.double().mean() > 0.98, f"{(~close).sum()} of {close.numel()} differ"


# ---- streams ----

DELAY = 200_000_000  # cycles: a tenth of a second


def streams(dry: bool) -> Found:
    for server, op in operators("cuda"):
        yield (
            f"{op} by {server}",
            needs_gpu(lambda s=server, o=op: assert_op_follows_its_stream(s, o), dry),
        )
    yield "step of mlp", needs_gpu(step_follows_its_stream, dry)


@contextmanager
def late(given: Tensor, values: Tensor) -> Iterator[None]:
    """A side stream, on which `given` gets its values after a while: who does not wait for it sees
    others.
    """
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        given.copy_(values)
        yield
    side.synchronize()


def assert_op_follows_its_stream(server: str, op: str) -> None:
    require_server(server, op, AND_MASK)
    given = arguments(op, "cuda")
    values = torch.randn_like(given[0])
    call(server, op, given, AND_MASK)  # compiles
    with late(given[0], values):
        found = call(server, op, given, AND_MASK)
    equal(found, call(server, op, given, AND_MASK))


def step_follows_its_stream() -> None:
    step = AttachedStep("mlp", htv.Median(), "cuda")
    values = torch.randn_like(step.x)
    step()
    with late(step.x, values):
        step()
        found = step.gradients()
    step()
    equal(found, step.gradients())


# ---- nothing waits for the device ----


def waiting(dry: bool) -> Found:
    for server in ("auto", "triton", "cuda"):
        for name in MODELS:
            for rule in (htv.AndMask(0.4), htv.Median()):
                run = lambda s=server, n=name, r=rule: step_does_not_wait(s, n, r)
                yield f"step of {name} by {server}, {rule}", needs_gpu(run, dry)


def step_does_not_wait(server: str, name: str, rule: htv.Rule) -> None:
    with htv.use_backend(server):
        step = AttachedStep(name, rule, "cuda")
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- several devices ----


def devices(dry: bool) -> Found:
    for server, op in operators("cuda"):
        yield (
            f"{op} by {server}",
            needs_gpu(lambda s=server, o=op: assert_op_follows_its_device(s, o), dry),
        )


def assert_op_follows_its_device(server: str, op: str) -> None:
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    require_server(server, op, AND_MASK)
    given = arguments(op, "cuda:0")
    there = [a.to("cuda:1") if isinstance(a, Tensor) and a.is_cuda else a for a in given]
    with torch.cuda.device(0):
        found = call(server, op, there, AND_MASK)
        assert all(t.device.index == 1 for t in found) and torch.cuda.current_device() == 0
    equal([t.cpu() for t in found], [t.cpu() for t in call(server, op, given, AND_MASK)])


# ---- more than 2^31 elements ----


def large(dry: bool) -> Found:
    """In a dry run a few thousand."""
    device, share = ("cpu", 2**18) if dry else ("cuda", 1)
    for server in HANDLERS if not dry else ("triton",):
        for statistic in (AND_MASK, MEDIAN):
            for groups, coordinates in ((3, 2**30 // share + 24), (2, 2**31 // share + 24)):
                what = f"stacked ({groups}, {coordinates}) by {server}, {statistic.name}"
                yield (
                    what,
                    lambda s=server, t=statistic, e=groups, p=coordinates: large_stacked(
                        s, t, e, p, device
                    ),
                )
            width = 32800 if not dry else 80
            what = f"linear, {2 * width} x {width} weights by {server}, {statistic.name}"
            yield what, lambda s=server, t=statistic, w=width: large_weight(s, t, w, device)
    rows, width = (131200, 32800) if not dry else (80, 40)
    yield f"linear, {rows} rows of {width} by triton", lambda: large_rows(rows, width, device)


@contextmanager
def memory(gigabytes: float, device: str) -> Iterator[None]:
    """So much of the device, while no other process looks at large tensors."""
    if device == "cpu":
        yield
        return
    with (Path(tempfile.gettempdir()) / f"htv-large-{os.getuid()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        free, _ = torch.cuda.mem_get_info()
        if free < 1e9 * gigabytes:
            raise Skipped(f"needs {gigabytes:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def small_integers(*shape: int, device: str) -> Tensor:
    return torch.randint(-3, 4, shape, device=device, dtype=torch.int8).to(torch.bfloat16)


def windows(size: int) -> list[slice]:
    """At both ends, and around where 32-bit indices end."""
    starts = {0, size - 4096, *(n - 2048 for n in (2**29, 2**30, 2**31, 2**32) if n + 2048 < size)}
    return [slice(start, start + 4096) for start in sorted(starts)]


def near(found: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found.double(), wanted[0], rtol=1e-6, atol=1e-6)


def large_stacked(
    server: str, statistic: Statistic, groups: int, coordinates: int, device: str
) -> None:
    require_server(server, "stacked", statistic, device)
    with memory(1e-9 * coordinates * (4 * groups + 6), device):
        grads = torch.cat([small_integers(1, coordinates, device=device) for _ in range(groups)])
        value, _ = call(server, "stacked", [grads], statistic)
        for window in windows(coordinates):
            near(value[window], reference.stacked(grads[:, window].double(), statistic))


def large_weight(server: str, statistic: Statistic, width: int, device: str) -> None:
    """2 width x width weights, of four groups of a row."""
    require_server(server, "linear", statistic, device)
    with memory(40, device):
        x, g = (small_integers(4, n, device=device) for n in (width, 2 * width))
        offsets = torch.arange(5)
        value, _ = call(server, "linear", [x, g, offsets], statistic)
        for first in sorted({0, min(2**31 // width, 2 * width - 4), 2 * width - 4}):
            rows = slice(first, first + 4)
            near(value[rows], reference.linear(x.double(), g[:, rows].double(), offsets, statistic))


def large_rows(rows: int, width: int, device: str) -> None:
    """In four groups."""
    require_server("triton", "linear", AND_MASK, device)
    with memory(24, device):
        x, g = (small_integers(rows, n, device=device) for n in (width, 24))
        offsets = torch.arange(5) * (rows // 4)
        value, _ = call("triton", "linear", [x, g, offsets], AND_MASK)
        for columns in (slice(0, 8), slice(width - 8, width)):
            near(
                value[:, columns],
                reference.linear(x[:, columns].double(), g.double(), offsets, AND_MASK),
            )
