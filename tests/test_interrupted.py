"""Interrupts, failures and deletion: nothing stays behind, and the next step is right."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

import htv
from htv.bench.models import mlp
from htv.engine.forward_block import ForwardBlock
from htv.engine.session import Session
from htv.engine.voters import Voters


def step(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def lines_of(function):
    """The lines at which an interrupt may come, in the code of a function."""
    return sorted({line for _, _, line in function.__code__.co_lines() if line})


def interrupted_at(code, line, call):
    """Run with a KeyboardInterrupt when a line of a code object is reached; whether it was."""

    def trace(frame, event, _):
        def local(frame, event, _):
            if event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                raise KeyboardInterrupt
            return local

        return local if frame.f_code is code else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


PLACES = [
    Session.run, Session.open, Voters.begin, Session.close,
    ForwardBlock.__enter__, ForwardBlock.__exit__,
]  # fmt: skip


@pytest.mark.parametrize("unsupported", ["error", "plain"])
@pytest.mark.parametrize("layout", PLACES, ids=lambda f: f.__qualname__)
def test_an_interrupt_at_any_line_wedges_nothing(layout, unsupported):
    model, x = mlp().double(), torch.randn(6, 12).double()
    handle = htv.attach(model, htv.Median(), on_unsupported=unsupported)
    expected, met = step(model, x), 0

    def block():
        with handle.forward(x):
            loss = model(x).square().sum()
        loss.backward()

    call = block if "Block" in layout.__qualname__ else lambda: model(x)
    for line in lines_of(layout):
        met += interrupted_at(layout.__code__, line, call)
        for _ in range(2):
            for found, wanted in zip(step(model, x), expected, strict=True):
                assert torch.equal(found, wanted), line
        assert torch._C._len_torch_function_stack() == 0, line
    assert met > 2
    handle.detach()


@pytest.mark.parametrize("block", ["groups", "accumulate", "examined"])
def test_an_interrupted_block_is_over(block):
    model, x = mlp().double(), torch.randn(6, 12).double()
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        expected = step(model, x)
        enter = {
            "groups": lambda: handle.groups(torch.tensor([0, 0, 1, 1, 2, 2])),
            "accumulate": handle.accumulate,
            "examined": lambda: handle.examined(lambda *_: None),
        }[block]
        with pytest.raises(KeyboardInterrupt), enter():
            raise KeyboardInterrupt
        for found, wanted in zip(step(model, x), expected, strict=True):
            assert torch.equal(found, wanted)
        with enter():
            pass


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def tensors_alive():
    gc.collect()
    return sum(type(o) is torch.Tensor for o in gc.get_objects())


@pytest.mark.parametrize("rule", [htv.AndMask(0.4), htv.Median()], ids=repr)
@pytest.mark.parametrize("dropped", [0, 2], ids=["", "after forwards without a backward"])
def test_failed_backwards_keep_nothing(rule, dropped):
    shared = nn.Linear(8, 8)
    model, x = (
        nn.Sequential(nn.Linear(12, 8), shared, nn.ReLU(), shared, nn.Linear(8, 2)),
        torch.randn(6, 12),
    )
    with htv.attach(model, rule):
        step(model, x)
        for _ in range(dropped):
            model(x)
        counts = []
        for number in range(8):
            hook = model[0].register_full_backward_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(x).sum().backward()
            hook.remove()
            if number in (1, 7):
                counts.append(tensors_alive())
        assert counts[1] <= counts[0]
        step(model, x)


def test_what_a_failed_backward_recorded_dies_with_its_graph():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.Median()) as handle:
        hook = model[0].register_full_backward_hook(fail)
        loss = model(x).sum()
        buffers = [tracked._buffers.mine for tracked in handle._session.tracked()]
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        hook.remove()
        assert any(buffer()._parts for buffer in buffers)
        del loss
        assert all(buffer() is None for buffer in buffers)


def test_a_detached_model_is_freed_at_once():
    model = mlp()
    handle = htv.attach(model, htv.Median())
    step(model, torch.randn(6, 12))
    handle.detach()
    gone = weakref.ref(model), weakref.ref(handle)
    gc.disable()
    try:
        del model, handle
        assert gone[0]() is None and gone[1]() is None
    finally:
        gc.enable()


def test_a_failed_micro_batch_leaves_no_half_counted_votes():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        with (
            pytest.raises(RuntimeError, match="failed part-way.*begin the block again"),
            handle.accumulate(),
        ):
            hook = model[0].register_full_backward_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(x).sum().backward()
            hook.remove()
            model(x).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        with handle.accumulate():
            model(x).sum().backward()


def test_a_backward_onto_an_aggregate_warns_once():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.AndMask(0.4)):
        model(x).sum().backward()
        with pytest.warns(
            UserWarning, match=r"adds to the aggregate.*handle.accumulate\(\)"
        ) as caught:
            for _ in range(3):
                model(x).sum().backward()
        assert len(caught) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_with_zero_grad_between_do_not_warn(set_to_none, recwarn):
    model, x = mlp(), torch.randn(6, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with htv.attach(model, htv.AndMask(0.4)):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            model(x).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert not [w for w in recwarn if "aggregate" in str(w.message)]
