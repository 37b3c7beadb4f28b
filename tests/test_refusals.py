"""What cannot be served is refused by name, with a remedy, and leaves model and gradients as they were."""

import pytest
import torch
import torch.nn.functional as F
from layer_table import Module
from torch import nn

import htv
from models import mlp

X = torch.randn(5, 4, 6)


class Square(torch.autograd.Function):
    """A custom function: torch-function modes do not see its apply."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p, (grad * x).sum_to_size(p.shape)


def refused(model, call, error, *words, backward=False):
    """`call` raises `error` with all words in its message, and every .grad and state stays."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    if not backward:
        assert all((p.grad == 7).all() for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


UNSUPPORTED = {
    "matmul": lambda: Module(lambda m, x: x @ m.w, w=torch.randn(6, 2)),
    "einsum": lambda: Module(lambda m, x: torch.einsum("nti,io->nto", x, m.w), w=torch.randn(6, 2)),
    "bmm": lambda: Module(lambda m, x: torch.bmm(x, m.w.expand(5, 6, 2)), w=torch.randn(6, 2)),
    "addmm": lambda: Module(lambda m, x: torch.addmm(m.b, x[:, 0], m.w), w=torch.randn(6, 2), b=torch.randn(2)),
    "bilinear": lambda: Module(lambda m, x: m.layer(x, x), layer=nn.Bilinear(6, 6, 2)),
    "prelu": lambda: Module(lambda m, x: m.layer(x), layer=nn.PReLU()),
    "conv_transpose1d": lambda: Module(lambda m, x: m.layer(x), layer=nn.ConvTranspose1d(4, 2, 3)),
    "multi_head_attention_forward": lambda: Module(
        lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(6, 2, batch_first=True)
    ),
    "lstm": lambda: Module(lambda m, x: m.layer(x)[0], layer=nn.LSTM(6, 3, batch_first=True)),
    "gru": lambda: Module(lambda m, x: m.layer(x)[0], layer=nn.GRU(6, 3, batch_first=True)),
    "embeddingbag": lambda: Module(
        lambda m, x: m.layer((x[..., 0].abs() * 3).long().clamp(max=4)), layer=nn.EmbeddingBag(5, 3)
    ),
    "instance_norm": lambda: Module(lambda m, x: m.layer(x), layer=nn.InstanceNorm1d(4, affine=True)),
    "computed weight": lambda: Module(lambda m, x: F.linear(x, m.w * 2), w=torch.randn(2, 6)),
    "weight norm": lambda: Module(
        lambda m, x: m.layer(x), layer=nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    ),
    "setitem": lambda: Module(lambda m, x: x.clone().__setitem__((slice(None), 0), m.p), p=torch.randn(6)),
    "cat along the batch": lambda: Module(lambda m, x: torch.cat([x, m.p]), p=torch.randn(1, 4, 6)),
    "one row per example of the set": lambda: Module(lambda m, x: x + m.p, p=torch.randn(5, 1, 6)),
    "embedding with max_norm": lambda: Module(
        lambda m, x: m.layer((x[..., 0].abs() * 3).long().clamp(max=4)), layer=nn.Embedding(5, 3, max_norm=1.0)
    ),
    "sparse embedding": lambda: Module(
        lambda m, x: m.layer((x[..., 0].abs() * 3).long().clamp(max=4)), layer=nn.Embedding(5, 3, sparse=True)
    ),
    "batch transposed away": lambda: Module(lambda m, x: m.layer(x.transpose(0, 1)), layer=nn.Linear(6, 2)),
    "batch transposed away, then pointwise": lambda: Module(
        lambda m, x: m.layer(torch.tanh(x.permute(1, 0, 2)) + 1), layer=nn.Linear(6, 2)
    ),
    "batch behind time in a stack": lambda: Module(
        lambda m, x: m.layer(torch.stack([x[:, t] for t in range(4)])), layer=nn.Linear(6, 2)
    ),
    "batch moved by einsum": lambda: Module(lambda m, x: m.layer(torch.einsum("btd->tbd", x)), layer=nn.Linear(6, 2)),
    "batch moved by an aten operator": lambda: Module(
        lambda m, x: m.layer(torch.ops.aten.transpose.int(x, 0, 1)), layer=nn.Linear(6, 2)
    ),
    "batch merged, then transposed": lambda: Module(
        lambda m, x: m.layer(x.reshape(-1, 4, 3).transpose(0, 1)), layer=nn.Linear(3, 2)
    ),
    "rows picked across the batch": lambda: Module(
        lambda m, x: m.layer(x.reshape(-1, 6)[[0, 7, 8, 3]]), layer=nn.Linear(6, 2)
    ),
    "batch summed by a vector": lambda: Module(
        lambda m, x: m.layer((torch.ones(len(x)) @ x[:, 0])[:, None]), layer=nn.Linear(1, 2)
    ),
    "examples compared by einsum": lambda: Module(
        lambda m, x: m.layer(torch.einsum("ad,bd->ba", x[:, 0], x[:, 0]).T[:, :1]), layer=nn.Linear(1, 2)
    ),
    "examples compared with themselves": lambda: Module(
        lambda m, x: (lambda y: m.layer(torch.einsum("ad,bd->ab", y, y)[:, :1]))(x[:, 0]), layer=nn.Linear(1, 2)
    ),
    "batch flipped": lambda: Module(lambda m, x: m.layer(torch.tanh(m.layer(x)).flip(0)), layer=nn.Linear(6, 6)),
    "batch rolled": lambda: Module(lambda m, x: m.layer(x.roll(1, 0)), layer=nn.Linear(6, 6)),
    "parts of the batch swapped": lambda: Module(
        lambda m, x: m.layer(torch.cat(x.chunk(2)[::-1])), layer=nn.Linear(6, 6)
    ),
    "excluded-like input with a gradient": lambda: Module(
        lambda m, x: x + m.layer(torch.ones(1, 4, 6, requires_grad=True)), layer=nn.Linear(6, 6)
    ),
    "batch indexed away": lambda: Module(lambda m, x: m.layer(x[0]), layer=nn.Linear(6, 2)),
    "batch reduced away": lambda: Module(lambda m, x: m.layer(x.mean(0)), layer=nn.Linear(6, 2)),
}


@pytest.mark.parametrize("square", [False, True], ids=["T != N", "T == N"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_use(name, square):
    """Also where sizes coincide, so that shapes alone would not tell."""
    model = UNSUPPORTED[name]()
    x = torch.randn(4, 4, 6) if square and "example" not in name and name != "bmm" else X
    parameter = next(n for n, _ in model.named_parameters())
    with htv.attach(model, htv.Median()):
        refused(model, lambda: model(x), htv.UnsupportedError, repr(parameter), "exclude")


def test_unsupported_use_can_be_plain():
    model = Module(lambda m, x: torch.relu(m.first(x)) @ m.w, first=nn.Linear(6, 6), w=torch.randn(6, 2))
    plain = dict(
        zip(["w", "weight", "bias"], torch.autograd.grad(model(X).sum(), list(model.parameters())), strict=True)
    )
    with htv.attach(model, htv.Median(), on_unsupported="plain"):
        with pytest.warns(UserWarning, match="'w' is used by matmul"):
            model(X).sum().backward()
    torch.testing.assert_close(model.w.grad, plain["w"])
    assert not torch.allclose(model.first.weight.grad, plain["weight"])


def test_excluded_parameters_may_be_used_anyhow():
    model = Module(lambda m, x: m.first(x) @ (m.w * m.v), first=nn.Linear(6, 6), w=torch.randn(6, 2), v=torch.ones(2))
    plain = torch.autograd.grad(model(X).square().sum(), [model.w, model.v])
    with htv.attach(model, htv.Median(), exclude=("w", "v")):
        found = torch.autograd.grad(model(X).square().sum(), [model.w, model.v])
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_mixing_excluded_and_served_parameters_is_refused():
    model = Module(lambda m, x: x * (m.p * m.q), p=torch.randn(6), q=torch.randn(6))
    with htv.attach(model, htv.Median(), exclude="q"):
        refused(model, lambda: model(X), htv.UnsupportedError, "'p'", "excluded")


def test_batch_norm_in_train_mode():
    for affine in (True, False):
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=affine))
        with htv.attach(model, htv.Median()):
            refused(model, lambda m=model: m(X[:, 0]), htv.UnsupportedError, "BatchNorm", ".eval()", "GroupNorm")


@pytest.mark.parametrize(
    "penalty",
    [lambda m: m[0].weight.square().sum(), lambda m: Square.apply(torch.ones(1), m[3].bias).sum()],
    ids=["weight penalty", "custom function"],
)
def test_a_path_to_a_parameter_outside_the_forward(penalty):
    model = mlp()
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(6, 12)).sum() + penalty(model)
        refused(model, loss.backward, htv.UnsupportedError, "does not serve", "weight decay", backward=True)


def test_a_custom_function_inside_the_forward():
    model = Module(lambda m, x: Square.apply(x, m.p), p=torch.randn(6))
    with htv.attach(model, htv.Median()):
        refused(model, lambda: model(X).sum().backward(), htv.UnsupportedError, "'p'", "custom autograd.Function")


def test_two_forwards_with_different_groups_in_one_backward():
    model = mlp()
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(6, 12)).sum() + model(torch.randn(4, 12)).sum()
        refused(model, loss.backward, htv.UnsupportedError, "two forwards with different groups", backward=True)


def test_batch_dim_mismatch():
    model = Module(lambda m, x: m.layer(x.reshape(-1, 6)), layer=nn.Linear(6, 2))
    with htv.attach(model, htv.Median()):
        refused(model, lambda: model(X), ValueError, "'layer.weight'", "(20, 6)", "(5,)", "batch in dim 0")


def test_groups_and_packed_of_the_wrong_length():
    model = mlp()
    x = torch.randn(6, 12)
    with htv.attach(model, htv.Median()) as handle:
        for voters, words in (
            (handle.groups(torch.zeros(5, dtype=torch.long)), ("groups has 5 ids", "size 6")),
            (handle.groups(torch.zeros(6)), ("integer ids",)),
            (handle.packed(torch.tensor([0, 3, 5])), ("cu_seqlens", "6")),
            (handle.packed(torch.tensor([0, 4, 2, 6])), ("cu_seqlens", "falls")),
        ):
            with voters:
                refused(model, lambda: model(x), ValueError, *words)
        with handle.groups(torch.arange(6)), pytest.raises(RuntimeError, match="nested"):
            with handle.packed(torch.tensor([0, 6])):
                pass
        model(x).sum().backward()  # usable again


def test_empty_batch_and_too_few_groups():
    model = mlp()
    with htv.attach(model, htv.Median()):
        refused(model, lambda: model(torch.randn(0, 12)), ValueError, "empty", "size 0")
    with htv.attach(model, htv.TrimmedMean(3)):
        refused(model, lambda: model(torch.randn(6, 12)), ValueError, "trim=3", "use at most 2")


def test_no_tensor_to_tell_the_batch_from():
    model = Module(lambda m, rows: torch.stack([m.p * row for row in rows]), p=torch.randn(3))
    with htv.attach(model, htv.Median()):
        refused(model, lambda: model([1.0, 2.0]), ValueError, "handle.groups(ids)")


def test_double_attach():
    model = mlp()
    handle = htv.attach(model, htv.Median())
    with pytest.raises(RuntimeError, match="the model is attached already: call detach"):
        htv.attach(model, htv.AndMask(0.5))
    with pytest.raises(RuntimeError, match="module '0' is attached already"):
        htv.attach(nn.Sequential(model[0]), htv.AndMask(0.5))
    handle.detach()
    htv.attach(model, htv.AndMask(0.5)).detach()


def test_backward_after_detach():
    model = mlp()
    handle = htv.attach(model, htv.Median())
    loss = model(torch.randn(6, 12)).sum()
    handle.detach()
    refused(model, loss.backward, RuntimeError, "backward after detach", "run the forward again")


def test_double_backward():
    model = mlp()
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(6, 12)).sum()
        refused(model, lambda: loss.backward(create_graph=True), RuntimeError, "create_graph")


def test_statistics_that_were_not_asked_for():
    with htv.attach(mlp(), htv.Median()) as handle, pytest.raises(RuntimeError, match="stats=True"):
        handle.stats()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model="mlp"), TypeError, "model must be"),
        (dict(rule="median"), TypeError, "rule must be"),
        (dict(rule=htv.Median), TypeError, "rule must be"),
        (dict(rule=lambda n, p: "median"), TypeError, "rule for parameter '0.weight'"),
        (dict(exclude="9.weight"), ValueError, "matches no parameter"),
        (dict(on_unsupported="ignore"), ValueError, "on_unsupported"),
    ],
)
def test_bad_arguments_of_attach(arguments, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        htv.attach(**({"model": model, "rule": htv.Median()} | arguments))
    assert "forward" not in vars(model)


def test_complex_parameters():
    model = Module(lambda m, x: x * m.p, p=torch.randn(6, dtype=torch.cfloat))
    with pytest.raises(TypeError, match="'p' is torch.complex64.*exclude='p'"):
        htv.attach(model, htv.Median())
