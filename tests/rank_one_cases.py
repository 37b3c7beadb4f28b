"""What order statistics of htv::linear are held to where no group has more than one row."""

import torch

from htv.ops import reference, schema
from htv.rules import Statistic

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics(groups):
    yield from (Statistic("median", interpolation) for interpolation in (-1, 0, 1))
    for name in ("trimmed_mean", "winsorized_mean"):
        yield from (Statistic(name, count) for count in sorted({0, min(1, (groups - 1) // 2), (groups - 1) // 2}))


def run(op, x, g, offsets, statistic):
    """An implementation of the op `linear` of htv/ops/schema.py, for a statistic without a mask."""
    value, mask_sum = op(x, g, offsets, *schema.numbers(statistic))
    assert mask_sum == 0 and value.dtype == reference.compute_dtype(x.dtype)
    return value


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_equals_definition(op, x, g, offsets):
    for statistic in statistics(len(offsets) - 1):
        value, (expected, _) = run(op, x, g, offsets, statistic), reference.linear(x, g, offsets, statistic)
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
