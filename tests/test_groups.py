"""Groups: who votes, and which ids and bounds are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htv.groups import Groups


def test_each_unit_votes():
    groups = Groups.each(4)
    assert groups.count == 4 and groups.order is None
    x = torch.randn(4, 3)
    assert groups.sum_units(x) is x or torch.equal(groups.sum_units(x), x)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_ids_in_any_order_sum_by_id(ids):
    x = torch.arange(len(ids) * 2, dtype=torch.float64).reshape(len(ids), 2)
    groups = Groups.by_id(torch.tensor(ids), len(ids))
    expected = torch.stack([x[torch.tensor(ids) == key].sum(0) for key in sorted(set(ids))])
    assert groups.count == len(set(ids))
    assert torch.equal(groups.sum_units(x), expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any))
def test_packed_sequences_sum_by_range_and_empty_ones_do_not_vote(lengths):
    total = sum(lengths)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    x = torch.randint(-9, 9, (total, 2)).double()
    expected = torch.stack([part.sum(0) for part in x.split(lengths) if len(part)])
    for lead in ((total,), (1, total)):
        groups = Groups.packed(torch.tensor(bounds, dtype=torch.int32), lead)
        assert torch.equal(groups.sum_units(x.reshape(*lead, 2)), expected)


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
        Groups.packed(torch.tensor(bounds), (3,))


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Groups.each(0)
    with pytest.raises(ValueError, match="empty"):
        Groups.by_id(torch.zeros(0, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="no rows"):
        Groups.packed(torch.tensor([0, 0]), (0,))
