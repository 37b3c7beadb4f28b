"""Every use in `layer_table` against one group at a time: under the rules, by groups, in lower
types, of any size.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import htv
from htv.tools.check import aggregated, one_group_at_a_time
from support import layer_table, supported
from support.layer_table import BASIC, LAYERS, TABLE, Module, Recurrent
from support.oracles import RULES
from support.quick import RULES as QUICK
from support.quick import quick, quick_pairs

FIVE = [
    htv.Mean(),
    htv.AndMask(0.4),
    htv.AndMask(0.4, rescale=True),
    htv.Median(),
    htv.WinsorizedMean(1),
]
THREE = [htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
CASES = [
    pytest.param(
        name,
        rule,
        id=f"{name}-{rule}",
        marks=() if rule in (QUICK if section in BASIC else THREE[:2]) else pytest.mark.slow,
    )
    for section, rows in TABLE.items()
    for name in rows
    for rule in (RULES if section in BASIC else FIVE)
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For calls this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("layer", "rule"), CASES)
def test_layer(layer, rule):
    report = htv.check(*LAYERS[layer](), rule)
    assert report.groups == layer_table.N and report.ambiguous < 0.2
    # Where a sign means nothing (a key bias under softmax), neither does the fraction of
    # coordinates kept.
    assert report.error < 1e-10 or (report.ambiguous and rule == htv.AndMask(0.4, rescale=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_by_unsorted_groups_of_unequal_size(layer):
    model, x = LAYERS[layer]()
    for rule in (htv.AndMask(0.3), htv.Median(), htv.MedianOfMeans(2)):
        assert htv.check(model, x, rule, groups=torch.tensor([4, 1, 1, 9, 4, 1, 2])).groups == 4


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_of_one_example(layer, monkeypatch):
    """The last batch of an epoch, say."""
    monkeypatch.setattr(layer_table, "N", 1)
    assert htv.check(*LAYERS[layer](), htv.Median(), allow_single=True).groups == 1


@pytest.mark.parametrize("size", quick([2, 4, 6], (4, 6)))
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_where_sizes_coincide(layer, size, monkeypatch):
    """As many examples as tokens, features, heads."""
    monkeypatch.setattr(layer_table, "N", size)
    assert htv.check(*LAYERS[layer](), htv.Median()).groups == size


LOWER = [(dtype, rule) for dtype in (torch.float32, torch.bfloat16) for rule in THREE]


@pytest.mark.parametrize("dtype, rule", quick_pairs(LOWER, (LOWER[0], LOWER[4])), ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_in_lower_types(layer, dtype, rule):
    if layer == "orthogonal" and dtype == torch.bfloat16:
        pytest.skip("torch has no matrix factorisation in bfloat16")
    model, batch = LAYERS[layer]()
    report = htv.check(model, batch, rule, dtype=dtype)
    if sum(p.numel() for p in model.parameters()) > 1:
        assert report.ambiguous < (0.1 if dtype == torch.float32 else 0.9)


def outputs(model, batch):
    args, kwargs = (
        ((), batch)
        if isinstance(batch, dict)
        else (batch if isinstance(batch, tuple) else (batch,), {})
    )
    torch.manual_seed(0)
    return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_are_those_of_the_plain_model(layer):
    model, batch = LAYERS[layer]()
    model = model.double()
    batch = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = outputs(model, batch)
    buffers = [b.clone() for b in model.buffers()]
    model.load_state_dict(state)
    with htv.attach(model, htv.Median()):
        tracked = outputs(model, batch)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
        for a, b in zip(tracked, plain, strict=True):
            assert a.shape == b.shape and a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        model.load_state_dict(state)
        with torch.no_grad():
            untouched = outputs(model, batch)
        model.load_state_dict(state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(untouched, outputs(model, batch), strict=True))


SEQUENCE_FIRST = {
    "linear": lambda: nn.Linear(6, 5),
    "layer norm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "scale": lambda: Module(lambda m, x: x * m.w, w=torch.randn(6)),
    "positions": lambda: Module(
        lambda m, x: torch.tanh(x + m.p[: len(x), None]), p=torch.randn(9, 6)
    ),
    "positions looked up": lambda: Module(
        lambda m, x: x * m.e(torch.arange(len(x)))[:, None], e=nn.Embedding(9, 6)
    ),
    "MultiheadAttention": lambda: Module(
        lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2)
    ),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
    "LSTM": lambda: Module(lambda m, x: m.r(x)[0], r=nn.LSTM(6, 4, 2, bidirectional=True)),
    "GRU": lambda: Module(lambda m, x: m.r(x)[0], r=nn.GRU(6, 4)),
    "matmul": lambda: Module(lambda m, x: x @ m.w, w=torch.randn(6, 2)),
    "einsum": lambda: Module(
        lambda m, x: torch.einsum("tnd,tde->tne", x, m.w), w=torch.randn(4, 6, 2)
    ),
}


@pytest.mark.parametrize("size", [5, 4, 6], ids=["N", "N == T", "N == D"])
@pytest.mark.parametrize("name", SEQUENCE_FIRST)
def test_sequence_first_models(name, size):
    model, x = SEQUENCE_FIRST[name](), torch.randn(4, size, 6)
    for rule in (htv.AndMask(0.4), htv.Median()):
        assert htv.check(model, x, rule, batch_dim=1).groups == size


RANDOM = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True),
    "recurrence": lambda: Recurrent("LSTM", num_layers=2, dropout=0.4, batch_first=True),
    "randomized relu": lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU(), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_noise_is_that_of_the_plain_model(name):
    """With the same seed, outputs, and gradients under Mean, are those without htv."""
    model, x = RANDOM[name]().double(), torch.randn(5, 4, 6).double()
    found = []
    for tracked in (False, True):
        with htv.attach(model, htv.Mean()) if tracked else nullcontext():
            y = outputs(model, x)
            found.append(
                (y[0], *torch.autograd.grad(y[0].square().sum(), list(model.parameters())))
            )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


ROWS = {
    "one row": lambda: torch.randn(6),
    "(1, 1, D)": lambda: torch.randn(1, 1, 6),
    "(1, D)": lambda: torch.randn(1, 6),
    "no dim": lambda: torch.tensor(0.7),
    "one number": lambda: torch.randn(1),
    "(1, 1, 1)": lambda: torch.randn(1, 1, 1),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_tokens_of_elementwise_parameters(name, masked):
    """A token's contribution to a parameter all tokens share is its own sum."""
    model = Module(
        lambda m, x: m.l(torch.tanh(x * m.p + m.q)),
        l=nn.Linear(6, 3),
        p=ROWS[name](),
        q=ROWS[name](),
    ).double()
    x, mask = torch.randn(4, 5, 6).double(), torch.ones(4, 5, dtype=torch.bool)
    if masked:
        mask = torch.arange(5) < torch.tensor([2, 5, 1, 3])[:, None]
    grouped_rows = mask.nonzero().tolist()
    parameters = dict(model.named_parameters())
    parts = one_group_at_a_time(
        lambda e: model(x[tuple(grouped_rows[e])][None, None]).square().sum(),
        parameters,
        len(grouped_rows),
    )
    for rule in THREE:
        with htv.attach(model, rule) as handle:
            with handle.tokens(mask if masked else None):
                y = model(x)
            grads = torch.autograd.grad(
                (y.square().sum(-1) * mask).sum(), list(parameters.values())
            )
        for (name, stacked), grad in zip(parts.items(), grads, strict=True):
            torch.testing.assert_close(
                grad, aggregated(stacked, rule), rtol=1e-9, atol=1e-12, msg=name
            )


# Several parameters that meet in one layer, or one behind the other; and whether they have tokens.
BESIDE = {
    "linear": (lambda: nn.Linear(6, 3), True),
    "linear of a computed weight": (
        lambda: Module(
            lambda m, x: F.linear(x, m.w.exp(), m.b), w=torch.randn(3, 6), b=torch.randn(3)
        ),
        True,
    ),
    "matmul": (
        lambda: Module(lambda m, x: x @ m.w + m.b, w=torch.randn(6, 3), b=torch.randn(3)),
        True,
    ),
    "conv": (lambda: nn.Conv1d(5, 3, 2), False),
    "transposed conv": (lambda: nn.ConvTranspose1d(5, 3, 2), False),
    "embedding, then linear": (
        lambda: Module(
            lambda m, x: m.h(m.e((x[..., 0] > 0).long())), e=nn.Embedding(2, 4), h=nn.Linear(4, 3)
        ),
        True,
    ),
    "embedding bag, then linear": (
        lambda: Module(
            lambda m, x: m.h(m.e((x[..., 0] > 0).long())),
            e=nn.EmbeddingBag(2, 4),
            h=nn.Linear(4, 3),
        ),
        False,
    ),
    "layer norm": (lambda: nn.LayerNorm(6), True),
    "group norm": (lambda: nn.GroupNorm(1, 5), False),
    "instance norm": (lambda: nn.InstanceNorm1d(5, affine=True), False),
    "bilinear": (lambda: Module(lambda m, x: m.b(x, x.tanh()), b=nn.Bilinear(6, 6, 3)), True),
    "elementwise": (
        lambda: Module(lambda m, x: torch.tanh(x * m.p) + m.q, p=torch.randn(6), q=torch.randn(6)),
        True,
    ),
    "prelu": (
        lambda: Module(
            lambda m, x: m.l(m.a(m.n(x))), l=nn.Linear(6, 3), a=nn.PReLU(), n=nn.LayerNorm(6)
        ),
        None,
    ),
    "attention": (
        lambda: Module(
            lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)
        ),
        None,
    ),
    "GRU": (lambda: Module(lambda m, x: m.r(x)[0], r=nn.GRU(6, 4, batch_first=True)), False),
}


@pytest.mark.parametrize("grouped_rows", ["equal", "tokens"])
@pytest.mark.parametrize("name", BESIDE)
def test_excluded_parameters_beside_served_ones(name, grouped_rows):
    """Those excluded keep the plain gradient, whoever votes on the others, and with what weight."""
    make, has_tokens = BESIDE[name]
    model, x = make().double(), torch.randn(4, 5, 6).double()
    ids, parameters = torch.tensor([1, 1, 1, 0]), dict(model.named_parameters())
    mask = torch.arange(5) < torch.tensor([2, 5, 1, 3])[:, None]
    loss = lambda rows: (model(x[rows]) * 0.8 + 0.7).square().sum()
    plain = dict(
        zip(parameters, torch.autograd.grad(loss(ids >= 0), list(parameters.values())), strict=True)
    )
    parts = one_group_at_a_time(lambda e: loss(ids == e), parameters, 2)
    # Four examples in two groups: as if each group had two.
    tracked = {name: 2 * c[0] + 2 / 3 * c[1] for name, c in parts.items()}
    for excluded in parameters:
        model.zero_grad()
        with htv.attach(model, htv.Mean(), exclude=excluded) as handle:
            block = (
                handle.groups(ids, weight="equal")
                if grouped_rows == "equal"
                else handle.tokens(mask)
            )
            try:
                with block:
                    value = loss(ids >= 0)
                value.backward()
            except (htv.UnsupportedError, ValueError):
                assert grouped_rows == "tokens" and not has_tokens
                continue
        assert grouped_rows == "equal" or has_tokens is not False
        torch.testing.assert_close(parameters[excluded].grad, plain[excluded])
        for other in parameters.keys() - {excluded} if grouped_rows == "equal" else ():
            torch.testing.assert_close(
                parameters[other].grad, tracked[other], msg=lambda m: f"{other}: {m}"
            )


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_excluded_embedding_bag(mode):
    model = Module(lambda m, i: m.h(m.e(i)), e=nn.EmbeddingBag(9, 4, mode=mode), h=nn.Linear(4, 3))
    for size in (5, 7):  # as many examples as ids in a bag
        assert (
            htv.check(
                model, torch.randint(0, 9, (size, 5)), htv.Median(), exclude="e.weight"
            ).groups
            == size
        )


def test_the_table_of_what_is_supported_is_current():
    assert supported.missing() == []
    remedy = "run: PYTHONPATH=tests python tests/support/supported.py"
    assert supported.PATH.read_text() == supported.text(), remedy
