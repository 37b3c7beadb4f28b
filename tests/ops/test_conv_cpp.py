"""htv::conv in C++ against its definition, at every CPU level this machine has."""

import math

import pytest
import torch

from htv.ops import backend, reference, schema
from htv.rules import Statistic

pytestmark = [
    pytest.mark.skipif(
        backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
    ),
    pytest.mark.usefixtures("one_thread"),
]


def statistics(groups):
    """Those whose value is exact where products and sums are, then others."""
    exact = [
        Statistic(name, count)
        for name in ("and_mask", "xor_mask")
        for count in {0, 1, groups // 3, groups}
    ]
    exact += [
        Statistic("mean"),
        Statistic("sign_sum"),
        *(Statistic("median", count) for count in (-1, 0, 1)),
    ]
    rounded = [
        Statistic("geometric_mean", groups // 3),
        Statistic("winsorized_mean", (groups - 1) // 3),
    ]
    rounded += [Statistic("trimmed_mean", (groups - 1) // 2)]
    rounded += [Statistic("sand_mask", 0, groups / 3, 0.7)] if groups > 1 else []
    return exact, rounded


def geometry_of(kernel, stride=1, padding=0, dilation=1, groups=1):
    """kernel, stride, padding, dilation, one entry per dim each, and groups."""
    wide = [
        [n] * len(kernel) if isinstance(n, int) else list(n) for n in (stride, padding, dilation)
    ]
    return [list(kernel), *wide, groups]


def factors(lengths, c, o, space, geometry, dtype, seed=0, low=-2, high=3):
    """x, grad_output and offsets, of small integers."""
    generator = torch.Generator().manual_seed(seed)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(space, *geometry[:4], strict=True)
    ]
    x = torch.randint(low, high, (sum(lengths), c, *space), generator=generator).to(dtype)
    grad = torch.randint(low, high, (sum(lengths), o, *out), generator=generator).to(dtype)
    return x, grad, torch.tensor([0, *lengths]).cumsum(0)


def cpp(x, grad, offsets, geometry, statistic):
    value, mask_sum = torch.ops.htv.conv(x, grad, offsets, *geometry, *schema.numbers(statistic))
    assert value.dtype == reference.compute_dtype(x.dtype) and value.is_contiguous()
    assert value.shape == (grad.shape[1], x.shape[1] // geometry[-1], *geometry[0])
    return value, mask_sum


def agrees(x, grad, offsets, geometry):
    exact, rounded = statistics(len(offsets) - 1)
    for statistic in (*exact, *rounded):
        value, mask_sum = cpp(x, grad, offsets, geometry, statistic)
        expected, expected_sum = reference.conv(
            x.double(), grad.double(), offsets, geometry, statistic
        )
        rounding = 1e-12 if x.dtype == torch.float64 else 3e-5
        tolerance = 1e-6 if statistic in exact else rounding
        torch.testing.assert_close(
            value.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
        )
        torch.testing.assert_close(mask_sum, expected_sum, rtol=tolerance, atol=tolerance)


CASES = {
    "1d": ([1, 2, 0, 3], 4, 6, (9,), geometry_of((3,), padding=1)),
    "2d": ([2, 1, 0, 3, 1], 5, 7, (6, 5), geometry_of((3, 2), (1, 2), (1, 0), (2, 1))),
    "3d": ([1, 1, 2], 3, 4, (4, 3, 5), geometry_of((2, 2, 3), padding=(0, 1, 1))),
    "few channels": ([1] * 5, 3, 17, (12, 12), geometry_of((7, 7), 2, 3)),
    "many channels": ([1] * 4, 70, 66, (4, 4), geometry_of((3, 3), 1, 1)),
    "aligned channels": ([1] * 3, 64, 33, (5, 4), geometry_of((3, 3), 1, 1)),
    "1x1": ([1] * 4, 40, 20, (5, 5), geometry_of((1, 1))),
    "1x1 strided": ([1] * 4, 33, 20, (5, 5), geometry_of((1, 1), 2)),
    "large kernel": ([1, 2], 33, 9, (9, 9), geometry_of((5, 5), 1, 2)),
    "one position": ([1] * 6, 20, 10, (3, 3), geometry_of((3, 3))),
    "long groups": ([2, 1, 3], 4, 6, (17, 16), geometry_of((3, 3), 1, 1)),
    "groups": ([1, 2, 1], 12, 8, (5, 5), geometry_of((3, 3), 1, 1, groups=4)),
    "wide groups": ([1, 2, 1], 36, 40, (5, 5), geometry_of((3, 3), 1, 1, groups=2)),
    "depthwise": ([1, 2, 0, 1], 35, 35, (6, 5), geometry_of((3, 3), 1, 1, groups=35)),
    "depthwise 1d": ([1, 0, 2], 17, 17, (11,), geometry_of((4,), 1, 3, groups=17)),
    "depthwise 3d": (
        [2, 1],
        5,
        5,
        (4, 5, 3),
        geometry_of((3, 2, 2), (1, 2, 1), (1, 0, 1), (1, 2, 1), groups=5),
    ),
    "depthwise strided": (
        [1, 2, 1],
        16,
        16,
        (9, 8),
        geometry_of((3, 3), (3, 2), (2, 1), (1, 2), groups=16),
    ),
    "depthwise multiplied": ([1, 2, 1], 10, 20, (6, 5), geometry_of((3, 3), 1, 1, groups=10)),
    "depthwise, many groups": ([1] * 80, 3, 3, (4, 4), geometry_of((3, 3), 1, 1, groups=3)),
    "depthwise in strips": ([1, 2], 3, 3, (70, 40), geometry_of((3, 2), 1, (3, 1), groups=3)),
    "depthwise in strips, 1d": ([2, 1], 3, 6, (5000,), geometry_of((5,), 2, 4, 2, groups=3)),
    "depthwise, many taps": ([1, 1, 2], 4, 4, (5, 4), geometry_of((13, 11), 1, (6, 5), groups=4)),
    "depthwise, only padding": ([1, 2], 4, 4, (1, 2), geometry_of((2, 2), 5, 6, groups=4)),
    "narrow groups": ([1, 2, 1], 21, 35, (6, 5), geometry_of((3, 3), 2, 1, groups=7)),
    "many groups": ([1] * 40, 3, 5, (4, 4), geometry_of((3, 3), 1, 1)),
}


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", CASES)
def test_geometries(level, name, last):
    lengths, c, o, space, geometry = CASES[name]
    x, grad, offsets = factors(lengths, c, o, space, geometry, torch.float32)
    if last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    agrees(x, grad, offsets, geometry)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["2d", "many channels", "wide groups", "1x1", "depthwise", "narrow groups"]
)
def test_types(level, dtype, name):
    lengths, c, o, space, geometry = CASES[name]
    agrees(*factors(lengths, c, o, space, geometry, dtype), geometry)


@pytest.mark.parametrize(("c", "o", "groups"), [(70, 100, 1), (64, 80, 2)])
def test_copies_are_of_some_channels_at_a_time(c, o, groups):
    """Images whose copy would take more than may be: 2 x 250 x 250 positions."""
    geometry = geometry_of((2, 3), 1, 1, groups=groups)
    x, grad, offsets = factors([1, 1], c, o, (250, 250), geometry, torch.float32, low=-1, high=2)
    for statistic in (Statistic("and_mask", 2), Statistic("median")):
        value, mask_sum = cpp(x, grad, offsets, geometry, statistic)
        expected, expected_sum = reference.conv(
            x.double(), grad.double(), offsets, geometry, statistic
        )
        assert torch.equal(value.double(), expected) and mask_sum == expected_sum


@pytest.mark.parametrize(("c", "o", "groups"), [(20, 9, 1), (20, 20, 20), (20, 10, 5)])
def test_nan_and_infinity(level, c, o, groups):
    geometry = geometry_of((3, 3), 1, 1, groups=groups)
    x, grad, offsets = factors([1, 2, 1, 3], c, o, (4, 5), geometry, torch.float32, seed=3)
    x[0, 3, 1, 1], x[1, 5, 2, 2], x[4, 5, 0, 0], grad[2, 7, 3, 3] = (
        math.nan,
        math.inf,
        -math.inf,
        math.inf,
    )
    agrees(x, grad, offsets, geometry)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_the_number_of_threads_changes_no_bit(depthwise):
    geometry = geometry_of((5, 5), 1, 2, groups=20 if depthwise else 1)
    x, grad, offsets = factors(
        [2] * 6, 40, 20 if depthwise else 50, (9, 9), geometry, torch.float32
    )
    x, grad = x + torch.rand_like(x), grad + torch.rand_like(grad)
    for statistic in sum(statistics(6), []):
        results = []
        for n in (1, 2, 3, 9):
            torch.set_num_threads(n)
            results.append(cpp(x, grad, offsets, geometry, statistic))
        for value, mask_sum in results[1:]:
            assert torch.equal(value, results[0][0]) and mask_sum == results[0][1], statistic


def test_nothing_at_all():
    geometry = geometry_of((3, 3), 1, 1)
    value, mask_sum = cpp(
        torch.ones(0, 4, 5, 5),
        torch.ones(0, 3, 5, 5),
        torch.tensor([0, 0]),
        geometry,
        Statistic("and_mask"),
    )
    assert torch.equal(value, torch.zeros(3, 4, 3, 3)) and mask_sum == 3 * 36


@pytest.mark.parametrize("name", ["and_mask", "median"])
def test_opcheck(name):
    geometry = geometry_of((3, 3), 1, 1)
    x, grad, offsets = factors([1, 2], 4, 3, (5, 5), geometry, torch.float32)
    torch.library.opcheck(
        torch.ops.htv.conv.default, (x, grad, offsets, *geometry, *schema.numbers(Statistic(name)))
    )
    rows = (
        torch.randn(4, 3),
        torch.randn(4, 2),
        torch.tensor([0, 1, 4]),
        *schema.numbers(Statistic(name)),
    )
    torch.library.opcheck(torch.ops.htv.linear.default, rows)


X, GRAD, OFFSETS, GEOMETRY = (
    torch.ones(2, 4, 5, 5),
    torch.ones(2, 6, 5, 5),
    torch.arange(3),
    geometry_of((3, 3), 1, 1),
)


@pytest.mark.parametrize(
    ("x", "grad", "offsets", "geometry", "name", "message"),
    [
        (
            X[0],
            GRAD,
            OFFSETS,
            GEOMETRY,
            "mean",
            "must be .samples, channels, .space. with 2 spatial dims",
        ),
        (X[:, :, ::2], GRAD, OFFSETS, GEOMETRY, "mean", "x must be dense"),
        (X, GRAD.double(), OFFSETS, GEOMETRY, "mean", "must have one dtype"),
        (X, GRAD[:1], OFFSETS, GEOMETRY, "mean", "x has 2 samples, grad_output 1"),
        (
            X,
            GRAD,
            OFFSETS,
            geometry_of((3, 3), 1, 1, groups=4),
            "mean",
            "divisible by the groups of the conv.*, 4",
        ),
        (
            X,
            GRAD,
            OFFSETS,
            geometry_of((3, 3)),
            "mean",
            "grad_output sees 7 positions of spatial dim 0, x has 5",
        ),
        (X, GRAD, OFFSETS, geometry_of((3, 3), 0, 1), "mean", "must be positive"),
        (
            X,
            GRAD,
            OFFSETS[:2],
            GEOMETRY,
            "mean",
            "offsets must run from 0 to the number of rows, 2",
        ),
        (X, GRAD, OFFSETS, GEOMETRY, "median_of_means", "does not serve statistic 10"),
    ],
)
def test_bad_arguments(x, grad, offsets, geometry, name, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.htv.conv(x, grad, offsets, *geometry, schema.code(name), 1, 0.0, 0.0)


def test_one_sample_picked_from_a_batch_with_its_channels_last():
    """Its stride along the batch says nothing."""
    geometry = geometry_of((3, 3), padding=1)
    x, grad, offsets = factors([1] * 4, 8, 5, (6, 5), geometry, torch.float32)
    x, grad = (t.contiguous(memory_format=torch.channels_last)[::4] for t in (x, grad))
    assert x.stride(0) != x[0].numel()
    agrees(x, grad, offsets[:2], geometry)
