"""Groups: who votes, and which ids and bounds are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htv.groups import Groups, Place, Voters, segment_sum


def sums(groups, x):
    return Voters(groups, groups.home).sums(x)


def test_each_unit_votes():
    groups = Groups.each(4)
    x = torch.randn(4, 3)
    assert groups.count == 4 and torch.equal(sums(groups, x), x)
    assert torch.equal(sums(Groups.each(3, dim=1), x.reshape(1, 4, 3).transpose(1, 2)), x.t())


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_ids_in_any_order_sum_by_id(ids):
    x = torch.arange(len(ids) * 2, dtype=torch.float64).reshape(len(ids), 2)
    groups = Groups.by_id(torch.tensor(ids), len(ids))
    expected = torch.stack([x[torch.tensor(ids) == key].sum(0) for key in sorted(set(ids))])
    assert groups.count == len(set(ids))
    assert torch.equal(sums(groups, x), expected)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_equal_weights_make_every_mean_count_once(ids):
    x = torch.arange(len(ids) * 2, dtype=torch.float64).reshape(len(ids), 2)
    groups = Groups.by_id(torch.tensor(ids), len(ids), weight="equal")
    means = torch.stack([x[torch.tensor(ids) == key].mean(0) for key in sorted(set(ids))])
    torch.testing.assert_close(sums(groups, x), means * len(ids) / len(means))
    rows, bounds = Voters(groups, groups.home).grad_rows(x)
    torch.testing.assert_close(segment_sum(rows, bounds), sums(groups, x))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any))
def test_packed_sequences_sum_by_range_and_empty_ones_do_not_vote(lengths):
    total = sum(lengths)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    x = torch.randint(-9, 9, (total, 2)).double()
    expected = torch.stack([part.sum(0) for part in x.split(lengths) if len(part)])
    for dim, lead in enumerate(((total,), (1, total))):
        groups = Groups.packed(torch.tensor(bounds, dtype=torch.int32), total, dim)
        assert torch.equal(sums(groups, x.reshape(*lead, 2)), expected)


PLACES = st.builds(dict, outer=st.integers(1, 3), times=st.integers(1, 3))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), PLACES, st.integers(0, 2), st.randoms())
def test_rows_are_found_wherever_the_batch_is(ids, place, dim, random):
    """Merged with dims before and behind it, in any dim, or with its indices picked at random."""
    n, groups = len(ids), Groups.by_id(torch.tensor(ids), len(ids))
    for found in (Place(dim, **place), Place(dim, units=torch.tensor([random.randrange(n) for _ in range(5)]))):
        units = found.index(n)
        size = found.size(n)
        assert len(units) == size
        if found.units is None:
            expected = torch.arange(n).repeat_interleave(place["times"]).repeat(place["outer"])
            assert torch.equal(units, expected)
        shape = [2, 3, 4]
        shape[dim] = size
        x = torch.randn(*shape, 2, dtype=torch.float64)
        voters = Voters(groups, found)
        rows = voters.rows(x)
        summed = torch.stack(
            [x.movedim(dim, 0)[torch.tensor(ids)[units] == key].sum(dim=(0, 1, 2)) for key in sorted(set(ids))]
        )
        torch.testing.assert_close(voters.sums(x), summed)
        torch.testing.assert_close(segment_sum(rows, voters.bounds(rows)), summed)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3), "integer ids"),
        (torch.zeros(3, dtype=torch.bool), "integer ids"),
        (torch.zeros(3, 1, dtype=torch.long), "1-D"),
        (torch.zeros(2, dtype=torch.long), "groups has 2 ids but dim 0 of the batch has size 3"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        Groups.by_id(ids, 3)


@pytest.mark.parametrize("bounds", [[0, 2], [0, 4], [1, 3], [0, 2, 1, 3], [0], [[0, 3]], [0.0, 3.0]])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        Groups.packed(torch.tensor(bounds), 3)


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Groups.each(0)
    with pytest.raises(ValueError, match="empty"):
        Groups.by_id(torch.zeros(0, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="no rows"):
        Groups.packed(torch.tensor([0, 0]), 0)
