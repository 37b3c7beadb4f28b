"""Places and marks by themselves, and what a whole forward makes of marks that disagree."""

import pytest
import torch
from torch import nn

import htv
from htv.engine.provenance import CONSTANT, LOST, Lost, Marks
from htv.groups import BatchLayout
from support.layout_cases import (
    Probe,
    assert_mark,
    case,
    data,
    given,
    marks_of,
    same_place,
    tensors,
)


@pytest.mark.parametrize(
    ("a", "b", "batch_size", "same"),
    [
        (BatchLayout(0), BatchLayout(0), 3, True),
        (BatchLayout(0), BatchLayout(1), 3, False),
        (BatchLayout(1, 2, 3), BatchLayout(1, 2, 3), 4, True),
        (BatchLayout(0, 2, 1), BatchLayout(0, 1, 2), 3, False),
        (BatchLayout(0, 2, 1), BatchLayout(0, 1, 2), 1, True),
        (BatchLayout(0, 2), BatchLayout(0, 3), 1, False),
        (BatchLayout(0, 2), BatchLayout(0), 3, False),
        (BatchLayout(0, examples=torch.tensor([0, 1, 2])), BatchLayout(0), 3, True),
        (BatchLayout(0, examples=torch.tensor([0, 2, 1])), BatchLayout(0), 3, False),
        (BatchLayout(0, examples=torch.tensor([0, 0, 1, 1])), BatchLayout(0, 1, 2), 2, True),
        (BatchLayout(0, examples=torch.tensor([0, 0, 1, 1])), BatchLayout(0, 2, 1), 2, False),
        (
            BatchLayout(0, examples=torch.tensor([1, 0])),
            BatchLayout(0, examples=torch.tensor([1, 0])),
            2,
            True,
        ),
        (
            BatchLayout(0, examples=torch.tensor([1, 0])),
            BatchLayout(0, examples=torch.tensor([0, 1])),
            2,
            False,
        ),
        (
            BatchLayout(0, examples=torch.tensor([0, 1])),
            BatchLayout(0, examples=torch.tensor([0])),
            2,
            False,
        ),
        (BatchLayout(0, examples=torch.tensor([0, 0])), BatchLayout(0, 2), 1, True),
    ],
)
def test_same_places(a, b, batch_size, same):
    assert a.same(b, batch_size) is same and b.same(a, batch_size) is same
    assert a.same(a, batch_size)
    if batch_size > 1 and a.dim == b.dim:  # the order of units is all there is to it
        assert (a.index(batch_size).tolist() == b.index(batch_size).tolist()) is same


def test_places_elsewhere_keep_their_pattern():
    examples = torch.tensor([1, 0])
    layout = BatchLayout(0, 2, 3, guess="so").at(2)
    assert (layout.dim, layout.outer, layout.times, layout.guess) == (2, 2, 3, "so")
    assert BatchLayout(0, examples=examples).at(1).examples is examples
    assert layout.at(2) is layout
    assert layout.size(4) == 24 and BatchLayout(0, examples=examples).size(4) == 2
    assert layout.index(2).tolist() == [0, 0, 0, 1, 1, 1] * 2


ONE, OTHER = torch.tensor([2, 0, 1]), torch.tensor([2, 1, 0])
ORDERS = {
    "outer and times": (lambda x: x.repeat(2, 1), lambda x: x.repeat_interleave(2, 0)),
    "times and outer": (lambda x: x.repeat_interleave(2, 0), lambda x: x.repeat(2, 1)),
    "turned": (lambda x: x, lambda x: x.flip(0)),
    "picked otherwise": (lambda x: x[ONE], lambda x: x[OTHER]),
    "crossed": (lambda x: x, lambda x: x.transpose(0, 1)),
}


class TwoOrders(nn.Module):
    """Two parts of a model whose batches stand in different order meet before a layer."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.a(x) * self.b(x))


@pytest.mark.parametrize("name", ORDERS)
def test_a_model_that_mixes_two_orders_is_refused(name):
    a, b = ORDERS[name]
    model = TwoOrders(a, b)
    with htv.attach(model, htv.Median()), pytest.raises(htv.UnsupportedError, match="last"):
        model(torch.randn(3, 3))
    for f in (a, b):  # each by itself is followed, or names the dim
        model = TwoOrders(f, lambda x, f=f: f(x).tanh())
        with htv.attach(model, htv.Median()):
            if f is ORDERS["crossed"][1]:
                with pytest.raises(htv.UnsupportedError, match="dim 1"):
                    model(torch.randn(3, 3))
            else:
                model(torch.randn(3, 3))


def test_rows_that_vote_keep_their_order():
    turned = torch.arange(4).flip(0)
    for call, kept in (
        (lambda x: x.flip(1), False),
        (lambda x: x[:, turned], False),
        (lambda x: x[:, [3, 2, 1, 0]], False),
        (lambda x: x[:, turned.numpy()], False),
        (lambda x: x.index_select(1, turned), False),
        (lambda x: x.tanh(), True),
        (lambda x: x[:, 1:], True),
    ):
        _, marks = marks_of(case("", call, given(0, 3, 4, 2), 0), 3, tokens=True)
        assert isinstance(marks[0], BatchLayout) is kept
        assert_mark(case("where only examples vote", call, given(0, 3, 4, 2), 0), 3)


def test_statistics_of_the_batch_are_shared_only_where_asked():
    centred = case("centred", lambda x: x - x.mean(0), given(0, 3, 4), LOST)
    assert_mark(centred, 3)
    _, marks = marks_of(centred, 3, batch_norm="shared")
    assert same_place(marks[0], BatchLayout(0))
    both = given(0, 3, 4), given(0, 3, 4)
    crossed = case("not broadcast", lambda x, y: x + y.cumsum(0), both, LOST)
    assert isinstance(marks_of(crossed, 3, batch_norm="shared")[1][0], Lost)


def test_data_has_no_say_unless_it_is_sure():
    guess = BatchLayout(1, guess="an input")
    meets = lambda first, second: case("", torch.mul, (first, second), 0)
    assert_mark(meets(given(0, 3, 3), data(guess, 3, 3, fixed=True)), 3)
    assert_mark(case("", torch.mul, (given(0, 3, 3), data(1, 3, 3)), LOST), 3)
    with pytest.raises(htv.UnsupportedError, match="by its size alone"):
        marks_of(meets(given(0, 3, 3), given(guess, 3, 3)), 3)
    lost = lambda x, y: x * y.flip(0).cumsum(0)
    assert_mark(case("lost data", lost, (given(0, 3, 3), data(0, 3, 3, fixed=True)), 0), 3)
    assert_mark(case("what is lost", lost, (given(0, 3, 3), given(0, 3, 3)), LOST), 3)


def test_marks_are_kept_by_identity():
    marks, x, y = Marks(), torch.zeros(2), torch.zeros(2)
    marks.put(x, BatchLayout(0))
    assert marks.get(x).dim == 0 and marks.get(y) is None and marks.current(y, None) is None
    later = Marks(marks)
    assert later.get(x) is marks.get(x) and later.current(x, None) is marks.get(x)
    later.put(x, CONSTANT)
    assert later.get(x) == CONSTANT and marks.get(x).dim == 0
    # Memory of a tensor that is gone may be another's.
    entry = marks.table.pop(id(x))
    marks.table[id(y)] = entry
    assert marks.get(y) is None and marks.current(y, None) is None


def test_a_view_is_looked_at_again_after_its_memory_was_written_to():
    marks, asked = Marks(), []
    base = torch.zeros(2, 3)
    view = base[0]

    def again(tensor):
        asked.append(tensor)
        return BatchLayout(0)

    marks.put(view, CONSTANT)
    assert marks.current(view, again) == CONSTANT and not asked
    base[0] = 1
    assert same_place(marks.current(view, again), BatchLayout(0)) and asked == [view]
    assert same_place(marks.current(view, again), BatchLayout(0)) and asked == [view]


def test_writing_nothing_leaves_a_target_open():
    """An empty write fits any dim: the place is a guess until something says more."""

    def call(x):
        t = torch.zeros(3, 3, dtype=x.dtype)
        t[:, :0] = x
        return t

    probe = Probe(call, (given(0, 3, 0),))
    with htv.attach(probe, htv.Mean()):
        (t,) = tensors(probe(torch.zeros(3, 1)))
    assert probe.mode.mark(t).guess
