"""Attached steps on a pretended GPU, where waiting for it raises. Run by `test_waiting.py`."""

import contextlib
import itertools
import os

import pytest
import torch
from torch import nn

import htv
from htv import groups
from htv.ops import backend
from support import interpreter, pretended_gpu
from support.pretended_gpu import OnDevice, Waits, moved, pretended, values

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
if TRITON:  # its kernels look at the variable when they are imported
    from triton.runtime.interpreter import GridExecutor

    from htv.triton_kernels import conv, device, embedding, linear, stacked  # noqa: F401

    interpreter.hasten()
HANDLERS = ["reference", *(["auto"] if TRITON else [])]


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 8, padding_idx=0), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(
            8, 2, bias=False, batch_first=True
        )  # a key's bias has only noise
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Tied(nn.Module):
    """More rows than lookups: some are the head's alone."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)).tanh())


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16)
        self.norm, self.head = nn.GroupNorm(4, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.depthwise(self.conv(x)).tanh()).mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(6, 6)


MODELS = {
    "mlp": mlp,
    "text": lambda: (Text(), torch.randint(0, 9, (6, 4))),
    "tied": lambda: (Tied(), torch.randint(0, 40, (6, 4))),
    "images": lambda: (Images(), torch.randn(6, 3, 5, 5)),
}
RULES = (
    htv.AndMask(0.4), htv.AndMask(0.4, rescale=True), htv.SandMask(0.3, k=0.5), htv.Median(),
    htv.WinsorizedMean(1), htv.MedianOfMeans(2),
)  # fmt: skip
VOTERS = {
    "each": lambda handle: contextlib.nullcontext(),
    "groups": lambda handle: handle.groups(torch.tensor([3, 1, 3, 1, 2, 2])),
    "weighted": lambda handle: handle.groups([3, 1, 1, 1, 2, 2], weight="equal"),
    "tokens": lambda handle: handle.tokens(torch.arange(24).reshape(6, 4) % 5 > 0),
}


@pytest.fixture(autouse=True)
def no_device_calls(monkeypatch):
    if not TRITON:
        monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
        return
    absent = backend._absent
    monkeypatch.setattr(
        backend, "_absent", lambda name, where: None if name == "triton" else absent(name, where)
    )
    launch = GridExecutor.__call__
    monkeypatch.setattr(device, "DEVICE", "cuda")
    for module in (device, stacked):
        monkeypatch.setattr(module, "guard", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(device, "capability", lambda where: ((9, 0), 4))
    monkeypatch.setattr(
        GridExecutor,
        "__call__",
        lambda self, *args, **options: launch(self, *map(plain, args), **options),
    )


def plain(argument):
    return argument.inner if isinstance(argument, OnDevice) else argument


def gradients(model, batch, rule, voters):
    handle = htv.attach(model, rule)
    try:
        with voters(handle):
            model(batch).square().sum().backward()
    finally:
        handle.detach()
    return [values(p.grad) for p in model.parameters()]


def knows(model: str, voters: str, rule) -> bool:
    """Whether a rule has enough of so few groups, and whether tokens have layers that know them."""
    return voters != "tokens" or model in ("text", "tied")


def steps():
    """All that can be combined. Quick are a hard and a soft mask and a median of every example's
    votes, and one rule for other voters.
    """
    usual = {
        "each": (htv.AndMask(0.4), htv.SandMask(0.3, k=0.5), htv.Median()),
        "groups": (htv.Median(),),
        "weighted": (htv.AndMask(0.4),),
        "tokens": (htv.AndMask(0.4),),
    }
    for combined in itertools.product(HANDLERS, MODELS, VOTERS, RULES):
        *_, voters, rule = combined
        marks = () if rule in usual[voters] else (pytest.mark.slow,)
        yield pytest.param(*combined, marks=marks, id="-".join(map(str, combined)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("server", "model", "voters", "rule"), steps())
def test_a_step_waits_for_nothing(server, model, voters, rule, monkeypatch):
    if not knows(model, voters, rule):
        pytest.skip("images have no tokens")
    if server == "reference" and model in ("text", "tied"):
        pytest.skip("PyTorch's sums by pairs of token and group wait")
    torch.manual_seed(0)
    net, batch = MODELS[model]()
    wanted = gradients(net, batch, rule, VOTERS[voters])
    net.zero_grad()
    with pretended(monkeypatch), htv.use_backend(server):
        found = gradients(moved(net), OnDevice(batch), rule, VOTERS[voters])
    assert all(p.device == pretended_gpu.CUDA for p in net.parameters())
    for parameter, one, other in zip(dict(net.named_parameters()), found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5, msg=lambda m, name=parameter: f"{name}: {m}"
        )


def test_what_waits_is_noticed(monkeypatch):
    with pretended(monkeypatch):
        x, host = torch.ones(3, device="cuda"), torch.ones(3)
        for wait in (
            lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(),
            lambda: torch.equal(x, x), lambda: x.nonzero(), lambda: x[x > 0],
            lambda: x.masked_select(x > 0), lambda: x.unique(),
            lambda: x.repeat_interleave(x.long()), lambda: x.cpu(), lambda: host.copy_(x),
            lambda: host.to("cuda"), lambda: host.to("cuda", non_blocking=True),
            lambda: torch.tensor([1.0], device="cuda"), lambda: x.new_tensor([2.0]),
            lambda: x + host, lambda: x[host.long()],
        ):  # fmt: skip
            with pytest.raises(
                (Waits, NotImplementedError)
            ):  # torch.tensor(device=...) gets past the pretence
                wait()
        assert (x + host.pin_memory().to("cuda", non_blocking=True)).device.type == "cuda"


def test_a_capture_holds_who_votes(monkeypatch):
    """What a CUDA graph would replay must not be read from the host's memory again."""
    order = torch.tensor([2, 0, 1])
    with pretended(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail("copies"))
        assert torch.equal(values(groups.to_device_async(order, pretended_gpu.CUDA)), order)
        assert groups.to_device_async(order[:0], pretended_gpu.CUDA).shape == (0,)
        with pytest.raises(RuntimeError, match="cannot capture who votes with 5000 values"):
            groups.to_device_async(torch.arange(5000), pretended_gpu.CUDA)
