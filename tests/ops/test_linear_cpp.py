"""htv::linear in C++ against its definition, at every CPU level this machine has."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htv.ops import backend, functional, reference, schema
from htv.rules import Statistic
from support import budgets
from support.quick import quick_pairs

pytestmark = [
    pytest.mark.skipif(
        backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
    ),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


COUNTED = ("mean", "and_mask", "xor_mask", "sign_sum")  # exact where sums are


def statistics(groups):
    for name in COUNTED:
        counts = (
            sorted({0, 1, groups // 3, groups, groups + 1})
            if name in ("and_mask", "xor_mask")
            else [0]
        )
        yield from (Statistic(name, count) for count in counts)


def inexact_statistics(groups):
    """Those that round, or rank what was rounded."""
    yield Statistic("geometric_mean", groups // 3)
    if groups > 1:
        yield Statistic("sand_mask", 0, groups / 3, 0.7)
    yield from (Statistic("median", count) for count in (-1, 0, 1))
    for count in {0, (groups - 1) // 4, (groups - 1) // 2}:
        yield from (Statistic(name, count) for name in ("trimmed_mean", "winsorized_mean"))


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def cpp(x, g, offsets, statistic):
    value, mask_sum = torch.ops.htv.linear(x, g, offsets, *schema.numbers(statistic))
    assert value.dtype == reference.compute_dtype(x.dtype) and value.shape == (
        g.shape[1],
        x.shape[1],
    )
    assert mask_sum.dtype == torch.float64 and mask_sum.shape == ()
    return value, mask_sum


def integers(lengths, out, width, dtype, low=-2, high=3, seed=0):
    """Factors whose products and sums are exact in float32, with plenty of zeros and ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    x = torch.randint(low, high, (rows, width), generator=generator).to(dtype)
    return (
        x,
        torch.randint(low, high, (rows, out), generator=generator).to(dtype),
        offsets_of(lengths),
    )


def exact(x, g, offsets, statistic):
    """The definition in float64; the group sums of small integers are exact there."""
    value, mask_sum = reference.linear(x.double(), g.double(), offsets, statistic)
    value = value.round()  # E * (sum / E) of integers
    return value.to(reference.compute_dtype(x.dtype)), mask_sum


SHAPES = [
    ([1], 1, 1),
    ([1, 1], 3, 2),
    ([1] * 7, 65, 193),
    ([1] * 33, 8, 48),
    ([1] * 300, 10, 50),  # more rows than are packed at a time
    ([0, 1, 1, 0, 1], 5, 7),  # groups without rows
    ([2, 1, 3], 4, 5),
    ([0, 5, 0, 0, 9, 2, 0], 9, 49),
    ([128, 128], 7, 25),
    ([127, 2, 127, 1], 17, 13),
    ([500, 1, 3, 200], 64, 100),  # groups longer than what is packed at a time
    ([16] * 20, 130, 200),
]
SHAPED = [(dtype, *shape) for dtype in DTYPES for shape in SHAPES]
SHAPED = quick_pairs(SHAPED, [t for t in SHAPED if t[0] == torch.float32 or t[1:] in SHAPES[2::3]])


@pytest.mark.parametrize(("dtype", "lengths", "out", "width"), SHAPED, ids=lambda v: str(v)[:20])
def test_integers_with_ties_are_exact(level, dtype, lengths, out, width):
    x, g, offsets = integers(lengths, out, width, dtype)
    for statistic in statistics(len(lengths)):
        value, mask_sum = cpp(x, g, offsets, statistic)
        expected, expected_sum = exact(x, g, offsets, statistic)
        assert torch.equal(value, expected), statistic
        assert mask_sum == expected_sum, statistic


@pytest.mark.parametrize(("dtype", "lengths", "out", "width"), SHAPED, ids=lambda v: str(v)[:20])
def test_statistics_that_round(level, dtype, lengths, out, width):
    x, g, offsets = integers(lengths, out, width, dtype, seed=1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for statistic in inexact_statistics(len(lengths)):
        value, mask_sum = cpp(x, g, offsets, statistic)
        expected, expected_sum = reference.linear(x.double(), g.double(), offsets, statistic)
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mask_sum, expected_sum, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 3, 31, 32, 33, 100, 400])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_medians_are_elements(level, groups, rows):
    """Of products that are exact, whatever the number of groups and of the blocks their values are
    held in.
    """
    x, g, offsets = integers([rows] * groups, 21, 70, torch.float32, seed=groups + rows)
    for count in (-1, 0, 1):
        value, _ = cpp(x, g, offsets, Statistic("median", count))
        expected, _ = reference.linear(x.double(), g.double(), offsets, Statistic("median", count))
        assert torch.equal(value.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[1] * 40, [3, 1, 7, 2, 30, 5], [200, 150, 90, 300, 1]], ids=str
)
def test_random_factors(level, dtype, lengths):
    """Within what the factors' roundings may come to, where no sign is in doubt."""
    generator = torch.Generator().manual_seed(len(lengths))
    x = torch.randn(sum(lengths), 70, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.randn(sum(lengths), 30, generator=generator, dtype=torch.float64).to(dtype)
    offsets = offsets_of(lengths)
    for statistic in (*statistics(len(lengths)), *inexact_statistics(len(lengths))):
        value, _ = cpp(x, g, offsets, statistic)
        exact, _ = reference.linear(x.double(), g.double(), offsets, statistic)
        budget, sure = budgets.linear_budget(x, g, offsets, statistic, value.dtype)
        assert sure.double().mean() > 0.9
        assert ((value.double() - exact).abs() <= budget)[sure].all(), statistic


def test_one_row_per_group_equals_stacked(level):
    """The separable path must agree with the contributions it never forms."""
    generator = torch.Generator().manual_seed(5)
    x, g = torch.randn(50, 33, generator=generator).relu(), torch.randn(50, 21, generator=generator)
    contributions = (g[:, :, None] * x[:, None, :]).reshape(50, -1)
    for statistic in statistics(50):
        value, mask_sum = cpp(x, g, torch.arange(51), statistic)
        stacked, stacked_sum = functional.stacked(contributions, statistic)
        torch.testing.assert_close(value.flatten(), stacked * 50, rtol=1e-5, atol=1e-5)
        assert mask_sum == stacked_sum


@pytest.mark.parametrize("lengths", [[1] * 12, [2, 3, 1, 4, 2], [140, 3, 1]], ids=str)
def test_nan_and_infinity(level, lengths):
    x, g, offsets = integers(lengths, 20, 60, torch.float32, seed=6)
    x[0, 3], x[1, 5], x[3, 5], x[2, 7] = math.nan, math.inf, -math.inf, math.inf
    g[4, 1], g[5, 2] = math.nan, -math.inf
    for statistic in statistics(len(lengths)):
        value, mask_sum = cpp(x, g, offsets, statistic)
        expected, expected_sum = exact(x, g, offsets, statistic)
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), statistic
        assert mask_sum == expected_sum, statistic
    for statistic in inexact_statistics(len(lengths)):
        value, mask_sum = cpp(x, g, offsets, statistic)
        expected, expected_sum = reference.linear(x.double(), g.double(), offsets, statistic)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(mask_sum, expected_sum, rtol=1e-5, atol=1e-5)


def by_factors(x, g, statistic):
    """The definition for groups of one row, of factors whose products and sums are exact in
    float64, without forming contributions.
    """
    x, g = x.double(), g.double()

    def met(of_g, of_x):  # in any row
        return of_g.double().T @ of_x.double() > 0

    nan = met(g.isnan(), torch.ones_like(x)) | met(torch.ones_like(g), x.isnan())
    nan |= met(g.isinf(), x == 0) | met(g == 0, x.isinf())
    votes = (g.sign().nan_to_num(0).T @ x.sign().nan_to_num(0)).masked_fill(nan, torch.nan)
    value, mask_sum = reference.finish(reference.Summary(len(x), g.T @ x, votes), statistic)
    return (value * len(x)).round(), mask_sum


# More rows than are packed at a time: for the columns there are, or for any
LARGE = [(1100, 40, 3000), (140, 3, 17000), (2500, 9, 70)]


@pytest.mark.parametrize("zeros", [False, True], ids=["dense", "zeros"])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_many_groups_of_one_row(level, product, sizes, zeros):
    rows, out, width = sizes
    generator = torch.Generator().manual_seed(rows)
    x, g = (
        torch.randint(0 if zeros else 1, 4, (rows, n), generator=generator).float()
        * torch.randint(0, 2, (rows, n), generator=generator).mul(2).sub(1)  # -0.0, too
        for n in (width, out)
    )
    x[0, 2], x[rows - 1, 1], g[3, 1] = math.nan, math.inf, -math.inf
    x[5, 5], x[rows - 2, 5] = math.inf, -math.inf
    at = rows // 30
    for name, count in (("mean", 0), ("and_mask", at), ("xor_mask", at), ("sign_sum", 0)):
        statistic = Statistic(name, count)
        value, mask_sum = cpp(x, g, torch.arange(rows + 1), statistic)
        expected, expected_sum = by_factors(x, g, statistic)
        assert torch.equal(value.isnan(), expected.isnan()), statistic
        assert torch.equal(value.nan_to_num().double(), expected.float().nan_to_num().double())
        assert mask_sum == expected_sum, statistic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_begin_anywhere(level, dtype):
    def moved(matrix):
        memory = torch.empty(matrix.numel() + 1, dtype=dtype)[1:].view_as(matrix)
        return memory.copy_(matrix)

    for lengths in ([1] * 40, [3] * 40):
        x, g, offsets = integers(lengths, 37, 101, dtype)
        for statistic in statistics(len(lengths)):
            value, mask_sum = cpp(moved(x), moved(g), offsets, statistic)
            expected, expected_sum = exact(x, g, offsets, statistic)
            assert torch.equal(value, expected) and mask_sum == expected_sum, statistic


def test_no_rows_at_all(level):
    x, g = torch.ones(0, 5), torch.ones(0, 3)
    value, mask_sum = cpp(x, g, torch.tensor([0, 0, 0]), Statistic("and_mask", 0))
    assert torch.equal(value, torch.zeros(3, 5)) and mask_sum == 15


@pytest.mark.parametrize(
    "offsets", [torch.arange(5), torch.tensor([0, 3, 4])], ids=["one row", "several rows"]
)
@pytest.mark.parametrize("name", ["mean", "and_mask", "sand_mask", "median"])
def test_no_coordinates(level, offsets, name):
    for x, g in ((torch.ones(4, 0), torch.ones(4, 3)), (torch.ones(4, 2), torch.ones(4, 0))):
        value, mask_sum = cpp(x, g, offsets, Statistic(name, 0))
        assert value.shape == (g.shape[1], x.shape[1]) and mask_sum == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    out=st.integers(1, 70),
    width=st.integers(1, 70),
    name=st.sampled_from(COUNTED),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, out, width, name, share, seed):
    x, g, offsets = integers(lengths, out, width, torch.float32, seed=seed)
    statistic = Statistic(name, math.ceil(share * len(lengths)))
    value, mask_sum = cpp(x, g, offsets, statistic)
    expected, expected_sum = exact(x, g, offsets, statistic)
    assert torch.equal(value, expected) and mask_sum == expected_sum


PAIRED = [
    ([2, 4, 0, 6, 130, 128], 70, 90),
    ([2] * 40, 9, 33),
    ([512], 17, 16),
    ([64] * 3, 130, 300),
    ([300, 2], 8, 1),
]


@pytest.mark.parametrize(("lengths", "out", "width"), PAIRED, ids=lambda v: str(v)[:20])
def test_pairs_of_bfloat16_rows(level, lengths, out, width):
    """Where every group has an even number of rows, some CPUs multiply two at a time."""
    x, g, offsets = integers(lengths, out, width, torch.bfloat16)
    for statistic in itertools.chain(statistics(len(lengths)), inexact_statistics(len(lengths))):
        found, wanted = cpp(x, g, offsets, statistic), exact(x, g, offsets, statistic)
        if statistic.name in (*COUNTED, "median"):
            expected = (
                reference.linear(x, g, offsets, statistic) if statistic.name == "median" else wanted
            )
            assert torch.equal(found[0], expected[0]) and found[1] == wanted[1]
        else:
            by_float32 = cpp(x.float(), g.float(), offsets, statistic)
            torch.testing.assert_close(found, by_float32)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-63, 2.0**-66, 2.0**-100])
def test_bfloat16_products_that_are_denormal_still_vote(level, scale):
    torch.manual_seed(0)
    x, g = (torch.randn(60, n).mul(scale).to(torch.bfloat16) for n in (20, 17))
    x[3, 4], g[5, 6] = 1e-39, 0.0  # a denormal factor beside
    offsets = offsets_of([4, 20, 0, 36])
    for statistic in (Statistic("sign_sum"), Statistic("and_mask", 3), Statistic("and_mask", 2)):
        found, by_float32 = (cpp(*t, offsets, statistic) for t in ((x, g), (x.float(), g.float())))
        torch.testing.assert_close(found[0], by_float32[0], rtol=1e-4, atol=1e-45)
        assert found[1] == by_float32[1] and torch.equal(found[0] == 0, by_float32[0] == 0)


@pytest.mark.parametrize(
    "lengths", [[1] * 64, [1] * 300, [10] * 12], ids=["one row", "many of one row", "ten rows"]
)
def test_the_number_of_threads_changes_no_bit(lengths, product):
    generator = torch.Generator().manual_seed(7)
    x, g = (
        torch.randn(sum(lengths), 500, generator=generator),
        torch.randn(sum(lengths), 300, generator=generator),
    )
    for statistic in (*statistics(len(lengths)), *inexact_statistics(len(lengths))):
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpp(x, g, offsets_of(lengths), statistic))
        for value, mask_sum in results[1:]:
            assert torch.equal(value, results[0][0]) and mask_sum == results[0][1], statistic


def test_autocast_rounds_nothing(product):
    """The product is torch's, but not the one that autocast would take."""
    x, g = torch.randn(300, 600), torch.randn(300, 700)
    offsets, statistic = torch.arange(301), Statistic("and_mask", 30)
    expected = cpp(x, g, offsets, statistic)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpp(x, g, offsets, statistic)[0], expected)
    torch.testing.assert_close(expected, (g.T @ x).where(expected != 0, 0), rtol=1e-4, atol=1e-4)


X, G, OFFSETS = torch.ones(4, 3), torch.ones(4, 2), torch.arange(5)


@pytest.mark.parametrize(
    ("x", "g", "offsets", "name", "message"),
    [
        (X[0], G, OFFSETS, "mean", "x must have 2 dimensions, got 1"),
        (X, G.t().contiguous().t(), OFFSETS, "mean", "grad_output must be contiguous"),
        (X.int(), G.int(), OFFSETS, "mean", "x must be float64, float32, bfloat16 or float16"),
        (X, G.double(), OFFSETS, "mean", "x and grad_output must have one dtype"),
        (X, G[:3], OFFSETS, "mean", "x has 4 rows, grad_output 3"),
        (X, G, OFFSETS, "median_of_means", "does not serve statistic 10"),
        (
            X,
            G,
            OFFSETS,
            "trimmed_mean",
            "count must satisfy 0 <= 2 . count < groups, got count = 2 of 4 groups",
        ),
        (X, G, OFFSETS, 11, "unknown statistic 11"),
        (X, G, OFFSETS.int(), "mean", "offsets must be int64"),
        (X, G, OFFSETS[:1], "mean", "at least 2"),
        (X, G, OFFSETS[:4], "mean", "offsets must run from 0 to the number of rows, 4; got 0 to 3"),
        (X, G, torch.tensor([0, 3, 2, 4]), "mean", "offsets must not decrease"),
    ],
)
def test_bad_arguments(x, g, offsets, name, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.htv.linear(
            x, g, offsets, name if isinstance(name, int) else schema.code(name), 2, 0.0, 0.0
        )
