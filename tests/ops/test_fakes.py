"""What torch.compile is told of a GPU's results, on a machine with a GPU or without."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from htv.ops import backend, schema

OF_A_STATISTIC = ("stacked", "linear", "conv", "embedding")
OPS = [(op, server) for op in OF_A_STATISTIC for server in ("reference", "triton")]
NUMBERS = schema.code("and_mask"), 2, 0.0, 0.0


SUMMARIES = [
    (op, name)
    for op in ("stacked_summary", "linear_summary", "conv_summary")
    for name in ("and_mask", "sand_mask", "geometric_mean")
]


def arguments(op, dtype):
    """Of `op` or the one for its summary, up to the statistic's numbers, and the shape of the
    result. Offsets stay on the host.
    """
    op = op.removesuffix("_summary")
    tensor = lambda *shape: torch.empty(shape, dtype=dtype, device="cuda")
    number = lambda size: torch.empty(size, dtype=torch.int64, device="cuda")
    offsets = torch.empty(4, dtype=torch.int64)
    return {
        "stacked": ((tensor(5, 7),), (7,)),
        "linear": ((tensor(6, 4), tensor(6, 3), offsets), (3, 4)),
        "conv": (
            (tensor(6, 4, 9, 9), tensor(6, 8, 9, 9), offsets, [3, 3], [1, 1], [1, 1], [1, 1], 2),
            (8, 2, 3, 3),
        ),
        "embedding": ((tensor(6, 4), number(6), number(6), 10, 3), (10, 4)),
    }[op]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, server", OPS)
def test_results_are_on_the_device_of_the_factors(op, server, dtype):
    with FakeTensorMode():
        given, shape = arguments(op, dtype)
        value, mask_sum = backend.operator(op, server)(*given, *NUMBERS)
    assert (value.shape, value.dtype, value.device.type, value.is_contiguous()) == (
        shape,
        torch.float32,
        "cuda",
        True,
    )
    assert (mask_sum.shape, mask_sum.dtype, mask_sum.device.type) == ((), torch.float64, "cuda")


@pytest.mark.parametrize("op, name", SUMMARIES)
def test_summaries_have_the_fields_of_their_statistic(op, name):
    with FakeTensorMode():
        given, shape = arguments(op, torch.bfloat16)
        fields = backend.operator(op, "reference")(*given, schema.code(name), 1e-10)
    kept = (True, True, name == "sand_mask", name == "geometric_mean")
    for field, is_kept in zip(fields, kept, strict=True):
        assert (field.shape, field.dtype) == (shape if is_kept else (0,), torch.float32)
        assert field.device.type == "cuda"


@pytest.mark.parametrize("op, server", OPS)
def test_graphs_hold_the_op_itself(op, server):
    """fullgraph=True: nothing of an op, its host-side look-ups least of all, is traced into or
    breaks the graph.
    """
    operator, targets = backend.operator(op, server), []

    def compiler(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        given, shape = arguments(op, torch.float32)
        compiled = torch.compile(
            lambda *a: operator(*a, *NUMBERS)[0] * 2, fullgraph=True, backend=compiler
        )
        assert compiled(*given).shape == shape
    assert operator in targets
