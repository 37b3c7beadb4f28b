"""What a parameter's contributions go through between a layer's backward and its gradient."""

import gc

import pytest
import torch

import htv
from htv.autograd.aggregation import (
    AggregationNode,
    BufferListener,
    ContributionBuffer,
    Function,
    NestedBackwards,
    ParameterArgument,
    UseRecorder,
    settle_together,
)
from htv.groups import Groups
from htv.ops.factors import StackedFactors

GROUPS = Groups.each(3)


class Parameter(BufferListener):
    """An owner that remembers what it was told."""

    def __init__(self, name="p"):
        self.name, self.passes, self.settled = name, NestedBackwards(), set()
        self.delivered, self.observed = [], []

    def guard(self):
        raise RuntimeError("its handle is gone")

    def deliver(self, grad, current):
        self.delivered.append((grad, current))

    def observe(self, parts):
        self.observed.append(parts)


@pytest.fixture
def task(monkeypatch):
    """Says which backward pass is under way."""
    now = [7]
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: now[0])
    return lambda number: now.__setitem__(0, number)


def rows(*values, dtype=torch.float32):
    """One contribution per group."""
    return StackedFactors(torch.tensor(values, dtype=dtype).reshape(-1, 1))


P = torch.zeros(1)


def test_what_was_recorded_is_aggregated_once(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Median(), GROUPS, owner)
    buffer.record(rows(1.0, 2.0, 9.0))
    assert not buffer.consumed
    assert buffer.settle(P, None).tolist() == [6.0]  # E times the median
    assert buffer.consumed and owner.settled == {7}
    ((grad, current),) = owner.delivered
    assert grad.tolist() == [6.0] and current == 7
    assert buffer.settle(P, None) is None and len(owner.delivered) == 1


def test_several_uses_are_summed_by_group_before_the_rule(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Median(), GROUPS, owner)
    buffer.record(rows(1.0, 2.0, 9.0))
    buffer.record(rows(4.0, 0.0, 0.0))
    assert buffer.settle(P, None).tolist() == [15.0]  # the median of 5, 2, 9


def test_nothing_recorded_settles_nothing(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner, observes=True)
    assert buffer.settle(P, None) is None and buffer.taken(7) is None
    assert not buffer.consumed and not owner.delivered and not owner.observed and not owner.settled


def test_every_pass_has_its_own(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    buffer.record(rows(1.0, 1.0, 1.0))
    task(8)
    buffer.record(rows(2.0, 2.0, 2.0))
    assert buffer.settle(P, None).tolist() == [6.0]
    task(7)
    assert buffer.settle(P, None).tolist() == [3.0]
    assert [current for _, current in owner.delivered] == [8, 7]
    assert owner.settled == {7}  # passes of their own need not be remembered


def test_a_gradient_has_its_parameters_type(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    buffer.record(rows(1.0, 1.0, 1.0))
    grad = buffer.settle(P.bfloat16(), None)
    assert grad.dtype == torch.bfloat16 and owner.delivered[0][0] is grad


def test_a_guard_keeps_contributions_out(task):
    owner = Parameter()
    owner.attached = False
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    with pytest.raises(RuntimeError, match="gone"):
        buffer.record(rows(1.0, 1.0, 1.0))
    assert buffer.settle(P, None) is None


def test_a_graph_outlives_its_model(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner, observes=True)
    del owner
    gc.collect()
    buffer.record(rows(1.0, 1.0, 1.0), born=3)
    assert buffer.parameter_name == "p"
    assert buffer.settle(P, None).tolist() == [3.0]


@pytest.mark.parametrize("observes", [False, True])
def test_an_owner_sees_what_it_asked_for(task, observes):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner, observes)
    part = rows(1.0, 1.0, 1.0)
    buffer.record(part)
    buffer.settle(P, None)
    assert owner.observed == ([[part]] if observes else [])


def test_passes_inside_one_another_are_related():
    passes = NestedBackwards()
    passes.outer.update({3: 2, 2: 1, 5: 4})
    assert passes.related(3, 1) and passes.related(3, 2)
    assert passes.related(2, 1) and passes.related(4, 5)
    assert not passes.related(3, 5) and not passes.related(1, 4) and passes.related(9, 9)


def test_a_reentrant_pass_is_known_by_where_its_forward_ran(task):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    buffer.record(rows(1.0, 1.0, 1.0))  # no forward of its own
    buffer.record(rows(1.0, 1.0, 1.0), born=7)  # ran in this very pass
    assert owner.passes.outer == {}
    buffer.settle(P, None)
    task(8)
    ContributionBuffer(htv.Mean(), GROUPS, owner).record(rows(1.0, 1.0, 1.0), born=2)
    assert owner.passes.outer == {8: 2}


@pytest.mark.parametrize("settled", [False, True])
def test_related_passes_may_not_both_contribute(task, settled):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    task(8)
    buffer.record(rows(1.0, 1.0, 1.0), born=7)
    if settled:
        buffer.settle(P, None)
        assert owner.settled == {8}
        buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    task(7)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        buffer.record(rows(1.0, 1.0, 1.0))
    task(9)  # of another thread
    buffer.record(rows(2.0, 2.0, 2.0))
    assert buffer.settle(P, None).tolist() == [6.0]
    assert owner.settled == ({8, 9} if settled else {9})


class Block:
    """Stands for an accumulation."""

    def __init__(self):
        self.added = []

    def add(self, *given):
        self.added.append(given)


def test_contributions_may_be_gathered_over_passes(task, monkeypatch):
    owner = Parameter()
    buffer = ContributionBuffer(htv.Mean(), GROUPS, owner)
    owner.gathering = Block()
    part = rows(1.0, 1.0, 1.0)
    buffer.record(part)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: True)
    assert buffer.settle(P, None) is None
    assert owner.gathering.added == [(7, [part], GROUPS)] and owner.delivered == [(None, 7)]

    def does_not_tell(node):
        raise RuntimeError("leaves")

    buffer.record(part)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", does_not_tell)
    with pytest.raises(RuntimeError, match="accumulate"):
        buffer.settle(P, None)


def test_parameters_of_a_hub_settle_by_themselves(task, monkeypatch):
    """One not wanted by this pass, one that accumulates, one nothing came to, two others."""
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: node != "unwanted")
    owners = [Parameter(str(i)) for i in range(5)]
    buffers = [ContributionBuffer(htv.Median(), GROUPS, owner) for owner in owners]
    owners[1].gathering = Block()
    for i in (0, 1, 3, 4):
        buffers[i].record(rows(1.0, 2.0 + i, 9.0))
    edges = [(node, 0) for node in ("unwanted", "1", "2", "3", "4")]
    grads = settle_together(buffers, [P] * 3 + [P.double(), P], edges)
    assert grads[:3] == [None] * 3 and [g.item() for g in grads[3:]] == [15.0, 18.0]
    assert grads[3].dtype == torch.float64
    assert [len(owner.delivered) for owner in owners] == [0, 1, 0, 1, 1]
    assert [buffer.consumed for buffer in buffers] == [True, True, False, True, True]
    assert len(owners[1].gathering.added) == 1


class Use(torch.autograd.Function):
    """x * p for every row of x; records what each of them contributes to p."""

    @staticmethod
    def forward(ctx, x, argument, *tokens):
        ctx.x, ctx.argument = x, argument
        return x * argument.value

    @staticmethod
    def backward(ctx, grad):
        make = lambda grouped_rows, grad, x: StackedFactors(grad * x)
        kept = ctx.argument.grad(True, make, GROUPS.grouped_rows(GROUPS.input_layout), grad, ctx.x)
        assert kept is None
        return (grad * ctx.argument.value, None, *[None] * len(ctx.argument.tokens))


X = torch.tensor([[1.0], [2.0], [9.0]])


def tracked(rule=None, name="p"):
    owner, p = Parameter(name), torch.ones(1, requires_grad=True)
    buffer = ContributionBuffer(rule or htv.Median(), GROUPS, owner)
    return owner, p, buffer


def test_a_hub_runs_after_all_uses_of_its_token():
    owner, p, buffer = tracked()
    argument = ParameterArgument(
        p.detach(), [UseRecorder(AggregationNode.apply((buffer,), p), buffer)]
    )
    assert argument.is_served and len(argument.tokens) == 1
    out = Use.apply(X, argument, *argument.tokens) + 2 * Use.apply(
        X.flip(0), argument, *argument.tokens
    )
    assert argument.tokens[0].shape == (0,)
    out.sum().backward()
    assert p.grad.tolist() == [33.0]  # three times the median of 19, 6 and 11
    assert len(owner.delivered) == 1


def test_a_hub_of_two_returns_each_ones_own():
    (_, p, a), (_, q, b) = tracked(), tracked()
    token = AggregationNode.apply((a, b), p, q)
    first, second = (
        ParameterArgument(t.detach(), [UseRecorder(token, buffer)])
        for t, buffer in ((p, a), (q, b))
    )
    (Use.apply(X, first, token) + Use.apply(3 * X, second, token)).sum().backward()
    assert p.grad.tolist() == [6.0] and q.grad.tolist() == [18.0]
    assert a.consumed and b.consumed


def test_only_what_a_pass_goes_on_to_is_recorded():
    """autograd.grad of one parameter leaves nothing of another's behind."""
    (_, p, a), (owner, q, b) = tracked(), tracked()
    argument = lambda t, buffer: ParameterArgument(
        t.detach(), [UseRecorder(AggregationNode.apply((buffer,), t), buffer)]
    )
    first, second = argument(p, a), argument(q, b)
    out = Use.apply(X, first, *first.tokens) + Use.apply(X, second, *second.tokens)
    (grad,) = torch.autograd.grad(out.sum(), p)
    assert grad.tolist() == [6.0] and not owner.delivered and not b._parts


def test_one_derived_value_makes_its_factors_once(task, monkeypatch):
    """Every sink adapts them to its parameter; one no gradient is wanted of gets none."""
    unwanted = object()
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: node is not unwanted)
    owners = [Parameter(str(i)) for i in range(3)]
    buffers = [ContributionBuffer(htv.Mean(), GROUPS, owner) for owner in owners]
    tokens = [type("Token", (), {"grad_fn": node})() for node in (None, unwanted, "wanted")]
    double = lambda factors: StackedFactors(2 * factors.values)
    recorders = [
        UseRecorder(t, ld, a)
        for t, ld, a in zip(tokens, buffers, (None, None, double), strict=True)
    ]
    made = []

    def make(grouped_rows, values):
        made.append(values)
        return StackedFactors(values)

    ParameterArgument(P, recorders).record(make, None, torch.ones(3, 1))
    assert len(made) == 1
    assert [buffer.settle(P, None) for buffer in buffers[:2]] == [torch.tensor([3.0]), None]
    assert buffers[2].settle(P, None).tolist() == [6.0]


def test_a_sink_tells_in_which_pass_its_forward_ran(task):
    owner, _, buffer = tracked()
    recorder = UseRecorder(P, buffer, born=7)
    task(8)
    recorder.record(rows(1.0, 1.0, 1.0))
    assert owner.passes.outer == {8: 7}


def test_a_slot_that_is_not_served_gives_the_plain_gradient():
    argument = ParameterArgument(P)
    assert not argument.is_served and argument.tokens == ()
    groups = Groups.by_id([0, 0, 1], 3, weight="equal")
    make = lambda grouped_rows, values: StackedFactors(grouped_rows.along(values, dim=0))
    grad = argument.grad(True, make, groups.grouped_rows(groups.input_layout), X)
    assert grad.tolist() == [12.0]  # without the weights
    assert argument.grad(False, make, None, X) is None


class Doubled(Function):
    """Notes whether autocast is on where its gradients are computed."""

    seen = []

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def gradients(ctx, grad):
        Doubled.seen.append(torch.is_autocast_enabled("cpu"))
        return 2 * grad


def test_statistics_are_not_differentiated_and_keep_their_type():
    x = torch.ones(3, requires_grad=True)
    Doubled.seen.clear()
    y = Doubled.apply(x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    assert Doubled.seen == [False, False] and x.grad.tolist() == [4.0] * 3
    with pytest.raises(RuntimeError, match="create_graph"):
        y.backward(create_graph=True)
