"""torch.compile(fullgraph=True): the compiled model's gradients are those of the eager one, or it
refuses.
"""

import copy
import gc
import warnings
import weakref
from abc import ABC
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import htv
from support.layer_table import Module
from support.quick import quick_pairs

MEDIAN = htv.Median()
AND_MASK = htv.AndMask(0.6)
DYNAMO_ERRORS = Exception  # Dynamo and its backends wrap what is raised while they trace


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Text(nn.Module):
    """A tied table, positions, a layer used twice, elementwise parameters, buffers, dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table, self.norm, self.twice = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.positions, self.gamma = (
            nn.Parameter(torch.randn(5, 8)),
            nn.Parameter(torch.randn(8) / 10),
        )
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids, mask=None):
        x = self.norm(self.table(ids) + self.positions)
        x = torch.tanh(self.twice(x)) * (1 + self.gamma.exp())
        x = self.dropout(torch.tanh(self.twice(x) * self.scale))
        self.calls.add_(1)
        return F.linear(x if mask is None else x * mask, self.table.weight)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, stride=2, groups=2),
        )
        self.norm, self.last = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class Packed(nn.Module):
    """Takes rows of any sequence."""

    def __init__(self):
        super().__init__()
        self.table, self.scale, self.linear = (
            nn.Embedding(11, 8),
            nn.Parameter(torch.randn(8)),
            nn.Linear(8, 8),
        )

    def forward(self, ids):
        return torch.tanh(self.linear(self.table(ids) * self.scale))


class Pair:
    """A compiled attached model beside an eager one."""

    def __init__(self, model, rule=MEDIAN, backend="aot_eager", compiled=True, **options):
        self.model, self.eager = model, copy.deepcopy(model)
        self.handle, self.eager_handle = (
            htv.attach(m, rule, **options) for m in (self.model, self.eager)
        )
        self.compiled = torch.compile(model, fullgraph=True, backend=backend) if compiled else model

    def detach(self):
        self.handle.detach(), self.eager_handle.detach()

    def step(
        self, *inputs, loss=lambda y: y.square().sum(), voting=lambda handle: torch.enable_grad()
    ):
        """One step of both; compares outputs and gradients."""
        sides = (
            (self.model, self.compiled, self.handle),
            (self.eager, self.eager, self.eager_handle),
        )
        outputs = []
        for model, run, handle in sides:
            model.zero_grad()
            with voting(handle):
                outputs.append(run(*inputs))
            loss(outputs[-1]).backward()
        torch.testing.assert_close(*outputs)
        self.same()

    def same(self):
        for (name, p), q in zip(
            self.model.named_parameters(), self.eager.parameters(), strict=True
        ):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}"
            )


def ids(n=6):
    return torch.randint(0, 11, (n, 5))


def images(n=6):
    return torch.randn(n, 1, 8, 8)


# -- gradients -------------------------------------------------------------------------------------


MODELS = {"text": (Text, ids), "image": (Image, images)}
COMPILED = [
    (backend, rule, model)
    for backend, rule in (
        ("aot_eager", MEDIAN),
        ("aot_eager", AND_MASK),
        ("aot_eager", htv.Mean()),
        ("aot_eager", htv.SandMask(0.5, 1.0)),
        ("eager", MEDIAN),
        ("inductor", AND_MASK),
        ("inductor", MEDIAN),
    )
    for model in MODELS
]
QUICK = [
    ("aot_eager", MEDIAN, "text"),
    ("aot_eager", AND_MASK, "image"),
    ("aot_eager", htv.Mean(), "text"),
    ("eager", MEDIAN, "image"),
]


@pytest.mark.parametrize("backend, rule, model", quick_pairs(COMPILED, QUICK), ids=str)
def test_same_gradients(backend, rule, model):
    model, batch = MODELS[model]
    pair = Pair(model(), rule, backend)
    pair.step(batch())
    pair.step(batch())


def test_same_gradients_with_inductor():
    pair = Pair(Text(), AND_MASK, "inductor", stats=True)
    pair.step(ids())
    pair.step(ids())
    assert pair.model.calls == pair.eager.calls == 2
    compiled, eager = pair.handle.stats(), pair.eager_handle.stats()
    assert [compiled[n].kept_fraction for n in eager] == [
        pytest.approx(a.kept_fraction) for a in eager.values()
    ]
    with pytest.raises(htv.UnsupportedError, match="'gamma' reached the loss by a path"):
        (pair.compiled(ids()).sum() + pair.model.gamma.square().sum()).backward()


x4, x3 = torch.randn(6, 8), torch.randn(6, 5, 8)
USES = {
    "transposed": lambda: Module(lambda m, x: F.linear(x, m.w.t()), w=torch.randn(8, 8)),
    "chunk": lambda: Module(
        lambda m, x: F.linear(x, m.w.chunk(3)[1]) + F.linear(x, m.w[:8]), w=torch.randn(24, 8)
    ),
    "matmul": lambda: Module(lambda m, x: x @ m.w, w=torch.randn(8, 4)),
    "positions": lambda: Module(lambda m, x: x + m.e(torch.arange(5)), e=nn.Embedding(9, 8)),
    "positions, computed with": lambda: Module(
        lambda m, x: x + m.e(torch.arange(5)).tanh(), e=nn.Embedding(9, 8)
    ),
    "positions of each": lambda: Module(
        lambda m, x: x + m.e(torch.arange(5).repeat(6, 1)), e=nn.Embedding(9, 8)
    ),
    "linear of a constant": lambda: Module(
        lambda m, x: x * m.l(torch.ones(5, 3)), l=nn.Linear(3, 8)
    ),
    "class token": lambda: Module(
        lambda m, x: m.l(torch.cat([m.c.expand(6, -1, -1), x], 1)),
        c=torch.randn(1, 1, 8),
        l=nn.Linear(8, 3),
    ),
    "joined biases": lambda: Module(
        lambda m, x: F.linear(x, m.w, torch.cat([m.a, m.b])),
        w=torch.randn(8, 8),
        a=torch.randn(3),
        b=torch.randn(5),
    ),
    "part of the batch": lambda: Module(lambda m, x: m.l(x[1:4].flip(0)), l=nn.Linear(8, 3)),
    "chunks of the batch": lambda: Module(
        lambda m, x: torch.cat([m.l(t) for t in x.chunk(2)]), l=nn.Linear(8, 3)
    ),
    "merged dims": lambda: Module(
        lambda m, x: m.l(x.flatten(0, 1)).reshape(6, 5, 3), l=nn.Linear(8, 3)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    "Gaussian policy": lambda: Module(
        lambda m, x: (
            torch.distributions.Normal(m.l(x), m.s.exp(), validate_args=False)
            .log_prob(torch.sin(x[..., :3]))
            .sum(-1)
        ),
        l=nn.Linear(8, 3),
        s=torch.randn(3),
    ),
    "sampled images": lambda: Module(
        lambda m, x: m.c(
            F.grid_sample(
                x[:, None],
                F.affine_grid(m.l(x.flatten(1)).view(-1, 2, 3), (6, 1, 5, 8), align_corners=False),
                align_corners=False,
            )
        ),
        l=nn.Linear(40, 6),
        c=nn.Conv2d(1, 2, 1),
    ),
    "sequence": lambda: nn.Sequential(
        nn.Conv1d(5, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.PReLU()
    ),
    "checkpoint": lambda: Module(
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
        a=nn.Linear(8, 4),
        b=nn.Linear(4, 4),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_uses_of_parameters(name):
    Pair(USES[name]()).step(torch.randn(6, 5, 8))


@pytest.mark.parametrize("batch_norm", ["frozen", "shared"])
def test_batch_norm(batch_norm):
    pair = Pair(nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)), batch_norm=batch_norm)
    pair.step(torch.randn(6, 5, 8))
    torch.testing.assert_close(pair.model.state_dict(), pair.eager.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(pair.compiled(x3), pair.eager(x3))


def test_excluded_and_frozen_parameters():
    model = Text()
    model.norm.weight.requires_grad_(False)
    pair = Pair(model, exclude=["twice.bias", "norm.bias"])
    pair.step(ids())
    assert model.norm.weight.grad is None
    for m in (pair.model, pair.eager):
        m.twice.weight.requires_grad_(False)
    pair.step(ids())
    assert model.twice.weight.grad is None
    for m in (pair.model, pair.eager):
        m.twice.weight.requires_grad_(True)
    pair.step(ids())


def test_excluded_beside_served():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Conv1d(5, 4, 3))
    Pair(model, exclude=["0.bias", "1.weight", "2.weight"]).step(x3)


def test_gradients_of_inputs_and_a_second_forward_in_one_graph():
    pair = Pair(Image())
    a, b = images().requires_grad_(), images()
    both = lambda model: lambda a, b: model(a).square().sum() + model(b).sum()
    torch.compile(both(pair.model), fullgraph=True, backend="aot_eager")(a, b).backward()
    grad, a.grad = a.grad, None
    both(pair.eager)(a, b).backward()
    pair.same()
    torch.testing.assert_close(grad, a.grad)


def test_autograd_grad_and_optimizer_steps():
    pair = Pair(Text(), AND_MASK)
    batch = ids()
    grads = [
        torch.autograd.grad(run(batch).square().sum(), list(model.parameters()))
        for run, model in ((pair.compiled, pair.model), (pair.eager, pair.eager))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (pair.model, pair.eager)]
    for _ in range(2):
        pair.step(ids())
        for optimizer in optimizers:
            optimizer.step()


def test_user_hooks_run_on_the_aggregated_gradient():
    pair = Pair(Text())
    for model in (pair.model, pair.eager):
        model.twice.weight.register_hook(lambda grad: 2 * grad)
    pair.step(ids())


# -- who votes -------------------------------------------------------------------------------------


def compiled_frames():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("weight", ["size", "equal"])
def test_groups_change_without_compiling_again(weight):
    pair = Pair(Text())
    torch._dynamo.utils.counters.clear()
    for grouped_rows in ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 1], [5, 5, 5, 5, 7, 7]):
        pair.step(ids(), voting=lambda handle: handle.groups(torch.tensor(grouped_rows), weight))
    assert compiled_frames() == 1
    pair.step(ids())


@pytest.mark.parametrize("lead", [(), (1,)])
def test_packed_sequences_change_without_compiling_again(lead):
    pair = Pair(Packed())
    torch._dynamo.utils.counters.clear()
    for bounds in (
        [0, 3, 10, 12],
        [0, 5, 6, 12],
        [0, 1, 2, 3, 12],
        [0, 2, 12],
        [0, 1, 1, 2, 7, 12],
    ):
        rows = torch.randint(0, 11, (*lead, 12))
        pair.step(rows, voting=lambda handle: handle.packed(torch.tensor(bounds)))
    assert compiled_frames() == 2  # one for any number of sequences


def test_tokens_vote():
    pair = Pair(Packed())
    pair.step(ids(), voting=lambda handle: handle.tokens())
    mask = torch.rand(6, 5) > 0.5
    pair.step(ids(), voting=lambda handle: handle.tokens(mask))


def test_groups_opened_inside_a_compiled_function():
    pair = Pair(Text())

    def step(model, handle, batch, grouped_rows):
        with handle.groups(grouped_rows):
            return model(batch).square().sum()

    batch, grouped_rows = ids(), torch.tensor([0, 1, 0, 1, 2, 2])
    torch.compile(step, fullgraph=True, backend="aot_eager")(
        pair.model, pair.handle, batch, grouped_rows
    ).backward()
    step(pair.eager, pair.eager_handle, batch, grouped_rows).backward()
    pair.same()


def test_batch_sizes():
    pair = Pair(Text())
    for n in (6, 7, 6, 3):
        pair.step(ids(n))


def test_batch_dim():
    Pair(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), batch_dim=1).step(x3)


def test_accumulation():
    pair = Pair(Text(), AND_MASK)
    batches = ids(), ids()
    for run, handle in ((pair.compiled, pair.handle), (pair.eager, pair.eager_handle)):
        with handle.accumulate():
            for batch in batches:
                (run(batch).square().sum() / 2).backward()
    pair.same()
    pair.step(ids())
    with pytest.raises(RuntimeError, match="inside accumulate"), pair.handle.accumulate():
        torch.autograd.grad(pair.compiled(batches[0]).sum(), pair.model.gamma)


def test_wrong_groups():
    pair = Pair(Text(), htv.TrimmedMean(2))
    with pytest.raises(DYNAMO_ERRORS, match="at least 5 groups|needs|groups"):
        pair.compiled(ids(3))
    with pytest.raises(DYNAMO_ERRORS, match="groups has 2 ids but dim 0 of the batch has size 6"):
        with pair.handle.groups(torch.tensor([0, 1])):
            pair.compiled(ids())
    with pair.handle.groups(
        torch.tensor([0, 0, 0, 1, 1, 1])
    ):  # their values are seen when backward runs
        loss = pair.compiled(ids()).sum()
    with pytest.raises(ValueError, match="groups"):
        loss.backward()
    pair.step(ids())


# -- what a forward returns and takes --------------------------------------------------------------

Named = namedtuple("Named", "y none number")


@dataclass
class Output:
    y: torch.Tensor
    names: list
    loss: torch.Tensor | None = None


class Layer(ABC):  # noqa: B024
    """A part of a `Cache`; of ABC, whose `__slots__` are empty, as Hugging Face's are."""

    def __init__(self, keys):
        self.keys, self.kind, self.size = keys, Layer, len(keys)


class Cache:
    """Holds what the forward made in attributes, as the caches of Hugging Face's models do."""

    def __init__(self, y):
        self.y, self.layers = y, [Layer(y.detach() * 2)]

    def rows(self):
        return len(self.y)


@pytest.mark.parametrize(
    "wrap, unwrap",
    [
        (lambda y: {"y": y, "none": None, "more": (y.sum(), 3, "s", [y])}, lambda out: out["y"]),
        (lambda y: Named(y, None, 2.5), lambda out: out.y),
        (lambda y: Output(y, ["a", None]), lambda out: out.y),
        (lambda y: (y, y), lambda out: out[0]),
        (Cache, lambda out: out.y),
    ],
    ids=["dict", "namedtuple", "dataclass", "tuple", "object"],
)
def test_results(wrap, unwrap):
    class Model(nn.Linear):
        def forward(self, x, flag=None, scale=1.0):
            return wrap(super().forward(x) * scale)

    pair = Pair(Model(8, 3))
    out, eager = pair.compiled(x4, flag=None, scale=2.0), pair.eager(x4, scale=2.0)
    assert type(out) is type(eager)
    torch.testing.assert_close(unwrap(out), unwrap(eager))
    if isinstance(out, dict):
        assert out["none"] is None and out["more"][1:3] == (3, "s")
    elif isinstance(out, Named):
        assert out.none is None and out.number == 2.5
    elif isinstance(out, Output):
        assert out.names == ["a", None] and out.loss is None
    elif isinstance(out, Cache):
        assert out.rows() == 6 and out.layers[0].kind is Layer and out.layers[0].size == 6
        torch.testing.assert_close(out.layers[0].keys, eager.layers[0].keys)
    unwrap(out).sum().backward()
    unwrap(eager).sum().backward()
    pair.same()


def test_a_result_that_cannot_leave():
    pair = Pair(Module(lambda m, x: {1: {m.l(x)}}, l=nn.Linear(8, 3)))
    with pytest.raises(DYNAMO_ERRORS, match="cannot return a set"):
        pair.compiled(x4)


def test_a_causal_model_returns_its_cache():
    import support.torchvision_operators  # noqa: F401

    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    pair, batch = Pair(model), ids()
    out, eager = (m(input_ids=batch, labels=batch) for m in (pair.compiled, pair.eager))
    assert type(out.past_key_values) is type(eager.past_key_values)
    assert out.past_key_values.get_seq_length() == 5
    keys, eager_keys = (o.past_key_values.layers[0].keys for o in (out, eager))
    torch.testing.assert_close(keys, eager_keys)
    out.loss.backward()
    eager.loss.backward()
    pair.same()


def test_an_object_that_the_model_holds_cannot_leave():
    model = Module(lambda m, x: (m.l(x), m.cache), l=nn.Linear(8, 3))
    model.cache = Cache(torch.zeros(2))
    pair = Pair(model)
    with pytest.raises(DYNAMO_ERRORS, match="cannot return a Cache.*that the forward made"):
        pair.compiled(x4)
    assert torch.compile(pair.model, backend="aot_eager")(x4)[1] is pair.model.cache


def test_settings_are_seen():
    pair = Pair(Text(dropout=0.5))
    batch = ids()
    assert not torch.equal(pair.compiled(batch), pair.compiled(batch))
    pair.model.eval(), pair.eager.eval()
    pair.step(batch)
    with torch.no_grad():
        torch.testing.assert_close(pair.compiled(batch), pair.eager(batch))
    with torch.inference_mode():
        torch.testing.assert_close(pair.compiled(batch), pair.eager(batch))
    for model in (pair.model, pair.eager):
        model.train()
        model.dropout.p = 0.0
        model.scale.mul_(2)
    pair.step(batch)
    pair.step(batch, torch.rand(6, 5, 1))


def test_tensor_attributes():
    model = Module(lambda m, x: m.l(x) * m.table, l=nn.Linear(8, 3))
    model.table = torch.randn(3)
    pair = Pair(model)
    pair.step(x4)
    pair.model.table = pair.eager.table = torch.randn(3)
    pair.step(x4)


# -- attached, detached, compiled ------------------------------------------------------------------


def test_detach_and_attach_again():
    pair = Pair(Text())
    pair.step(ids())
    loss = pair.compiled(ids()).sum()
    pair.detach()
    with pytest.raises(RuntimeError, match="backward after detach"):
        loss.backward()
    pair.step(ids())  # plain gradients on both sides
    htv.attach(pair.model, AND_MASK), htv.attach(pair.eager, AND_MASK)
    pair.step(ids())


@pytest.mark.parametrize("in_place", [False, True])
def test_attach_what_was_compiled_before(in_place):
    model = Text()
    pair = Pair(model)
    pair.detach()
    if in_place:
        model.compile(fullgraph=True, backend="aot_eager")
        pair.compiled = model
    pair.step(ids())
    pair.handle, pair.eager_handle = (
        htv.attach(pair.compiled, MEDIAN),
        htv.attach(pair.eager, MEDIAN),
    )
    assert pair.handle.model is model
    pair.step(ids())
    pair.detach()
    pair.step(ids())


def test_a_part_is_called_from_a_compiled_function():
    pair = Pair(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)))
    f = lambda model: lambda x: model[1](torch.tanh(model[0](x))).square().sum()
    torch.compile(f(pair.model), fullgraph=True, backend="aot_eager")(x4).backward()
    f(pair.eager)(x4).backward()
    pair.same()


@pytest.mark.parametrize("before", [False, True])
def test_a_part_compiled_by_itself_runs_eagerly(before):
    model = Text()
    if before:
        model.twice.compile(fullgraph=True, backend="aot_eager")
    pair = Pair(model)
    if not before:
        pair.model.twice.compile(fullgraph=True, backend="aot_eager")
    pair.compiled = pair.model
    pair.step(ids())
    pair.step(ids())


def test_a_compiled_helper_is_neither_traced_with_htv_nor_compiled_again():
    compiled_frames = []

    def backend(graph, _):
        compiled_frames.append(graph)
        return graph

    helper = torch.compile(lambda h: F.gelu(h) * h.sigmoid(), backend=backend)
    forward = lambda m, x: m.k(helper(m.l(x)))
    pair = Pair(Module(forward, l=nn.Linear(8, 4), k=nn.Linear(4, 3)))
    pair.compiled = pair.model
    for batch in (x4, x4, x4[:4]):
        pair.step(batch)
    assert not compiled_frames
    failing = Module(lambda m, x: m.l(x).view(7), l=nn.Linear(8, 4))
    with htv.attach(failing, MEDIAN), pytest.raises(RuntimeError, match="shape"):
        failing(x4)
    helper(torch.randn(3, 4))
    assert len(compiled_frames) == 1


def test_eager_and_compiled_steps_alternate():
    pair = Pair(Text())
    pair.step(ids())
    pair.compiled, compiled = pair.model, pair.compiled
    pair.step(ids())
    pair.compiled = compiled
    pair.step(ids())


def test_where_dynamo_gives_up_the_forward_is_eager():
    def forward(m, x):
        y = m.l(x)
        return m.l(y.tanh()) if y.sum() > 0 else m.l(y.sin())

    pair = Pair(Module(forward, l=nn.Linear(8, 8)))
    with pytest.raises(DYNAMO_ERRORS, match="[Dd]ata-dependent|nonstrict_trace"):
        pair.compiled(x4)
    pair.compiled = torch.compile(pair.model, backend="aot_eager")
    pair.step(x4)
    pair.step(x4)


def test_nothing_stays_after_an_error_or_keeps_the_model():
    model = Module(lambda m, x: m.l(x) if x.shape[1] == 8 else m.fails(x), l=nn.Linear(8, 3))
    handle = htv.attach(model, MEDIAN)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x4).sum().backward()
    own = dict(model.named_parameters())
    with pytest.raises(DYNAMO_ERRORS):
        compiled(torch.randn(6, 7))
    assert dict(model.named_parameters()) == own
    compiled(x4).sum().backward()
    seen = [weakref.ref(o) for o in (model, handle, model.l.weight)]
    del model, handle, compiled, own
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3


# -- refused ---------------------------------------------------------------------------------------


def test_a_gradient_by_another_path_is_refused():
    pair = Pair(Text())
    batch = ids()
    with pytest.raises(htv.UnsupportedError, match="'twice.weight' reached the loss by a path"):
        (pair.compiled(batch).sum() + pair.model.twice.weight.square().sum()).backward()
    pair.step(batch)
    within = torch.compile(
        lambda x: pair.model(x).sum() + pair.model.twice.weight.square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(DYNAMO_ERRORS, match="'twice.weight' reached the loss by a path"):
        within(batch).backward()
    pair.step(batch)


def test_two_graphs_under_one_loss_are_refused():
    pair = Pair(Text())
    with pytest.raises(htv.UnsupportedError, match="two aggregated gradients"):
        (pair.compiled(ids()).sum() + pair.compiled(ids()).sum()).backward()


def _sets(m, x):
    m.steps = m.steps + 1
    return m.l(x)


def _slope(m, x):
    """Remedy: without torch.compile, as `test_input_derivatives.py` does."""
    x = x.requires_grad_()
    return torch.autograd.grad(m.l(x).sin().sum(), x, create_graph=True)[0]


NOWHERE = torch.randn(8)
REFUSED = {
    "mixed": (lambda m, x: m.l(x.flip(1).cumsum(0)), "it is not known any more"),
    "picked by values": (lambda m, x: m.l(x[m.order]), "picks rows by the values of a tensor"),
    "computed weight": (
        lambda m, x: F.linear(x, m.l.weight.tanh()),
        "through a tensor computed from it",
    ),
    "global": (lambda m, x: m.l(x + NOWHERE), "neither an argument of the forward"),
    "set": (_sets, "sets attribute 'steps'"),
    "batch norm": (lambda m, x: m.bn(m.l(x)), "BatchNorm in train mode"),
    "a weight per example": (
        lambda m, x: F.conv1d(
            m.l.weight.repeat(6, 1)[None],
            m.l(x).view(24, 1, 1).expand(24, 4, 1),
            groups=6,
        ),
        "'l.weight' is used by conv1d",
    ),
    "derivative": (_slope, "torch.compile has no second derivatives"),
}


def refused(name):
    model = Module(REFUSED[name][0], l=nn.Linear(8, 4))
    model.steps = 0
    model.register_buffer("order", torch.tensor([1, 0, 2, 3, 5, 4]))
    if name == "batch norm":
        model.bn = nn.BatchNorm1d(4)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, why = refused(name), REFUSED[name][1]
    htv.attach(model, MEDIAN)
    with pytest.raises(DYNAMO_ERRORS, match=why):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x4).sum().backward()
    assert model.steps == 0


@pytest.mark.parametrize(
    "name", ["picked by values", "computed weight", "global", "set", "derivative"]
)
def test_without_fullgraph_it_runs_eagerly(name):
    """The remedy that the messages name."""
    pair = Pair(refused(name))
    pair.compiled = torch.compile(pair.model, backend="aot_eager")
    pair.step(x4)
    pair.step(x4)


def test_passed_on_plainly():
    pair = Pair(
        Module(lambda m, x: m.l(m.k(x).cumsum(0)), l=nn.Linear(4, 3), k=nn.Linear(8, 4)),
        on_unsupported="plain",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.step(x4)


@pytest.mark.parametrize("exchange", ["parameter", "module"])
def test_exchanged_parameters_are_refused(exchange):
    pair = Pair(Text())
    pair.step(ids())
    if exchange == "module":
        pair.model.twice = nn.Linear(8, 8)
    else:
        pair.model.load_state_dict(copy.deepcopy(pair.eager.state_dict()), assign=True)
    with pytest.raises(DYNAMO_ERRORS, match="parameters changed while attached"):
        pair.compiled(ids())


class Halved(htv.Rule):
    """A rule of one's own that is not hashable, as a dataclass with eq is not."""

    __hash__ = None

    def reduce(self, contributions):
        return contributions.mean(dim=0) / 2


def test_a_rule_of_ones_own_is_refused_by_name():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    model(x).sum().backward()
    plain, model.weight.grad = model.weight.grad, None
    with htv.attach(model, Halved()):
        model(x).sum().backward()
        torch.testing.assert_close(model.weight.grad, plain / 2)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.raises(
            Exception, match="Halved is a rule of your own, and a compiled model cannot"
        ):
            compiled(x)
