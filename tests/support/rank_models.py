"""The model and batch that tests of several ranks train, and the gradient one process gets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import htv
from htv.ops.functional import apply_rule

EXAMPLES, FEATURES, CLASSES = 12, 16, 5


class Net(nn.Module):
    """Linear layers, a norm, and, if asked for, a layer the forward leaves out."""

    def __init__(self, unused: bool = False):
        super().__init__()
        self.a, self.n = nn.Linear(FEATURES, 32), nn.LayerNorm(32)
        self.b, self.c = nn.Linear(32, 24), nn.Linear(24, CLASSES)
        if unused:
            self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(self.n(torch.relu(self.a(x))))))


class Images(nn.Module):
    """Convolutions, perhaps in channels_last: their weights are not laid out as their dims are."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.c, self.memory_format = nn.Linear(4, CLASSES), memory_format
        self.to(memory_format=memory_format)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=self.memory_format)
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean(dim=(2, 3)))


class Tied(nn.Module):
    """An embedding that is the head's weight, too, and words that few examples have."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(CLASSES, 8)
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(self.words(ids)))).mean(dim=1)


class Checkpointed(Net):
    """The same as `Net`, with a part that backward runs again."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(checkpoint(self._middle, x, use_reentrant=self.use_reentrant))

    def _middle(self, x: Tensor) -> Tensor:
        return F.gelu(self.b(self.n(x)))


def _frozen() -> Net:
    net = Net()
    net.b.weight.requires_grad_(False)
    return net


def matrices() -> nn.Module:
    """Return a model whose gradients have a low rank worth sending."""
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES))


MODELS = {
    "matrices": matrices,
    "net": Net,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(use_reentrant=True),
    "frozen weight": _frozen,
    "unused layer": lambda: Net(unused=True),
    "images": Images,
    "images in channels_last": lambda: Images(torch.channels_last),
    "tied": Tied,
}


def made(name: str = "net", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model, the same on every rank."""
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def batch(name: str = "net", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of all ranks' examples."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (EXAMPLES,), generator=random)
    if name.startswith("images"):
        return torch.randn(EXAMPLES, 3, 8, 8, generator=random).to(dtype), labels
    if name == "tied":
        return torch.randint(0, CLASSES, (EXAMPLES, 4), generator=random), labels
    return torch.randn(EXAMPLES, FEATURES, generator=random, dtype=torch.float64).to(dtype), labels


def shard(tensors: tuple[Tensor, ...], rank: int, world: int, sizes: list[int] | None = None):
    """Return one rank's examples: equally many on each, or `sizes`, the others left out."""
    if sizes is None:
        sizes = [len(tensors[0]) // world] * world
    return tuple(t[: sum(sizes)].split(sizes)[rank] for t in tensors)


def contributions(
    name: str, sizes: list[int] | None = None, share: float | None = None
) -> dict[str, Tensor]:
    """Return (E, *shape) per parameter, one example at a time by plain autograd.

    sizes:  examples per rank, each of which takes its own mean; default: equally many.
    share:  what a rank's loss counts in the loss of all; default 1 / ranks.
    """
    model, (x, y) = made(name), batch(name)
    sizes = [len(x)] if sizes is None else sizes
    share = 1 / len(sizes) if share is None else share
    found: dict[str, list[Tensor]] = {}
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    weights = [share / size for size in sizes for _ in range(size)]
    for e, weight in enumerate(weights):
        model.zero_grad()
        (F.cross_entropy(model(x[e : e + 1]), y[e : e + 1]) * weight).backward()
        for key, p in parameters.items():
            found.setdefault(key, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    return {key: torch.stack(values) for key, values in found.items()}


def aggregated(contributed: dict[str, Tensor], rule: htv.Rule) -> dict[str, Tensor]:
    """Return the gradient that one process gets for these contributions."""
    return {key: len(c) * apply_rule(c, rule) for key, c in contributed.items()}


def by_ranks(contributed: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    """Return the contributions of ranks, each one group of its examples."""
    return {
        key: torch.stack([part.sum(dim=0) for part in c.split(sizes)])
        for key, c in contributed.items()
    }


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return whole gradients by the names parameters have without wrappers."""
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        if not p.requires_grad:
            continue
        plain = name.replace("module.", "").replace("_orig_mod.", "")
        found[plain] = None if grad is None else grad.detach().clone()
    return found


def assert_one_vote(
    found: list[dict], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Compare what ranks have with what one process gets: equal zeros, equal values, and ranks
    equal to the bit.
    """
    for rank, grads in enumerate(found):
        assert grads.keys() == expected.keys()
        for name, want in expected.items():
            got = grads[name]
            if got is None:
                assert not want.any(), f"{name} has no gradient on rank {rank}"
                continue
            first = found[0][name]
            assert torch.equal(got, first), f"{name} differs between ranks 0 and {rank}"
            assert torch.equal(got == 0, want == 0), f"{name}: another vote on rank {rank}"
            scale = float(want.abs().max()) or 1.0
            worst = float((got.double() - want).abs().max()) / scale
            assert worst <= tolerance, f"{name} is off by {worst:.1e}"
