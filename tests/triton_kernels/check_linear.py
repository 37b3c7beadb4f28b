"""What the Triton kernels of `linear` must do, wherever they can run: on a GPU, or on the CPU under
TRITON_INTERPRET=1.

Not collected by its name: `test_interpreted.py` runs it in a process of its own: Triton reads
TRITON_INTERPRET once.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_table import (
    ALL,
    SHAPES,
    SMALL,
    assert_nan_poisons_its_column,
    assert_no_votes_needed_is_the_plain_gradient,
    assert_rounding_is_bounded,
    assert_rows_outside_the_groups_are_not_read,
    assert_ties_and_zeros_count,
    check,
    inf_is_an_ordinary_extreme,
    make,
)
from triton_cases import DEVICE, DTYPES, HALF_SLOW, slow, statistics

from htv.rules import Statistic
from htv.triton_kernels import configs, device, linear, product, stacked

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf

LOWER_SLOW = [torch.float32, *map(slow, DTYPES[1:])]
named = {"ids": lambda statistic: statistic.name}


@pytest.mark.parametrize("dtype", LOWER_SLOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("step", [slow(1), 3], ids=["every statistic", "some"])
def test_integers(step, shape, dtype):
    for statistic in statistics(len(shape[0]))[::step]:
        check(*make(*shape, dtype), statistic)


@pytest.mark.parametrize("statistic", statistics(3), ids=lambda s: f"{s.name}-{s.count}")
def test_every_statistic(statistic):
    check(*make([3, 1, 5], 20, 33), statistic)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=3, max_size=7),
    O=st.integers(1, 140),
    I=st.integers(1, 140),
    statistic=st.sampled_from(ALL),
    splits=st.integers(1, 3),
)
def test_any_shape(sizes, O, I, statistic, splits):
    check(
        *make(sizes, O, I), statistic, (SMALL, 1 if statistic.name.endswith("ed_mean") else splits)
    )


CONFIGS = sorted(
    {config for rows in configs.TABLE.values() for row in rows.values() for config in row}
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config(config):
    check(*make([1, 70, 0, 33], 150, 140), Statistic("and_mask", 2), (config, 1))


@pytest.mark.parametrize("splits", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_splits_merge(splits):
    """A group whole in one split, so exactly what one program says; squares are merged to a
    rounding or two.
    """
    x, g, offsets = make([5, 0, 20, 1, 9], 33, 40, integers=False)
    for statistic in ALL[:6]:
        whole, mask_sum = linear.linear(x, g, offsets, statistic, (SMALL, 1))
        value, split_mask_sum = linear.linear(x, g, offsets, statistic, (SMALL, splits))
        torch.testing.assert_close(value, whole, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(mask_sum, split_mask_sum, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "statistic",
    [
        Statistic("median"),
        pytest.param(Statistic("winsorized_mean", 3), marks=pytest.mark.slow),
        pytest.param(Statistic("median_of_means", 3), marks=pytest.mark.slow),
    ],
    **named,
)
@pytest.mark.parametrize("scratch", [2 << 10, pytest.param(20 << 10, marks=pytest.mark.slow)])
def test_contributions_in_boxes(statistic, scratch, monkeypatch):
    monkeypatch.setattr(product, "SCRATCH_BYTES", scratch)
    check(*make([5, 0, 2, 1, 9, 4, 4], 50, 140), statistic)


@pytest.mark.parametrize(
    "statistic",
    [
        Statistic("median"),
        pytest.param(Statistic("trimmed_mean", 3), marks=pytest.mark.slow),
        Statistic("winsorized_mean", 2),
    ],
    **named,
)
def test_more_groups_than_are_sorted(statistic, monkeypatch):
    monkeypatch.setattr(stacked, "MOST_SORTED", 4)
    check(*make([2, 3, 1, 0, 4, 2, 2], 20, 18), statistic)


@pytest.mark.parametrize("name", ["trimmed_mean", "winsorized_mean"])
def test_few_extremes_in_registers_or_ranked(name, monkeypatch):
    """Long groups are ranked, short ones keep their extremes on chip."""
    x, g, offsets = make([6, 5, 7, 9, 6], 20, 30)
    for count in (1, 2):
        for least in (1, 1000):
            monkeypatch.setattr(product, "LONG_GROUPS", least)
            check(x, g, offsets, Statistic(name, count))


def test_a_patch_of_tiles_covers_all():
    check(*make([2, 3], 32 * 11, 32 * 5 + 1), Statistic("mean"), (SMALL, 1))


def test_more_groups_than_are_counted_at_once():
    check(*make([1, 0, 2] * 50, 10, 12), Statistic("and_mask", 30))


def test_ties_and_zeros():
    assert_ties_and_zeros_count()


@pytest.mark.parametrize("dtype", LOWER_SLOW, ids=str)
@pytest.mark.parametrize("statistic", ALL, **named)
@pytest.mark.parametrize(
    "group", [3, pytest.param(0, marks=pytest.mark.slow)], ids=["last", "first"]
)
def test_nan_poisons_its_column(group, statistic, dtype):
    assert_nan_poisons_its_column(group, statistic, dtype)


@pytest.mark.parametrize("statistic", ALL, **named)
def test_inf_is_an_ordinary_extreme(statistic):
    inf_is_an_ordinary_extreme(statistic)


@pytest.mark.parametrize("name", ["and_mask", "xor_mask"])
def test_masked_out_inf_is_zero(name):
    x = torch.tensor([[math.inf], [-math.inf] if name == "and_mask" else [math.inf]], device=DEVICE)
    value = check(x, torch.ones(2, 1, device=DEVICE), torch.arange(3), Statistic(name, 1))
    assert value.item() == 0


@pytest.mark.parametrize("statistic", ALL, **named)
def test_rows_outside_the_groups_are_not_read(statistic):
    assert_rows_outside_the_groups_are_not_read(statistic)


@pytest.mark.parametrize("dtype", HALF_SLOW, ids=str)
@pytest.mark.parametrize("statistic", ALL, **named)
def test_rounding(statistic, dtype):
    assert_rounding_is_bounded(statistic, dtype)


def test_mask_of_zero_votes_keeps_the_plain_gradient():
    assert_no_votes_needed_is_the_plain_gradient()


def test_offsets_and_operands_of_other_kinds():
    x, g, offsets = make([5, 6, 7], 30, 40)
    wanted, _ = linear.linear(x, g, offsets, Statistic("and_mask", 2))
    padded = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(
        x
    )  # contiguous, not 16-byte aligned
    wide = torch.cat([x, x], dim=1)[:, :40]  # rows lie apart
    for other in (offsets.int(), offsets.to(DEVICE), offsets.to(DEVICE).int()):
        assert torch.equal(linear.linear(x, g, other, Statistic("and_mask", 2))[0], wanted)
    for x_, g_ in ((x.T.contiguous().T, g.T.contiguous().T), (padded, g), (wide, g)):
        assert torch.equal(linear.linear(x_, g_, offsets, Statistic("and_mask", 2))[0], wanted)


def test_groups_of_one_size_are_counted_out():
    for bounds in ([0, 3, 6, 9], [4, 6, 8], [0, 3, 7], [0, 0, 0], [2, 5], [0, 0]):
        assert device.offsets_on(torch.device("meta"), torch.tensor(bounds)).shape == (len(bounds),)
    assert device.offsets_on(torch.device(DEVICE), torch.tensor([4, 6, 8])).tolist() == [4, 6, 8]


@pytest.mark.parametrize("O, I", [(0, 3), (3, 0)])
def test_no_coordinates(O, I):
    value, mask_sum = linear.linear(*make([2, 3], O, I), Statistic("and_mask", 1))
    assert value.shape == (O, I) and mask_sum == 0


def test_errors_name_what_is_wrong():
    x, g, offsets = make([2, 3], 4, 5)
    mean = Statistic("mean")
    with pytest.raises(ValueError, match="unknown statistic 'mode'"):
        linear.linear(x, g, offsets, Statistic("mode"))
    with pytest.raises(ValueError, match="count 1 of 2 groups"):
        linear.linear(x, g, offsets, Statistic("trimmed_mean", 1))
    with pytest.raises(ValueError, match="1 to 2 buckets, got 3"):
        linear.linear(x, g, offsets, Statistic("median_of_means", 3))
    with pytest.raises(TypeError, match="float64"):
        linear.linear(x.double(), g.double(), offsets, mean)
    with pytest.raises(TypeError, match="share a dtype"):
        linear.linear(x, g.half(), offsets, mean)
    with pytest.raises(ValueError, match="meta"):
        linear.linear(x.to("meta"), g.to("meta"), offsets, mean)
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(4, 4\)"):
        linear.linear(x, g[:4], offsets, mean)
    with pytest.raises(ValueError, match="at most 16777216 features"):
        linear.linear(x[:, :1].expand(5, 2**24 + 1), g, offsets, mean)
    for wrong in (offsets.double(), offsets[:1], offsets[None]):
        with pytest.raises(ValueError, match="E \\+ 1 >= 2 integers"):
            linear.linear(x, g, wrong, mean)
    for wrong in ([0, 6], [0, 3, 2], [-1, 5]):
        with pytest.raises(ValueError, match="ascend within the 5 rows"):
            linear.linear(x, g, torch.tensor(wrong), mean)
