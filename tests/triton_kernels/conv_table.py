"""What the Triton kernels of `conv` must do, wherever they can run, without pytest."""

import math

import torch
from triton_table import DEVICE, assert_same

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import configs, conv

SMALL = configs.Config(16, 32, 16, 2, num_warps=4, num_stages=2)
AND_MASK, MEDIAN, BUCKETS = (
    Statistic("and_mask", 2),
    Statistic("median"),
    Statistic("median_of_means", 2),
)
# samples per group, C, O, space, kernel, stride, padding, dilation, groups
SHAPES = {
    "1-d": ([1, 0, 2], 4, 6, [9], [3], [1], [1], [1], 1),
    "2-d": ([2, 1], 3, 5, [7, 6], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "3-d": ([1, 2], 2, 3, [4, 5, 4], [2, 3, 1], [1, 2, 1], [1, 0, 0], [1, 1, 1], 1),
    "stride, dilation": ([1, 1, 1], 3, 4, [9, 8], [3, 2], [2, 1], [1, 0], [1, 2], 1),
    "pointwise": ([1, 1, 1], 20, 18, [4, 5], [1, 1], [1, 1], [0, 0], [1, 1], 1),
    "one position": ([1, 1, 1], 3, 4, [3, 3], [3, 3], [1, 1], [0, 0], [1, 1], 1),
    "grouped": ([1, 2], 8, 34, [5, 5], [3, 3], [1, 1], [1, 1], [1, 1], 2),
    "depthwise": ([1, 2, 0], 70, 70, [6, 5], [3, 3], [1, 1], [1, 1], [1, 1], 70),
    "depthwise, large kernel": ([1, 1, 1], 5, 5, [16], [11], [2], [5], [1], 5),
    "depthwise, multiplied": (
        [1, 1, 1],
        3,
        6,
        [6, 5, 3],
        [2, 3, 1],
        [1, 2, 1],
        [0, 1, 0],
        [2, 1, 1],
        3,
    ),
    "few channels a group": ([1, 1, 1], 12, 8, [6, 5], [3, 2], [1, 1], [1, 1], [1, 1], 4),
}


def make(sizes, C, O, space, kernel, stride, padding, dilation, groups, dtype=torch.float32):
    """Arguments of `conv` up to the geometry, of integers."""
    generator = torch.Generator().manual_seed(0)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    x, g = (
        torch.randn(sum(sizes), *shape, generator=generator).round().to(dtype).to(DEVICE)
        for shape in ((C, *space), (O, *out))
    )
    return x, g, torch.tensor([0, *sizes]).cumsum(0), kernel, stride, padding, dilation, groups


def check(arguments, statistic, choice=None):
    x, g, offsets, *geometry = arguments
    found = conv.conv(*arguments, statistic, choice)
    assert_same(
        found,
        reference.conv(x.double(), g.double(), offsets, geometry, statistic),
        statistic,
        len(x),
    )
    return found[0]


def assert_nan_and_inf_hold(shape):
    arguments = make(*SHAPES[shape][:6], [0, 0], *SHAPES[shape][7:])
    x, g = arguments[:2]
    g[g == 0] = 1  # no 0 * inf
    x[0, 1, 2, 3], x[1, 2, 1, 1] = math.nan, math.inf
    for statistic in (AND_MASK, MEDIAN):
        assert check(arguments, statistic).isnan().any()


def assert_channels_may_be_last_or_first(shape):
    x, g, *rest = make(*SHAPES[shape])
    wanted = check((x, g, *rest), AND_MASK)
    last = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g)]
    for x_, g_ in ((last[0], g), (x, last[1]), last):
        assert torch.equal(conv.conv(x_, g_, *rest, AND_MASK)[0], wanted)
