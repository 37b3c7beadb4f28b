"""What the Triton kernels of `conv` must do. Not collected by its name: see `test_interpreted.py`."""

import math

import pytest
import torch
from triton_cases import DEVICE, DTYPES, assert_same

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import configs, conv, product

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf

SMALL = configs.Config(16, 32, 16, 2, num_warps=4, num_stages=2)
AND_MASK, MEDIAN, BUCKETS = Statistic("and_mask", 2), Statistic("median"), Statistic("median_of_means", 2)
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
    "depthwise, multiplied": ([1, 1, 1], 3, 6, [6, 5, 3], [2, 3, 1], [1, 2, 1], [0, 1, 0], [2, 1, 1], 3),
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
    assert_same(found, reference.conv(x.double(), g.double(), offsets, geometry, statistic), statistic, len(x))
    return found[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_integers(shape):
    for statistic in (AND_MASK, MEDIAN, BUCKETS, Statistic("winsorized_mean", (len(shape[0]) - 1) // 2)):
        check(make(*shape), statistic)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ["2-d", "grouped", "depthwise"])
def test_half_precision(shape, dtype):
    check(make(*SHAPES[shape], dtype), AND_MASK)


@pytest.mark.parametrize("shape", ["2-d", "grouped", "depthwise", "depthwise, large kernel"])
def test_splits(shape):
    arguments = make(*SHAPES[shape])
    for splits in (2, 3):
        check(
            arguments, AND_MASK, (SMALL, min(splits, len(SHAPES[shape][0]))) if "depth" not in shape else (None, splits)
        )


@pytest.mark.parametrize("shape", ["2-d", "grouped"])
@pytest.mark.parametrize("scratch", [2 << 10, 12 << 10])
def test_contributions_in_boxes(shape, scratch, monkeypatch):
    monkeypatch.setattr(product, "SCRATCH_BYTES", scratch)
    for statistic in (MEDIAN, BUCKETS):
        check(make(*SHAPES[shape]), statistic)


@pytest.mark.parametrize("shape", ["2-d", "depthwise"])
def test_nan_and_inf(shape):
    arguments = make(*SHAPES[shape][:6], [0, 0], *SHAPES[shape][7:])
    x, g = arguments[:2]
    g[g == 0] = 1  # no 0 * inf
    x[0, 1, 2, 3], x[1, 2, 1, 1] = math.nan, math.inf
    for statistic in (AND_MASK, MEDIAN):
        assert check(arguments, statistic).isnan().any()


@pytest.mark.parametrize("shape", ["2-d", "3-d", "depthwise"])
def test_channels_last_or_first(shape):
    x, g, *rest = make(*SHAPES[shape])
    wanted = check((x, g, *rest), AND_MASK)
    last = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g)]
    for x_, g_ in ((last[0], g), (x, last[1]), last):
        assert torch.equal(conv.conv(x_, g_, *rest, AND_MASK)[0], wanted)


def test_nothing_to_see():
    for shape in ("2-d", "depthwise"):
        _, *others = SHAPES[shape]
        for statistic in (AND_MASK, MEDIAN):
            assert not check(make([0, 0], *others), statistic).any()
    x, g, *rest = make([1, 1], 0, 4, [5], [3], [1], [0], [1], 1)
    assert conv.conv(x, g, *rest, MEDIAN)[0].shape == (4, 0, 3)


def test_errors_name_what_is_wrong():
    x, g, offsets, kernel, stride, padding, dilation, groups = make(*SHAPES["2-d"])
    with pytest.raises(ValueError, match="1 to 3 spatial dims"):
        conv.conv(x[..., 0, 0], g[..., 0, 0], offsets, [], [], [], [], 1, AND_MASK)
    with pytest.raises(ValueError, match="do not split into 2 groups"):
        conv.conv(x, g, offsets, kernel, stride, padding, dilation, 2, AND_MASK)
    with pytest.raises(ValueError, match=r"stride must be 2 numbers of at least 1, got \[0, 1\]"):
        conv.conv(x, g, offsets, kernel, [0, 1], padding, dilation, 1, AND_MASK)
    with pytest.raises(ValueError, match=r"has \(4, 6\) positions"):
        conv.conv(x, g, offsets, kernel, [2, 1], padding, dilation, 1, AND_MASK)
    with pytest.raises(ValueError, match="ascend within the 3 rows"):
        conv.conv(x, g, offsets + 1, kernel, stride, padding, dilation, 1, AND_MASK)
    with pytest.raises(TypeError, match="float64"):
        conv.conv(x.double(), g.double(), offsets, kernel, stride, padding, dilation, 1, AND_MASK)
