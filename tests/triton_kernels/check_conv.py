"""What the Triton kernels of `conv` must do. Run by `test_interpreted.py`."""

import pytest
import torch
from conv_table import (
    AND_MASK,
    BUCKETS,
    MEDIAN,
    SHAPES,
    SMALL,
    assert_channels_may_be_last_or_first,
    assert_nan_and_inf_hold,
    check,
    make,
)
from triton_cases import slow

from htv.rules import Statistic
from htv.triton_kernels import conv, product

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf


LONG = ("depthwise", "depthwise, large kernel")  # others have fewer programs


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in SHAPES])
def test_integers(name):
    shape = SHAPES[name]
    for statistic in (
        AND_MASK,
        MEDIAN,
        BUCKETS,
        Statistic("winsorized_mean", (len(shape[0]) - 1) // 2),
    ):
        check(make(*shape), statistic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("shape", ["2-d", "grouped", "depthwise"])
def test_half_precision(shape, dtype):
    check(make(*SHAPES[shape], dtype), AND_MASK)


@pytest.mark.parametrize(
    "shape", ["2-d", slow("grouped"), "depthwise", slow("depthwise, large kernel")]
)
def test_splits(shape):
    arguments = make(*SHAPES[shape])
    for splits in (2, 3):
        check(
            arguments,
            AND_MASK,
            (SMALL, min(splits, len(SHAPES[shape][0]))) if "depth" not in shape else (None, splits),
        )


@pytest.mark.parametrize("shape", ["2-d", slow("grouped")])
@pytest.mark.parametrize("scratch", [2 << 10, 12 << 10])
def test_contributions_in_boxes(shape, scratch, monkeypatch):
    monkeypatch.setattr(product, "SCRATCH_BYTES", scratch)
    for statistic in (MEDIAN, BUCKETS):
        check(make(*SHAPES[shape]), statistic)


@pytest.mark.parametrize("shape", ["2-d", "depthwise"])
def test_nan_and_inf(shape):
    assert_nan_and_inf_hold(shape)


@pytest.mark.parametrize("shape", ["2-d", "3-d", "depthwise"])
def test_channels_last_or_first(shape):
    assert_channels_may_be_last_or_first(shape)


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
