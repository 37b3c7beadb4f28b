"""What the Triton kernels that yield summaries must do. Not collected by its name: see
`test_interpreted.py`.
"""

import math

import conv_table
import linear_table
import pytest
import torch
from triton_cases import DEVICE, slow

import htv
from htv.ops import aggregate, backend, reference, schema
from htv.ops.factors import LinearFactors, StackedFactors
from htv.ops.reference import Summary
from htv.rules import Statistic
from htv.triton_kernels import configs, conv, linear, stacked

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf

KEEPING = ["and_mask", "sand_mask", "geometric_mean"]  # sum and votes, the spread, the logarithms
DTYPES = [torch.float32, torch.bfloat16, slow(torch.float16)]
SMALL = configs.Config(32, 32, 16, 2, num_warps=4, num_stages=2)


def assert_summary(fields, contributions, name, log_offset=reference.LOG_OFFSET):
    """Of contributions that are exact: so are votes, and sums but for those of bfloat16."""
    exact = Summary.of(contributions.double(), name, log_offset)
    fields = Summary.of_fields(len(contributions), name, fields)
    for found, wanted in zip(fields.tensors, exact.tensors, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(
            found.double(), wanted.to(found.device), rtol=1e-4, atol=1e-4, equal_nan=True
        )
    assert torch.equal(fields.votes.nan_to_num(), exact.votes.nan_to_num().float())


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked(dtype, name):
    for groups in (1, 5, 17):
        grads = torch.randn(groups, 700, device=DEVICE).round().to(dtype)
        grads[0, 3], grads[-1, 5] = math.nan, math.inf
        assert_summary(stacked.stacked_summary(grads, name, 3e-9), grads, name, 3e-9)


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize(
    "dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)], ids=str
)
@pytest.mark.parametrize("shape", linear_table.SHAPES.values(), ids=linear_table.SHAPES.keys())
def test_linear(shape, dtype, name):
    x, g, offsets = linear_table.make(*shape, dtype)
    contributions = reference.linear_contributions(x.double(), g.double(), offsets)
    for choice in (None, (SMALL, min(3, len(offsets) - 1))):
        fields = linear.linear_summary(x, g, offsets, name, 3e-9, choice)
        assert_summary(fields, contributions, name, 3e-9)


def test_no_coordinates():
    x, g, offsets = linear_table.make([2, 1], 0, 4)
    for name in KEEPING:
        fields = Summary.of_fields(2, name, linear.linear_summary(x, g, offsets, name, 1e-10))
        assert {field.shape for field in fields.tensors} == {(0, 4)}


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("shape", ["2-d", "grouped", "depthwise"])
def test_conv(shape, name):
    x, g, offsets, *geometry = conv_table.make(*conv_table.SHAPES[shape])
    contributions = reference.conv_contributions(x.double(), g.double(), offsets, tuple(geometry))
    fields = conv.conv_summary(x, g, offsets, *geometry, name, 1e-10)
    assert_summary(fields, contributions, name)


@pytest.mark.parametrize("name", KEEPING)
def test_they_are_what_serves(name):
    x, g, offsets = linear_table.make([3, 1, 5], 20, 33)
    contributions = reference.linear_contributions(x, g, offsets)
    with htv.use_backend("triton"):
        for part in (LinearFactors(x, g, offsets), StackedFactors(contributions)):
            found = aggregate.summarise([part], Statistic(name))
            exact = Summary.of(contributions.double(), name)
            for field, wanted in zip(found.tensors, exact.tensors, strict=True):
                torch.testing.assert_close(field.double(), wanted, rtol=1e-4, atol=1e-4)
        op = backend.operator("linear_summary", "triton")
        with pytest.raises(ValueError, match="no summary for median"):
            op(x, g, offsets, schema.code("median"), 1e-10)
