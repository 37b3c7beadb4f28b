"""What no mode can see: scripted functions, custom Functions, writes in place, tensors that stand
in for parameters.
"""

import pytest
import torch
import torch.nn.functional as F
from test_batch_choice import assert_votes_by_example
from torch import nn
from torch.overrides import handle_torch_function
from torch.utils.checkpoint import checkpoint

import htv

RULE = htv.Median()


@torch.jit.script
def centred(h):
    return (h - h.mean(0)) / h.std(0)


@torch.jit.script
def centred_in_place(h):
    return h.sub_(h.mean(0))


@torch.jit.script
def among_examples(h):
    return torch.softmax(h @ h.t(), -1) @ h


@torch.jit.script
def swapped(h):
    return h.transpose(0, 1).tanh()


@torch.jit.script
def gelu(h):
    return 0.5 * h * (1 + torch.erf(h / 1.41421))


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h - h.mean(0)

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


class CentredInPlace(Centred):
    @staticmethod
    def forward(ctx, h):
        ctx.mark_dirty(h)
        return h.sub_(h.mean(0))


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.tanh()

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return grad * (1 - h.tanh() ** 2)


class FlippedBack(Tanh):
    """Whose backward gives an example another one's gradient; its forward does not show it."""

    @staticmethod
    def backward(ctx, grad):
        return Tanh.backward(ctx, grad).flip(0)


class Normed(Tanh):
    """Whose backward keeps rows apart but scales all of them by what they are together."""

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


class OneReachesAnother(Tanh):
    """Of one example alone, and in one direction."""

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] += grad[0]
        return grad


class Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.t().contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.t()


class Silent(Transposed):
    """Whose backward tells nothing of where its examples are."""

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad).t()


class Noisy(Tanh):
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand_like(grad)


class Nesting(Tanh):
    """As reversible networks do, which would add to gradients each time that it ran."""

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(h.tanh(), grad)
        return h.grad


class Attended(torch.autograd.Function):
    """Attention inside each example; its arguments and its result have them in different dims."""

    @staticmethod
    def forward(ctx, scale, q, k, v):
        ctx.scale = scale
        scores = torch.einsum("tnd,nsd->nts", q, k) * scale
        ctx.save_for_backward(q, k, v, scores)
        return torch.einsum("nts,nsd->tnd", scores, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, scores = ctx.saved_tensors
        of_scores = torch.einsum("tnd,nsd->nts", grad, v) * ctx.scale
        of_q, of_k = (
            torch.einsum("nts,nsd->tnd", of_scores, k),
            torch.einsum("nts,tnd->nsd", of_scores, q),
        )
        return None, of_q, of_k, torch.einsum("nts,tnd->nsd", scores, grad)


def attended(h):
    q = h.reshape(len(h), 4, 2)
    made = Attended.apply(0.5, q.transpose(0, 1).contiguous(), q.tanh(), q.cos())
    return made.transpose(0, 1).reshape(len(h), 8)


class Both(torch.autograd.Function):
    """Two results, one of which has the batch behind."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sin(), h.t().contiguous()

    @staticmethod
    def backward(ctx, first, second):
        (h,) = ctx.saved_tensors
        return first * h.cos() + second.t()


def both(h):
    sine, behind = Both.apply(h)
    return sine + behind.t()


# Named as something of torch's that works row by row.
LIBRARY = torch.library.Library("htv_tests", "DEF")
LIBRARY.define("softplus(Tensor x) -> Tensor")
LIBRARY.impl("softplus", lambda x: x - x.mean(0), "CompositeImplicitAutograd")
LIBRARY.define("mish(Tensor x) -> Tensor")
LIBRARY.impl("mish", lambda x: x.tanh() * x, "CompositeImplicitAutograd")


def relu(h):
    """A library's own, which modes see as they see torch's."""
    if torch._C._len_torch_function_stack():
        return handle_torch_function(relu, (h,), h)
    return h - h.mean(0)


def written(function):
    """The function for what it writes; its result is dropped."""

    def run(h):
        function(h)
        return h

    return run


def between(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(function(self.a(x)))

    return Model().double()


MIXING = {
    "a script": centred,
    "a script that attends": among_examples,
    "a script in place": centred_in_place,
    "a script in place, for what it writes": written(centred_in_place),
    "a Function": Centred.apply,
    "a Function in place": CentredInPlace.apply,
    "a Function in place, for what it writes": written(CentredInPlace.apply),
    "a Function whose backward flips": FlippedBack.apply,
    "a Function whose backward divides by a norm": Normed.apply,
    "a Function of which one example reaches another": OneReachesAnother.apply,
    "a Function without a gradient": lambda h: Silent.apply(h)[:8].repeat(2, 1)[: len(h), :1] * h,
    "a Function that draws": Noisy.apply,
    "a Function that starts a backward": Nesting.apply,
    "an operator of another library": torch.ops.htv_tests.softplus,
    "an overload of it": torch.ops.htv_tests.softplus.default,
    "a function of another library": relu,
    "a reentrant checkpoint": lambda h: checkpoint(lambda h: h - h.mean(0), h, use_reentrant=True),
}


@pytest.mark.parametrize("size", [6, 8], ids=["N", "N == D"])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_unseen_is_refused(name, size):
    model = between(MIXING[name])
    with htv.attach(model, RULE), pytest.raises(htv.UnsupportedError, match="'b.weight'"):
        model(torch.randn(size, 5).double())


FOLLOWED = {
    "a script": gelu,
    "a Function that was tried": Tanh.apply,
    "one of several arguments": attended,
    "one of several results": both,
    "a declared function": htv.rowwise(lambda h: Tanh.apply(h)),
    "a declared Function": htv.rowwise(type("Declared", (Tanh,), {})).apply,
    "a declared operator": htv.rowwise(torch.ops.htv_tests.mish),
    "a reentrant checkpoint": lambda h: tanh_again(h),
}


def tanh_again(h):
    """Checkpointed for the whole batch alone: the oracle's torch.autograd.grad cannot pass one."""
    return checkpoint(torch.tanh, h, use_reentrant=True) if len(h) > 1 else torch.tanh(h)


@pytest.mark.parametrize("size", [1, 2, 6, 8], ids=["1", "2", "N", "N == D"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_declared_tried_or_told_by_its_graph_is_followed(name, size):
    model, x = between(FOLLOWED[name]), torch.randn(size, 5).double()
    with htv.attach(model, RULE, allow_single=True):
        model(x).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows]).square().sum(), size)


def test_a_function_that_transposes_a_square_is_known_to():
    """The size of a dim says nothing of where the examples are."""
    model, x = between(lambda h: Transposed.apply(h).t()), torch.randn(8, 5).double()
    with htv.attach(model, RULE):
        model(x).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows]).square().sum(), 8)
    model = between(Transposed.apply)
    with htv.attach(model, RULE), pytest.raises(htv.UnsupportedError, match="the batch is in dim"):
        model(x)


def test_a_trial_changes_nothing_but_time():
    """Neither random numbers nor gradients nor what hooks see."""
    model, x, seen = between(Tanh.apply), torch.randn(6, 5).double(), []

    def watch(module, args, h):
        h.register_hook(lambda grad: seen.append(grad))

    model.a.register_forward_hook(watch)
    torch.manual_seed(3)
    with htv.attach(model, RULE):
        loss = model(x).square().sum()
        drawn = torch.rand(2)
        assert seen == [] and model.a.weight.grad is None
        loss.backward()
    torch.manual_seed(3)
    assert len(seen) == 1 and torch.equal(drawn, torch.rand(2))


class RunsTheModelAgain(torch.autograd.Function):
    """As activation checkpoints of other libraries do."""

    @staticmethod
    def forward(ctx, h, layer):
        ctx.layer = layer
        ctx.save_for_backward(h)
        return h.tanh()

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        with torch.enable_grad():
            ctx.layer(h[:, :5])
        return grad * (1 - h.tanh() ** 2), None


def test_a_backward_that_runs_the_model_is_not_tried():
    model = between(lambda h: RunsTheModelAgain.apply(h, model.a))
    with htv.attach(model, RULE), pytest.raises(htv.UnsupportedError, match="RunsTheModelAgain"):
        model(torch.randn(6, 5).double())


@torch.jit.script
def turned(h):
    return h.flip(1).tanh()


@pytest.mark.parametrize("name", ["a script", "a Function"])
def test_unseen_functions_may_take_tokens_out_of_their_order(name):
    model = between({"a script": turned, "a Function": Tanh.apply}[name])
    mask = torch.arange(3) < torch.arange(1, 5)[:, None]
    with htv.attach(model, RULE) as handle, handle.tokens(mask):
        with pytest.raises(htv.UnsupportedError, match="'b.weight'"):
            model(torch.randn(4, 3, 5).double())


def test_a_transposition_in_a_script_is_followed():
    model, x = between(lambda h: swapped(h).transpose(0, 1)), torch.randn(6, 5).double()
    swapping = between(swapped)
    with htv.attach(model, RULE):
        model(x).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows]).square().sum(), 6)
    with (
        htv.attach(swapping, RULE),
        pytest.raises(htv.UnsupportedError, match="the batch is in dim 1"),
    ):
        swapping(torch.randn(8, 5).double())


class Quantised(torch.autograd.Function):
    """Learned step size quantisation: both arguments are parameters."""

    @staticmethod
    def forward(ctx, weight, step):
        ctx.save_for_backward(weight, step)
        return (weight / step).round() * step

    @staticmethod
    def backward(ctx, grad):
        weight, step = ctx.saved_tensors
        ratio = weight / step
        return grad, (grad * (ratio.round() - ratio)).sum().reshape(step.shape)


def test_a_function_of_parameters_alone_is_a_computed_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.step, self.b = (
                nn.Linear(5, 8),
                nn.Parameter(torch.tensor(0.1)),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            return self.b(
                torch.relu(F.linear(x, Quantised.apply(self.a.weight, self.step), self.a.bias))
            )

    model, x = Model().double(), torch.randn(6, 5).double()
    with htv.attach(model, RULE):
        model(x).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows]).square().sum(), 6)


def test_a_hook_that_exchanges_a_parameter_is_refused():
    model, other = (
        nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)),
        nn.Parameter(torch.randn(8, 5)),
    )
    own = model[0].weight
    with htv.attach(model, RULE):
        before = model[0].register_forward_pre_hook(
            lambda m, _: m._parameters.__setitem__("weight", other)
        )
        after = model[0].register_forward_hook(
            lambda m, *_: m._parameters.__setitem__("weight", own), always_call=True
        )
        with pytest.raises(
            htv.UnsupportedError,
            match="'0.weight' is another tensor than when the model was attached",
        ):
            model(torch.randn(6, 5))
        before.remove(), after.remove()
        model(torch.randn(6, 5)).sum().backward()


def test_what_an_unseen_function_takes_from_a_forward_of_another_size_is_refused():
    first, held = nn.Linear(5, 8).double(), []
    model = between(lambda h: centred_by(h, held[0]))
    with htv.attach(first, RULE), htv.attach(model, RULE):
        held.append(first(torch.randn(4, 5).double()))
        with pytest.raises(
            htv.UnsupportedError, match="another forward, of another number of examples"
        ):
            model(torch.randn(6, 5).double())


@torch.jit.script
def centred_by(h, other):
    return h - other.mean(1).sum()


def test_rowwise_takes_functions():
    with pytest.raises(TypeError, match="rowwise takes a function"):
        htv.rowwise(3)
    assert htv.rowwise(torch.tanh)(torch.zeros(2)).tolist() == [0, 0]


def test_a_pair_of_towers_whose_similarities_no_loss_uses():
    """CLIP: the model computes (N, N) similarities and a temperature beside the embeddings."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = (
                nn.Linear(5, 3),
                nn.Linear(7, 3),
                nn.Parameter(torch.tensor(2.0)),
            )

        def forward(self, text, image):
            text, image = self.a(text), self.b(image)
            return text, image, text @ image.t() * self.scale.exp()

    model, text, image = Towers().double(), torch.randn(6, 5).double(), torch.randn(6, 7).double()
    with htv.attach(model, RULE):
        a, b, _ = model(text, image)
        (a * b).sum().backward()
        found = model.a.weight.grad.clone(), model.scale.grad
        with pytest.raises(htv.UnsupportedError, match="'scale'|'image', an input of shape"):
            model(text, image)[2].sum().backward()
    with htv.attach(model, RULE, batch=("text", "image"), exclude="scale"):
        model.zero_grad()
        model(text, image)[2].diagonal().sum().backward()
    with htv.attach(model, RULE, batch=("text", "image")):
        with pytest.raises(htv.UnsupportedError, match="'scale' is used by mul.*'matmul' at"):
            model(text, image)[2].sum().backward()
    run = lambda rows: (model(text[rows], image[rows])[0] * model(text[rows], image[rows])[1]).sum()
    parts = [torch.autograd.grad(run(slice(e, e + 1)), model.a.weight)[0] for e in range(6)]
    torch.testing.assert_close(found[0], 6 * torch.stack(parts).quantile(0.5, dim=0))
    assert found[1] is None


def into_real_parts(h):
    z = torch.fft.fft(h)
    torch.view_as_real(z)[..., 0].mul_(2)
    return z.real


def into_zeros(h):
    z = torch.zeros(h.shape, dtype=torch.complex128)
    z.real.copy_(h)
    return z.real * 2 + z.imag


def seen_after(h):
    z = torch.zeros(h.shape, dtype=torch.complex128)
    real = torch.view_as_real(z)
    z.copy_(h.to(z.dtype))
    return real[..., 0]


@pytest.mark.parametrize("size", [2, 6, 8])
@pytest.mark.parametrize("function", [into_real_parts, into_zeros, seen_after])
def test_what_is_written_to_parts_of_complex_numbers_is_followed(function, size):
    """A real view counts its memory in halves of its base's elements."""
    model, x = between(function), torch.randn(size, 5).double()
    with htv.attach(model, RULE):
        model(x).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows]).square().sum(), size)


def test_half_of_complex_numbers_is_not_taken_for_the_whole():
    def half(h):
        z = torch.zeros(2 * len(h), h.shape[1], dtype=torch.complex128)
        torch.view_as_real(z)[: len(h), :, 0].copy_(h)
        return z[: len(h)].real

    model = between(half)
    with htv.attach(model, RULE), pytest.raises(htv.UnsupportedError, match="'b.weight'"):
        model(torch.randn(6, 5).double())
