"""What the Triton kernels of `embedding` must do. Not collected by its name: see
`test_interpreted.py`.
"""

import math

import pytest
import torch
from triton_cases import DEVICE, HALF_SLOW, assert_same, slow, statistics

from htv.ops import reference
from htv.rules import Statistic
from htv.triton_kernels import embedding

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf

AND_MASK, MEDIAN, BUCKETS = (
    Statistic("and_mask", 2),
    Statistic("median"),
    Statistic("median_of_means", 3),
)
SOME = (
    AND_MASK,
    MEDIAN,
    BUCKETS,
    Statistic("winsorized_mean", 1),
    Statistic("sand_mask", votes=1.0, k=0.5),
)
# rows, features, tokens, groups
SIZES = {
    "no row": (0, 3, 4, 2),
    "ones": (1, 1, 1, 1),
    "few": (9, 7, 12, 5),
    "many": (24, 5, 2, 5),
    "two blocks of features": (4, 300, 2, 3),
}


def make(rows, features, tokens, groups, dtype=torch.float32):
    """Integers of any voters in any order: ties, cancellations and repeated tokens are frequent."""
    generator = torch.Generator().manual_seed(rows + features)
    grad = (torch.randn(rows, features, generator=generator) * 2).round().to(dtype)
    ids = torch.randint(0, tokens, (rows,), generator=generator)
    group_index = torch.randint(0, groups, (rows,), generator=generator)
    return *(t.to(DEVICE) for t in (grad, ids, group_index)), tokens, groups


def check(lookups, statistic):
    grad, ids, group_index, tokens, groups = lookups
    found = embedding.embedding(*lookups, statistic)
    inside = (ids >= 0) & (ids < tokens)
    wanted = reference.embedding(
        grad[inside].double(), ids[inside], group_index[inside], tokens, groups, statistic
    )
    assert_same(found, wanted, statistic, groups)
    return found[0]


LONG = {  # a quarter of a minute each, for every statistic
    "few": SOME,
    "many": (AND_MASK, MEDIAN),
    "two blocks of features": (AND_MASK, MEDIAN),
}


@pytest.mark.parametrize("size", [slow(size) if size in LONG else size for size in SIZES])
def test_every_statistic(size):
    lookups = make(*SIZES[size])
    for statistic in statistics(lookups[-1]):
        check(lookups, statistic)


@pytest.mark.parametrize("size", LONG)
def test_some_statistics(size):
    for statistic in LONG[size]:
        check(make(*SIZES[size]), statistic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_half_precision(dtype):
    for statistic in (AND_MASK, MEDIAN):
        check(make(20, 6, 3, 6, dtype), statistic)


def test_what_lies_outside_of_the_table_takes_no_part():
    """A padding_idx comes as -1."""
    grad, ids, group_index, tokens, groups = make(*SIZES["many"])
    ids[::5], ids[3], grad[0], grad[3] = -1, tokens, math.nan, math.inf
    for statistic in SOME[:3]:
        assert not check((grad, ids, group_index, tokens, groups), statistic).isnan().any()


def test_extreme_values():
    grad, ids, group_index, tokens, groups = make(24, 8, 2, 6)
    grad[0, 0], grad[1, 1] = math.nan, math.inf
    grad[:, 2], grad[:, 3], grad[:, 4] = -0.0, 2.0**-140, (torch.arange(24) - 12) * 2.0**-140
    ids[4:6], group_index[4:6], grad[4, 5], grad[5, 5] = (
        1,
        2,
        math.inf,
        -math.inf,
    )  # one contribution of both
    ids[6:8], grad[6, 6], grad[7, 6], group_index[6], group_index[7] = (
        1,
        math.inf,
        -math.inf,
        0,
        1,
    )  # one bucket of both
    for statistic in SOME:
        assert check((grad, ids, group_index, tokens, groups), statistic).isnan().any()


def test_sums_are_taken_in_one_order():
    """Bits do not depend on how lookups of different tokens and groups are mixed."""
    grad, ids, group_index, tokens, groups = make(*SIZES["many"])
    grad = torch.randn_like(grad)
    by_voter = group_index.argsort(stable=True)
    for statistic in (AND_MASK, MEDIAN, BUCKETS):
        one = embedding.embedding(grad, ids, group_index, tokens, groups, statistic)[0]
        other = embedding.embedding(
            grad[by_voter], ids[by_voter], group_index[by_voter], tokens, groups, statistic
        )[0]
        assert torch.equal(one, other)


def test_errors_name_what_is_wrong():
    grad, ids, group_index, tokens, groups = make(*SIZES["few"])
    with pytest.raises(TypeError, match="float64"):
        embedding.embedding(grad.double(), ids, group_index, tokens, groups, AND_MASK)
    with pytest.raises(ValueError, match=r"wants grad_output \(R, D\)"):
        embedding.embedding(grad, ids[1:], group_index, tokens, groups, AND_MASK)
    with pytest.raises(TypeError, match="ids and voter must be int64"):
        embedding.embedding(grad, ids.int(), group_index, tokens, groups, AND_MASK)
    with pytest.raises(ValueError, match="cannot tell 12 tokens of 0 groups apart"):
        embedding.embedding(grad, ids, group_index, tokens, 0, AND_MASK)
    with pytest.raises(ValueError, match="1 to 5 buckets"):
        embedding.embedding(grad, ids, group_index, tokens, groups, Statistic("median_of_means", 6))
    assert embedding.embedding(grad[:, :0], ids, group_index, tokens, groups, MEDIAN)[0].shape == (
        12,
        0,
    )


@pytest.mark.parametrize("dtype", HALF_SLOW, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_contributions_to_some_rows(size, dtype):
    grad, ids, group_index, tokens, groups = make(*SIZES[size], dtype)
    ids[::3] = -1  # of a padding_idx
    for some in (torch.arange(tokens).flip(0), torch.arange(0, tokens, 2), torch.arange(0)):
        some = some.to(DEVICE)
        found = embedding.embedding_contributions(grad, ids, group_index, some, tokens, groups)
        wanted = reference.embedding_contributions(
            grad.double(), ids, group_index, some, tokens, groups
        )
        assert found.dtype == torch.float32 and torch.equal(found.double(), wanted)  # integers


def test_contributions_want_what_fits():
    grad, ids, group_index, tokens, groups = make(*SIZES["few"])
    some = torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"embedding_contributions .*wants grad_output \(R, D\)"):
        embedding.embedding_contributions(grad, ids[:-1], group_index, some, tokens, groups)
    with pytest.raises(TypeError, match="tokens must be"):
        embedding.embedding_contributions(grad, ids, group_index, some.int(), tokens, groups)
