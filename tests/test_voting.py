"""Who votes: examples in any dim, groups with weights, packed sequences, single tokens, padding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_attach import Module
from torch import nn

import htv
from htv.bench.models import LanguageModel, mlp
from htv.tools.check import aggregated, one_group_at_a_time
from support.oracles import by_name

RULES = [
    htv.Mean(),
    htv.AndMask(0.4),
    htv.AndMask(0.4, rescale=True),
    htv.Median(),
    htv.WinsorizedMean(1),
]


def assert_aggregates(model, contributions, rule):
    """Every .grad is the aggregate of contributions, name -> (E, *shape), up to rounding."""
    largest = max(c.abs().max().item() for c in contributions.values())
    for name, p in model.named_parameters():
        stacked, found = contributions[name], p.grad
        expected = aggregated(stacked, rule)
        if name.endswith(
            "in_proj_bias"
        ):  # the keys' part has no gradient but rounding, whose sign means nothing
            if getattr(rule, "rescale", False):
                continue
            values = lambda t: torch.cat([t[..., : len(p) // 3], t[..., 2 * len(p) // 3 :]], -1)
            stacked, found, expected = map(values, (stacked, found, expected))
        noise = (stacked != 0) & (stacked.abs() <= 1e-12 * largest)
        assert not noise.any(), f"{name}: the test's data has contributions that are only rounding"
        budget = {"rtol": 1e-9, "atol": 1e-11 * stacked.abs().sum(0).max().item()}
        torch.testing.assert_close(
            found, expected, **budget, msg=lambda m, name=name: f"{name}: {m}"
        )


def per_group(model, loss_of_group, count):
    return one_group_at_a_time(loss_of_group, dict(model.named_parameters()), count)


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_environments_whose_means_count_once(rule):
    model, x = mlp().double(), torch.randn(9, 12).double()
    ids = torch.tensor([5, 2, 2, 5, 2, 2, 2, 0, 0])
    loss = lambda rows: (model(x[rows]) - 1).square().sum(1)
    means = per_group(model, lambda e: loss(ids == (0, 2, 5)[e]).mean(), 3)
    with htv.attach(model, rule) as handle:
        with handle.groups(ids, weight="equal"):
            value = loss(slice(None)).mean()
        value.backward()
    # Mean() is the gradient of the mean of the environments' means.
    assert_aggregates(model, {name: c / 3 for name, c in means.items()}, rule)


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_packed_sequences_whose_means_count_once(rule):
    model, x = (
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double(),
        torch.randn(7, 4).double(),
    )
    bounds = [0, 1, 5, 5, 7]
    loss = lambda rows: model(x[rows]).square().sum(1)
    means = per_group(model, lambda e: loss(slice(*((0, 1), (1, 5), (5, 7))[e])).mean(), 3)
    for lead in ((7,), (1, 7)):
        model.zero_grad()
        with htv.attach(model, rule) as handle:
            with handle.packed(torch.tensor(bounds), weight="equal"):
                value = model(x.reshape(*lead, 4)).square().sum() / 7
            value.backward()
        assert_aggregates(model, {name: c / 3 for name, c in means.items()}, rule)


def test_weights_reach_every_kind_of_layer():
    model = Module(
        lambda m, ids: m.out(
            m.conv((m.e(ids) + m.p).transpose(1, 2)).transpose(1, 2) * m.s
        ).flatten(1),
        e=nn.Embedding(6, 4),
        p=torch.randn(3, 4),
        conv=nn.Conv1d(4, 4, 2),
        s=torch.randn(4),
        out=nn.Linear(4, 2),
    ).double()
    x, ids = torch.randint(0, 6, (6, 3)), torch.tensor([1, 1, 1, 0, 0, 2])
    loss = lambda rows: model(x[rows]).square().sum(1)
    for rule in (htv.Mean(), htv.AndMask(0.5), htv.Median()):
        model.zero_grad()
        means = per_group(model, lambda e: loss(ids == e).mean(), 3)
        with htv.attach(model, rule) as handle:
            with handle.groups(ids, weight="equal"):
                value = loss(slice(None)).mean()
            value.backward()
        assert_aggregates(model, {name: c / 3 for name, c in means.items()}, rule)


class SequenceFirst(nn.Module):
    """Input (T, N, D), as recurrent layers and attention take it by default."""

    def __init__(self):
        super().__init__()
        self.rnn, self.attention = nn.GRU(4, 6), nn.MultiheadAttention(6, 2)
        self.positions, self.out = nn.Parameter(torch.randn(9, 1, 6)), nn.Linear(6, 3)

    def forward(self, x):
        y = self.rnn(x)[0] + self.positions[: len(x)]
        return self.out(y + self.attention(y, y, y, need_weights=False)[0])


@pytest.mark.parametrize("length", [5, 6], ids=["T != N", "T == N"])
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_examples_in_dim_1(rule, length):
    model, x = SequenceFirst().double(), torch.randn(length, 6, 4).double()
    contributions = per_group(model, lambda e: model(x[:, e : e + 1]).square().sum(), 6)
    with htv.attach(model, rule, batch_dim=1):
        model(x).square().sum().backward()
    assert_aggregates(model, contributions, rule)


def test_time_taken_for_the_batch_is_refused():
    """A sequence-first model without batch_dim=1 would let time steps vote."""
    with htv.attach(SequenceFirst(), htv.Median()) as handle:
        with pytest.raises(htv.UnsupportedError, match="batch_dim=1"):
            handle.model(torch.randn(5, 6, 4))


# -- tokens ----------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Tokens that look at each other; all kinds of parameters that can be told apart by token."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.inner, self.out = (
            nn.Embedding(9, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, ids):
        x = self.embed(ids)
        y = self.norm(x)
        y = x + torch.softmax(y @ y.transpose(1, 2), -1) @ self.inner(y)
        return self.out(y * self.scale)


def copied_per_token(model, ids, loss):
    """name -> (N, T, *shape): plain gradients of one copy of each parameter per token."""
    n, t = ids.shape
    copies = {
        name: p.detach().expand(n, t, *p.shape).clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    linear = lambda x, name: (
        torch.einsum("nti,ntoi->nto", x, copies[f"{name}.weight"]) + copies[f"{name}.bias"]
    )
    x = torch.gather(copies["embed.weight"], 2, ids[..., None, None].expand(n, t, 1, 4)).squeeze(2)
    y = F.layer_norm(x, (4,)) * copies["norm.weight"] + copies["norm.bias"]
    y = x + torch.softmax(y @ y.transpose(1, 2), -1) @ linear(y, "inner")
    value = loss(linear(y * copies["scale"], "out"))
    return dict(zip(copies, torch.autograd.grad(value, list(copies.values())), strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_every_token_votes(rule, masked):
    model, ids = Mixer().double(), torch.randint(0, 9, (3, 5))
    mask = torch.rand(3, 5) < 0.6 if masked else torch.ones(3, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[2, 2] = True
    loss = lambda y: (y.square().sum(-1) * mask).sum()
    copies = copied_per_token(model, ids, loss)
    with htv.attach(model, rule) as handle:
        with handle.tokens(mask if masked else None):
            value = loss(model(ids))
        value.backward()
    assert_aggregates(model, {name: c[mask] for name, c in copies.items()}, rule)


def test_tokens_of_a_whole_model():
    """All tokens' contributions add up to the plain gradient."""
    model, ids = LanguageModel(), torch.randint(0, 29, (3, 5))
    exclude = [name for name, _ in model.named_parameters() if "position" in name]
    plain = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    with htv.attach(model, htv.WinsorizedMean(0), exclude=exclude) as handle:
        with handle.tokens():
            value = model(ids).square().sum()
        found = torch.autograd.grad(value, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_what_has_no_tokens_is_refused():
    x = torch.randn(4, 3, 6)
    for module, words in (
        (nn.Conv1d(3, 2, 2), "no rows that could vote"),
        (Module(lambda m, x: x + m.p, p=torch.randn(3, 6)), "exclude='p'"),
    ):
        with htv.attach(module, htv.Median()) as handle, handle.tokens():
            with pytest.raises(htv.UnsupportedError, match=words):
                module(x)
    pooled = Module(lambda m, x: m.a(m.b(x).mean(1)), a=nn.Linear(5, 2), b=nn.Linear(6, 5))
    with (
        htv.attach(pooled, htv.Median()) as handle,
        handle.tokens(torch.ones(4, 3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="whose rows are not these tokens"):
            pooled(x).sum().backward()
    for mask, words in (
        (torch.ones(4, 3), "boolean"),
        (torch.zeros(4, 3, dtype=torch.bool), "lets no token vote"),
    ):
        with htv.attach(pooled, htv.Median()) as handle, handle.tokens(mask):
            with pytest.raises(ValueError, match=words):
                pooled(x)


@pytest.mark.parametrize("excluded", ["weight", "bias"])
def test_excluded_parameters_are_plain_whoever_votes(excluded):
    """Also in one layer with a served one."""
    model, x = nn.Linear(6, 3), torch.randn(4, 5, 6)
    plain = dict(
        zip(
            ("weight", "bias"),
            torch.autograd.grad(model(x).square().sum(), [model.weight, model.bias]),
            strict=True,
        )
    )
    mask = torch.rand(4, 5) < 0.5
    mask[0, 0] = True
    with htv.attach(model, htv.Mean(), exclude=excluded) as handle:
        for block in (
            handle.groups(torch.tensor([1, 1, 1, 0]), weight="equal"),
            handle.tokens(mask),
        ):
            model.zero_grad()
            with block:
                loss = model(x).square().sum()
            loss.backward()
            torch.testing.assert_close(getattr(model, excluded).grad, plain[excluded])


def test_bad_weights():
    with htv.attach(mlp(), htv.Median()) as handle:
        with pytest.raises(ValueError, match="weight must be 'size' or 'equal'"):
            with handle.groups(torch.arange(3), weight="mean"):
                pass


# -- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_padded_tokens_change_nothing(rule):
    """Examples of unequal length, padded: the same as every example by itself without padding."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = Module(lambda m, x, pad: m.layer(x, src_key_padding_mask=pad), layer=layer).double()
    lengths = [5, 2, 4, 2, 3]  # of one token, queries and keys had no gradient but rounding's
    x = torch.randn(5, 5, 6).double()
    wanted = torch.randn(6).double()  # squares of what was normalised hardly depend on anything
    losses = lambda y: (y - wanted).square().sum(-1)
    pad = torch.arange(5) >= torch.tensor(lengths)[:, None]
    none = torch.zeros(1, 5, dtype=torch.bool)
    alone = lambda e: losses(model(x[e : e + 1, : lengths[e]], none[:, : lengths[e]])).sum()
    contributions = per_group(model, alone, 5)
    with htv.attach(model, rule):
        (losses(model(x, pad)) * ~pad).sum().backward()
    assert_aggregates(model, contributions, rule)


class Attending(nn.Module):
    """Attention over all rows of a packed batch, as far as a mask lets them see each other."""

    def __init__(self, mask):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.heads, self.mask = nn.Linear(8, 24), mask

    def forward(self, ids):
        rows = self.embed(ids)
        q, k, v = self.heads(rows).view(1, -1, 2, 12).transpose(1, 2).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(seen.transpose(1, 2).reshape(1, -1, 8)) + self.out(rows)


def block_mask(sizes):
    numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (numbers[:, None] == numbers).tril()


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_packed_sequences_attend_to_themselves(kind):
    sizes = [3, 1, 4, 2]
    mask = block_mask(sizes)
    if kind == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    ids, bounds = torch.randint(11, (1, 10)), torch.tensor([0, 3, 4, 8, 10])
    model = Attending(mask).double()
    parts = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        alone = copy.deepcopy(model)
        alone.mask = block_mask([int(last - first)])
        (alone(ids[:, first:last]).square().sum()).backward()
        parts.append({n: p.grad for n, p in alone.named_parameters()})
    with htv.attach(model, htv.Median()) as handle:
        with handle.packed(bounds):
            loss = model(ids).square().sum()
        loss.backward()
    for name, parameter in model.named_parameters():
        wanted = htv.median(torch.stack([part[name] for part in parts])) * len(sizes)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("opened", ["one place", "everywhere"])
def test_attention_across_packed_sequences_is_refused(opened):
    mask = block_mask([3, 1, 4, 2])
    mask[5, 0] = True
    model = Attending(None if opened == "everywhere" else mask).double()
    with htv.attach(model, htv.Median()) as handle, pytest.raises(htv.UnsupportedError):
        with handle.packed(torch.tensor([0, 3, 4, 8, 10])):
            model(torch.randint(11, (1, 10))).square().sum().backward()


def test_one_packed_sequence_may_attend_without_a_mask():
    model, ids = Attending(None).double(), torch.randint(11, (1, 10))
    model(ids).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with htv.attach(model, htv.Median(), allow_single=True) as handle:
        with handle.packed(torch.tensor([0, 10])):
            model(ids).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)
