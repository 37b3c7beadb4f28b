"""The compiled part of the engine does what its Python twins do, and leaves the rest to Python."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import htv
from htv.engine import handlers, usual
from htv.engine.handlers import linear as linear_handler
from htv.engine.handlers.call import LAYERS
from htv.engine.provenance import CONSTANT
from htv.groups import BatchLayout

needs_compiled = pytest.mark.skipif(
    usual.compiled is None, reason="htv is built without compiled code"
)


@pytest.fixture(params=[0, 1], ids=["python", "compiled"])
def guard_class(request):
    if request.param and usual.compiled is None:
        pytest.skip("htv is built without compiled code")
    return usual.GradientGuard if request.param else usual._GradientGuard


class Subclass(torch.Tensor):
    pass


# -- marks ----------------------------------------------------------------------------------------


@pytest.fixture(params=["python", "compiled"])
def functions(request):
    """usual_mark, put_usual, has_members and of_identity."""
    names = ("usual_mark", "put_usual", "has_members", "of_identity")
    if request.param == "compiled":
        if usual.compiled is None:
            pytest.skip("htv is built without compiled code")
        return [getattr(usual.compiled, name) for name in names]
    return [getattr(usual, f"_{name}") for name in names]


def test_a_mark_is_found_while_its_tensor_is_unchanged(functions):
    look, put, _, _ = functions
    x, table, mark = torch.zeros(3), {}, BatchLayout(0)
    assert look(table, x) is None
    assert put(table, x, mark) is True and look(table, x) is mark
    assert look(table, torch.zeros(3)) is None
    x.add_(1)
    assert look(table, x) is None
    assert put(table, x, CONSTANT) is True and look(table, x) is CONSTANT


def test_a_tensor_that_got_a_gradient_has_another_mark(functions):
    look, put, _, _ = functions
    x, table = torch.zeros(3), {}
    put(table, x, CONSTANT)
    x.requires_grad_()
    assert look(table, x) is None
    put(table, x, CONSTANT)
    x.requires_grad_(False)
    assert look(table, x) is CONSTANT


def test_an_identity_may_be_used_again(functions):
    look, put, _, _ = functions
    x, y, table = torch.zeros(3), torch.zeros(3), {}
    put(table, x, CONSTANT)
    table[id(y)] = table[id(x)]
    assert look(table, y) is None
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None  # the table does not keep it


@pytest.mark.parametrize(
    "tensor", [nn.Parameter(torch.zeros(2)), torch.zeros(2)], ids=["parameter", "tensor"]
)
def test_plain_tensors_are_put(functions, tensor):
    look, put, _, _ = functions
    table = {}
    assert put(table, tensor, CONSTANT) is True and look(table, tensor) is CONSTANT


def test_others_are_left_to_the_caller(functions):
    look, put, _, _ = functions
    table, x = {}, torch.zeros(2).as_subclass(Subclass)
    with torch.inference_mode():
        inference = torch.zeros(2)
    assert put(table, x, CONSTANT) is False and put(table, inference, CONSTANT) is False
    assert not table and look(table, x) is None
    table[id(inference)] = weakref.ref(inference), CONSTANT, None, False
    assert look(table, inference) is None  # torch does not tell whether it was written to
    with TorchFunctionMode():
        assert put(table, torch.Tensor.__new__(torch.Tensor), CONSTANT) is False


def test_what_a_table_has_for_an_object(functions):
    of = functions[3]
    a, b = object(), object()
    assert of({id(a): 1}, a) == 1 and of({id(a): 1}, b) is None


def test_members(functions):
    same = functions[2]
    own = {"a": object(), "b": object()}
    known = [(own, tuple(own.values())), ({}, ())]
    assert same(known) is True
    own["a"], own["b"] = own["b"], own["a"]
    assert same(known) is False
    own["a"], own["b"] = own["b"], own["a"]
    assert same(known) is True
    own["c"] = None
    assert same(known) is False
    del own["c"], own["b"]
    assert same(known) is False


# -- the guard on a gradient ----------------------------------------------------------------------


class Owner:
    def __init__(self):
        self.refused = []

    def refuse_unexpected(self, task):
        self.refused.append(task)


def test_a_guard_lets_through_what_was_delivered(guard_class):
    owner, grad = Owner(), torch.ones(3)
    guard = guard_class(weakref.ref(owner), 8)
    assert guard.expect(grad, -1) is False and len(guard) == 1 and guard.gave(grad)
    guard(grad)
    assert not owner.refused and len(guard) == 0
    guard(grad)  # once
    assert owner.refused == [-1]


def test_a_guard_refuses_another_tensor_and_a_changed_one(guard_class):
    owner, grad = Owner(), torch.ones(3)
    guard = guard_class(weakref.ref(owner), 8)
    guard.expect(grad, -1)
    guard(grad.clone())
    guard.expect(grad, -1)
    grad.mul_(2)
    assert not guard.gave(grad)
    guard(grad)
    assert owner.refused == [-1, -1]


def test_a_guard_tells_of_two_deliveries(guard_class):
    owner = Owner()
    guard = guard_class(weakref.ref(owner), 8)
    assert guard.expect(torch.ones(1), 3) is False and guard.expect(torch.ones(1), 3) is True
    assert guard.expect(None, 3) is True and len(guard) == 0
    assert guard.expect(torch.ones(1), 4) is False
    guard.forget()
    assert not guard.gave(torch.ones(1))


def test_a_guard_waits_for_so_many(guard_class):
    guard = guard_class(weakref.ref(Owner()), 3)
    for task in range(9):
        guard.expect(torch.ones(1), task)
    assert len(guard) == 3


def test_a_guard_of_one_that_is_gone(guard_class):
    owner = Owner()
    guard = guard_class(weakref.ref(owner), 3)
    del owner
    gc.collect()
    guard(torch.ones(1))
    guard(None)


# -- calls ----------------------------------------------------------------------------------------


def mode_of(model, x):
    session = htv.attach(model, htv.AndMask(0.4))._session
    return session.open(session.root, (x,), {})


CALLS = {
    "unary": lambda call, x: call(torch.tanh, x),
    "keywords": lambda call, x: call(torch.softmax, x, dim=1),
    "along the batch": lambda call, x: call(torch.softmax, x, dim=0),
    "reduction": lambda call, x: call(torch.sum, x, 1),
    "a constant beside": lambda call, x: call(torch.add, x, torch.ones(6)),
    "a slice": lambda call, x: call(torch.Tensor.__getitem__, x, (slice(None), slice(1, 3))),
    "cut along the batch": lambda call, x: call(torch.Tensor.__getitem__, x, slice(1, 3)),
    "a shape": lambda call, x: call(torch.reshape, x, (4, 3, 2)),
    "a shape across": lambda call, x: call(torch.reshape, x, (3, 8)),
    "several results": lambda call, x: call(torch.chunk, x, 2, 1)[1],
    "in place": lambda call, x: call(torch.Tensor.mul_, call(torch.neg, x), 2.0),
    "transposed": lambda call, x: call(torch.transpose, x, 0, 1),
    "a product": lambda call, x: call(torch.matmul, x, torch.ones(6, 2)),
    "of examples with each other": lambda call, x: call(torch.matmul, x, x.detach().t()),
    "concatenated": lambda call, x: call(torch.cat, [x, x], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_marks_are_those_found_in_python(name):
    x = torch.randn(4, 6, requires_grad=True)
    mode = mode_of(nn.Linear(6, 6), x)

    def mark(run):
        call = lambda function, *args, **kwargs: run(function, args, kwargs)
        return mode.mark(CALLS[name](call, x))

    expected = mark(mode.unusual)
    for _ in range(3):  # found, kept, looked up
        assert str(mark(mode.general)) == str(expected)


@needs_compiled
def test_what_was_found_is_kept_for_calls_that_are_alike():
    x = torch.randn(4, 6, requires_grad=True)
    mode, seen = mode_of(nn.Linear(6, 6), x), []
    learn = type(mode).learn
    type(mode).learn = lambda *given: seen.append(given[1]) or learn(*given)
    try:
        for _ in range(3):
            mode.general(torch.sum, (x, 1), {})
            mode.general(torch.sum, (x,), {"dim": 1})
    finally:
        type(mode).learn = learn
    assert seen == [torch.sum, torch.sum]  # by position and by name


def test_a_call_that_fails_raises_what_it_raises():
    x = torch.randn(4, 6, requires_grad=True)
    mode = mode_of(nn.Linear(6, 6), x)
    with pytest.raises(RuntimeError, match="shape"):
        mode.general(torch.reshape, (x, (5, 5)), {})
    with pytest.raises(TypeError):
        mode.__torch_function__(torch.reshape, (), (x, "a"), None)


# -- layers ---------------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Notes the calls that are given a tensor of interest first."""

    def __init__(self, x):
        super().__init__()
        self.x, self.seen = x, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and args[0] is self.x and getattr(func, "__name__", "") != "__get__":
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


IMAGES = {1: (2, 4, 9), 2: (2, 4, 9, 9), 3: (2, 4, 5, 5, 5)}
MODULES = {
    nn.Linear: (lambda: nn.Linear(6, 3), torch.randn(4, 6)),
    nn.Conv1d: (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), torch.randn(IMAGES[1])),
    nn.Conv2d: (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2), torch.randn(IMAGES[2])),
    nn.Conv3d: (lambda: nn.Conv3d(4, 6, 3, bias=False), torch.randn(IMAGES[3])),
    nn.LayerNorm: (lambda: nn.LayerNorm(6, eps=1e-3), torch.randn(4, 6)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), torch.randn(IMAGES[2])),
    nn.RMSNorm: (lambda: nn.RMSNorm(6), torch.randn(4, 6)),
    nn.Embedding: (lambda: nn.Embedding(9, 6, padding_idx=0), torch.randint(0, 9, (4, 5))),
}


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_layers_call_is_that_of_its_forward(kind):
    make, x = MODULES[kind]
    module = make()
    layer = handlers.layer_of(module, module.forward)
    assert layer is LAYERS[kind]
    with Recorder(x) as recorder:
        module(x)
    (func, args, kwargs), *_ = recorder.seen
    names = list(LAYERS[kind].names)
    given = [*args[1:], *kwargs.values()]
    assert func is layer.function and len(given) == len(names)
    for value, name in zip(given, names, strict=True):
        assert value is getattr(module, name) or value == getattr(module, name)


class Mine(nn.Linear):
    pass


def wrapped(linear):
    linear.forward = lambda x: F.linear(x, linear.weight)
    return linear


@pytest.mark.parametrize("make", [lambda: Mine(6, 3), lambda: wrapped(nn.Linear(6, 3)), nn.ReLU])
def test_other_modules_call_their_forward(make):
    module = make()
    assert handlers.layer_of(module, module.forward) is None


class Between(nn.Module):
    """A linear layer inside a module, so that it is not the outermost one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_another_mode_on_the_stack_sees_the_call():
    layer, x = nn.Linear(6, 3), torch.randn(4, 6)

    class Seeing(Between):
        def forward(self, x):
            with Recorder(x) as recorder:
                y = self.layer(x)
            self.seen = [func for func, _, _ in recorder.seen]
            return y

    model = Seeing(layer)
    with htv.attach(model, htv.Median()):
        model(x).sum().backward()
    assert model.seen == [F.linear]


def test_a_function_put_in_its_place_is_called(monkeypatch):
    model, x, seen = Between(nn.LayerNorm(6)), torch.randn(4, 6), []
    original = F.layer_norm

    def replaced(*args, **kwargs):
        seen.append(len(args))
        return original(*args, **kwargs)

    with htv.attach(model, htv.Median()):
        model(x).sum().backward()
        monkeypatch.setattr(F, "layer_norm", replaced)
        with pytest.raises(htv.UnsupportedError, match=r"used by \S*test_usual\.replaced"):
            model(x)
    assert len(seen) == 1


def test_padding_that_is_no_zeros():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
    model, x = Between(conv), torch.randn(IMAGES[2])
    plain = model(x)
    with htv.attach(model, htv.Median()):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_gradients_of_a_layer_called_at_once(kind):
    torch.manual_seed(0)
    make, x = MODULES[kind]
    model = Between(make()).double()
    x = x if kind is nn.Embedding else x.double()
    assert htv.check(model, x, htv.Median()).parameters == len(list(model.parameters()))


def test_an_error_of_a_layer_leaves_the_mode_on_the_stack():
    model = Between(nn.Linear(6, 3))
    with htv.attach(model, htv.Median()):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(4, 5))
        assert torch._C._len_torch_function_stack() == 0
        model(torch.randn(4, 6)).sum().backward()
    assert model.layer.weight.grad is not None


# -- linear layers ---------------------------------------------------------------------------------

LINEAR_CASES = {  # the layer, its input, what attaches it, whether the usual case serves it
    "rows": (lambda: nn.Linear(3, 4), (6, 3), {}, True),
    "tokens": (lambda: nn.Linear(3, 4), (6, 5, 3), {}, True),
    "no bias": (lambda: nn.Linear(3, 4, bias=False), (6, 3), {}, True),
    "excluded bias": (lambda: nn.Linear(3, 4), (6, 3), {"exclude": "bias"}, False),
    "frozen bias": (lambda: frozen(nn.Linear(3, 4), "bias"), (6, 3), {}, False),
    "frozen weight": (lambda: frozen(nn.Linear(3, 4), "weight"), (6, 3), {}, False),
    "one example": (lambda: nn.Linear(3, 4), (1, 3), {"allow_single": True}, False),
}


def frozen(module, name):
    module.get_parameter(name).requires_grad_(False)
    return module


@pytest.mark.parametrize("voters", ["examples", "groups", "tokens"])
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_layers_get_the_same_on_both_ways(case, voters, monkeypatch):
    make, shape, options, served = LINEAR_CASES[case]
    usual, taken, found = linear_handler._usual, [], []

    def noted(*args):
        taken.append(usual(*args))
        return taken[-1]

    for way in (noted, lambda *args: None):
        monkeypatch.setattr(linear_handler, "_usual", way)
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        with htv.attach(model, htv.AndMask(0.4), **options) as handle:
            block = {
                "examples": contextlib.nullcontext,
                "groups": lambda: handle.groups(torch.tensor([0] + [1] * (len(x) - 1))),
                "tokens": handle.tokens,
            }[voters]
            with block():
                y = model(x)
            y.square().sum().backward()
            uses = {tracked.name: tracked.uses for tracked in handle._session.tracked()}
        found.append(([p.grad for p in model.parameters()], y, uses))
    assert (taken[0] is not None) == served
    (grads, y, uses), (expected, expected_y, expected_uses) = found
    assert torch.equal(y, expected_y) and uses == expected_uses
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad is None) == (wanted is None)
        assert grad is None or torch.equal(grad, wanted)
