"""The ops that yield what streaming statistics need to know, in C++ against their definition, at
every CPU level this machine has.
"""

import itertools
import math

import pytest
import torch

from htv.ops import backend, functional, reference, schema, statistics
from htv.ops.reference import Summary
from htv.rules import Statistic

pytestmark = [
    pytest.mark.skipif(
        backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
    ),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = [name for name in statistics.names() if statistics.of(name).streams]
KEEPING = ["and_mask", "sand_mask", "geometric_mean"]  # sum and votes, the spread, the logarithms
OFFSETS = (reference.LOG_OFFSET, 3e-9, 0.5)
LENGTHS = [
    [1],
    [1] * 7,
    [1] * 33,
    [1] * 300,  # more rows than are packed at a time
    [0, 1, 1, 0, 1],
    [2, 1, 3],
    [0, 5, 0, 0, 9, 2, 0],
    [127, 2, 127, 1],
    [500, 1, 3, 200],  # groups longer than what is packed at a time
    [2, 4, 0, 6, 130, 128],
    [16] * 20,
]
SHAPES = [(1, 1), (3, 2), (8, 48), (65, 193)]


def integers(*shape, dtype, seed=0, low=-2, high=3):
    """Values whose products and sums are exact in float32, with plenty of zeros and ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_summary(fields, contributions, name, log_offset):
    """Of contributions that are exact: so are sums and votes."""
    total, votes, spread, logs = fields
    exact = Summary.of(contributions.double(), name, log_offset)
    dtype = reference.compute_dtype(contributions.dtype)
    assert total.dtype == votes.dtype == spread.dtype == logs.dtype == dtype
    assert torch.equal(total.isnan(), exact.total.isnan())
    assert torch.equal(total.double().nan_to_num(), exact.total.nan_to_num())
    assert torch.equal(votes.isnan(), exact.votes.isnan())
    assert torch.equal(votes.double().nan_to_num(), exact.votes.nan_to_num())
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5}
    close = {"atol": 1e-5, "equal_nan": True} | close
    for found, wanted in ((spread, exact.spread), (logs, exact.logs)):
        if wanted is None:
            assert found.shape == (0,)
        else:
            torch.testing.assert_close(found.double(), wanted, **close)


def numbers(name, log_offset=reference.LOG_OFFSET):
    return schema.code(name), log_offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KEEPING)
def test_stacked(level, dtype, name):
    for groups, width in itertools.product((1, 2, 16, 17, 300), (1, 15, 33, 1025, 2100)):
        grads = integers(groups, width, dtype=dtype, seed=groups)
        for log_offset in OFFSETS:
            fields = torch.ops.htv.stacked_summary(grads, *numbers(name, log_offset))
            assert_summary(fields, grads, name, log_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: str(v)[:20])
def test_linear(level, dtype, name, lengths):
    offsets = bounds_of(lengths)
    for out, width in SHAPES:
        x = integers(sum(lengths), width, dtype=dtype, seed=out)
        g = integers(sum(lengths), out, dtype=dtype, seed=width)
        contributions = reference.linear_contributions(x.double(), g.double(), offsets)
        contributions = contributions.to(reference.compute_dtype(dtype))
        fields = torch.ops.htv.linear_summary(x, g, offsets, *numbers(name, OFFSETS[1]))
        assert_summary(fields, contributions, name, OFFSETS[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_streaming_statistic(level, name):
    x, g, offsets = torch.randn(40, 21), torch.randn(40, 9), bounds_of([4] * 10)
    contributions = reference.linear_contributions(x, g, offsets)
    exact = Summary.of(contributions.double(), name)
    found = (
        torch.ops.htv.linear_summary(x, g, offsets, *numbers(name)),
        torch.ops.htv.stacked_summary(contributions.flatten(1), *numbers(name)),
    )
    for fields in found:
        summary = Summary.of_fields(10, name, fields).map(lambda field: field.reshape(9, 21))
        for field, wanted in zip(summary.tensors, exact.tensors, strict=True):
            torch.testing.assert_close(field.double(), wanted, rtol=1e-4, atol=1e-4)


CONVS = [  # channels, outputs, kernel, stride, padding, dilation, groups of the convolution
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (64, 72, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (20, 9, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (18, 18, (3, 3), (1, 1), (1, 1), (2, 1), 18),  # depthwise
    (8, 16, (3,), (1,), (2,), (1,), 4),
    (64, 48, (3, 3), (1, 1), (0, 1), (1, 1), 2),
]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv(level, name, case, last):
    channels, outputs, kernel, stride, padding, dilation, groups = case
    for dtype, lengths in ((torch.float32, [1] * 6), (torch.float64, [2, 0, 3]), (DTYPES[2], [4])):
        x = integers(sum(lengths), channels, *(7,) * len(kernel), dtype=dtype)
        weight = torch.zeros(outputs, channels // groups, *kernel, dtype=dtype)
        convolve = torch.nn.functional.conv1d if len(kernel) == 1 else torch.nn.functional.conv2d
        shape = convolve(x, weight, None, stride, padding, dilation, groups).shape
        g = integers(*shape, dtype=dtype, seed=1)
        if last:
            x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
        geometry, offsets = (kernel, stride, padding, dilation, groups), bounds_of(lengths)
        contributions = reference.conv_contributions(x.double(), g.double(), offsets, geometry)
        fields = torch.ops.htv.conv_summary(x, g, offsets, *geometry, *numbers(name, OFFSETS[1]))
        contributions = contributions.to(reference.compute_dtype(dtype))
        assert_summary(fields, contributions, name, OFFSETS[1])


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("lengths", [[1] * 12, [2, 3, 1, 4, 2], [140, 3, 1]], ids=str)
def test_nan_and_infinity(level, name, lengths):
    rows, offsets = sum(lengths), bounds_of(lengths)
    x, g = integers(rows, 60, dtype=torch.float32), integers(rows, 20, dtype=torch.float32, seed=1)
    x[0, 3], x[1, 5], x[3, 5], x[2, 7] = math.nan, math.inf, -math.inf, math.inf
    g[4, 1], g[5, 2] = math.nan, -math.inf
    contributions = reference.linear_contributions(x.double(), g.double(), offsets).float()
    fields = torch.ops.htv.linear_summary(x, g, offsets, *numbers(name))
    assert_summary(fields, contributions, name, reference.LOG_OFFSET)
    flat = contributions.flatten(1)
    fields = torch.ops.htv.stacked_summary(flat, *numbers(name))
    assert_summary(fields, flat, name, reference.LOG_OFFSET)


def test_infinities_of_both_signs_are_no_nan_votes(level):
    """Their sum is NaN, and no contribution is."""
    x = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0], [1.0, math.nan]])
    g = torch.ones(3, 1)
    total, votes, _, _ = torch.ops.htv.linear_summary(x, g, torch.arange(4), *numbers("and_mask"))
    assert total.isnan().all()
    assert votes[0, 0] == 1 and votes[0, 1].isnan()


@pytest.mark.parametrize("lengths", [[1] * 40, [3] * 40], ids=["one row", "three rows"])
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_begin_anywhere(level, dtype, name, lengths):
    def moved(matrix):
        memory = torch.empty(matrix.numel() + 1, dtype=dtype)[1:].view_as(matrix)
        return memory.copy_(matrix)

    x, g = (integers(sum(lengths), n, dtype=dtype, seed=n) for n in (101, 37))
    plain, shifted = (
        torch.ops.htv.linear_summary(*t, bounds_of(lengths), *numbers(name))
        for t in ((x, g), (moved(x), moved(g)))
    )
    for field, same in zip(plain, shifted, strict=True):
        assert torch.equal(field, same)


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("lengths", [[1] * 64, [1] * 1100, [10] * 12], ids=lambda v: str(v)[:12])
def test_sums_and_votes_are_those_of_the_ops_for_them(level, product, name, lengths):
    """Votes to the last; and the number of threads changes no bit."""
    rows, offsets = sum(lengths), bounds_of(lengths)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 500, generator=generator).relu()
    g = torch.randn(rows, 130, generator=generator)
    fields = torch.ops.htv.linear_summary(x, g, offsets, *numbers(name))
    votes, _ = torch.ops.htv.linear(x, g, offsets, *schema.numbers(Statistic("sign_sum")))
    assert torch.equal(fields[1], votes)
    torch.testing.assert_close(fields[0], g.T @ x, rtol=1e-4, atol=1e-4)
    torch.set_num_threads(2)
    for one, two in zip(
        fields, torch.ops.htv.linear_summary(x, g, offsets, *numbers(name)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", KEEPING)
def test_no_rows_and_no_coordinates(level, name):
    none = torch.zeros(3, dtype=torch.int64)
    fields = torch.ops.htv.linear_summary(torch.ones(0, 5), torch.ones(0, 3), none, *numbers(name))
    assert_summary(fields, torch.zeros(2, 3, 5), name, reference.LOG_OFFSET)
    for width, out in ((0, 3), (5, 0)):
        fields = torch.ops.htv.linear_summary(
            torch.ones(2, width), torch.ones(2, out), torch.arange(3), *numbers(name)
        )
        assert fields[0].shape == fields[1].shape == (out, width)
    assert torch.ops.htv.stacked_summary(torch.ones(3, 0), *numbers(name))[0].shape == (0,)


def test_contributions_that_lie_apart(level):
    """As `stacked_summary` would refuse them."""
    grads = integers(6, 9, 14, dtype=torch.float32)[:, ::2, 3:].transpose(1, 2)
    for name in KEEPING:
        found, wanted = functional.summary(grads, name), Summary.of(grads.double(), name)
        for field, exact in zip(found.tensors, wanted.tensors, strict=True):
            torch.testing.assert_close(field.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "log_offset", "message"),
    [
        ("median", 1e-10, "there is no summary for"),
        ("and_mask", 0.0, "log_offset must be finite and at least"),
        ("geometric_mean", math.nan, "log_offset must be finite and at least"),
        ("geometric_mean", math.inf, "log_offset must be finite and at least"),
        ("geometric_mean", -1.0, "log_offset must be finite and at least"),
    ],
)
@pytest.mark.parametrize("served", [True, False], ids=["C++", "reference"])
def test_bad_arguments(name, log_offset, message, served):
    call = torch.ops.htv.stacked_summary if served else schema._stacked_summary_reference
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(torch.ones(3, 4), *numbers(name, log_offset))
