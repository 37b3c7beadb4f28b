"""Every kind of use htv serves: TABLE maps a section to names, and these to builders of (model,
batch).

All batches have N examples in dim 0, of four tokens (or channels) of six features where that makes
sense; tests change N so that sizes coincide. What is used in a table by more than one row stands
above it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

Builder = Callable[[], tuple[nn.Module, object]]

N = 7


def examples(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


def ids(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, (N, *shape))


class Module(nn.Module):
    """A module from a function of (itself, x) and parameters by name."""

    def __init__(self, forward, **parameters):
        super().__init__()
        self.function = forward
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, *args):
        return self.function(self, *args)


def tokens(forward, **parameters) -> Builder:
    """A builder of a Module and a batch of shape (N, 4, 6); parameters come from functions, drawn
    anew every time.
    """
    return lambda: (
        Module(forward, **{name: make() for name, make in parameters.items()}),
        examples(4, 6),
    )


def drawn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def linear(i: int, o: int, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, **options)


def of(make: Callable[[], nn.Module], *shape: int) -> Builder:
    """A builder of a module and a batch of shape (N, *shape)."""
    return lambda: (make(), examples(*shape))


# -- normalisation ---------------------------------------------------------------------------------


def rms(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_rms(self, x):
    y = x.float() if x.dtype == torch.bfloat16 else x
    return (y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)).type_as(
        x
    )


# -- attention -------------------------------------------------------------------------------------


def attention(call, batch_first: bool = True, **options) -> Builder:
    return tokens(call, a=lambda: nn.MultiheadAttention(6, 2, batch_first=batch_first, **options))


def merged_heads(self, x):
    n, t, d = x.shape
    q, k, v = (
        y.view(n, t, 2, d // 2).transpose(1, 2).reshape(n * 2, t, d // 2)
        for y in self.qkv(x).chunk(3, -1)
    )
    y = torch.bmm(torch.softmax(q @ k.transpose(1, 2), -1), v)
    return self.out(y.view(n, 2, t, d // 2).transpose(1, 2).reshape(n, t, d))


def functional_attention(self, x):
    y = x.transpose(0, 1)
    found, weights = F.multi_head_attention_forward(
        y,
        y,
        y,
        6,
        2,
        self.w,
        self.b,
        None,
        None,
        False,
        0.0,
        self.out,
        None,
        average_attn_weights=False,
    )
    return found.transpose(0, 1), weights


def separate_projections(self, x):
    y = x.transpose(0, 1)
    weights = dict(
        q_proj_weight=self.q,
        k_proj_weight=self.k,
        v_proj_weight=self.v,
        use_separate_proj_weight=True,
    )
    options = (6, 2, None, self.b, None, None, False, 0.0, self.out, None)
    return F.multi_head_attention_forward(y, y[..., :3], y[..., :4], *options, **weights)[
        0
    ].transpose(0, 1)


def rotated(self, x):
    """Rotary positions by complex numbers, as language models write them; then a lower-triangular
    mix.
    """
    n, t, d = x.shape
    qk = self.qk(x).reshape(n, t, d // 2, 2)
    pairs = torch.view_as_complex((qk.float() if x.dtype == torch.bfloat16 else qk).contiguous())
    angles = torch.outer(torch.arange(t), 0.5 ** torch.arange(d // 2)).to(pairs.real.dtype)
    turned = (
        torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        .flatten(2)
        .to(x.dtype)
    )
    halves = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
    weights = torch.tril(turned @ halves.transpose(-1, -2))
    return self.out(weights / torch.linalg.norm(weights, dim=-1, keepdim=True) @ x)


def relative_bias(self, x):
    """A bias per head and distance, looked up by positions and added to the attention's scores."""
    n, t, d = x.shape
    q, k, v = self.qkv(x).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    distance = torch.arange(t)[:, None] - torch.arange(t)[None] + t - 1
    bias = self.table(distance).permute(2, 0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(n, t, d)


def windows(self, x):
    """(N, 4, 4, 6) images cut into shifted windows of 2 by 2, merged with the batch, and put
    together again.
    """
    n = len(x)
    y = (
        torch.roll(x, (-1, -1), (1, 2))
        .view(n, 2, 2, 2, 2, 6)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(-1, 4, 6)
    )
    q, k, v = self.qkv(y).chunk(3, -1)
    y = torch.softmax(q @ k.mT + self.bias, -1) @ v
    y = y.view(n, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, 6)
    return torch.roll(y, (1, 1), (1, 2))


def encoder(layers: int = 1, evaluated: bool = False, **options) -> Builder:
    def make():
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **{"dropout": 0.0} | options)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).train(not evaluated)

    return of(make, 4, 6)


def decoder(**options) -> Builder:
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)
        return self.l(x, torch.tanh(x), tgt_mask=mask, memory_key_padding_mask=x[..., 0] > 1)

    return tokens(
        forward,
        l=lambda: nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True, **options),
    )


def frozen_encoder() -> Builder:
    """An encoder in eval mode with all parameters frozen would take torch's fused path."""
    model, x = encoder(2, evaluated=True)()
    return Module(
        lambda m, x: m.head(m.encoder(x)), encoder=model.requires_grad_(False), head=nn.Linear(6, 3)
    ), x


# -- recurrence ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Outputs and last hidden states of a recurrent layer; x: (N, T, 6), turned round unless
    batch_first.
    """

    def __init__(self, kind: str, packed: bool = False, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(6, 4, **options)
        self.packed, self.batch_first = packed, options.get("batch_first", False)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        if self.packed:
            lengths = 1 + (x[:, :3, 0] > 0).sum(1)
            x = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
        y, hidden = self.layer(x)
        if self.packed:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=4)
        y = y if self.batch_first else y.transpose(0, 1)
        return [
            y,
            *(h.transpose(0, 1) for h in (hidden if isinstance(hidden, tuple) else (hidden,))),
        ]


def recurrent(kind: str, **options) -> Builder:
    return of(lambda: Recurrent(kind, **options), 4, 6)


def learnt_state(self, x):
    start = (self.h.expand(-1, len(x), -1).contiguous(), self.c.expand(-1, len(x), -1).contiguous())
    return self.l(x, start)[0]


def cell_loop(self, x):
    h = x.new_zeros(len(x), 4)
    found = []
    for t in range(x.shape[1]):
        h = self.cell(x[:, t], h)
        found.append(h)
    return torch.stack(found, 1)


def handwritten_recurrence(self, x):
    h = torch.zeros(len(x), 6, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(self.input(x[:, t]) + self.hidden(h))
    return h


# -- parametrizations ------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def parametrized(
    layer: Callable[[], nn.Module], how: Callable[[nn.Module], nn.Module], *shape: int, train=True
):
    return of(lambda: nn.Sequential(how(layer())).train(train), *shape)


class Cached(nn.Module):
    """A normalised weight used twice, computed once."""

    def __init__(self):
        super().__init__()
        self.l = parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        with parametrize.cached():
            return self.l(torch.tanh(self.l(x)))


class WeightNormed(nn.Module):
    """The older torch.nn.utils.weight_norm, put on after copying: its modules cannot be
    deep-copied.
    """

    def __init__(self):
        super().__init__()
        self.g, self.v = nn.Parameter(torch.rand(5, 1, 1) + 0.5), nn.Parameter(torch.randn(5, 4, 3))

    def forward(self, x):
        return F.conv1d(x, torch._weight_norm(self.v, self.g, 0))


# -- products --------------------------------------------------------------------------------------


CONSTANT = torch.linspace(-7, 9, 600).sin()
FEATURES = CONSTANT[:54].view(9, 6)


def einsum(equation: str, *shape: int) -> Builder:
    return tokens(lambda m, x: torch.einsum(equation, x, m.w), w=drawn(*shape))


EINSUMS = {
    "nti,io->nto": (6, 2), "ntd,dhe->nthe": (6, 2, 3), "ntd,tde->nte": (4, 6, 2),
    "ntd,td->nt": (4, 6), "...d,de->...e": (6, 2), "ntd,st->nsd": (5, 4), "ntd,tdo->no": (4, 6, 3),
    "ntd,td": (4, 6), "ntd,k->ntdk": (5,), "btd,e->bt": (3,),
}  # fmt: skip


def assembled(self, x):
    """A weight put together from two parameters, row by row."""
    weight = torch.zeros(3, 6, dtype=x.dtype)
    weight[0] = self.v
    weight[1:] = self.u
    return F.linear(x, weight)


def aligned(*shape: int, equation: str) -> Builder:
    """An einsum of the batch with a constant of more dims: "..." counts from the end, so the batch
    ends in dim 1.
    """

    def forward(self, x):
        y = torch.einsum(equation, self.l(x), CONSTANT[: math.prod(shape)].to(x.dtype).view(shape))
        return (y.sin() * self.s).transpose(0, 1)

    return tokens(forward, l=linear(6, 6), s=drawn(1))


# -- adapters --------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A low-rank adapter beside a frozen layer, with a second one in the form of DoRA: a learnt
    magnitude.
    """

    def __init__(self, merged: bool, magnitude: bool):
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.magnitude = nn.Parameter(torch.rand(5) + 0.5) if magnitude else None
        self.merged = merged

    def forward(self, x):
        if not self.merged:
            return self.base(x) + 2.0 * self.b(self.a(x))
        weight = self.base.weight + 2.0 * self.b.weight @ self.a.weight
        if self.magnitude is not None:
            weight = weight * (self.magnitude / weight.norm(dim=1)).unsqueeze(1)
        return F.linear(x, weight, self.base.bias)


def mixture(self, x):
    """Every token goes to the expert its gate prefers: rows gathered across the batch, and added
    back.
    """
    flat = x.reshape(-1, 6)
    out = torch.zeros(len(flat), 6, dtype=x.dtype)
    weights = torch.softmax(self.gate(flat), -1)
    top = weights.argmax(-1)
    for expert in range(3):
        (rows,) = torch.where(top == expert)
        out.index_add_(
            0, rows, torch.tanh(F.linear(flat[rows], self.w[expert])) * weights[rows, expert, None]
        )
    return out.view_as(x)


def gathered(self, x):
    weights = torch.sigmoid(self.gate(x))
    chosen = weights.topk(2, dim=-1).indices
    experts = torch.einsum("ntd,nte->nted", x, weights)
    picked = torch.gather(experts, 2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    return self.out(picked.sum(dim=2))


# -- reuse -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is the head too."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.embedding, self.body, self.head = (
            nn.Embedding(11, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 11, bias=False),
        )
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, x):
        y = self.embedding(x)
        for layer in (self.body, self.head):
            y = torch.tanh(
                checkpoint(layer, y, use_reentrant=False) if self.checkpointed else layer(y)
            )
        return y


def reused(self, x):
    return self.layer(torch.tanh(self.layer(x)) + self.layer.weight[0])


def checkpointed(*names: str) -> Callable:
    """A forward of checkpointed modules in a row."""

    def forward(self, x):
        for name in names:
            x = checkpoint(getattr(self, name), torch.tanh(x), use_reentrant=False)
        return x

    return forward


def reused_in_checkpoint(self, x):
    return self.layer(torch.tanh(checkpoint(self.layer, x, use_reentrant=False))) * self.layer.bias


# -- distributions ---------------------------------------------------------------------------------


def policy(spread) -> Builder:
    """A Gaussian policy (N, 6) -> three actions: their log-probabilities and entropy. spread(m,
    mean): the distribution's standard deviation.
    """

    def forward(self, x):
        mean = torch.tanh(self.mean(x))
        policy = torch.distributions.Normal(mean, spread(self, mean))
        return policy.log_prob(torch.sin(x[:, :3])).sum(-1), policy.entropy().sum(-1)

    return of(
        lambda: Module(forward, mean=nn.Linear(6, 3), log_std=torch.randn(1, 3) * 0.3), 6
    )  # fmt: skip


def squashed(self, x):
    """The log-probabilities of a squashed Gaussian, as soft actor-critic has them."""
    mean = self.mean(x)
    normal = torch.distributions.Normal(mean, self.log_std.exp())
    normal = torch.distributions.Independent(normal, 1)
    action = torch.tanh(normal.mean + normal.stddev * torch.sin(x[:, :3]))
    log_prob = normal.log_prob(torch.atanh(action.clamp(-0.99, 0.99)))
    return log_prob - torch.log(1 - action.square() + 0.1).sum(-1)


def mixture_of_gaussians(self, x):
    """With learnt shares, and one deviation that is a number."""
    shares = torch.distributions.Categorical(logits=self.shares)
    parts = torch.distributions.Normal(self.mean(x), 0.7)
    return torch.distributions.MixtureSameFamily(shares, parts).log_prob(torch.sin(x[:, 0]))


def divergence(self, x):
    """What a variational autoencoder pays, and a layer on the latent."""
    latent = torch.distributions.Normal(self.mean(x), self.log_std.exp())
    prior = torch.distributions.Normal(torch.zeros_like(x[:, :3]), 1.0)
    noisy = latent.loc + latent.scale * torch.sin(x[:, 3:])
    return torch.distributions.kl_divergence(latent, prior), self.out(torch.tanh(noisy))


# -- weights of examples' own ----------------------------------------------------------------------


class Synthesis(nn.Module):
    """Two convolutions whose weights are scaled by every example's style, as StyleGAN2 has them:
    all examples' are one convolution with a group for each. It starts from a learnt image.
    """

    def __init__(self, upsampled: bool = False):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 4, 3, 3))
        self.styles = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 5)])
        self.weights = nn.ParameterList([torch.randn(1, 5, 4, 3, 3), torch.randn(1, 4, 5, 3, 3)])
        self.strength, self.bias = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(4))
        self.colours, self.upsampled = nn.Conv2d(4, 2, 1), upsampled
        self.register_buffer("noise", torch.randn(1, 1, 3, 3))

    def modulated(self, x, z, layer: int, upsampled: bool = False):
        weight = self.weights[layer] * self.styles[layer](z)[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-3)
        n, outputs, inputs = weight.shape[:3]
        x = x.reshape(1, n * inputs, *x.shape[2:])
        if upsampled:
            weight = weight.transpose(1, 2).reshape(n * inputs, outputs, 3, 3)
            y = F.conv_transpose2d(x, weight, stride=2, groups=n)
        else:
            y = F.conv2d(x, weight.view(n * outputs, inputs, 3, 3), padding=1, groups=n)
        return y.view(n, outputs, *y.shape[2:])

    def forward(self, z):
        x = self.modulated(self.start.repeat(len(z), 1, 1, 1), z, 0)
        x = torch.tanh(x + self.strength * self.noise)
        x = self.modulated(x, z, 1, self.upsampled)
        return self.colours(torch.tanh(x + self.bias.view(-1, 1, 1)))


def of_a_basis(self, x):
    """Kernels mixed of a learnt basis by every example's own attention, with biases."""
    mix = torch.softmax(self.mix(x.mean(-1)), -1)
    weight = torch.einsum("nk,koit->noit", mix, self.basis)
    bias = torch.einsum("nk,ko->no", mix, self.biases).flatten()
    n, outputs, inputs, width = weight.shape
    y = F.conv1d(
        x.reshape(1, n * inputs, -1), weight.reshape(-1, inputs, width), bias, groups=n, padding=1
    )
    return self.out(torch.tanh(y.view(n, outputs, -1)))


# -- images sampled at learnt places ---------------------------------------------------------------


def transformed(self, x):
    """A spatial transformer between two convolutions."""
    y = self.first(x)
    theta = 0.3 * self.where(x.flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(theta, y.shape, align_corners=False)
    return self.second(F.grid_sample(y, grid, align_corners=False))


def placed(shared):
    """Images seen through one transformation of all; shared(theta, x): the grid."""
    return of(
        lambda: Module(
            lambda m, x: m.l(F.grid_sample(x, shared(m.theta, x), align_corners=False)),
            theta=torch.randn(2, 3) * 0.4,
            l=nn.Linear(4, 2),
        ),
        3,
        4,
        4,
    )


def painted(self, x):
    """A learnt image looked at where every example says."""
    grid = torch.tanh(self.where(x)).view(-1, 2, 3, 2)
    return self.l(F.grid_sample(self.image.expand(len(x), -1, -1, -1), grid, align_corners=False))


# -- bags ------------------------------------------------------------------------------------------


def flat_bags(self, x):
    """Two bags of every example, of two and three ids, in one list with offsets."""
    starts = torch.arange(len(x)) * 5
    return self.e(x.flatten(), torch.stack([starts, starts + 2], 1).flatten()).view(len(x), -1)


# -- where the batch goes --------------------------------------------------------------------------


def accumulated(self, x):
    total = torch.zeros(len(x), 4, 6, dtype=x.dtype)
    total += self.first(x)
    total[:, 1:] += self.first(x[:, :-1])
    total[:, 0] = x[:, 2]
    return self.second(total)


def decaying(self, x):
    bias = self.bias.clone()
    for _ in range(3):
        x = torch.tanh(x + bias)
    return x


def swapped(self, x):
    """Parts of the batch change places, and change them back."""
    half = (len(x) + 1) // 2
    y = self.l(torch.cat([x[half:], x[:half]]))
    return torch.cat([y[len(x) - half :], y[: len(x) - half]])


def sorted_by_length(self, x):
    order = x[:, 0, 0].argsort()
    return torch.tanh(self.l(x[order]))[order.argsort()]


def masked_rows(self, x):
    kept = x[..., 0] > 0
    return torch.zeros(*x.shape[:2], 2, dtype=x.dtype).index_put((kept,), self.l(x[kept]))


def shuffled_tokens(self, x):
    """Rows of all examples in an order of their own, and back."""
    flat = x.reshape(-1, 6)
    order = (torch.arange(len(flat)) * 5 + 3) % len(
        flat
    )  # 5 and the number of rows have no common divisor
    order = order if len(order.unique()) == len(flat) else order.sort().indices
    return self.l(flat[order])[order.argsort()].reshape(*x.shape[:2], -1)


def several_samples(self, x):
    """Every example twice in the batch: copies one after another, and the batch after itself."""
    n = len(x)
    near = self.l(x.repeat_interleave(2, 0)).view(n, 2, 4, 6).mean(1)
    far = self.l(x.repeat(2, 1, 1)).view(2, n, 4, 6)
    return near + far[0] * far[1]


def looked_up(pick) -> Builder:
    """A layer on rows of a constant table that ids of the batch pick."""
    return lambda: (
        Module(lambda m, t: m.l(pick(FEATURES.to(m.l.weight.dtype), t)), l=nn.Linear(6, 5)),
        ids(len(FEATURES)),
    )


def tiled(self, x):
    return self.h(torch.tile(self.l(x).transpose(0, 1), (1, 2))).transpose(0, 1)


POSITIONS = torch.arange(16)
there_and_back = lambda there, back: tokens(lambda m, x: back(m.l(there(x))), l=linear(6, 6))

TABLE: dict[str, dict[str, Builder]] = {
    "Linear": {
        "linear 2-D": of(linear(6, 5), 6),
        "linear without bias": of(linear(6, 5, bias=False), 6),
        "linear 3-D": of(linear(6, 5), 4, 6),
        "linear 4-D": of(linear(6, 5), 2, 3, 6),
        "linear 5-D": of(linear(6, 5), 2, 1, 3, 6),
        "F.linear": tokens(
            lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=drawn(5, 6), b=drawn(5)
        ),
        "bilinear": tokens(
            lambda m, x: m.l(x, torch.tanh(x[..., :3])), l=lambda: nn.Bilinear(6, 3, 5)
        ),
        "bilinear without bias": tokens(
            lambda m, x: m.l(x[:, 0], x[:, 1]), l=lambda: nn.Bilinear(6, 6, 2, bias=False)
        ),
    },
    "Convolution": {
        "conv1d": of(lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), 3, 9),
        "conv2d": of(lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), 3, 5, 6),
        "conv2d strided": of(lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), bias=False), 3, 8, 9),
        "conv2d same": of(lambda: nn.Conv2d(2, 3, 4, padding="same", dilation=(1, 2)), 2, 6, 7),
        "conv2d valid": of(lambda: nn.Conv2d(2, 3, 2, padding="valid"), 2, 4, 4),
        "conv2d reflect": of(
            lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, 5, 5
        ),
        "conv2d replicate": of(
            lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), 2, 5, 5
        ),
        "conv2d circular": of(
            lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), 2, 5, 5
        ),
        "conv2d grouped": of(lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), 6, 4, 4),
        "conv2d depthwise": of(lambda: nn.Conv2d(4, 8, 3, groups=4), 4, 5, 5),
        "conv2d channels last": lambda: (
            nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last),
            examples(4, 5, 5).to(memory_format=torch.channels_last),
        ),
        "conv3d": of(lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), 2, 3, 4, 4),
    },
    "Transposed convolution": {
        f"conv_transpose{d}d": of(
            lambda d=d: getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, 2, 1, 1, groups=2, dilation=2),
            4,
            *space,
        )
        for d, space in ((1, (5,)), (2, (5, 4)), (3, (3, 3, 4)))
    }
    | {
        "conv_transpose2d plain": of(lambda: nn.ConvTranspose2d(3, 2, (2, 3), bias=False), 3, 4, 4),
        "conv_transpose2d depthwise": of(
            lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), 4, 3, 3
        ),
        "conv_transpose1d output_size": tokens(
            lambda m, x: m.l(x, output_size=[12]),
            l=lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1),
        ),
    },
    "Embedding": {
        "embedding": lambda: (nn.Embedding(11, 5), ids(11, 6)),
        "embedding of one id": lambda: (nn.Embedding(11, 5), ids(11)),
        "embedding of images of ids": lambda: (nn.Embedding(5, 3), ids(5, 2, 3)),
        "embedding, repeated ids": lambda: (nn.Embedding(3, 5), ids(2, 6)),
        "embedding, padding_idx": lambda: (nn.Embedding(11, 5, padding_idx=-3), ids(11, 6, low=6)),
        "embedding bag": lambda: (nn.EmbeddingBag(20, 3), ids(20, 5)),
        **{
            f"embedding bag {mode}, padding_idx": lambda mode=mode: (
                nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1),
                torch.cat([ids(6, 5)[1:], torch.ones(1, 5, dtype=torch.long)]),
            )
            for mode in ("sum", "mean", "max")
        },
        "embedding bag, weighted": lambda: (
            Module(
                lambda m, x, w: m.e(x, per_sample_weights=w),
                e=nn.EmbeddingBag(9, 3, mode="sum", padding_idx=0),
            ),
            (ids(9, 5), examples(5)),
        ),
        **{
            f"embedding bag {mode} by offsets": lambda mode=mode: (
                Module(flat_bags, e=nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1)),
                ids(6, 5),
            )
            for mode in ("sum", "mean", "max")
        },
        "rows picked from a parameter": lambda: (
            Module(lambda m, x: m.t[x], t=torch.randn(20, 3, 2)),
            ids(20, 4),
        ),
        "rows picked by index_select": lambda: (
            Module(lambda m, x: torch.index_select(m.t, 0, x), t=torch.randn(20, 3)),
            ids(20),
        ),
    },
    "Normalisation": {
        "layer norm": of(lambda: nn.LayerNorm(6), 6),
        "layer norm 4-D over two": of(lambda: nn.LayerNorm((4, 6)), 2, 4, 6),
        "layer norm without bias": of(lambda: nn.LayerNorm(6, bias=False), 3, 6),
        "group norm": of(lambda: nn.GroupNorm(3, 6), 6, 4, 5),
        "group norm flat": of(lambda: nn.GroupNorm(2, 6), 6),
        "instance norm 1d": of(lambda: nn.InstanceNorm1d(4, affine=True), 4, 6),
        "instance norm 2d": of(
            lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 4, 4
        ),
        "instance norm 3d, frozen": of(
            lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True).eval(), 2, 2, 3, 3
        ),
        "rms norm": of(lambda: nn.RMSNorm(6), 3, 6),
        "rms norm over two dims": of(lambda: nn.RMSNorm((3, 6), eps=1e-3), 3, 6),
        "rms norm by hand": of(lambda: Module(rms, weight=torch.randn(6)), 3, 6),
        "rms norm by hand, 1 + weight": of(lambda: Module(gemma_rms, weight=torch.randn(6)), 3, 6),
        "batch norm, frozen": of(lambda: nn.BatchNorm2d(4).eval(), 4, 3, 3),
    },
    "PReLU": {
        "prelu": of(nn.PReLU, 4, 6),
        "prelu per channel": of(lambda: nn.PReLU(4, init=0.1), 4, 6),
        "prelu of features": of(lambda: nn.PReLU(6), 6),
        "prelu of images": of(lambda: nn.PReLU(3), 3, 4, 4),
    },
    "Attention": {
        "MultiheadAttention": attention(lambda m, x: m.a(x, x, x)),
        "MultiheadAttention without weights": attention(
            lambda m, x: m.a(x, x, x, need_weights=False)[0]
        ),
        "MultiheadAttention without bias": attention(lambda m, x: m.a(x, x, x)[0], bias=False),
        "MultiheadAttention, sequence first": attention(
            lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), batch_first=False
        ),
        "MultiheadAttention, separate projections": attention(
            lambda m, x: m.a(x, x[..., :3], x[..., :4])[0], kdim=3, vdim=4
        ),
        "MultiheadAttention, bias_k, bias_v, zero_attn": attention(
            lambda m, x: m.a(x, x, x)[0], add_bias_kv=True, add_zero_attn=True
        ),
        "MultiheadAttention, masks": attention(
            lambda m, x: m.a(
                x,
                x,
                x,
                key_padding_mask=x[..., 0] > 1.2,
                attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(2),
            )[0]
        ),
        "MultiheadAttention, causal": attention(
            lambda m, x: m.a(
                x,
                x,
                x,
                attn_mask=torch.ones(4, 4).triu(1).bool(),
                is_causal=True,
                need_weights=False,
            )[0]
        ),
        "MultiheadAttention, a mask per head": attention(
            lambda m, x: m.a(x, x, x, attn_mask=(x @ x.mT).repeat_interleave(2, 0).detach())[0]
        ),
        "MultiheadAttention, learnt queries": tokens(
            lambda m, x: m.a(m.q.expand(len(x), -1, -1), x, x, need_weights=False)[0],
            a=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
            q=drawn(1, 3, 6),
        ),
        "F.multi_head_attention_forward": tokens(
            lambda m, x: functional_attention(m, x), w=drawn(18, 6), b=drawn(18), out=drawn(6, 6)
        ),
        "F.multi_head_attention_forward, separate": tokens(
            lambda m, x: separate_projections(m, x),
            q=drawn(6, 6),
            k=drawn(6, 3),
            v=drawn(6, 4),
            b=drawn(18),
            out=drawn(6, 6),
        ),
        "heads merged into the batch and back": of(
            lambda: Module(merged_heads, qkv=nn.Linear(6, 18), out=nn.Linear(6, 6)), 7, 6
        ),
        "rotary positions": of(
            lambda: Module(rotated, qk=nn.Linear(6, 6), out=nn.Linear(6, 5)), 7, 6
        ),
        "relative positions as an attention bias": of(
            lambda: Module(relative_bias, qkv=nn.Linear(6, 18), table=nn.Embedding(7, 2)), 4, 6
        ),
        "shifted windows": of(
            lambda: Module(windows, qkv=nn.Linear(6, 18), bias=torch.randn(4, 4)), 4, 4, 6
        ),
    },
    "Transformer layers": {
        "TransformerEncoderLayer": encoder(),
        "TransformerEncoder": encoder(2, activation="gelu", norm_first=True),
        "TransformerEncoder in eval mode": encoder(2, evaluated=True, dropout=0.1),
        "TransformerEncoder, frozen in eval mode": frozen_encoder,
        "TransformerEncoderLayer, sequence first": tokens(
            lambda m, x: m.l(x.transpose(0, 1)).transpose(0, 1),
            l=lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
        ),
        "TransformerDecoderLayer": decoder(),
        "TransformerDecoderLayer, norm first": decoder(norm_first=True),
        "Transformer": tokens(
            lambda m, x: m.l(x, torch.tanh(x)),
            l=lambda: nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        ),
    },
    "Recurrence": {
        **{kind: recurrent(kind, batch_first=True) for kind in ("LSTM", "GRU", "RNN")},
        "RNN with relu": recurrent("RNN", nonlinearity="relu"),
        **{
            f"{kind}, two layers both ways": recurrent(
                kind, num_layers=2, bidirectional=True, batch_first=True
            )
            for kind in ("LSTM", "GRU", "RNN")
        },
        **{
            f"{kind}, sequence first, no bias": recurrent(kind, bias=False)
            for kind in ("LSTM", "GRU", "RNN")
        },
        **{
            f"{kind}, packed sequences": recurrent(
                kind, packed=True, num_layers=2, bidirectional=True, batch_first=True
            )
            for kind in ("LSTM", "GRU", "RNN")
        },
        "LSTM with projections": recurrent("LSTM", proj_size=3, num_layers=2, batch_first=True),
        "LSTM from a learnt state": tokens(
            learnt_state,
            l=lambda: nn.LSTM(6, 4, batch_first=True),
            h=drawn(1, 1, 4),
            c=drawn(1, 1, 4),
        ),
        "LSTMCell": tokens(lambda m, x: m.c(x[:, 0]), c=lambda: nn.LSTMCell(6, 4)),
        "GRUCell": tokens(cell_loop, cell=lambda: nn.GRUCell(6, 4)),
        "RNNCell": tokens(cell_loop, cell=lambda: nn.RNNCell(6, 4)),
        "recurrence by hand": tokens(
            handwritten_recurrence, input=linear(6, 6), hidden=linear(6, 6)
        ),
    },
    "Parametrizations": {
        "weight_norm": parametrized(linear(6, 5), parametrizations.weight_norm, 6),
        "weight_norm of a convolution": parametrized(
            lambda: nn.Conv1d(4, 5, 3), parametrizations.weight_norm, 4, 6
        ),
        "weight_norm as it was before": of(WeightNormed, 4, 6),
        "spectral_norm": parametrized(linear(6, 5), parametrizations.spectral_norm, 6),
        "spectral_norm in eval mode": parametrized(
            linear(6, 5), parametrizations.spectral_norm, 6, train=False
        ),
        "spectral_norm of a convolution": parametrized(
            lambda: nn.Conv2d(3, 4, 3), parametrizations.spectral_norm, 3, 5, 5
        ),
        "orthogonal": parametrized(linear(6, 5), parametrizations.orthogonal, 6),
        "symmetric by hand": parametrized(
            linear(6, 6),
            lambda l: parametrize.register_parametrization(l, "weight", Symmetric()) or l,
            4,
            6,
        ),
        "computed once by cached()": of(Cached, 4, 6),
        "weight standardisation": of(
            lambda: Module(
                lambda m, x: F.conv2d(
                    x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True)
                ),
                w=torch.randn(4, 3, 2, 2),
            ),
            3,
            4,
            4,
        ),
    },
    "Quantised weights": {
        "fake-quantised": tokens(
            lambda m, x: F.linear(
                x, torch.fake_quantize_per_tensor_affine(m.w, 0.125, 0, -8, 7), m.b
            ),
            w=drawn(5, 6),
            b=drawn(5),
        ),
        "fake-quantised per channel": tokens(
            lambda m, x: F.linear(
                x,
                torch.fake_quantize_per_channel_affine(
                    m.w,
                    torch.tensor([0.125, 0.25, 0.5]).float(),
                    torch.zeros(3, dtype=torch.int),
                    0,
                    -8,
                    7,
                ),
            ),
            w=drawn(3, 6),
        ),
        "straight-through by hand": tokens(
            lambda m, x: m.l(F.linear(x, m.w + ((m.w * 8).round() / 8 - m.w).detach())),
            w=drawn(3, 6),
            l=linear(3, 2),
        ),
    },
    "Weights of examples' own": {
        "modulated convolutions": of(Synthesis, 6),
        "modulated convolutions, upsampled": of(lambda: Synthesis(upsampled=True), 6),
        "kernels of a basis": of(
            lambda: Module(
                of_a_basis,
                mix=nn.Linear(3, 2),
                basis=torch.randn(2, 4, 3, 3),
                biases=torch.randn(2, 4),
                out=nn.Conv1d(4, 2, 1),
            ),
            3,
            5,
        ),
    },
    "Distributions": {
        "Gaussian policy": policy(lambda m, mean: m.log_std.exp()),
        "Gaussian policy, expanded": policy(lambda m, mean: m.log_std.expand_as(mean).exp()),
        "Gaussian policy, times ones": policy(
            lambda m, mean: torch.ones_like(mean) * m.log_std.exp()
        ),
        "Gaussian policy, soft and clamped": policy(
            lambda m, mean: F.softplus(m.log_std[0]).clamp(min=0.6)
        ),
        "mixture of Gaussians": of(
            lambda: Module(mixture_of_gaussians, mean=nn.Linear(6, 3), shares=torch.randn(3)), 6
        ),
        "Gaussians beside a prior": of(
            lambda: Module(
                divergence, mean=nn.Linear(6, 3), log_std=torch.randn(3) * 0.3, out=nn.Linear(3, 2)
            ),
            6,
        ),
        "squashed Gaussian": of(
            lambda: Module(squashed, mean=nn.Linear(6, 3), log_std=torch.randn(3) * 0.3), 6
        ),
    },
    "Images sampled at learnt places": {
        "spatial transformer": of(
            lambda: Module(
                transformed,
                first=nn.Conv2d(3, 2, 3, padding=1),
                where=nn.Linear(48, 6),
                second=nn.Conv2d(2, 2, 1),
            ),
            3,
            4,
            4,
        ),
        "one transformation, expanded": placed(
            lambda theta, x: F.affine_grid(theta.expand(len(x), 2, 3), x.shape, align_corners=False)
        ),
        "one grid, expanded": placed(
            lambda theta, x: F.affine_grid(
                theta[None], (1, *x.shape[1:]), align_corners=False
            ).expand(len(x), -1, -1, -1)
        ),
        "a learnt image": of(
            lambda: Module(
                painted, where=nn.Linear(6, 12), image=torch.randn(1, 2, 4, 4), l=nn.Linear(3, 2)
            ),
            6,
        ),
    },
    "Products written out": {
        "matmul": tokens(lambda m, x: x @ m.w, w=drawn(6, 2)),
        "matmul by a vector": tokens(lambda m, x: x @ m.w, w=drawn(6)),
        "matmul from the left": tokens(lambda m, x: m.w @ x, w=drawn(3, 4)),
        "matmul per head": tokens(lambda m, x: x[:, None] @ m.w, w=drawn(3, 6, 2)),
        "matmul per head from the left": tokens(lambda m, x: m.w @ x[:, None], w=drawn(3, 2, 4)),
        "bmm": tokens(lambda m, x: torch.bmm(x, m.w.expand(len(x), 6, 2)), w=drawn(6, 2)),
        "mm and mv": tokens(
            lambda m, x: torch.mv(torch.mm(x[:, 0], m.w), m.v), w=drawn(6, 2), v=drawn(2)
        ),
        "matmul of named factors": tokens(
            lambda m, x: torch.matmul(other=m.w, input=x), w=drawn(6, 6)
        ),
        "tensordot": tokens(lambda m, x: torch.tensordot(x, m.w, 1), w=drawn(6, 2)),
        "tensordot over pairs, named": tokens(
            lambda m, x: torch.tensordot(a=m.w, b=x, dims=([1, 0], [2, 1])).T, w=drawn(4, 6, 3)
        ),
        "inner": tokens(lambda m, x: torch.inner(x, m.w), w=drawn(2, 6)),
        "multi_dot": tokens(
            lambda m, x: torch.linalg.multi_dot([x[:, 0], m.w, m.v]), w=drawn(6, 2), v=drawn(2, 3)
        ),
        "linalg.matmul": tokens(lambda m, x: torch.linalg.matmul(x, m.w), w=drawn(6, 2)),
        "bmm, viewed as torch lays it out": tokens(
            lambda m, x: (
                torch.bmm(x.flatten(0, 1).repeat(3, 1).view(3, -1, 6), m.w)
                .view(-1, 2)
                .reshape(3, len(x), -1)
                .sum(0)
            ),
            w=drawn(3, 6, 2),
        ),
        "a parameter in broadcast_tensors": tokens(
            lambda m, x: torch.broadcast_tensors(x, m.w)[1] * x, w=drawn(6)
        ),
        "a parameter in column_stack": tokens(
            lambda m, x: torch.column_stack([x[:, 0], m.w.expand(len(x), 2)]) * x[:, 1, :1],
            w=drawn(2),
        ),
        "addmm of named factors": tokens(
            lambda m, x: torch.addmm(mat2=m.w, mat1=x[:, 0], input=m.b), w=drawn(6, 6), b=drawn(6)
        ),
        "addmm": tokens(
            lambda m, x: torch.addmm(m.b, x.reshape(-1, 6), m.w).reshape(len(x), 4, 2),
            w=drawn(6, 2),
            b=drawn(2),
        ),
        "addmm, alpha and beta": tokens(
            lambda m, x: torch.addmm(m.b, x[:, 0], m.w, beta=0.5, alpha=2.0),
            w=drawn(6, 2),
            b=drawn(2),
        ),
        "baddbmm": tokens(
            lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), 6, 2)),
            w=drawn(6, 2),
            b=drawn(1, 4, 2),
        ),
        **{f"einsum {equation}": einsum(equation, *shape) for equation, shape in EINSUMS.items()},
        "einsum of a constant of more dims": aligned(4, 1, 4, 6, equation="...td,...td->...td"),
        "einsum of a constant, summed": aligned(4, 1, 5, 6, equation="...td,...kd->...tk"),
        "einsum of three": tokens(
            lambda m, x: torch.einsum("nti,ij,nsj->nts", x, m.w, torch.tanh(x)), w=drawn(6, 6)
        ),
        "examples times experts' weights": tokens(
            lambda m, x: sum(F.linear(x, m.w[i]) * i for i in range(3)), w=drawn(4, 5, 6)
        ),
    },
    "Views and parts of parameters": {
        "overlapping windows as a weight": tokens(
            lambda m, x: F.linear(x, m.p.unfold(0, 6, 1)), p=drawn(8)
        ),
        "overlapping windows by as_strided": tokens(
            lambda m, x: F.linear(x, m.p.as_strided((3, 6), (2, 1)), m.p[:3]), p=drawn(10)
        ),
        "overlapping windows, elementwise": tokens(
            lambda m, x: torch.tanh(x * m.p.unfold(0, 6, 1)), p=drawn(9)
        ),
        "overlapping windows by as_strided, elementwise": tokens(
            lambda m, x: torch.tanh(x + m.p.as_strided((4, 6), (1, 1))), p=drawn(9)
        ),
        "a weight assembled from parameters": tokens(assembled, u=drawn(2, 6), v=drawn(6)),
    },
    "Adapters": {
        "LoRA": of(lambda: Lora(merged=False, magnitude=False), 4, 6),
        "LoRA merged into the weight": of(lambda: Lora(merged=True, magnitude=False), 4, 6),
        "DoRA": of(lambda: Lora(merged=True, magnitude=True), 4, 6),
        "bottleneck adapter": tokens(
            lambda m, x: x + m.up(torch.relu(m.down(x))) * m.gate,
            down=linear(6, 2),
            up=linear(2, 6),
            gate=drawn(1),
        ),
        "prompt tokens": tokens(
            lambda m, x: m.l(torch.cat([m.prompt.expand(len(x), -1, -1), x], 1)),
            l=linear(6, 3),
            prompt=drawn(2, 6),
        ),
        "mixture of experts": tokens(mixture, gate=linear(6, 3), w=drawn(3, 6, 6)),
    },
    "Tokens, positions, scales, gates": {
        "scale and shift": lambda: (
            Module(
                lambda m, x: (1 + m.scale) * x + m.shift[:, :3],
                scale=torch.randn(4),
                shift=torch.randn(2, 5, 1),
            ),
            examples(2, 3, 4),
        ),
        "in-place addition": of(
            lambda: Module(
                lambda m, x: x.clone().add_(m.p).mul_(m.q.exp()),
                p=torch.randn(3, 4),
                q=torch.randn(1),
            ),
            3,
            4,
        ),
        "scalar gate": of(
            lambda: Module(
                lambda m, x: torch.sigmoid(m.gate) * x / (1 + m.gate**2), gate=torch.tensor(0.3)
            ),
            3,
        ),
        "layer scale": tokens(lambda m, x: x + m.scale * m.l(x), l=linear(6, 6), scale=drawn(6)),
        "class token expanded": tokens(
            lambda m, x: m.l(torch.cat((m.token.expand(len(x), -1, -1), x), 1))[:, 0],
            l=linear(6, 3),
            token=drawn(1, 1, 6),
        ),
        "class token repeated": tokens(
            lambda m, x: torch.cat((m.token.repeat(len(x), 1, 1), x), 1) ** 2, token=drawn(1, 2, 6)
        ),
        "positions sliced": tokens(
            lambda m, x: torch.tanh(x + m.p[:, : x.shape[1]]), p=drawn(1, 9, 6)
        ),
        "positions by torch.arange": tokens(
            lambda m, x: torch.tanh(x + m.e(torch.arange(x.shape[1]))),
            e=lambda: nn.Embedding(16, 6),
        ),
        "positions by a global constant": of(
            lambda: Module(lambda m, x: x + m.e(POSITIONS[: x.shape[1]]), e=nn.Embedding(16, 6)),
            7,
            6,
        ),
        "positions resized": tokens(
            lambda m, x: x + F.interpolate(m.p, size=4, mode="linear").transpose(1, 2),
            p=drawn(1, 6, 3),
        ),
        "positions of a constant through a layer": tokens(
            lambda m, x: x + m.layer(torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(4, 1)),
            layer=linear(1, 6),
        ),
        "where": of(
            lambda: Module(
                lambda m, x: torch.where(x > 0, x * m.slope, x - m.slope), slope=torch.randn(4)
            ),
            4,
        ),
        "one parameter, two derived uses": of(
            lambda: Module(
                lambda m, x: x * m.p[0] + torch.tanh(m.p[1]) + m.p.sum(), p=torch.randn(2, 4)
            ),
            3,
            4,
        ),
        "one derived tensor used often": of(lambda: Module(decaying, bias=torch.randn(6)), 6),
        "gathered and mixed within examples": of(
            lambda: Module(gathered, gate=nn.Linear(6, 3), out=nn.Linear(6, 4)), 5, 6
        ),
    },
    "Reuse": {
        "tied embedding and head": lambda: (Tied(), ids(11, 4)),
        "tied, transposed": tokens(
            lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t()), w=drawn(3, 6)
        ),
        "a part of a weight used again": tokens(
            lambda m, x: F.linear(x, m.w)[..., :2] + F.linear(x, m.w[1:3]), w=drawn(3, 6)
        ),
        "chunks of a fused weight": tokens(
            lambda m, x: F.linear(x, m.w.chunk(3)[0]) * F.linear(x, m.w.chunk(3)[2]), w=drawn(9, 6)
        ),
        "used by three kinds of op": of(lambda: Module(reused, layer=nn.Linear(6, 6)), 6),
        "a convolution at two sizes": of(
            lambda: Module(lambda m, x: m.c(torch.tanh(m.c(x))), c=nn.Conv2d(3, 3, 3)), 3, 6, 6
        ),
        "a layer norm called twice": of(
            lambda: Module(lambda m, x: m.n(torch.tanh(m.n(x))), n=nn.LayerNorm(6)), 6
        ),
        "an LSTM called twice": tokens(
            lambda m, x: m.l(torch.tanh(m.l(x)[0]))[0], l=lambda: nn.LSTM(6, 6, batch_first=True)
        ),
        "a weight in a matmul and in an embedding": lambda: (
            Module(lambda m, x: F.embedding(x, m.w) @ m.w.t() * m.w[0, 0], w=torch.randn(5, 6)),
            ids(5, 4),
        ),
        "checkpointed": tokens(
            checkpointed("a", "n", "b"), a=linear(6, 6), n=lambda: nn.LayerNorm(6), b=linear(6, 2)
        ),
        "checkpointed, tied embedding and head": lambda: (Tied(checkpointed=True), ids(11, 4)),
        "checkpointed, one module twice": tokens(checkpointed("a", "a"), a=linear(6, 6)),
        "checkpointed and used elsewhere": of(
            lambda: Module(reused_in_checkpoint, layer=nn.Linear(6, 6)), 6
        ),
        "checkpointed encoder layer": lambda: (lambda m, x: (Module(checkpointed("e"), e=m), x))(
            *encoder()()
        ),
    },
    "Where the batch goes": {
        "written in place": tokens(accumulated, first=linear(6, 6), second=lambda: nn.LayerNorm(6)),
        "rows flattened": tokens(
            lambda m, x: m.l(x.reshape(-1, 6)).reshape(len(x), -1), l=linear(6, 2)
        ),
        "transposed": there_and_back(lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
        "transposed, then pointwise": there_and_back(
            lambda x: torch.tanh(x.permute(1, 0, 2)) + 1, lambda y: y.permute(1, 0, 2)
        ),
        "transposed and flattened": tokens(
            lambda m, x: m.n(m.l(x.transpose(0, 1).reshape(-1, 6))).view(4, -1, 3).transpose(0, 1),
            l=linear(6, 3),
            n=lambda: nn.LayerNorm(3),
        ),
        "stacked over time": there_and_back(
            lambda x: torch.stack([x[:, t] for t in range(4)]),
            lambda y: torch.stack([y[t] for t in range(4)], 1),
        ),
        "moved by einsum": there_and_back(
            lambda x: torch.einsum("btd->tbd", x), lambda y: torch.einsum("tbd->btd", y)
        ),
        "moved by an aten operator": there_and_back(
            lambda x: torch.ops.aten.transpose.int(x, 0, 1),
            lambda y: torch.ops.aten.transpose.int(y, 0, 1),
        ),
        "merged, then transposed": tokens(
            lambda m, x: (
                m.l(x.reshape(-1, 4, 3).transpose(0, 1)).transpose(0, 1).reshape(len(x), -1)
            ),
            l=linear(3, 2),
        ),
        "flipped and back": there_and_back(lambda x: torch.tanh(x).flip(0), lambda y: y.flip(0)),
        "rolled and back": there_and_back(lambda x: x.roll(1, 0), lambda y: y.roll(-1, 0)),
        "parts swapped and back": tokens(swapped, l=linear(6, 6)),
        "sorted and back": tokens(sorted_by_length, l=linear(6, 6)),
        "tokens shuffled across the batch and back": tokens(shuffled_tokens, l=linear(6, 2)),
        "every example's own token": tokens(
            lambda m, x: m.l(x[torch.arange(len(x)), x[..., 0].argmax(1)]), l=linear(6, 6)
        ),
        "some tokens only": tokens(masked_rows, l=linear(6, 2)),
        "tiled, with fewer numbers than dims": tokens(tiled, l=linear(6, 3), h=linear(6, 2)),
        "tiled, by keyword": tokens(
            lambda m, x: m.h(torch.tile(input=m.l(x), dims=(1, 1, 2))),
            l=linear(6, 3),
            h=linear(6, 2),
        ),
        "repeated, by keyword": tokens(
            lambda m, x: m.h(m.l(x).repeat(repeats=(1, 1, 2))), l=linear(6, 3), h=linear(6, 2)
        ),
        "squeezed, whatever the batch's size": tokens(
            lambda m, x: m.h(torch.tanh(m.l(x[:, 0]).squeeze())).reshape(len(x), -1),
            l=linear(6, 3),
            h=linear(3, 2),
        ),
        "rows of a constant, by getitem": looked_up(lambda table, t: table[t]),
        "rows of a constant, by names": looked_up(
            lambda table, t: torch.index_select(dim=0, index=t, input=table)
        ),
        "rows of a constant, by index_select": looked_up(lambda table, t: table.index_select(0, t)),
        "rows of a constant, by embedding": looked_up(lambda table, t: F.embedding(t, table)),
        "several samples per example": tokens(several_samples, l=linear(6, 6)),
        "token shift by padding": tokens(
            lambda m, x: m.h(F.pad(m.l(x), (0, 0, 1, -1)) + x), l=linear(6, 6), h=linear(6, 2)
        ),
        "unbound and stacked": tokens(
            lambda m, x: torch.stack([m.l(part) for part in x.unbind(1)], 1), l=linear(6, 2)
        ),
    },
}

BASIC = ("Linear", "Convolution", "Transposed convolution", "Embedding", "Normalisation", "PReLU",
         "Tokens, positions, scales, gates")  # fmt: skip
LAYERS: dict[str, Builder] = {
    name: build for rows in TABLE.values() for name, build in rows.items()
}
warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
