"""What a parameter's contributions go through between a layer's backward and its gradient."""

import gc

import pytest
import torch

import htv
from htv.autograd.ledger import (
    Function,
    Hub,
    Ledger,
    Owner,
    Passes,
    Sink,
    Slot,
    settle_together,
)
from htv.groups import Groups
from htv.ops.factors import StackedFactors

GROUPS = Groups.each(3)


class Parameter(Owner):
    """An owner that remembers what it was told."""

    def __init__(self, name="p"):
        self.name, self.passes, self.settled = name, Passes(), set()
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
    ledger = Ledger(htv.Median(), GROUPS, owner)
    ledger.record(rows(1.0, 2.0, 9.0))
    assert not ledger.consumed
    assert ledger.settle(P, None).tolist() == [6.0]  # E times the median
    assert ledger.consumed and owner.settled == {7}
    ((grad, current),) = owner.delivered
    assert grad.tolist() == [6.0] and current == 7
    assert ledger.settle(P, None) is None and len(owner.delivered) == 1


def test_several_uses_are_summed_by_group_before_the_rule(task):
    owner = Parameter()
    ledger = Ledger(htv.Median(), GROUPS, owner)
    ledger.record(rows(1.0, 2.0, 9.0))
    ledger.record(rows(4.0, 0.0, 0.0))
    assert ledger.settle(P, None).tolist() == [15.0]  # the median of 5, 2, 9


def test_nothing_recorded_settles_nothing(task):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner, observes=True)
    assert ledger.settle(P, None) is None and ledger.taken() == (7, None)
    assert not ledger.consumed and not owner.delivered and not owner.observed and not owner.settled


def test_every_pass_has_its_own(task):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    ledger.record(rows(1.0, 1.0, 1.0))
    task(8)
    ledger.record(rows(2.0, 2.0, 2.0))
    assert ledger.settle(P, None).tolist() == [6.0]
    task(7)
    assert ledger.settle(P, None).tolist() == [3.0]
    assert [current for _, current in owner.delivered] == [8, 7]
    assert owner.settled == {7}  # passes of their own need not be remembered


def test_a_gradient_has_its_parameters_type(task):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    ledger.record(rows(1.0, 1.0, 1.0))
    grad = ledger.settle(P.bfloat16(), None)
    assert grad.dtype == torch.bfloat16 and owner.delivered[0][0] is grad
    assert ledger.delivered(7, None, P) is None and owner.delivered[1] == (None, 7)


def test_a_guard_keeps_contributions_out(task):
    owner = Parameter()
    owner.attached = False
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    with pytest.raises(RuntimeError, match="gone"):
        ledger.record(rows(1.0, 1.0, 1.0))
    assert ledger.settle(P, None) is None


def test_a_graph_outlives_its_model(task):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner, observes=True)
    del owner
    gc.collect()
    ledger.record(rows(1.0, 1.0, 1.0), born=3)
    assert not ledger.accumulates and ledger.owner_name == "p"
    assert ledger.settle(P, None).tolist() == [3.0]


@pytest.mark.parametrize("observes", [False, True])
def test_an_owner_sees_what_it_asked_for(task, observes):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner, observes)
    part = rows(1.0, 1.0, 1.0)
    ledger.record(part)
    ledger.settle(P, None)
    assert owner.observed == ([[part]] if observes else [])


def test_passes_inside_one_another_are_related():
    passes = Passes()
    passes.outer.update({3: 2, 2: 1, 5: 4})
    assert passes.related(3, 1) and passes.related(3, 2)
    assert passes.related(2, 1) and passes.related(4, 5)
    assert not passes.related(3, 5) and not passes.related(1, 4) and passes.related(9, 9)


def test_a_reentrant_pass_is_known_by_where_its_forward_ran(task):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    ledger.record(rows(1.0, 1.0, 1.0))  # no forward of its own
    ledger.record(rows(1.0, 1.0, 1.0), born=7)  # ran in this very pass
    assert owner.passes.outer == {}
    ledger.settle(P, None)
    task(8)
    Ledger(htv.Mean(), GROUPS, owner).record(rows(1.0, 1.0, 1.0), born=2)
    assert owner.passes.outer == {8: 2}


@pytest.mark.parametrize("settled", [False, True])
def test_related_passes_may_not_both_contribute(task, settled):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    task(8)
    ledger.record(rows(1.0, 1.0, 1.0), born=7)
    if settled:
        ledger.settle(P, None)
        assert owner.settled == {8}
        ledger = Ledger(htv.Mean(), GROUPS, owner)
    task(7)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        ledger.record(rows(1.0, 1.0, 1.0))
    task(9)  # of another thread
    ledger.record(rows(2.0, 2.0, 2.0))
    assert ledger.settle(P, None).tolist() == [6.0]
    assert owner.settled == ({8, 9} if settled else {9})


class Block:
    """Stands for an accumulation."""

    def __init__(self):
        self.added = []

    def add(self, *given):
        self.added.append(given)


def test_contributions_may_be_gathered_over_passes(task, monkeypatch):
    owner = Parameter()
    ledger = Ledger(htv.Mean(), GROUPS, owner)
    assert not ledger.accumulates
    owner.accumulation = Block()
    assert ledger.accumulates
    part = rows(1.0, 1.0, 1.0)
    ledger.record(part)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: True)
    assert ledger.settle(P, None) is None
    assert owner.accumulation.added == [(7, [part], GROUPS)] and owner.delivered == [(None, 7)]

    def does_not_tell(node):
        raise RuntimeError("leaves")

    ledger.record(part)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", does_not_tell)
    with pytest.raises(RuntimeError, match="accumulate"):
        ledger.settle(P, None)


def test_parameters_of_a_hub_settle_by_themselves(task, monkeypatch):
    """One not wanted by this pass, one that accumulates, one nothing came to, two others."""
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: node != "unwanted")
    owners = [Parameter(str(i)) for i in range(5)]
    ledgers = [Ledger(htv.Median(), GROUPS, owner) for owner in owners]
    owners[1].accumulation = Block()
    for i in (0, 1, 3, 4):
        ledgers[i].record(rows(1.0, 2.0 + i, 9.0))
    nodes = ["unwanted", "1", "2", "3", "4"]
    grads = settle_together(ledgers, [P] * 3 + [P.double(), P], nodes)
    assert grads[:3] == [None] * 3 and [g.item() for g in grads[3:]] == [15.0, 18.0]
    assert grads[3].dtype == torch.float64
    assert [len(owner.delivered) for owner in owners] == [0, 1, 0, 1, 1]
    assert [ledger.consumed for ledger in ledgers] == [True, True, False, True, True]
    assert len(owners[1].accumulation.added) == 1


class Use(torch.autograd.Function):
    """x * p for every row of x; records what each of them contributes to p."""

    @staticmethod
    def forward(ctx, x, slot, *tokens):
        ctx.x, ctx.slot = x, slot
        return x * slot.value

    @staticmethod
    def backward(ctx, grad):
        make = lambda voters, grad, x: StackedFactors(grad * x)
        kept = ctx.slot.grad(True, make, GROUPS.voters(GROUPS.home), grad, ctx.x)
        assert kept is None
        return (grad * ctx.slot.value, None, *[None] * len(ctx.slot.tokens))


X = torch.tensor([[1.0], [2.0], [9.0]])


def served(rule=None, name="p"):
    owner, p = Parameter(name), torch.ones(1, requires_grad=True)
    ledger = Ledger(rule or htv.Median(), GROUPS, owner)
    return owner, p, ledger


def test_a_hub_runs_after_all_uses_of_its_token():
    owner, p, ledger = served()
    slot = Slot(p.detach(), [Sink(Hub.apply((ledger,), p), ledger)])
    assert slot.is_served and len(slot.tokens) == 1
    out = Use.apply(X, slot, *slot.tokens) + 2 * Use.apply(X.flip(0), slot, *slot.tokens)
    assert slot.tokens[0].shape == (0,)
    out.sum().backward()
    assert p.grad.tolist() == [33.0]  # three times the median of 19, 6 and 11
    assert len(owner.delivered) == 1


def test_a_hub_of_two_returns_each_ones_own():
    (_, p, a), (_, q, b) = served(), served()
    token = Hub.apply((a, b), p, q)
    first, second = (Slot(t.detach(), [Sink(token, ledger)]) for t, ledger in ((p, a), (q, b)))
    (Use.apply(X, first, token) + Use.apply(3 * X, second, token)).sum().backward()
    assert p.grad.tolist() == [6.0] and q.grad.tolist() == [18.0]
    assert a.consumed and b.consumed


def test_only_what_a_pass_goes_on_to_is_recorded():
    """autograd.grad of one parameter leaves nothing of another's behind."""
    (_, p, a), (owner, q, b) = served(), served()
    slot = lambda t, ledger: Slot(t.detach(), [Sink(Hub.apply((ledger,), t), ledger)])
    first, second = slot(p, a), slot(q, b)
    out = Use.apply(X, first, *first.tokens) + Use.apply(X, second, *second.tokens)
    (grad,) = torch.autograd.grad(out.sum(), p)
    assert grad.tolist() == [6.0] and not owner.delivered and not b._parts


def test_one_derived_value_makes_its_factors_once(task, monkeypatch):
    """Every sink adapts them to its parameter; one no gradient is wanted of gets none."""
    unwanted = object()
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: node is not unwanted)
    owners = [Parameter(str(i)) for i in range(3)]
    ledgers = [Ledger(htv.Mean(), GROUPS, owner) for owner in owners]
    tokens = [type("Token", (), {"grad_fn": node})() for node in (None, unwanted, "wanted")]
    double = lambda factors: StackedFactors(2 * factors.values)
    sinks = [Sink(t, ld, a) for t, ld, a in zip(tokens, ledgers, (None, None, double), strict=True)]
    made = []

    def make(voters, values):
        made.append(values)
        return StackedFactors(values)

    Slot(P, sinks).record(make, None, torch.ones(3, 1))
    assert len(made) == 1
    assert [ledger.settle(P, None) for ledger in ledgers[:2]] == [torch.tensor([3.0]), None]
    assert ledgers[2].settle(P, None).tolist() == [6.0]


def test_a_sink_tells_in_which_pass_its_forward_ran(task):
    owner, _, ledger = served()
    sink = Sink(P, ledger, born=7)
    task(8)
    sink.record(rows(1.0, 1.0, 1.0))
    assert owner.passes.outer == {8: 7}


def test_a_slot_that_is_not_served_gives_the_plain_gradient():
    slot = Slot(P)
    assert not slot.is_served and slot.tokens == ()
    groups = Groups.by_id([0, 0, 1], 3, weight="equal")
    make = lambda voters, values: StackedFactors(voters.along(values, dim=0))
    grad = slot.grad(True, make, groups.voters(groups.home), X)
    assert grad.tolist() == [12.0]  # without the weights
    assert slot.grad(False, make, None, X) is None


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
