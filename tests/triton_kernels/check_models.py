"""A model served by the Triton kernels alone. Run by `test_interpreted.py`."""

import pytest
import torch
from torch import nn
from triton_cases import DEVICE

import htv
from htv.ops import backend, registry, schema

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Small(nn.Module):
    """A linear layer, biases, a norm, convolutions (plain, grouped, depthwise) and an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 32, 3, padding=1)
        self.grouped = nn.Conv1d(32, 32, 3, groups=2)
        self.depthwise = nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2))
        x = self.depthwise(self.grouped(x).tanh())
        return self.head(self.norm(x.transpose(1, 2))).sum(dim=1)


RULES = (
    htv.AndMask(0.4),
    htv.AndMask(0.4, rescale=True),
    htv.SandMask(0.3, k=0.5),
    htv.Median(),
)


LONG = (htv.MedianOfMeans(2), htv.WinsorizedMean(1))  # half a minute


@pytest.mark.parametrize(
    "rule", (*RULES, *(pytest.param(rule, marks=pytest.mark.slow) for rule in LONG)), ids=repr
)
def test_a_model(rule):
    torch.manual_seed(0)
    model, ids = Small().to(DEVICE), torch.randint(0, 7, (5, 8), device=DEVICE)

    def grads(name):
        model.zero_grad()
        handle = htv.attach(model, rule)
        try:
            with htv.use_backend(name):
                model(ids).square().sum().backward()
        finally:
            handle.detach()
        return [p.grad.clone() for p in model.parameters()]

    for name, found, wanted in zip(
        dict(model.named_parameters()), grads("triton"), grads("reference"), strict=True
    ):
        torch.testing.assert_close(
            found, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("op", registry.ops("triton"))
def test_ops_keep_their_contract(op):
    """Schema, fake and kernel of the operators agree."""
    statistic = (schema.code("and_mask"), 2, 0.0, 0.0)
    summary = (schema.code("geometric_mean"), 1e-10)
    random, number = (
        (lambda *shape: torch.randn(shape, device=DEVICE)),
        (lambda *n: torch.tensor(n, device=DEVICE)),
    )
    x, offsets = random(6, 4), torch.tensor([0, 2, 6])
    lookups = x, number(1, 0, 1, 4, 1, -1), number(0, 0, 1, 1, 2, 2)
    logits = (
        random(6, 5),
        number(0, 4, 2, -100, 1, 3),
        random(6, 5),
        0.5,
        random(5).abs(),
        -100,
        0.1,
    )
    arguments = {
        "stacked": (x, *statistic),
        "stacked_summary": (x, *summary),
        "linear_summary": (x, random(6, 3), offsets, *summary),
        "conv_summary": (x[:, :, None], random(6, 3, 1), offsets, [1], [1], [0], [1], 1, *summary),
        "linear": (x, random(6, 3), offsets, *statistic),
        "embedding": (*lookups, 5, 3, *statistic),
        "embedding_contributions": (*lookups, number(4, 1), 5, 3),
        "conv": (x[:, :, None], random(6, 3, 1), offsets, [1], [1], [0], [1], 1, *statistic),
        "shifted_cross_entropy": logits,
        "shifted_cross_entropy_grad": (random(6), *logits, random(6), random(6)),
    }[op]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backend.operator(op, "triton"), arguments, test_utils=tests)


def test_a_linear_layer_is_compiled_whole():
    offsets, numbers = torch.tensor([0, 2, 6]), (schema.code("median"), 0, 0.0, 0.0)
    operator = backend.operator("linear", "triton")
    compiled = torch.compile(
        lambda x, g: operator(x, g, offsets, *numbers)[0] * 2, fullgraph=True, backend="aot_eager"
    )
    x, g = torch.randn(6, 4, device=DEVICE), torch.randn(6, 3, device=DEVICE)
    assert torch.equal(compiled(x, g), operator(x, g, offsets, *numbers)[0] * 2)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize(
    "bounds", [[0, 2, 4, 6], [0, 1, 4, 6]], ids=["groups of one size", "ragged"]
)
def test_cuda_graphs_capture(bounds):
    numbers, operator = (schema.code("and_mask"), 2, 0.0, 0.0), backend.operator("linear", "triton")
    x, g, offsets = (
        torch.randn(6, 40, device=DEVICE),
        torch.randn(6, 30, device=DEVICE),
        torch.tensor(bounds),
    )
    operator(x, g, offsets, *numbers)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, mask_sum = operator(x, g, offsets, *numbers)
    x.normal_()
    graph.replay()
    wanted, wanted_mask_sum = operator(x, g, offsets, *numbers)
    assert torch.equal(value, wanted) and mask_sum == wanted_mask_sum
