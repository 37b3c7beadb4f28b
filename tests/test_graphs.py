"""Graphs, sets and bags: rows of one group may meet, and rows of two may not."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.tools.check import aggregated, one_group_at_a_time

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(0.4)]
IN, HIDDEN, OUT = 3, 4, 2


@dataclass
class Graphs:
    """Nodes, edges from `edge_index[0]` to `edge_index[1]`, and the graph of every node."""

    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor
    edge_attr: torch.Tensor
    num_graphs: int

    def one(self, g: int) -> "Graphs":
        nodes = (self.batch == g).nonzero().flatten()
        number = torch.full((len(self.x),), -1)
        number[nodes] = torch.arange(len(nodes))
        edges = (self.batch[self.edge_index[0]] == g).nonzero().flatten()
        edge_index = number[self.edge_index[:, edges]]
        return Graphs(self.x[nodes], edge_index, 0 * nodes, self.edge_attr[edges], 1)


def graphs(sizes, edges_per_graph, shuffled=False, self_loops=False) -> Graphs:
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if shuffled:
        batch = batch[torch.randperm(len(batch))]
    pairs = []
    for g, count in enumerate(edges_per_graph):
        nodes = (batch == g).nonzero().flatten()
        if len(nodes):
            pairs.append(nodes[torch.randint(0, len(nodes), (2, count))])
    if self_loops:
        pairs.append(torch.arange(len(batch)).expand(2, -1))
    edge_index = torch.cat(pairs, 1)
    edge_index = edge_index[:, torch.randperm(edge_index.shape[1])]
    x, attr = torch.randn(len(batch), IN).double(), torch.randn(edge_index.shape[1], 2).double()
    return Graphs(x, edge_index, batch, attr, len(sizes))


def pooled(h, g, reduce="sum"):
    if reduce in ("amax", "mean"):
        at = g.batch.view(-1, 1).expand_as(h)
        start = h.new_zeros(g.num_graphs, h.shape[1])
        return start.scatter_reduce(0, at, h, reduce, include_self=False)
    return h.new_zeros(g.num_graphs, h.shape[1]).index_add(0, g.batch, h)


def segment_softmax(scores, index, count):
    at = index.view(-1, 1).expand_as(scores)
    highest = torch.full((count, scores.shape[1]), -torch.inf).double()
    highest = highest.scatter_reduce(0, at, scores.detach(), "amax")
    weights = (scores - highest[index]).exp()
    total = torch.zeros(count, scores.shape[1]).double().scatter_add(0, at, weights)
    return weights / (total.index_select(0, index) + 1e-16)


class GCN(nn.Module):
    def __init__(self, reduce="sum"):
        super().__init__()
        self.a, self.b = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.bias, self.head = nn.Parameter(torch.randn(HIDDEN)), nn.Linear(HIDDEN, OUT)
        self.reduce = reduce

    def forward(self, g):
        src, dst = g.edge_index
        degree = torch.zeros(len(g.x)).double().scatter_add(0, dst, torch.ones(len(dst)).double())
        scale = degree.clamp(min=1).rsqrt()
        h = g.x
        for layer in (self.a, self.b):
            m = layer(h)[src] * (scale[src] * scale[dst])[:, None]
            h = torch.zeros(len(h), HIDDEN).double().index_add(0, dst, m)
            h = torch.tanh(h + self.bias)
        return self.head(pooled(h, g, self.reduce))


class GAT(nn.Module):
    """Two heads; scores of edges from both their ends, a softmax over the edges of a node."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(IN, 2 * HIDDEN)
        self.att_src = nn.Parameter(torch.randn(1, 2, HIDDEN))
        self.att_dst = nn.Parameter(torch.randn(1, 2, HIDDEN))
        self.head = nn.Linear(2 * HIDDEN, OUT)

    def forward(self, g):
        src, dst = g.edge_index
        h = self.w(g.x).view(-1, 2, HIDDEN)
        scores = (h * self.att_src).sum(-1)[src] + (h * self.att_dst).sum(-1)[dst]
        alpha = segment_softmax(F.leaky_relu(scores, 0.2), dst, len(h))
        out = torch.zeros_like(h).index_add_(0, dst, h[src] * alpha[..., None])
        return self.head(pooled(F.elu(out.flatten(1)), g, "mean"))


class DeepSet(nn.Module):
    def __init__(self, reduce="sum"):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        self.rho = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
        self.reduce = reduce

    def forward(self, g):
        return self.rho(pooled(self.phi(g.x), g, self.reduce))


class MIL(nn.Module):
    """Gated attention over the instances of a bag."""

    def __init__(self):
        super().__init__()
        self.body, self.u, self.v = (nn.Linear(i, HIDDEN) for i in (IN, HIDDEN, HIDDEN))
        self.score, self.head = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, OUT)

    def forward(self, g):
        h = torch.tanh(self.body(g.x))
        scores = self.score(torch.tanh(self.u(h)) * torch.sigmoid(self.v(h)))
        return self.head(pooled(h * segment_softmax(scores, g.batch, g.num_graphs), g))


class MessagePassing(nn.Module):
    """Layers on edges: of both ends and the edge's features, and of nodes and their graph."""

    def __init__(self):
        super().__init__()
        self.edge, self.message = nn.Linear(2, HIDDEN), nn.Linear(2 * IN + HIDDEN, HIDDEN)
        self.norm, self.update = nn.LayerNorm(HIDDEN), nn.Linear(IN + 2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, g):
        src, dst = g.edge_index
        ends = torch.cat([g.x[src], g.x[dst], torch.tanh(self.edge(g.edge_attr))], 1)
        m = self.norm(torch.tanh(self.message(ends)))
        received = m.new_zeros(len(g.x), HIDDEN)
        received.index_add_(0, dst, m)
        whole = pooled(received, g)[g.batch]
        h = torch.tanh(self.update(torch.cat([g.x, received, whole], 1)))
        return self.head(pooled(h, g, "amax"))


class DenseBatch(nn.Module):
    """Nodes in (graphs, most nodes, features), padded, and attention among those of a graph."""

    def __init__(self, most=5):
        super().__init__()
        self.body, self.attention = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.head, self.most = nn.Linear(HIDDEN, OUT), most

    def forward(self, g):
        h = torch.tanh(self.body(g.x))
        sizes = g.batch.bincount(minlength=g.num_graphs)
        order = g.batch.argsort(stable=True)
        within = torch.arange(len(h)) - (sizes.cumsum(0) - sizes)[g.batch[order]]
        dense = h.new_zeros(g.num_graphs * self.most, HIDDEN)
        dense[g.batch[order] * self.most + within] = h[order]
        dense = dense.view(g.num_graphs, self.most, HIDDEN)
        mask = torch.arange(self.most) < sizes[:, None]
        q, k, v = self.attention(dense).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return self.head((out * mask[..., None]).sum(1))


MODELS = {
    "GCN": GCN, "GCN, mean": lambda: GCN("mean"), "GAT": GAT, "DeepSet": DeepSet,
    "DeepSet, mean": lambda: DeepSet("mean"), "DeepSet, max": lambda: DeepSet("amax"), "MIL": MIL,
    "MessagePassing": MessagePassing, "DenseBatch": DenseBatch,
}  # fmt: skip
BATCHES = {
    "unequal sizes": lambda: graphs([2, 4, 1, 3, 5], [3, 6, 1, 4, 9]),
    "unsorted ids": lambda: graphs([2, 4, 1, 3, 5], [3, 6, 1, 4, 9], shuffled=True),
    "as many edges as nodes": lambda: graphs([2, 4, 1, 3, 5], [2, 6, 0, 3, 4]),
    "as many edges as nodes, self-loops alone": lambda: graphs([2, 3, 4], [0, 0, 0], True, True),
    "as many nodes as graphs": lambda: graphs([1] * 4, [1, 2, 0, 1], shuffled=True),
    "two nodes, as edge_index has rows": lambda: graphs([2], [2]),
    "as many nodes as features": lambda: graphs([1, 1, 1], [2, 1, 1], shuffled=True),
    "no edge": lambda: graphs([2, 3, 1], [0, 0, 0]),
}
EMPTY = {
    "empty in the middle": lambda: graphs([2, 0, 3, 4], [2, 0, 4, 5]),
    "empty at the end": lambda: graphs([2, 3, 0], [2, 4, 0], shuffled=True),
    "empty in front, self-loops": lambda: graphs([0, 0, 4, 1], [0] * 4, self_loops=True),
}


def asked(model, g, **options) -> dict:
    """What groups() needs to be told beside the ids."""
    if isinstance(model, MessagePassing):
        options["also"] = {"g.edge_attr": g.batch[g.edge_index[0]]}
    return options


def assert_votes_by_graph(model, g, rule, call=None, block=None, given=None, **options):
    """`call(model, graphs)`: the model's output for all graphs, or for one."""
    call = call or (lambda model, g: model(g))
    count, parameters = g.num_graphs, dict(model.named_parameters())
    direction = torch.randn(count, OUT).double()
    parts = one_group_at_a_time(
        lambda e: (call(model, g.one(e)) * direction[e]).sum(), parameters, count
    )
    plain = call(model, g).detach()
    model.zero_grad()
    with htv.attach(model, rule, allow_single=count == 1, **(given or {})) as handle:
        with block(handle) if block else handle.groups(g.batch, **asked(model, g, **options)):
            found = call(model, g)
        (found * direction).sum().backward()
    torch.testing.assert_close(found.detach(), plain)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, aggregated(parts[name], rule), msg=name)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_every_graph_votes(model, batch, rule):
    assert_votes_by_graph(MODELS[model]().double(), BATCHES[batch](), rule)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("batch", EMPTY)
@pytest.mark.parametrize("model", [m for m in MODELS if m != "DenseBatch"])
def test_a_graph_without_nodes_votes_where_it_is_counted(model, batch, rule):
    g = EMPTY[batch]()
    assert_votes_by_graph(MODELS[model]().double(), g, rule, count=g.num_graphs)


@pytest.mark.parametrize("batch", [b for b in EMPTY if "front" not in b])
def test_a_graph_without_nodes_that_is_not_counted_is_refused(batch):
    model, g = DeepSet().double(), EMPTY[batch]()
    with htv.attach(model, htv.Median()) as handle, handle.groups(g.batch):
        with pytest.raises(htv.UnsupportedError, match=r"is no group's.*groups\(ids, count="):
            model(g)


def test_rows_that_may_be_nodes_or_graphs_are_refused():
    """Four of each, and the graphs without nodes could be nodes nothing was sent to."""
    model, g = DeepSet().double(), graphs([2, 0, 2, 0], [1, 0, 1, 0])
    with htv.attach(model, htv.Median()) as handle, handle.groups(g.batch, count=4):
        with pytest.raises(htv.UnsupportedError, match="for each example or for each group"):
            model(g)
    larger = graphs([2, 0, 3, 0], [1, 0, 1, 0])
    assert_votes_by_graph(model, larger, htv.Median(), count=4)


@pytest.mark.parametrize("model", [m for m in MODELS if m.startswith(("G", "Mess"))])
def test_an_edge_between_graphs_is_refused_by_name(model):
    g = graphs([2, 3, 2], [2, 3, 2], self_loops=True)
    model, joined = MODELS[model]().double(), g.batch.clamp(max=1)
    g.edge_index[:, 0] = torch.tensor([5, 4])  # from the last graph to the middle one
    with htv.attach(model, htv.Median()) as handle:
        with handle.groups(g.batch, **asked(model, g)):
            with pytest.raises(htv.UnsupportedError, match="rows of groups 1 and 2 together"):
                model(g)
    g.batch, g.num_graphs = joined, 2  # the same id for both, as the message says
    assert_votes_by_graph(model, g, htv.Median())


def test_edge_features_have_to_be_named():
    model, g = MessagePassing().double(), graphs([2, 3, 2], [2, 3, 3])
    with htv.attach(model, htv.Median()) as handle:
        with handle.groups(g.batch):
            with pytest.raises(htv.UnsupportedError, match="not known which part belongs"):
                model(g)
        for also, words in (
            ({"edge_attr": g.batch[g.edge_index[0]]}, "no tensor argument.*'g.edge_attr'"),
            ({"g.edge_attr": g.batch}, "one id per index"),
            ({"g.edge_attr": g.batch[g.edge_index[0]] + 9}, "speaks of group"),
        ):
            with handle.groups(g.batch, also=also), pytest.raises(ValueError, match=words):
                model(g)


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([0, 0, 3], dict(count=3), "ids from 0 to count - 1"),
        ([-1, 0, 1], dict(count=3), "ids from 0 to count - 1"),
        ([0, 0, 1], dict(count=3, weight="equal"), "has no rows"),
        ([1], dict(count=3), "batch of one row"),
    ],
)
def test_counts_that_are_refused(ids, options, words):
    model = nn.Linear(IN, OUT)
    with htv.attach(model, htv.Median()) as handle, handle.groups(torch.tensor(ids), **options):
        with pytest.raises(ValueError, match=words):
            model(torch.randn(len(ids), IN))


class Plain:
    """A batch as PyG has it: its tensors lie in an object inside it."""

    def __init__(self, **tensors):
        self._store = SimpleNamespace(**tensors)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._store, name)


class Slots:
    __slots__ = ("x", "edge_index", "batch", "num_graphs")

    def __init__(self, **tensors):
        for name, value in tensors.items():
            setattr(self, name, value)


class Mapped(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("kind", [Plain, Slots, Mapped, SimpleNamespace])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a tensor"])
def test_batches_in_objects(kind, beside):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gcn = GCN()

        def forward(self, data, scale=1.0):
            return self.gcn(data) * scale

    def call(model, g):
        fields = {n: getattr(g, n) for n in ("x", "edge_index", "batch", "num_graphs")}
        return model(kind(**fields), *([torch.full((1,), 2.0).double()] if beside else []))

    g = graphs([2, 4, 1, 3], [3, 6, 1, 4], shuffled=True)
    assert_votes_by_graph(Model().double(), g, htv.Median(), call)
    named = {
        Plain: "data._store.x", Slots: "data.x", Mapped: "data['x']", SimpleNamespace: "data.x"
    }  # fmt: skip
    assert_votes_by_graph(Model().double(), g, htv.Median(), call, given=dict(batch=named[kind]))


def test_sets_one_after_another_as_packed_has_them():
    g = graphs([2, 4, 1, 3], [0] * 4)
    bounds = torch.tensor([0, 2, 6, 7, 10])
    assert_votes_by_graph(MIL().double(), g, htv.Median(), block=lambda h: h.packed(bounds))


@pytest.mark.parametrize("edges", [[3, 6, 1], [2, 4, 1]], ids=["", "as many edges as nodes"])
def test_gates_of_edges_that_were_not_named(edges):
    """Served where they meet the edges' rows: these say whose they are; or refused, where they were
    taken for the nodes'.
    """

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(2, IN), nn.Linear(IN, OUT)

        def forward(self, g):
            src, dst = g.edge_index
            m = g.x[src] * torch.sigmoid(self.gate(g.edge_attr))
            return self.head(pooled(torch.zeros_like(g.x).index_add(0, dst, m), g))

    g, model = graphs([2, 4, 1], edges, shuffled=True), Gated().double()
    if sum(edges) != len(g.x):
        return assert_votes_by_graph(model, g, htv.Median())
    with htv.attach(model, htv.Median()) as handle, handle.groups(g.batch):
        with pytest.raises(htv.UnsupportedError, match="'g.edge_attr'.*by its size alone"):
            model(g)
    also = {"g.edge_attr": g.batch[g.edge_index[0]]}
    assert_votes_by_graph(model, g, htv.Median(), also=also)


def test_a_compiled_model_refuses_a_count():
    model = nn.Linear(IN, OUT)
    with htv.attach(model, htv.Median()) as handle, handle.groups(torch.tensor([0, 2]), count=3):
        with pytest.raises(Exception, match="torch.compile does not trace groups"):
            torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, IN))


def test_what_the_page_lists_as_refused():
    g, model = graphs([2, 3, 1], [2, 3, 1]), DeepSet().double()
    for mixed in (
        lambda h, g: h.sum(0, keepdim=True),
        lambda h, g: h - h.mean(0),
        lambda h, g: torch.eye(len(h)).double() @ h,
        lambda h, g: torch.eye(len(h)).double().to_sparse() @ h,
    ):
        model.rho.forward = lambda pooled, mixed=mixed: nn.Sequential.forward(
            model.rho, mixed(pooled, g)
        )
        with htv.attach(model, htv.Median()) as handle, handle.groups(g.batch):
            with pytest.raises(htv.UnsupportedError, match="belongs to which example"):
                model(g)
    del model.rho.forward
    assert_votes_by_graph(model, g, htv.Median())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_largest_by_index_reduce(rule):
    class Largest(DeepSet):
        def forward(self, g):
            h = self.phi(g.x)
            start = h.new_zeros(g.num_graphs, h.shape[1])
            return self.rho(start.index_reduce(0, g.batch, h, "amax", include_self=False))

    assert_votes_by_graph(Largest().double(), BATCHES["unsorted ids"](), rule)


def test_the_example_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "graphs.md").read_text()
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    model, handle = names["model"], names["handle"]
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    handle.detach()
    batch, (source, _) = names["batch"], names["edge_index"]

    def loss(e):
        nodes, edges = (batch == e).nonzero().flatten(), (batch[source] == e).nonzero().flatten()
        first = int(nodes[0]) if len(nodes) else 0
        inputs = names["x"][nodes], names["edge_index"][:, edges] - first
        out = model(*inputs, names["edge_attr"][edges], 0 * nodes, 1)
        return F.cross_entropy(out, names["labels"][e : e + 1]) / 3

    parts = one_group_at_a_time(loss, dict(model.named_parameters()), 3)
    for name, part in parts.items():
        torch.testing.assert_close(found[name], aggregated(part, htv.Median()), msg=name)
