"""What cannot be served is refused by name, with a remedy, and leaves model and gradients as they
were.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.bench.models import mlp
from htv.tools.check import aggregated, one_group_at_a_time
from support.layer_table import Module

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
    """`call` raises `error` with all words in its message, and every .grad and state stays. Returns
    the message.
    """
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
    return str(caught.value)


def mix(forward, **parameters):
    """A model of x (N, 4, 6) with layers `l` before and `h` after, unless told otherwise."""
    parameters = parameters or {"l": nn.Linear(6, 6), "h": nn.Linear(6, 6)}
    return Module(forward, **parameters)


def similarity(m, x):
    y = F.normalize(m.l(x[:, 0]), dim=-1)
    return y @ y.T


def contrastive(m, x):
    """A loss inside the forward, on which something is learnt after the examples were compared."""
    scores = similarity(m, x) * m.temperature.exp()
    return F.cross_entropy(scores, torch.arange(len(x)), reduction="none")


def set_row(m, x):
    y = m.l(x).clone()
    y[0] = y[1]
    return m.h(y)


def copied_row(m, x):
    y = m.l(x).clone()
    y[0].copy_(y[1])
    return m.h(y)


def running_over_the_batch(m, x):
    h, found = torch.zeros(4, 6), []
    for example in x:
        h = torch.tanh(m.l(example + h))
        found.append(h)
    return torch.stack(found)


def written_at_places(m, x):
    n = len(x)
    layouts = torch.zeros(n, n, 6)
    layouts[torch.arange(n), torch.arange(n)] = m.l(x[:, 0])
    return m.h(layouts)


class Bank(nn.Module):
    """Keeps hidden rows of its last batch, with their graph."""

    def __init__(self):
        super().__init__()
        self.l, self.h, self.rows = nn.Linear(6, 6), nn.Linear(6, 6), None

    def forward(self, x):
        y = self.l(x[:, 0])
        old = y.flip(0) if self.rows is None else self.rows
        self.rows = y
        return self.h(y + old)


def scattered(index):
    """Rows added to rows of other examples."""
    return lambda m, x: m.h(torch.zeros_like(x).index_add_(0, index(len(x)), m.l(x)))


def paired(m, x):
    y = m.l(x[:, 0])
    n = len(y)
    both = torch.cat([y[:, None].expand(-1, n, -1), y[None].expand(n, -1, -1)], -1)
    return F.linear(both, m.h.weight.repeat(1, 2))


def convolved(weights, groups=lambda n: n):
    """All examples as one convolution, by weights computed from them."""

    def forward(m, x):
        n = len(x)
        weight = weights(m.l(x)[..., :3])
        return m.h(F.conv1d(x.reshape(1, n * 4, 6), weight, padding=1, groups=groups(n))[0])

    return forward


# Examples have to do with each other before a parameter meets them.
MIXING = {
    "batch statistics by hand": lambda: mix(
        lambda m, x: (lambda y: m.h((y - y.mean(0)) / y.std(0)))(m.l(x))
    ),
    "batch statistics kept as a dim": lambda: mix(
        lambda m, x: (lambda y: m.h(y - y.mean(0, keepdim=True)))(m.l(x))
    ),
    "scaled by the mean of the batch": lambda: mix(
        lambda m, x: (lambda y: m.h(y * y.mean()))(m.l(x))
    ),
    "batch maximum": lambda: mix(lambda m, x: (lambda y: m.h(y - y.amax(0)))(m.l(x))),
    "similarity of examples": lambda: mix(lambda m, x: m.h(similarity(m, x)[:, :1].expand(-1, 6))),
    "similarity as attention": lambda: mix(lambda m, x: m.h(similarity(m, x) @ x[:, 0])),
    "contrastive loss": lambda: mix(contrastive, l=nn.Linear(6, 6), temperature=torch.tensor(0.1)),
    "distances of examples": lambda: mix(
        lambda m, x: (lambda y: m.h(torch.cdist(y, y)[:, :1].expand(-1, 6)))(m.l(x[:, 0]))
    ),
    "differences of examples": lambda: mix(
        lambda m, x: (lambda y: m.h(y[:, None] - y[None]))(m.l(x[:, 0]))
    ),
    "pairs of examples": lambda: mix(paired),
    "x + x.flip(0)": lambda: mix(lambda m, x: m.h(x + x.flip(0))),
    "y + y.flip(0)": lambda: mix(lambda m, x: (lambda y: m.h(y + y.flip(0)))(m.l(x))),
    "y * y.flip(0), detached": lambda: mix(lambda m, x: m.h(m.l(x) * m.l(x).flip(0).detach())),
    "mixup": lambda: mix(
        lambda m, x: (lambda y: m.h(0.3 * y + 0.7 * y[torch.arange(len(y)).flip(0)]))(m.l(x))
    ),
    "mixup by lerp": lambda: mix(
        lambda m, x: (lambda y: m.h(torch.lerp(y, y.roll(1, 0), 0.3)))(m.l(x))
    ),
    "mixup by take_along_dim": lambda: mix(
        lambda m, x: (lambda y, i: m.h(y + torch.take_along_dim(y, i, 0)))(
            m.l(x), torch.arange(len(x)).flip(0)[:, None, None]
        )
    ),
    "cumsum": lambda: mix(lambda m, x: m.h(m.l(x).cumsum(0))),
    "softmax over the batch": lambda: mix(lambda m, x: m.h(m.l(x).softmax(0))),
    "normalised over the batch": lambda: mix(lambda m, x: m.h(F.normalize(m.l(x), dim=0))),
    "sorted along the batch": lambda: mix(lambda m, x: m.h(m.l(x).sort(0).values)),
    "neighbours subtracted": lambda: mix(lambda m, x: m.h(m.l(x).diff(dim=0))),
    "neighbours added": lambda: mix(lambda m, x: m.h(m.l(x)[1:] + m.l(x)[:-1])),
    "windows along the batch": lambda: mix(lambda m, x: m.h(m.l(x).unfold(0, 2, 1)[..., 0])),
    "frequencies along the batch": lambda: mix(lambda m, x: m.h(torch.fft.fft(m.l(x), dim=0).real)),
    "one example for all": lambda: mix(lambda m, x: (lambda y: m.h(y - y[:1]))(m.l(x))),
    "attention over the batch": lambda: mix(
        lambda m, x: (lambda y: m.h(F.scaled_dot_product_attention(y, y, y)))(m.l(x[:, 0]))
    ),
    "attention over the batch, per token": lambda: mix(
        lambda m, x: (lambda y: m.h(F.scaled_dot_product_attention(y, y, y)))(
            m.l(x).transpose(0, 1)
        )
    ),
    "multi-head attention over the batch": lambda: mix(
        lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2)
    ),
    "recurrence along the batch": lambda: mix(lambda m, x: m.r(x)[0], r=nn.LSTM(6, 4)),
    "recurrence along the batch by hand": lambda: mix(running_over_the_batch, l=nn.Linear(6, 6)),
    "the other way's last state": lambda: mix(
        lambda m, x: (lambda y, h: m.r(y.flip(0), h)[0])(*m.r(x)), r=nn.GRU(6, 6, batch_first=True)
    ),
    "batch as the length of a convolution": lambda: mix(
        lambda m, x: m.c(x[:, 0].T.unsqueeze(0)), c=nn.Conv1d(6, 6, 3, padding=1)
    ),
    "batch as the space of a group norm": lambda: mix(
        lambda m, x: m.g(x[:, 0].T.unsqueeze(0)), g=nn.GroupNorm(2, 6)
    ),
    "batch as the space of an instance norm": lambda: mix(
        lambda m, x: m.g(x[:, 0].T.unsqueeze(0)), g=nn.InstanceNorm1d(6, affine=True)
    ),
    "layer norm over the batch": lambda: mix(
        lambda m, x: m.h(F.layer_norm(m.l(x), tuple(x.shape)))
    ),
    "layer norm over the batch and features": lambda: mix(
        lambda m, x: m.h(F.layer_norm(m.l(x.transpose(0, 1)), (len(x), 6)))
    ),
    "rms norm over the batch": lambda: mix(lambda m, x: m.h(F.rms_norm(m.l(x), tuple(x.shape)))),
    "shifted along the batch by padding": lambda: mix(
        lambda m, x: (lambda y: m.h(y + F.pad(y, (0, 0, 1, -1))))(m.l(x[:, 0]))
    ),
    "token shift along the batch": lambda: mix(
        lambda m, x: (lambda y: m.h(y + F.pad(y, (0, 0, 0, 0, 1, -1))))(m.l(x))
    ),
    "features rescaled over the batch": lambda: mix(
        lambda m, x: m.h(m.l(x[:, 0]).renorm(2, 1, 0.5))
    ),
    "lower triangle over the batch": lambda: mix(lambda m, x: m.h(m.l(x[:, 0]).T.tril().T)),
    "bilinear of two examples": lambda: mix(lambda m, x: m.b(x, x.flip(0)), b=nn.Bilinear(6, 6, 2)),
    "summed by einsum": lambda: mix(
        lambda m, x: torch.einsum("ntd,de->te", x, m.w), w=torch.randn(6, 6)
    ),
    "scattered to other examples": lambda: mix(scattered(lambda n: torch.arange(n).flip(0))),
    "scattered to one example": lambda: mix(scattered(lambda n: torch.zeros(n, dtype=torch.long))),
    "an example's row set to another's": lambda: mix(set_row),
    "an example's row copied from another's": lambda: mix(copied_row),
    "a bank of earlier rows": Bank,
    "singular vectors of the batch": lambda: mix(
        lambda m, x: m.h(
            torch.linalg.svd(m.l(x[:, 0]), full_matrices=False)[0][:, :1].expand(-1, 6)
        )
    ),
    "outer product over the batch": lambda: mix(
        lambda m, x: m.h(torch.outer(x[:, 0, 0], x[:, 0, 0])[..., None].expand(-1, -1, 6))
    ),
    "batch summed by a vector": lambda: mix(lambda m, x: m.h(torch.ones(len(x)) @ x[:, 0])),
    "batch reduced away": lambda: mix(lambda m, x: m.h(x.mean(0))),
    "examples compared by einsum": lambda: mix(
        lambda m, x: m.h(torch.einsum("ad,bd->ba", x[:, 0], x[:, 0]).T[:, :1].expand(-1, 6))
    ),
    "examples compared with themselves": lambda: mix(
        lambda m, x: (lambda y: m.h(torch.einsum("ad,bd->ab", y, y)[:, :1].expand(-1, 6)))(x[:, 0])
    ),
    "products summed over the batch": lambda: mix(
        lambda m, x: m.h(torch.addbmm(torch.zeros(4, 6), m.l(x), torch.ones(len(x), 6, 6)))
    ),
    "a convolution by other examples' weights": lambda: mix(convolved(lambda w: w.roll(1, 0))),
    "a convolution whose groups hold several examples": lambda: mix(
        convolved(lambda w: w.view(1, -1, 3), groups=lambda n: 1)
    ),
    "images sampled where other examples say": lambda: mix(
        lambda m, x: m.h(
            F.grid_sample(
                x[:, None], torch.tanh(m.l(x)).view(len(x), 3, 4, 2).flip(0), align_corners=False
            ).reshape(len(x), 2, 6)
        )
    ),
    "a weight made from the batch": lambda: mix(
        lambda m, x: F.linear(x, m.w * m.l(x).mean()), l=nn.Linear(6, 6), w=torch.randn(6, 6)
    ),
}
# The same where a parameter fits the batch's size: N is 5, then as many as tokens, then as
# features.
SIZED = {
    "mixed by a matrix from the left": lambda n: mix(
        lambda m, x: m.w @ x[:, 0], w=torch.randn(n, n)
    ),
    "mixed by einsum": lambda n: mix(
        lambda m, x: torch.einsum("sn,ntd->std", m.w, x), w=torch.randn(n, n)
    ),
    "mixed by tensordot": lambda n: mix(
        lambda m, x: torch.tensordot(x, m.w, ([0], [0])), w=torch.randn(n, 2)
    ),
    "batch as channels": lambda n: mix(
        lambda m, x: m.c(x[:, 0].unsqueeze(0)), c=nn.Conv1d(n, n, 1)
    ),
    "batch as the channels of a prelu": lambda n: mix(
        lambda m, x: F.prelu(x[:, 0].T, m.a), a=torch.rand(n)
    ),
    "a learnt tensor expanded to as many rows, compared with the batch": lambda n: mix(
        lambda m, x: m.h(x[:, 0]) @ m.l(m.q.expand(n, -1)).t(),
        l=nn.Linear(6, 6),
        h=nn.Linear(6, 6),
        q=torch.randn(1, 6),
    ),
    "a row for every place in the batch": lambda n: mix(
        lambda m, x: x * m.p, p=torch.randn(n, 1, 1)
    ),
    "a row for every place, sliced": lambda n: mix(
        lambda m, x: x * m.p[: len(x), None], p=torch.randn(n + 2, 6)
    ),
}
# Uses of one example at a time that are not served.
UNSUPPORTED = {
    "cat along the batch": lambda: Module(lambda m, x: torch.cat([x, m.p]), p=torch.randn(1, 4, 6)),
    "vecdot": lambda: Module(lambda m, x: torch.linalg.vecdot(x, m.w), w=torch.randn(6)),
    "cdist to prototypes": lambda: Module(
        lambda m, x: torch.cdist(x[:, 0], m.w), w=torch.randn(3, 6)
    ),
    "cosine_similarity": lambda: Module(
        lambda m, x: F.cosine_similarity(x[:, :1], m.w[None], dim=-1), w=torch.randn(3, 6)
    ),
    "squeezed in place": lambda: mix(lambda m, x: m.h(m.l(x).unsqueeze(0).clone().squeeze_(0))),
    "unsqueezed in place": lambda: mix(lambda m, x: m.h(m.l(x).clone().unsqueeze_(0))[0]),
    "transposed in place": lambda: mix(
        lambda m, x: m.h(m.l(x).clone().transpose_(0, 1)).transpose(0, 1)
    ),
    "zeros written to at places several dims of which fit": lambda: mix(written_at_places),
    "an operation htv does not know": lambda: mix(lambda m, x: m.h(m.l(x).sum_to_size(x.shape))),
    "an unbatched image": lambda: Module(lambda m, x: m.c(x[0]), c=nn.Conv1d(4, 2, 3)),
    "embedding with max_norm": lambda: Module(
        lambda m, x: m.layer((x[..., 0] > 0).long()), layer=nn.Embedding(5, 3, max_norm=1.0)
    ),
    "embedding with scale_grad_by_freq": lambda: Module(
        lambda m, x: m.layer((x[..., 0] > 0).long()),
        layer=nn.Embedding(5, 3, scale_grad_by_freq=True),
    ),
    "sparse embedding": lambda: Module(
        lambda m, x: m.layer((x[..., 0] > 0).long()), layer=nn.Embedding(5, 3, sparse=True)
    ),
    "embedding bag with max_norm": lambda: Module(
        lambda m, x: m.layer((x[..., 0] > 0).long()), layer=nn.EmbeddingBag(5, 3, max_norm=1.0)
    ),
    "excluded-like input with a gradient": lambda: Module(
        lambda m, x: x + m.layer(torch.ones(1, 4, 6, requires_grad=True)), layer=nn.Linear(6, 6)
    ),
    "bags by offsets that cut examples": lambda: Module(
        lambda m, x: m.layer((x[..., 0] > 0).long().flatten(), torch.tensor([0, 3, 8, 16])),
        layer=nn.EmbeddingBag(5, 3),
    ),
}
REMEDIES = ("exclude=", "give it a dim of size 1")


# Similarities of all examples with all are refused when a loss of them comes back: a model may
# return them beside others.
IN_BACKWARD = {
    "contrastive loss",
    "a learnt tensor expanded to as many rows, compared with the batch",
}


def assert_refused(model, x, name):
    """An UnsupportedError that names a parameter of the model and a remedy, before anything has
    changed.
    """
    names, late = [n for n, _ in model.named_parameters()], name in IN_BACKWARD
    with htv.attach(model, htv.Median()):
        call = (lambda: model(x).sum().backward()) if late else (lambda: model(x))
        message = refused(model, call, htv.UnsupportedError, backward=late)
    assert any(repr(name) in message for name in names), message
    assert any(remedy in message for remedy in REMEDIES), message


@pytest.mark.parametrize("size", [5, 4, 6], ids=["N", "N == T", "N == D"])
@pytest.mark.parametrize("name", MIXING | UNSUPPORTED)
def test_unsupported_use(name, size):
    """Also where sizes coincide, so that shapes alone would not tell."""
    assert_refused((MIXING | UNSUPPORTED)[name](), torch.randn(size, 4, 6), name)


@pytest.mark.parametrize("size", [5, 4, 6], ids=["N", "N == T", "N == D"])
@pytest.mark.parametrize("name", SIZED)
def test_a_parameter_that_meets_the_batch_s_dim(name, size):
    assert_refused(SIZED[name](size), torch.randn(size, 4, 6), name)


INSIDE = {  # a refused use, and the remedy its message names
    "a layer under vmap": (
        lambda m, x: torch.vmap(m.l)(x),
        lambda m, x: m.l(x),
        "torch.vmap.*without which a layer takes the whole batch",
    ),
    "a layer under vmap over tokens": (
        lambda m, x: torch.vmap(m.l, in_dims=1, out_dims=1)(x),
        lambda m, x: m.l(x),
        "torch.vmap.*without which a layer takes the whole batch",
    ),
    "a layer under vmap in chunks, of what another made": (
        lambda m, x: torch.vmap(m.h, chunk_size=2)(m.l(x)),
        lambda m, x: m.h(m.l(x)),
        "torch.vmap.*without which a layer takes the whole batch",
    ),
    "elementwise under vmap": (
        lambda m, x: torch.vmap(lambda row: row * m.l.bias)(x),
        lambda m, x: x * m.l.bias,
        "torch.vmap.*without which a layer takes the whole batch",
    ),
    "a gradient inside the forward by torch.func": (
        lambda m, x: torch.vmap(torch.func.grad(lambda row: m.l(row).square().sum() / 2))(x),
        lambda m, x: m.l(x) @ m.l.weight,
        "torch.vmap, or another transform of torch.func",
    ),
    "vmap over a stack of weights": (
        lambda m, x: torch.vmap(lambda w: x @ w)(m.l.weight.view(2, 3, 6).mT).permute(1, 2, 0, 3),
        lambda m, x: (x[:, None] @ m.l.weight.view(2, 3, 6).mT).transpose(1, 2),
        "torch.vmap over a parameter",
    ),
    "a normal distribution by a matrix": (
        lambda m, x: torch.distributions.MultivariateNormal(
            m.l(x), scale_tril=torch.diag_embed(m.h.bias.exp())
        ).log_prob(torch.sin(x)),
        lambda m, x: torch.distributions.Independent(
            torch.distributions.Normal(m.l(x), m.h.bias.exp()), 1
        ).log_prob(torch.sin(x)),
        "linalg_solve_triangular",
    ),
}


@pytest.mark.parametrize("size", [5, 4, 6], ids=["N", "N == T", "N == D"])
@pytest.mark.parametrize("name", INSIDE)
def test_what_a_transform_hides_is_refused_and_its_remedies_work(name, size):
    forward, remedy, words = INSIDE[name]
    model, x = mix(forward).double(), torch.randn(size, 4, 6).double()
    with htv.attach(model, htv.Median()) as handle:
        with pytest.raises(htv.UnsupportedError, match=words) as caught:
            model(x).square().sum().backward()
        assert "exclude='" in str(caught.value)
        model.function = remedy
        model.zero_grad()
        found = model(x)
        found.square().sum().backward()
        assert handle.attached
    model.function = forward
    torch.testing.assert_close(model(x), found)
    assert htv.check(mix(remedy), x, htv.Median()).groups == size
    with htv.attach(model, htv.Median(), exclude=("l", "h")):
        model(x).square().sum().backward()


def test_what_is_mapped_without_parameters_is_followed():
    unit = lambda row: row / row.norm()
    model = mix(lambda m, x: m.h(torch.vmap(torch.vmap(unit))(m.l(x))))
    for size in (5, 4):
        assert htv.check(model, torch.randn(size, 4, 6), htv.Median()).groups == size


@pytest.mark.parametrize("length", [4, 5], ids=["T != N", "T == N"])
def test_positions_as_an_input(length):
    """Where there are as many as examples their size says they are the batch's, and the sum says
    they are not.
    """
    model = Module(
        lambda m, x, at: m.l(x) + m.e(at), l=nn.Linear(6, 6), e=nn.Embedding(5, 6)
    ).double()
    x, at = torch.randn(5, length, 6).double(), torch.arange(length)
    if length == 4:
        with htv.attach(model, htv.Median()):
            words = ("'args[0]' of shape (5, 4, 6)", "'args[1]' of shape (4,)", "batch='args[0]'")
            refused(model, lambda: model(x, at), ValueError, *words)
    with htv.attach(model, htv.Median(), batch="args[0]"):
        if length == 5:
            refused(
                model,
                lambda: model(x, at),
                htv.UnsupportedError,
                "an input of shape (5,)",
                "size 1",
            )
            return
        model.zero_grad()
        model(x, at).square().sum().backward()
    parts = one_group_at_a_time(
        lambda e: model(x[e : e + 1], at).square().sum(), dict(model.named_parameters()), 5
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[name], htv.Median()))


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_hidden_state_as_an_input(kind):
    """(layers * directions, N, H): as many in the first dim as examples."""
    model = Module(lambda m, x, *h: m.r(x, h[0] if len(h) == 1 else h)[0],
                   r=getattr(nn, kind)(6, 4, batch_first=True, bidirectional=True))  # fmt: skip
    x, hidden = torch.randn(2, 3, 6), [torch.randn(2, 2, 4)] * (1 + (kind == "LSTM"))
    with htv.attach(model, htv.Median()):
        refused(
            model,
            lambda: model(x, *hidden),
            htv.UnsupportedError,
            "'r.weight_ih_l0'",
            "hidden state",
            "exclude=",
        )


OUT_OF_ORDER = {
    "flipped": lambda y: y.flip(1),
    "rolled": lambda y: y.roll(1, 1),
    "gathered": lambda y: y.gather(1, torch.arange(5).flip(0)[None, :, None].expand(len(y), 5, 6)),
    "index_select": lambda y: y.index_select(1, torch.arange(5).flip(0)),
    "picked": lambda y: y[:, torch.arange(5).flip(0)],
    "picked by a list": lambda y: y[:, [4, 3, 2, 1, 0]],
    "picked by a mask": lambda y: y[:, torch.tensor([True, False, True, True, True])],
    "sorted": lambda y: y.sort(1).values,
    "parts exchanged": lambda y: torch.cat([y[:, 2:], y[:, :2]], 1),
    "parts exchanged, and stacked": lambda y: torch.stack(list(y.unbind(1))[::-1], 1),
    "moved on by one": lambda y: torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1),
    "padded in front, cut behind": lambda y: F.pad(y, (0, 0, 1, -1)),
    "padded in front, then cut": lambda y: F.pad(y, (0, 0, 1, 0))[:, :-1],
    "added up elsewhere": lambda y: torch.zeros_like(y).scatter_add(
        1, torch.arange(5).flip(0)[None, :, None].expand(len(y), 5, 6), y
    ),
    "put elsewhere": lambda y: torch.zeros_like(y).index_put(
        (torch.arange(len(y))[:, None], torch.arange(5).flip(0)), y
    ),
    "written one place on": lambda y: written(y, lambda z: one_place_on(z, y)),
    "copied one place on": lambda y: written(y, lambda z: z[:, 1:].copy_(y[:, :-1])),
    "added one place on": lambda y: written(y, lambda z: z[:, 1:].add_(y[:, :-1])),
}


def one_place_on(z, y):
    z[:, 1:] = y[:, :-1]


def written(y, write):
    z = torch.zeros_like(y)
    write(z)
    return z


@pytest.mark.parametrize("size", [3, 5], ids=["N", "N == T"])
@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_tokens_out_of_their_order(name, size):
    """A mask of tokens would let other ones vote."""
    model = mix(lambda m, x: m.h(OUT_OF_ORDER[name](m.l(x))))
    mask = torch.arange(5) < torch.arange(1, size + 1)[:, None]
    with htv.attach(model, htv.Median()) as handle, handle.tokens(mask):
        refused(
            model,
            lambda: model(torch.randn(size, 5, 6)),
            htv.UnsupportedError,
            "'h.weight'",
            "exclude=",
        )


def test_a_parameter_that_some_tokens_use_more_than_once():
    """Token t of one use would vote with token t + 1 of another."""
    twice = mix(lambda m, x: m.h(m.l(x)[:, 1:] + 0) * m.h(m.l(x)[:, :-1]))
    with htv.attach(twice, htv.Median()) as handle:
        with handle.tokens():
            loss = twice(torch.randn(3, 5, 6)).sum()
        with pytest.raises(
            htv.UnsupportedError, match="'h.(weight|bias)' is used 2 times.*12 rows.*15"
        ):
            loss.backward()
    remedied = mix(lambda m, x: (lambda y: y[:, 1:] * y[:, :-1])(m.h(m.l(x))))
    x = torch.randn(3, 5, 6)
    plain = torch.autograd.grad(remedied(x).sum(), remedied.h.weight)
    with htv.attach(remedied, htv.WinsorizedMean(0)) as handle:
        with handle.tokens():
            loss = remedied(x).sum()
        found = torch.autograd.grad(loss, remedied.h.weight)
    torch.testing.assert_close(found, plain)


def test_what_joins_features_keeps_tokens_in_their_order():
    def rotated(m, x):
        y = m.l(x)
        y = torch.cat([-y[..., 3:], y[..., :3]], -1) + torch.stack([y, y], -1).flatten(-2)[..., :6]
        z = F.pad(y, (0, 2))[..., :6].clone()
        z[..., :2] = y[..., 2:4]
        return m.h(z)

    model, x = mix(rotated), torch.randn(3, 5, 6)
    mask = torch.arange(5) < torch.arange(2, 5)[:, None]
    loss = lambda: (model(x).square().sum(-1) * mask).sum()
    plain = torch.autograd.grad(loss(), list(model.parameters()))
    with htv.attach(model, htv.WinsorizedMean(0)) as handle:
        with handle.tokens(mask):
            value = loss()
        found = torch.autograd.grad(value, list(model.parameters()))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_where_tokens_vote(make):
    model = Module(lambda m, x: m.r(x[:, 0] if "Cell" in make.__name__ else x)[0], r=make(6, 4))
    with htv.attach(model, htv.Median()) as handle, handle.tokens():
        refused(model, lambda: model(X), htv.UnsupportedError, "'r.", "tokens()", "exclude=")


def test_coupling_that_needs_no_parameter_to_follow():
    """Where examples meet behind the last parameter, in a loss, contributions are what passes
    through their rows.
    """
    model = Module(similarity, l=nn.Linear(6, 6, bias=False)).double()
    x = torch.randn(5, 4, 6).double()
    weight = model.l.weight
    rows = F.normalize(model.l(x[:, 0]), dim=-1).detach().requires_grad_()
    loss = lambda s: F.cross_entropy(5 * s, torch.arange(5))
    (row_grads,) = torch.autograd.grad(loss(rows @ rows.T), rows)
    parts = [
        torch.autograd.grad((F.normalize(model.l(x[e, 0]), dim=-1) * row_grads[e]).sum(), weight)[0]
        for e in range(5)
    ]
    with htv.attach(model, htv.Median()):
        (found,) = torch.autograd.grad(loss(model(x)), weight)
    torch.testing.assert_close(found, aggregated(torch.stack(parts), htv.Median()))


# Where the batch is in the output of models that change the order of examples: the example of every
# row.
REORDERED = {
    "flipped": (lambda m, x: m.l(x.flip(0)), [4, 3, 2, 1, 0]),
    "rolled": (lambda m, x: m.l(torch.tanh(m.l(x)).roll(1, 0)), [4, 0, 1, 2, 3]),
    "parts swapped": (lambda m, x: m.l(torch.cat(x.chunk(2)[::-1])), [3, 4, 0, 1, 2]),
    "gathered": (
        lambda m, x: m.l(
            torch.gather(m.l(x[:, 0]), 0, torch.arange(5).flip(0)[:, None].expand(-1, 6))
        ),
        [4, 3, 2, 1, 0],
    ),
    "repeated": (lambda m, x: m.l(x.repeat_interleave(2, 0)[1:6]), [0, 1, 1, 2, 2]),
    "one example": (lambda m, x: m.l(x[2:3]), [2]),
    "one example without its dim": (lambda m, x: m.l(x[2]), [2] * 4),
    "rows of some": (lambda m, x: m.l(x.reshape(-1, 6)[[0, 7, 8, 3]]), [0, 1, 2, 0]),
    "data made with other data": (lambda m, x: m.l((x - x.mean(0)) / x.std(0)), [0, 1, 2, 3, 4]),
    "a row of a table for every place": (
        lambda m, x: m.l(x) * m.e(torch.arange(5))[:, None],
        [0, 1, 2, 3, 4],
    ),
    "a row of a parameter for every place": (
        lambda m, x: m.l(x) * m.e.weight[torch.arange(5)][:, None],
        [0, 1, 2, 3, 4],
    ),
}


@pytest.mark.parametrize("name", REORDERED)
def test_examples_in_another_order(name):
    forward, examples = REORDERED[name]
    model = Module(forward, l=nn.Linear(6, 6), e=nn.Embedding(9, 6)).double()
    x = torch.randn(5, 4, 6).double()
    parameters = {
        n: p for n, p in model.named_parameters() if n.startswith("l.") or "table" in name
    }
    y = model(x)
    weights = torch.randn(y.shape).double()
    mine = lambda e: (
        torch.tensor([e == example for example in examples])
        .double()
        .reshape(-1, *(1,) * (y.dim() - 1))
    )
    contributions = one_group_at_a_time(
        lambda e: (model(x) * weights * mine(e)).sum(), parameters, 5
    )
    for rule in (htv.AndMask(0.4), htv.WinsorizedMean(1)):
        with htv.attach(model, rule):
            grads = torch.autograd.grad((model(x) * weights).sum(), list(parameters.values()))
        for (name, stacked), grad in zip(contributions.items(), grads, strict=True):
            torch.testing.assert_close(
                grad, aggregated(stacked, rule), rtol=1e-9, atol=1e-12, msg=name
            )


def test_unsupported_use_can_be_plain():
    model = Module(
        lambda m, x: torch.linalg.vecdot(torch.relu(m.first(x)), m.w),
        first=nn.Linear(6, 6),
        w=torch.randn(6),
    )
    plain = dict(
        zip(
            ["w", "weight", "bias"],
            torch.autograd.grad(model(X).sum(), list(model.parameters())),
            strict=True,
        )
    )
    with htv.attach(model, htv.Median(), on_unsupported="plain"):
        with pytest.warns(UserWarning, match="'w' is used by linalg_vecdot"):
            model(X).sum().backward()
    torch.testing.assert_close(model.w.grad, plain["w"])
    assert not torch.allclose(model.first.weight.grad, plain["weight"])


def test_excluded_parameters_may_be_used_anyhow():
    model = Module(
        lambda m, x: m.first(x) @ (m.w * m.v),
        first=nn.Linear(6, 6),
        w=torch.randn(6, 2),
        v=torch.ones(2),
    )
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
            refused(
                model,
                lambda m=model: m(X[:, 0]),
                htv.UnsupportedError,
                "BatchNorm",
                ".eval()",
                "GroupNorm",
            )


@pytest.mark.parametrize(
    "penalty",
    [lambda m: m[0].weight.square().sum(), lambda m: Square.apply(torch.ones(1), m[3].bias).sum()],
    ids=["weight penalty", "custom function"],
)
def test_a_path_to_a_parameter_outside_the_forward(penalty):
    model = mlp()
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(6, 12)).sum() + penalty(model)
        refused(
            model,
            loss.backward,
            htv.UnsupportedError,
            "does not serve",
            "weight decay",
            backward=True,
        )


def test_a_custom_function_inside_the_forward():
    model = Module(lambda m, x: Square.apply(x, m.p), p=torch.randn(6))
    with htv.attach(model, htv.Median()):
        refused(
            model,
            lambda: model(X).sum().backward(),
            htv.UnsupportedError,
            "'p'",
            "custom autograd.Function",
        )


def test_vmap_inside_the_forward():
    model = Module(lambda m, x: torch.vmap(m.l)(x), l=nn.Linear(6, 6))
    with htv.attach(model, htv.Median()):
        refused(
            model,
            lambda: model(X).sum().backward(),
            htv.UnsupportedError,
            "'l.",
            "exclude",
            backward=True,
        )


def test_two_forwards_with_different_groups_in_one_backward():
    model = mlp()
    with htv.attach(model, htv.Median()):
        loss = model(torch.randn(6, 12)).sum() + model(torch.randn(4, 12)).sum()
        refused(
            model,
            loss.backward,
            htv.UnsupportedError,
            "two forwards with different groups",
            backward=True,
        )


def test_groups_and_packed_of_the_wrong_length():
    model = mlp()
    x = torch.randn(6, 12)
    with htv.attach(model, htv.Median()) as handle:
        for grouped_rows, words in (
            (handle.groups(torch.zeros(5, dtype=torch.long)), ("groups has 5 ids", "size 6")),
            (handle.groups(torch.zeros(6)), ("integer ids",)),
            (handle.packed(torch.tensor([0, 3, 5])), ("cu_seqlens", "6")),
            (handle.packed(torch.tensor([0, 4, 2, 6])), ("cu_seqlens", "falls")),
        ):
            with grouped_rows:
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


def test_refusals_name_the_module():
    inner = Module(lambda m, x: torch.linalg.vecdot(x, m.w), w=torch.randn(6))
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 6), inner)})
    model.forward = lambda x: model["block"](x)
    for used, path, words in (
        (model, "block.1", "module 'block.1', a Module"),
        (inner, "", "the model, a Module"),
    ):
        with htv.attach(used, htv.Median()), pytest.raises(htv.UnsupportedError) as caught:
            used(torch.randn(5, 6))
        assert caught.value.module == path and str(caught.value).endswith(f"(in {words})")


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


@pytest.mark.parametrize(
    "forward, ids",
    [
        (lambda m, i: m.p[i], [0, 7]),
        (lambda m, i: m.p[i], [-8, 0]),
        (lambda m, i: m.p.index_select(0, i), [0, -1]),
        (lambda m, i: F.embedding(i, m.p, padding_idx=7), [0, 1]),
        (lambda m, i: F.embedding(i, m.p, padding_idx=-8), [0, 1]),
        (
            lambda m, i: F.embedding_bag(
                i[:, None], m.p, mode="max", per_sample_weights=torch.ones(2, 1)
            ),
            [0, 1],
        ),
        (
            lambda m, i: F.conv1d(
                i.float()[:, None, None], m.p[:, None, None, 0], stride=2, padding="same"
            ),
            [0, 1],
        ),
    ],
)
def test_what_torch_refuses_stays_refused(forward, ids):
    """Rows out of range, above all, are not taken for others."""
    model = Module(forward, p=torch.randn(7, 3))
    ids = torch.tensor(ids)
    for attached in (False, True):
        if attached:
            htv.attach(model, htv.Median())
        with pytest.raises(
            (IndexError, RuntimeError, ValueError, AssertionError, NotImplementedError)
        ) as caught:
            model(ids)
        assert not isinstance(caught.value, htv.UnsupportedError)
