"""Groups: who votes, and which ids and bounds are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htv.groups import BatchLayout, GroupedRows, Groups, segment_sum


def sums(groups, x):
    return GroupedRows(groups, groups.input_layout).sums(x)


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
    rows, bounds = GroupedRows(groups, groups.input_layout).grad_rows(x)
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
def test_rows_are_found_wherever_the_batch_is(ids, layout, dim, random):
    """Merged with dims before and behind it, in any dim, or with its indices picked at random."""
    n, groups = len(ids), Groups.by_id(torch.tensor(ids), len(ids))
    for found in (
        BatchLayout(dim, **layout),
        BatchLayout(dim, examples=torch.tensor([random.randrange(n) for _ in range(5)])),
    ):
        batch_size = found.index(n)
        size = found.size(n)
        assert len(batch_size) == size
        if found.examples is None:
            expected = torch.arange(n).repeat_interleave(layout["times"]).repeat(layout["outer"])
            assert torch.equal(batch_size, expected)
        shape = [2, 3, 4]
        shape[dim] = size
        x = torch.randn(*shape, 2, dtype=torch.float64)
        grouped_rows = GroupedRows(groups, found)
        rows = grouped_rows.rows(x)
        summed = torch.stack(
            [
                x.movedim(dim, 0)[torch.tensor(ids)[batch_size] == key].sum(dim=(0, 1, 2))
                for key in sorted(set(ids))
            ]
        )
        torch.testing.assert_close(grouped_rows.sums(x), summed)
        torch.testing.assert_close(segment_sum(rows, grouped_rows.bounds(rows)), summed)


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


@pytest.mark.parametrize(
    "bounds", [[0, 2], [0, 4], [1, 3], [0, 2, 1, 3], [0], [[0, 3]], [0.0, 3.0]]
)
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


IDS = [3, 1, 3, 0]
MASK = torch.tensor([[True, False], [True, True]])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (Groups.each(3), Groups.each(3, dim=1), True),
        (Groups.each(3), Groups.each(4), False),
        (Groups.by_id(IDS, 4), Groups.by_id([0, 1, 3], 3), True),
        (Groups.by_id(IDS, 4), Groups.by_id([0, 1, 2], 3), False),
        (Groups.by_id([0, 1, 2], 3), Groups.each(3), False),
        (Groups.packed([0, 2, 3], 3), Groups.packed([0, 1, 3], 3), True),
        (Groups.packed([0, 2, 2, 3], 3), Groups.packed([0, 1, 3], 3), False),
        (Groups.packed([0, 2, 2, 3], 3), Groups.packed([0, 2, 3, 3], 3), False),
        (Groups.packed([0, 2, 2, 3], 3), Groups.packed([0, 1, 1, 3], 3), True),
        (Groups.each_row(3), Groups.each(3), False),
        (Groups.each_row(3), Groups.each_row(3), True),
        (Groups.each_row(3), Groups.each_row(2), False),
        (Groups.each_row(2, voting=MASK), Groups.each_row(2, voting=MASK.clone()), True),
        (Groups.each_row(2, voting=MASK), Groups.each_row(2, voting=~MASK | MASK), False),
        (Groups.each_row(2, voting=MASK), Groups.each_row(2), False),
    ],
)
def test_who_may_be_added_to_whom(a, b, same):
    assert a.same_groups(b) is same and b.same_groups(a) is same
    assert a.same_groups(a) and b.same_groups(b)


def test_members_are_the_groups_of_units():
    groups = Groups.by_id(IDS, 4)
    assert groups.members().tolist() == [2, 1, 2, 0] and groups.order.tolist() == [3, 1, 0, 2]
    assert groups.keys.tolist() == [0, 1, 3] and groups.named and groups.weights is None
    ordered = Groups.by_id([1, 1, 5], 3)
    assert ordered.order is None and ordered.members().tolist() == [0, 0, 1]
    assert Groups.packed([0, 2, 2, 3], 3).members().tolist() == [0, 0, 1]
    assert not Groups.packed([0, 2, 2, 3], 3).named and Groups.packed([0, 2, 3], 3).keys is None


def test_weights_make_groups_count_alike():
    assert Groups.by_id([0, 0, 0, 1], 4, weight="equal").weights.tolist() == [4 / 6, 2.0]
    assert Groups.packed([0, 3, 3, 4], 4, weight="equal").weights.tolist() == [4 / 6, 2.0]


def test_a_tensor_fits_by_the_size_of_its_dim():
    groups = Groups.each(3, dim=1)
    assert groups.fits(torch.zeros(2, 3))
    assert not groups.fits(torch.zeros(3, 2)) and not groups.fits(torch.zeros(3))
    assert groups.fits(torch.zeros(6), BatchLayout(0, 2)) and not groups.fits(
        torch.zeros(3), BatchLayout(0, 2)
    )


def test_plain_sums_know_no_weights_and_no_mask():
    grouped_rows = Groups.by_id([0, 0, 1], 3, weight="equal").grouped_rows(BatchLayout(1))
    alike = grouped_rows.ungrouped()
    assert alike.groups.weights is None and alike.layout is grouped_rows.layout and alike.count == 2
    alike = Groups.each_row(2, voting=MASK).grouped_rows(BatchLayout(0)).ungrouped()
    assert alike.groups.voting is None and alike.rows_vote
    grouped_rows = Groups.each(3).grouped_rows(BatchLayout(0))
    assert grouped_rows.ungrouped() is grouped_rows


def test_rows_that_vote_are_those_of_the_mask():
    grouped_rows = Groups.each_row(2, voting=MASK).grouped_rows(BatchLayout(0))
    x = torch.arange(8.0).reshape(2, 2, 2)
    rows = grouped_rows.rows(x)
    assert rows.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert grouped_rows.bounds(rows).tolist() == [0, 1, 2, 3]
    assert grouped_rows.sums(x).tolist() == rows.tolist()
    with pytest.raises(ValueError, match="not these tokens"):
        grouped_rows.rows(torch.zeros(2, 3, 2))
    uneven = Groups.each_row(2, voting=MASK).grouped_rows(
        BatchLayout(0, examples=torch.tensor([0, 0, 0, 1]))
    )
    with pytest.raises(
        ValueError, match="not these tokens"
    ):  # as many rows, but not of these units
        uneven.rows(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.long(), "boolean"),
        (MASK[0], "boolean"),
        (MASK[:1], "boolean"),
        (MASK & False, "no token vote"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        Groups.each_row(2, voting=mask)


def test_sums_along_a_dim_keep_the_others():
    x = torch.randn(4, 5, dtype=torch.float64)
    grouped_rows = Groups.by_id(IDS, 4, weight="equal").grouped_rows(BatchLayout(0))
    weights = torch.tensor([4 / 3, 4 / 3, 2 / 3], dtype=torch.float64)
    expected = torch.stack([x[3], x[1], x[0] + x[2]]) * weights[:, None]
    torch.testing.assert_close(grouped_rows.along(x), expected)
    torch.testing.assert_close(grouped_rows.along(x.t(), dim=1), expected)
    turned = Groups.by_id([1, 0], 2).grouped_rows(BatchLayout(0))
    assert turned.along(torch.tensor([[1.0], [2.0]])).tolist() == [[2.0], [1.0]]
    half = torch.ones(2, 1, dtype=torch.float16)
    assert (
        Groups.each(2).grouped_rows(BatchLayout(0)).sums(half, dtype=torch.float32).dtype
        == torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offsets", [[0, 2, 4], [0, 1, 1, 4], [0, 3, 4]])
def test_segments_of_any_sizes(offsets, dtype):
    x = torch.arange(8).reshape(4, 2).to(dtype)
    expected = [x[a:b].sum(0).tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert segment_sum(x, torch.tensor(offsets)).tolist() == expected
