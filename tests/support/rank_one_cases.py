"""What implementations of htv::linear are held to where no group has more than one row."""

import math

import torch

from htv.ops import reference, schema
from htv.rules import Statistic

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics(groups):
    yield from (Statistic("median", interpolation) for interpolation in (-1, 0, 1))
    for name in ("trimmed_mean", "winsorized_mean"):
        yield from (
            Statistic(name, count)
            for count in sorted({0, min(1, (groups - 1) // 2), (groups - 1) // 2})
        )


def run(op, x, g, offsets, statistic):
    """An implementation of the op `linear` of htv/ops/schema.py, for a statistic without a mask."""
    value, mask_sum = op(x, g, offsets, *schema.numbers(statistic))
    assert mask_sum == 0 and value.dtype == reference.compute_dtype(x.dtype)
    return value


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_equals_definition(op, x, g, offsets, asked=None):
    for statistic in asked or statistics(len(offsets) - 1):
        value, (expected, _) = (
            run(op, x, g, offsets, statistic),
            reference.linear(x, g, offsets, statistic),
        )
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        if statistic.name == "median":
            assert torch.equal(value.nan_to_num(), expected.nan_to_num()), statistic
        else:
            terms = (g.abs().to(value.dtype).t() @ x.abs().to(value.dtype)).nan_to_num(0, 0).amax()
            atol = 4 * torch.finfo(value.dtype).eps * float(terms)  # what the sum's terms may lose
            torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-5, atol=atol)


def factors(kind, rows, out, width, dtype, seed=0):
    """Dense, with the zeros of ReLU on either side, or small integers full of ties."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (width, out))
    if kind == "relu":
        x, g = x.relu(), g * (torch.rand(rows, out, generator=generator) < 0.5)
    elif kind == "ties":
        x, g = x.round(), g.round()
    return x.to(dtype), g.to(dtype)


# ---- masks and sign sums ----

SHAPES = [  # lengths of groups, O, I
    ([1], 1, 1),
    ([1, 1], 3, 2),
    ([1] * 7, 65, 193),
    ([1] * 127, 128, 128),
    ([1] * 130, 129, 20),
    ([1] * 300, 10, 50),
    ([1] * 520, 5, 9),
    ([0, 1, 1, 0, 1], 5, 7),
]
KINDS = ("ties", "dense", "relu")


def counted(groups):
    for count in sorted({0, 1, groups // 3, groups, groups + 1}):
        yield from (Statistic(name, count) for name in ("and_mask", "xor_mask"))
    yield from (Statistic("mean"), Statistic("sign_sum"))


def assert_counts(op, x, g, offsets, same_sum=True):
    """Signs, masks and NaN are those of the definition; what is kept is torch's own sum.

    same_sum: to the last bit, as where the op adds up on the CPU; else by rounding of as many
    terms.
    """
    dtype = reference.compute_dtype(x.dtype)
    total = g.to(dtype).t() @ x.to(dtype)
    terms = (
        (g.to(dtype).abs().t() @ x.to(dtype).abs()).nan_to_num(0, 0).amax()
        if total.numel()
        else 0.0
    )
    atol = 0.0 if same_sum else (8 + len(x) / 8) * torch.finfo(dtype).eps * float(terms)
    for statistic in counted(len(offsets) - 1):
        value, mask_sum = op(x, g, offsets, *schema.numbers(statistic))
        expected, expected_sum = reference.linear(x, g, offsets, statistic)
        assert value.dtype == dtype and mask_sum == expected_sum, statistic
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        if statistic.name == "sign_sum":
            expected = expected.round()  # E * (sum / E) of integers
        else:
            expected = torch.where((expected == 0) & (value == 0), 0, total)
        message = lambda words, of=statistic: f"{of}: {words}"
        torch.testing.assert_close(
            value.nan_to_num(), expected.nan_to_num(), rtol=0, atol=atol, msg=message
        )


# ---- what holds for an implementation `op`, whatever it runs on ----


def assert_counts_hold(op, dtype, lengths, out, width, same_sum=True):
    for kind in KINDS:
        assert_counts(
            op, *factors(kind, sum(lengths), out, width, dtype), offsets_of(lengths), same_sum
        )


def assert_holds_with_nan_and_infinity(op, dtype, same_sum=True):
    """Also where all but one factor are 0, in one row or in different ones: only infinity times 0
    is NaN.
    """
    x, g = factors("relu", 60, 40, 50, dtype)
    x[0, 3], x[1, 20], x[2, 20], x[3, 49] = math.nan, math.inf, -math.inf, math.inf
    g[4, 1], g[5, 36], g[3] = math.nan, -math.inf, 0.0
    assert_counts(op, x, g, torch.arange(61), same_sum)
    assert_equals_definition(op, x, g, torch.arange(61))


def assert_holds_where_products_vanish(op, dtype, same_sum=True):
    """They are smaller than the least number of their type: their signs do not count."""
    x, g = factors("dense", 40, 20, 30, torch.float64)
    small = 1e-170 if dtype == torch.float64 else 1e-23
    x[:, ::2] *= small
    g[:, ::2] *= small
    assert_counts(op, x.to(dtype), g.to(dtype), torch.arange(41), same_sum)
    assert_equals_definition(op, x.to(dtype), g.to(dtype), torch.arange(41))


ROWS = (1, 2, 3, 4, 5, 8, 13, 24, 33, 64, 65, 150)  # every network's both sides, then counting


def assert_order_statistics_hold(op, dtype, kind, rows):
    out, width = (9, 140) if rows < 65 else (5, 21)
    assert_equals_definition(op, *factors(kind, rows, out, width, dtype), torch.arange(rows + 1))


def assert_groups_without_rows_are_zeros(op, kind):
    few = [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]
    for lengths in (few, few * 9):
        assert_equals_definition(
            op, *factors(kind, sum(lengths), 5, 20, torch.float32), offsets_of(lengths)
        )
