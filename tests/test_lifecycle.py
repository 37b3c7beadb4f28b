"""What happens around a served backward: in-place edits, checkpoints, hooks, copies, replaced
parameters, leaks.
"""

import copy
import gc
import io
import threading
import uuid
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import htv
from htv.autograd.aggregation import (
    AggregationNode,
    BufferListener,
    ContributionBuffer,
    NestedBackwards,
    UseRecorder,
)
from htv.autograd.expand import expand
from htv.autograd.from_parameters import TensorFromParameters
from htv.bench.models import mlp
from htv.groups import GroupedRows, Groups
from htv.tools.check import aggregated
from support.layer_table import Module


class Bystander(BufferListener):
    def __init__(self):
        self.name, self.passes, self.settled = "p", NestedBackwards(), set()


MEDIAN = htv.Median()


def square(y):
    return y.square().sum()


def assert_as_oracle(model, x, ids=None, rule=MEDIAN):
    """One step of the attached model, loss = sum of squares, against a loop over groups."""
    ids = list(range(len(x))) if ids is None else ids
    expected = {name: [] for name, _ in model.named_parameters()}
    for key in sorted(set(ids)):
        model.zero_grad()  # backward(), for reentrant checkpoints refuse autograd.grad
        sum(square(model(x[n : n + 1])) for n in range(len(x)) if ids[n] == key).backward()
        for name, p in model.named_parameters():
            expected[name].append(p.grad)
    model.zero_grad()
    with htv.attach(model, rule) as handle:
        with handle.groups(torch.tensor(ids)):
            loss = square(model(x))
        loss.backward()
    for name, p in model.named_parameters():
        stacked = torch.stack(expected[name])
        torch.testing.assert_close(
            p.grad, aggregated(stacked, rule), rtol=1e-9, atol=1e-10, msg=name
        )


IN_PLACE = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear 3-D": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear 4-D": (lambda: nn.Linear(6, 5), (4, 2, 3, 6)),
    "linear 3-D, no bias": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (4, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), (4, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (4, 3, 5, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 3)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_outputs_may_be_changed_in_place(name):
    make, shape = IN_PLACE[name]
    assert_as_oracle(
        Module(lambda m, x: F.softplus(m.l(x).mul_(2.0)), l=make()).double(),
        torch.randn(shape).double(),
    )


def test_embeddings_may_be_changed_in_place():
    model = Module(lambda m, ids: m.e(ids).mul_(2.0), e=nn.Embedding(9, 5)).double()
    assert_as_oracle(model, torch.randint(0, 9, (4, 3)))


def test_a_derived_tensor_changed_in_place_after_its_use():
    def decayed(m, x):
        b = m.b.clone()
        x = torch.tanh(x + b)
        b *= 0.5
        return x + b

    assert_as_oracle(Module(decayed, b=torch.randn(6)).double(), torch.randn(5, 6).double())


def _set(p):
    p[0] = 0


@pytest.mark.parametrize(
    "edit", [_set, lambda p: p[:, :2].mul_(3.0), lambda p: p.mul_(3.0)], ids=["row", "view", "all"]
)
@pytest.mark.parametrize("used_before", [False, True])
def test_looked_up_positions_changed_in_place(edit, used_before):
    def forward(m, x):
        p = m.e(torch.arange(3))
        y = x + p if used_before else x
        edit(p)
        return torch.tanh(y) + p

    assert_as_oracle(Module(forward, e=nn.Embedding(4, 6)).double(), torch.randn(5, 3, 6).double())


def test_a_derived_tensor_that_depends_on_more_than_its_parameters():
    p, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    owner, groups = Bystander(), Groups.each(4)
    buffer = ContributionBuffer(htv.Median(), groups, owner)
    recorder = UseRecorder(AggregationNode.apply((buffer,), p), buffer)
    for source in (p.exp() * other, torch.cat([p, F.relu(other)])):
        with pytest.raises(htv.UnsupportedError, match="'p'.*gradient would be lost"):
            TensorFromParameters(source, [p], [recorder])
    TensorFromParameters(p.exp() * other.detach(), [p], [recorder])
    grouped_rows = GroupedRows(groups, groups.input_layout)
    copies = expand(
        TensorFromParameters(p.exp(), [p], [recorder]).argument(),
        2,
        4,
        grouped_rows,
        torch.bfloat16,
    )
    assert copies.dtype == torch.bfloat16 and copies.shape == (4, 3)
    copies.square().sum().backward()
    assert p.grad.dtype == torch.float32 and owner.settled
    torch.testing.assert_close(p.grad, 8 * (2 * p).exp().detach(), rtol=2e-2, atol=1e-2)


def test_parameters_replaced_while_attached():
    x = torch.randn(5, 12)
    model = mlp()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with htv.attach(model, htv.Median()):
        old, model[3] = model[3], nn.Linear(*reversed(model[3].weight.shape))
        with pytest.raises(
            RuntimeError, match="parameters changed while attached: '3.weight'.*attach again"
        ):
            model(x)
        model[3] = old
        model(x)
        override = {k: v.clone().requires_grad_() for k, v in state.items()}
        with pytest.raises(RuntimeError, match="changed while attached: '0.weight'"):
            torch.func.functional_call(model, override, x)
        model.register_parameter("added", nn.Parameter(torch.ones(2)))
        with pytest.raises(RuntimeError, match="changed while attached: 'added'"):
            model(x)
        del model.added
        model.load_state_dict(state, assign=True)
        with pytest.raises(RuntimeError, match="changed while attached"):
            model(x)
    with htv.attach(model, htv.Median()):
        square(model(x)).backward()


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("part", [False, True])
def test_copies_of_an_attached_model_are_detached(copied, part):
    model, x = mlp(), torch.randn(5, 12)
    whole = nn.Sequential(model, nn.Tanh()) if part else model
    plain = torch.autograd.grad(square(whole(x)), list(whole.parameters()))
    with htv.attach(model, htv.Median()):
        square(whole(x)).backward()
        tracked = [p.grad for p in model.parameters()]
        twin = copied(whole)
        assert all(
            "forward" not in vars(m) and "__reduce_ex__" not in vars(m) for m in twin.modules()
        )
        assert all(not p._backward_hooks for p in twin.parameters())
        for a, b in zip(
            torch.autograd.grad(square(twin(x)), list(twin.parameters())), plain, strict=True
        ):
            torch.testing.assert_close(a, b)
        with htv.attach(twin, htv.AndMask(0.2)):
            square(twin(x)).backward()
        model.zero_grad()
        square(whole(x)).backward()  # the original is served as before
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), tracked, strict=True))


def test_a_handle_is_not_copied():
    with (
        htv.attach(mlp(), htv.Median()) as handle,
        pytest.raises(RuntimeError, match="copy the model"),
    ):
        copy.deepcopy(handle)


def test_detach_leaves_what_the_user_patched_since():
    model, x = mlp(), torch.randn(5, 12)
    handle = htv.attach(model, htv.Median())
    patch = lambda x: x
    model.forward = patch
    del model[0].__dict__["forward"]
    handle.detach()
    assert (
        model.forward is patch
        and "forward" not in vars(model[0])
        and "forward" not in vars(model[3])
    )
    assert model(x) is x


def test_a_parameter_of_two_handles():
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    b.weight = a.weight
    handle = htv.attach(a, htv.Median())
    with pytest.raises(RuntimeError, match="'weight' is served by another handle"):
        htv.attach(b, htv.Median())
    assert "forward" not in vars(b) and not b.bias._backward_hooks
    htv.attach(b, htv.Median(), exclude="weight").detach()
    handle.detach()
    htv.attach(b, htv.Median()).detach()


def test_integer_and_uninitialized_parameters():
    model = Module(lambda m, x: m.l(x) + m.steps, l=nn.Linear(4, 3))
    model.steps = nn.Parameter(torch.arange(3), requires_grad=False)
    with htv.attach(model, htv.Median()) as handle:
        assert sorted(s.name for s in handle._session.tracked()) == ["l.bias", "l.weight"]
        square(model(torch.randn(5, 4))).backward()
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(
        RuntimeError, match="'0.weight' is not initialized.*Run the model once first"
    ):
        htv.attach(lazy, htv.Median())
    lazy(torch.randn(5, 4))
    htv.attach(lazy, htv.Median()).detach()


def test_stats_of_a_parameter_without_coordinates():
    model = Module(
        lambda m, x: torch.cat([x * m.q, x[:, :0] * m.p], 1), p=torch.randn(0), q=torch.randn(4)
    )
    with htv.attach(model, htv.Median(), stats=True) as handle:
        square(model(torch.randn(5, 4))).backward()
        stats = handle.stats()
    assert stats["p"].kept_fraction != stats["p"].kept_fraction and stats["q"].kept_fraction == 1.0


def test_packed_sequences_dropped_for_being_empty_keep_their_identity():
    first, second = (Groups.packed(torch.tensor(b), 5) for b in ([0, 2, 2, 5], [0, 0, 2, 5]))
    both = Groups.packed(torch.tensor([0, 2, 5]), 5)
    assert first.same_groups(Groups.packed(torch.tensor([0, 1, 1, 5]), 5))
    assert (
        not first.same_groups(second)
        and not first.same_groups(both)
        and not both.same_groups(first)
    )


# -- activation checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("second", ["checkpointed", "plain", "plain first"])
def test_a_layer_used_in_a_checkpoint_and_elsewhere(reentrant, second):
    def forward(m, x):
        if second == "plain first":
            return checkpoint(m.l, torch.tanh(m.l(x)), use_reentrant=reentrant)
        y = torch.tanh(checkpoint(m.l, x, use_reentrant=reentrant))
        return checkpoint(m.l, y, use_reentrant=reentrant) if second == "checkpointed" else m.l(y)

    model, x = (
        Module(forward, l=nn.Linear(6, 6)).double(),
        torch.randn(5, 6).double().requires_grad_(),
    )
    if not reentrant:
        return assert_as_oracle(model, x)
    with htv.attach(model, htv.Median()):
        with pytest.raises(
            RuntimeError, match="'l.(weight|bias)' is used in a reentrant.*use_reentrant=False"
        ):
            square(model(x)).backward()


def test_reentrant_checkpoints_of_several_layers_and_inside_one_another():
    model = Module(
        lambda m, x: checkpoint(
            m.outer, checkpoint(m.a, x, use_reentrant=True), use_reentrant=True
        ),
        a=nn.Linear(6, 6),
        outer=Module(
            lambda m, x: m.c(checkpoint(m.b, x, use_reentrant=True)),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, 6),
        ),
    ).double()
    assert_as_oracle(model, torch.randn(5, 6).double().requires_grad_())
    assert_as_oracle(model, torch.randn(5, 6).double().requires_grad_(), ids=[3, 1, 1, 3, 2])


def test_a_failed_reentrant_backward_blocks_nothing():
    model = Module(lambda m, x: checkpoint(m.l, x, use_reentrant=True), l=nn.Linear(6, 6)).double()
    x = torch.randn(5, 6).double().requires_grad_()
    with htv.attach(model, htv.Median()):
        clean = torch.autograd.grad(square(model.l(x)), model.l.weight)[0]
        y = x * 1
        y.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            square(model(y)).backward()
        for _ in range(2):
            model.zero_grad()
            square(model(x)).backward()
            torch.testing.assert_close(model.l.weight.grad, clean)
        square(model.l(x)).backward()
        torch.testing.assert_close(model.l.weight.grad, 2 * clean)


def test_reentrant_recomputation_among_forwards_of_different_groups():
    model = Module(lambda m, x: checkpoint(m.l, x, use_reentrant=True), l=nn.Linear(6, 6))
    x = torch.randn(5, 6, requires_grad=True)
    with htv.attach(model, htv.Median()) as handle:
        with handle.groups(torch.tensor([0, 0, 1, 1, 2])):
            loss = square(model(x))
        with handle.groups(torch.tensor([0, 1, 1, 1, 1])):
            other = square(model(x))
        with pytest.raises(RuntimeError, match="different groups.*use_reentrant=False"):
            loss.backward()
        del other
    with htv.attach(
        model, htv.Median()
    ) as handle:  # step after step, with evaluations between, nothing is refused
        for ids in ([0, 0, 1, 1, 2], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]):
            with handle.groups(torch.tensor(ids)):
                loss = square(model(x))
            with torch.no_grad():
                model(x)
            loss.backward()
            with torch.no_grad():
                model(x)


def test_a_whole_model_in_a_reentrant_checkpoint_keeps_its_groups():
    model, x = nn.Linear(6, 4).double(), torch.randn(5, 6).double().requires_grad_()
    with htv.attach(model, htv.Median()) as handle:
        for ids in ([0, 0, 1, 1, 2], None):
            found = []
            for call in (lambda x: checkpoint(model, x, use_reentrant=True), model):
                model.zero_grad()
                if ids is None:
                    loss = square(call(x))
                else:
                    with handle.groups(torch.tensor(ids)):
                        loss = square(call(x))
                loss.backward()
                found.append(model.weight.grad)
            torch.testing.assert_close(*found)


CHECKPOINTED = {
    "F.linear": lambda m, y: F.linear(y, m.w, m.b),
    "module and scale": lambda m, y: m.l(y) * m.b,
    "layer norm": lambda m, y: F.layer_norm(y, (6,), m.b, m.b),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_recomputation_outside_the_mode_fails_loudly(name):
    block = CHECKPOINTED[name]
    model = Module(
        lambda m, x: checkpoint(lambda y: block(m, y), torch.tanh(m.l(x)), use_reentrant=False),
        l=nn.Linear(6, 6), w=torch.randn(6, 6), b=torch.randn(6),
    )  # fmt: skip
    with htv.attach(model, htv.Mean()):
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            square(model(torch.randn(5, 6))).backward()


# -- hooks, threads, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "forward", [lambda m, x: x * m.p, lambda m, x: x * m.p.exp()], ids=["itself", "derived"]
)
def test_tensor_hooks_on_parameters_act_once_on_the_gradient(forward, when):
    x, found, calls = torch.randn(5, 6), [], []
    p = torch.randn(6)
    for hooked in (False, True):
        model = Module(forward, p=p.clone())
        hook = lambda g: calls.append(g.shape) or g / 2
        if hooked and when == "before":
            model.p.register_hook(hook)
        handle = htv.attach(model, htv.Median())
        if hooked and when == "after":
            model.p.register_hook(hook)
        square(model(x)).backward()
        handle.detach()
        found.append(model.p.grad)
        assert len(model.p._backward_hooks or ()) == hooked
    torch.testing.assert_close(found[1], found[0] / 2)
    assert calls == [(6,)]


def test_gradients_of_some_parameters_leave_no_factors_of_the_others():
    model, x = mlp(), torch.randn(5, 12, requires_grad=True)
    with htv.attach(model, htv.Median()) as handle:
        model(x)
        loss = square(model(x))
        buffers = {s.name: s._buffers.mine() for s in handle._session.tracked()}
        torch.autograd.grad(loss, [x], retain_graph=True)
        assert not any(buffer._parts for buffer in buffers.values())
        some = torch.autograd.grad(loss, [model[3].weight], retain_graph=True)[0]
        assert not any(buffer._parts for buffer in buffers.values())
        loss.backward()
        torch.testing.assert_close(model[3].weight.grad, some)


def test_forwards_before_and_after_a_backward_under_one_loss():
    model = mlp()
    with htv.attach(model, htv.Median()):
        first, second = (square(model(torch.randn(5, 12))) for _ in range(2))
        first.backward()
        third = square(model(torch.randn(5, 12)))
        with pytest.raises(
            htv.UnsupportedError, match="two aggregated gradients.*from before another backward"
        ):
            (second + third).backward()


def test_threads_are_served_apart():
    """A forward while another thread is inside one is served too."""
    entered, leave = threading.Event(), threading.Event()

    def forward(m, x):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert leave.wait(30)
        return m.l(x)

    model, x = Module(forward, l=nn.Linear(4, 3)), torch.randn(5, 4)
    with htv.attach(model, htv.Median()):
        expected = torch.autograd.grad(square(model(x)), model.l.weight)[0]
        thread = threading.Thread(target=lambda: model(torch.randn(5, 4)))
        thread.start()
        assert entered.wait(30)
        try:
            found = torch.autograd.grad(square(model(x)), model.l.weight)[0]
        finally:
            leave.set()
            thread.join()
    assert torch.equal(found, expected)


def test_backward_passes_of_two_threads_side_by_side():
    """Each has its own contributions, though another pass runs between two uses of a parameter."""
    between = threading.Event(), threading.Event()

    def pause(grad):
        if threading.current_thread() is not threading.main_thread():
            between[0].set()
            assert between[1].wait(30)

    def forward(m, x):
        y = m.l(x)
        y.register_hook(pause)
        return m.l(y)

    model, x = Module(forward, l=nn.Linear(4, 4)).double(), torch.randn(5, 4).double()
    with htv.attach(model, htv.Median()):
        gradients = lambda loss: torch.autograd.grad(loss, list(model.parameters()))
        expected, found = gradients(square(model(x))), []
        for before in (False, True):  # whether both forwards ran in one thread
            loss = square(model(x)) if before else None
            thread = threading.Thread(
                target=lambda loss: found.append(
                    gradients(square(model(x)) if loss is None else loss)
                ),
                args=(loss,),
            )
            thread.start()
            assert between[0].wait(30)
            try:
                found.append(gradients(square(model(x))))
            finally:
                between[1].set()
                thread.join()
            for event in between:
                event.clear()
    assert len(found) == 4
    for gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_attaching_while_another_thread_attaches(monkeypatch):
    done, attach = [], lambda: done.append(htv.attach(mlp(), htv.Median()))
    make = uuid.uuid4

    def interrupted():
        monkeypatch.setattr(uuid, "uuid4", make)
        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()
        return make()

    monkeypatch.setattr(uuid, "uuid4", interrupted)
    attach()
    assert len(done) == 2


def test_a_model_dropped_after_a_forward_is_freed():
    for graph in (True, False):
        model = mlp()
        handle = htv.attach(model, htv.Median())
        references = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
        loss = square(model(torch.randn(5, 12)))
        if graph:
            loss.backward()
        del model, handle, loss
        gc.collect()
        assert [r() for r in references] == [None] * len(references)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1)], ids=["linear", "conv1d"])
def test_the_weight_is_not_saved_where_the_input_needs_no_gradient(layer):
    shape = (5, 4) if isinstance(layer, nn.Linear) else (5, 4, 3)
    for needs in (False, True):
        saved = []
        with (
            htv.attach(layer, htv.Median()),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.data_ptr()) or t, lambda t: t
            ),
        ):
            layer(torch.randn(shape, requires_grad=needs))
        assert (layer.weight.data_ptr() in saved) == needs


def test_group_norm_keeps_the_memory_format():
    model = nn.GroupNorm(2, 4)
    x = torch.randn(5, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    plain = model(x)
    with htv.attach(model, htv.Mean()):
        y = model(x)
        assert y.stride() == plain.stride() and torch.equal(y, plain)
        grads = torch.autograd.grad(square(y.sin()), [x, *model.parameters()])
    for a, b in zip(
        grads, torch.autograd.grad(square(plain.sin()), [x, *model.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_backwards_through_one_graph_under_reentrant_neighbours():
    """What an earlier backward settled does not count against a later one."""
    model = Module(
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True)),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 3),
    )
    x = torch.randn(5, 4, requires_grad=True)
    with htv.attach(model, htv.Median()):
        loss = square(model(x))
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward(retain_graph=True)
        loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 3 * g)


def test_a_scalar_parameter_does_not_raise_the_type_of_what_it_meets():
    model, x = (
        Module(lambda m, x: x * m.scale.exp(), scale=torch.tensor(0.3)),
        torch.randn(5, 3, dtype=torch.bfloat16),
    )
    with htv.attach(model, htv.Median()):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert model.scale.grad.dtype == torch.float32
