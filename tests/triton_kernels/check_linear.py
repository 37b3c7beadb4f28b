"""What the Triton kernel of `linear` must do, wherever it can run: on a GPU, or on the CPU under TRITON_INTERPRET=1.

Not collected by its name: `test_linear.py` runs it in processes of their own, for Triton reads TRITON_INTERPRET once.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import configs, linear, statistic

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of NaN and inf

DEVICE = "cpu" if linear.INTERPRETED else "cuda"
STATISTICS = tuple(statistic.STATISTICS)
MASKS = ("and_mask", "xor_mask")
SHAPES = {  # rows per group, O, I
    "ragged": ([3, 1, 17, 40], 70, 130),
    "one row per group": ([1] * 5, 33, 17),
    "one group": ([50], 20, 64),
    "empty groups": ([0, 4, 0, 2, 0], 8, 9),
    "no rows": ([0, 0], 3, 4),
    "one coordinate": ([2, 3, 1], 1, 1),
    "whole blocks": ([16, 32, 16], 128, 64),
}


def make(sizes, O, I, dtype=torch.float32, integers=True, seed=0):
    """x (R, I), grad_output (R, O), offsets (E + 1,). Integers make every sum exact, and ties and zeros frequent."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(sum(sizes), n, generator=generator).to(dtype) for n in (I, O))
    if integers:
        x, g = x.round(), g.round()
    return x.to(DEVICE), g.to(DEVICE), torch.tensor([0, *sizes]).cumsum(0)


def assert_exact(x, g, offsets, name, count, config=None):
    """Bits, NaN and mask sum, for integer inputs."""
    value, mask_sum = linear.launch(x, g, offsets, name, count, config)
    wanted, wanted_mask_sum = reference.linear(x.double(), g.double(), offsets, Statistic(name, count))
    assert (value.dtype, value.device) == (torch.float32, x.device)
    assert (mask_sum.dtype, mask_sum.device, mask_sum.shape) == (torch.float64, x.device, ())
    # The reference divides by E and multiplies again.
    torch.testing.assert_close(value.double(), wanted.round(), rtol=0, atol=0, equal_nan=True)
    assert mask_sum.item() == wanted_mask_sum.item()
    return value


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_integers(shape, name, dtype):
    E = len(shape[0])
    for count in {0, (E + 1) // 2, E}:
        assert_exact(*make(*shape, dtype), name, count)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    O=st.integers(1, 140),
    I=st.integers(1, 140),
    name=st.sampled_from(STATISTICS),
    count=st.integers(0, 6),
)
def test_any_shape(sizes, O, I, name, count):
    assert_exact(*make(sizes, O, I), name, count)


@pytest.mark.parametrize("config", {config for row in configs.LINEAR.values() for config in row}, ids=str)
def test_every_config(config):
    assert_exact(*make([1, 70, 0, 33], 150, 140), "and_mask", 2, config)


def test_a_patch_of_tiles_covers_all():
    smallest = configs.LINEAR["sm_80", 4][-1]
    assert_exact(*make([2, 3], 32 * 11, 32 * 5 + 1), "mean", 0, smallest)


def test_ties_and_zeros():
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [0.0]], device=DEVICE)  # signs 3 to 1, one zero: net 2
    g = torch.ones(5, 1, device=DEVICE)
    offsets = torch.arange(6)
    kept = [assert_exact(x, g, offsets, "and_mask", count).item() for count in (1, 2, 3)]
    dropped = [assert_exact(x, g, offsets, "xor_mask", count).item() for count in (1, 2, 3)]
    assert kept == [2, 2, 0] and dropped == [0, 0, 2]
    assert assert_exact(x, g, offsets, "sign_sum", 0).item() == 2


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("group", [0, 3], ids=["first", "last"])
def test_nan_poisons_its_column(group, name, dtype):
    x, g, offsets = make([4, 5, 1, 6], 20, 20, dtype)
    x[offsets[group], 7] = math.nan
    for count in (0, 2, 4, 5):
        value = assert_exact(x, g, offsets, name, count)
        assert value[:, 7].isnan().all() and value.isnan().sum() == len(value)


@pytest.mark.parametrize("name", STATISTICS)
def test_inf_is_an_ordinary_extreme(name):
    x, g, offsets = make([4, 5, 1, 6], 20, 20)
    g = g.sign() + (g == 0)  # no 0 * inf
    x[0, 3] = math.inf
    x[0, 4], x[5, 4] = math.inf, -math.inf  # may meet in the sum, though no contribution is NaN
    for count in (0, 2, 4, 5):
        assert_exact(x, g, offsets, name, count)


@pytest.mark.parametrize("name", MASKS)
def test_masked_out_inf_is_zero(name):
    x = torch.tensor([[math.inf], [-math.inf] if name == "and_mask" else [math.inf]], device=DEVICE)
    value = assert_exact(x, torch.ones(2, 1, device=DEVICE), torch.arange(3), name, 1)
    assert value.item() == 0


@pytest.mark.parametrize("name", STATISTICS)
def test_rows_outside_the_groups_are_not_read(name):
    x, g, offsets = make([5, 3, 20, 7], 10, 12)
    x[:5], x[-7:], g[:5], g[-7:] = math.inf, math.nan, math.nan, math.inf
    value = assert_exact(x, g, offsets[1:-1], name, 1)
    assert value.isfinite().all()


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
def test_rounding(name, dtype):
    """At most twice the error of the definition in fp32, wherever no contribution is within rounding of 0.

    Tensor cores align the products of a block before they add them, which costs a few of the last bits.
    """
    x, g, offsets = make([60, 3, 33, 100, 31], 40, 50, dtype, integers=False)
    bounds = offsets.tolist()
    contributions = torch.stack(
        [g[a:b].double().T @ x[a:b].double() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    )
    clear = (contributions.abs() > 1e-3).all(dim=0)
    assert clear.double().mean() > 0.9
    exact, _ = reference.linear(x.double(), g.double(), offsets, Statistic(name, 3))
    low, _ = reference.linear(x.float(), g.float(), offsets, Statistic(name, 3))
    value, _ = linear.linear(x, g, offsets, name, 3)
    error, budget = ((v.double() - exact)[clear].abs().max().item() for v in (value, low))
    if DEVICE == "cuda" and dtype != torch.float32:
        budget += 2**-23 * (g.double().abs().T @ x.double().abs()).max().item()
    assert error <= 2 * budget
    assert torch.equal(value, linear.linear(x, g, offsets, name, 3)[0])


def test_mask_of_zero_votes_keeps_the_plain_gradient():
    x, g, offsets = make([5, 6, 7], 30, 40, integers=False)
    value, mask_sum = linear.linear(x, g, offsets, "and_mask", 0)
    assert torch.equal(value, linear.linear(x, g, offsets, "mean", 0)[0]) and mask_sum == 30 * 40
    torch.testing.assert_close(value, g.T @ x, rtol=1e-5, atol=1e-5)


def test_offsets_and_operands_of_other_kinds():
    x, g, offsets = make([5, 6, 7], 30, 40)
    wanted, _ = linear.linear(x, g, offsets, "and_mask", 2)
    for other in (offsets.int(), offsets.to(DEVICE), offsets.to(DEVICE).int()):
        assert torch.equal(linear.linear(x, g, other, "and_mask", 2)[0], wanted)
    assert torch.equal(linear.linear(x.T.contiguous().T, g.T.contiguous().T, offsets, "and_mask", 2)[0], wanted)
    padded = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)  # contiguous, not 16-byte aligned
    assert torch.equal(linear.linear(padded, g, offsets, "and_mask", 2)[0], wanted)


@pytest.mark.parametrize("O, I", [(0, 3), (3, 0)])
def test_no_coordinates(O, I):
    value, mask_sum = linear.linear(*make([2, 3], O, I), "and_mask", 1)
    assert value.shape == (O, I) and mask_sum == 0


def test_errors_name_what_is_wrong():
    x, g, offsets = make([2, 3], 4, 5)
    with pytest.raises(ValueError, match="unknown statistic 'median'"):
        linear.linear(x, g, offsets, "median", 0)
    with pytest.raises(TypeError, match="float64"):
        linear.linear(x.double(), g.double(), offsets, "mean", 0)
    with pytest.raises(TypeError, match="share a dtype"):
        linear.linear(x, g.half(), offsets, "mean", 0)
    with pytest.raises(ValueError, match="meta"):
        linear.linear(x.to("meta"), g.to("meta"), offsets, "mean", 0)
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(4, 4\)"):
        linear.linear(x, g[:4], offsets, "mean", 0)
    with pytest.raises(ValueError, match="at most 16777216 features"):
        linear.linear(x[:, :1].expand(5, 2**24 + 1), g, offsets, "mean", 0)
    for wrong in (offsets.double(), offsets[:1], offsets[None]):
        with pytest.raises(ValueError, match="E \\+ 1 >= 2 integers"):
            linear.linear(x, g, wrong, "mean", 0)
    for wrong in ([0, 6], [0, 3, 2], [-1, 5]):
        with pytest.raises(ValueError, match="ascend within the 5 rows"):
            linear.linear(x, g, torch.tensor(wrong), "mean", 0)
