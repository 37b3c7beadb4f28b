"""Small parameters share a node of the graph: each must get what it would get by itself."""

import pytest
import torch
from torch import nn

import htv
from htv.engine import parameter
from htv.engine.usual import compiled
from htv.ops import aggregate, backend
from htv.ops.factors import LinearFactors, StackedFactors
from support.oracles import RULES, by_name


class Branches(nn.Module):
    """Two branches of a norm and a linear layer each, behind a common norm."""

    def __init__(self):
        super().__init__()
        self.common = nn.LayerNorm(6)
        self.a = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
        self.b = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))

    def forward(self, x):
        x = self.common(x)
        return self.a(x), self.b(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    branches = Branches()
    for p in branches.parameters():
        nn.init.normal_(p)
    return branches


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
VECTORS = [
    "common.weight",
    "common.bias",
    "a.0.weight",
    "a.0.bias",
    "a.1.bias",
    "b.0.weight",
    "b.0.bias",
    "b.1.bias",
]


def is_same(one, other):
    """To the bit by the compiled kernels; the definition's order of sums depends on how many
    coordinates stand side by side.
    """
    if backend.NOT_BUILT is None:
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def both(outputs):
    return sum(y.square().sum() for y in outputs)


def only_a(outputs):
    return outputs[0].square().sum()


def alone(model, rule, loss=both, x=X):
    """Gradients with a node for every parameter."""
    with pytest.MonkeyPatch.context() as patch, htv.attach(model, rule):
        patch.setattr(parameter, "NODE_BYTES", 0)
        loss(model(x)).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def nodes(loss) -> list[int]:
    """How many parameters each node of a graph serves."""
    seen, ahead, found = set(), [loss.grad_fn], []
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "AggregationNodeBackward":
            found.append(len(node.next_functions))
        ahead += [n for n, _ in node.next_functions]
    return sorted(found)


def assert_same_gradients(model, expected):
    for name, p in model.named_parameters():
        grad = expected.get(name)
        assert (p.grad is None) == (grad is None), name
        assert grad is None or is_same(p.grad, grad), name


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_gradients_are_those_of_separate_hubs(model, rule):
    expected = alone(model, rule)
    with htv.attach(model, rule):
        loss = both(model(X))
        assert nodes(loss) == [len(list(model.parameters()))]
        loss.backward()
    assert_same_gradients(model, expected)
    storages = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


def test_matrices_of_layers_that_see_sequences_stand_alone(model):
    x = X.unsqueeze(1).expand(-1, 3, -1)
    expected = alone(model, htv.Median(), x=x)
    with htv.attach(model, htv.Median()):
        loss = both(model(x))
        assert nodes(loss) == [1, 1, len(VECTORS)]
        loss.backward()
    assert_same_gradients(model, expected)


def test_a_hub_is_no_larger_than_its_bytes(model, monkeypatch):
    each = 4 * len(X)
    monkeypatch.setattr(
        parameter, "NODE_BYTES", 12 * each
    )  # common.weight + common.bias; a.1.bias + ...
    with htv.attach(model, htv.Median()):
        assert nodes(both(model(X))) == [1, 1, 2, 2, 2, 2]


def test_rules_and_types_do_not_mix(model):
    model.b.double()
    rule = lambda name, _: htv.Mean() if name.endswith("bias") else htv.Median()
    with htv.attach(model, rule):
        outputs = model.a(X), model.b(X.double())
        assert nodes(outputs[0].sum()) == [3, 3] and nodes(outputs[1].sum()) == [2, 2]


def test_a_type_that_changed_since_sharing_was_decided(model):
    """The node of others may be made while a parameter has another type, for a time."""
    with htv.attach(model, htv.Median()) as handle:
        both(model(X)).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model.b.double()
        with handle.forward(X):
            x = model.common(X)
            a = model.a(x)
            model.b.float()
            both((a, model.b(x))).backward()
    assert_same_gradients(model, expected)


def test_what_a_loss_does_not_reach_gets_no_gradient(model):
    expected = alone(model, htv.Median(), only_a)
    with htv.attach(model, htv.Median()):
        only_a(model(X)).backward()
    assert_same_gradients(model, expected)
    assert model.b[0].weight.grad is None


def test_two_losses_of_one_forward(model):
    first, second = (
        alone(model, htv.Median(), only_a),
        alone(model, htv.Median(), lambda y: y[1].square().sum()),
    )
    with htv.attach(model, htv.Median()):
        a, b = model(X)
        a.square().sum().backward(retain_graph=True)
        b.square().sum().backward()
    total = {name: sum(g for g in (first[name], second[name]) if g is not None) for name in first}
    assert_same_gradients(model, total)


def test_a_forward_between_two_losses_of_another(model):
    with htv.attach(model, htv.Median()):
        a, b = model(X)
        a.square().sum().backward(retain_graph=True)
        model.zero_grad()
        loss = model(2 * X)[1].square().sum()
        expected = alone_in(model, b)
        (b.square().sum()).backward()
        assert_same_gradients(model, expected)
        model.zero_grad()
        loss.backward()
        assert model.b[0].weight.grad is not None


def alone_in(model, y):
    """What torch.autograd.grad finds for a loss that is kept."""
    used = {name: p for name, p in model.named_parameters() if not name.startswith("a.")}
    grads = torch.autograd.grad(y.square().sum(), list(used.values()), retain_graph=True)
    return {name: None for name, _ in model.named_parameters()} | dict(
        zip(used, grads, strict=True)
    )


def test_autograd_grad_of_one_member(model):
    expected = alone(model, htv.Median())
    with htv.attach(model, htv.Median()):
        loss = both(model(X))
        (grad,) = torch.autograd.grad(loss, [model.a[0].bias], retain_graph=True)
        assert is_same(grad, expected["a.0.bias"])
        assert all(p.grad is None for p in model.parameters())
        loss.backward(inputs=[model.a[0].weight, model.b[1].weight], retain_graph=True)
        given = {"a.0.weight", "b.1.weight"}
        assert_same_gradients(
            model, {name: g if name in given else None for name, g in expected.items()}
        )
        model.zero_grad()
        loss.backward()
    assert_same_gradients(model, expected)


def test_accumulation_takes_only_what_backward_asks_for(model):
    expected = alone(model, htv.AndMask(0.4))
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        before = model(X)  # its node is shared
        with handle.accumulate():
            both(before).backward(inputs=[model.a[0].weight])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(found) == ["a.0.weight"]
    # Summed up in another order than the kernel's.
    torch.testing.assert_close(found["a.0.weight"], expected["a.0.weight"])


def test_hooks_see_gradients_only(model):
    seen = []
    model.b[0].weight.register_hook(lambda grad: seen.append(grad.shape) or 2 * grad)
    model.b[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum()))
    expected = alone(model, htv.Median())
    seen.clear()
    with htv.attach(model, htv.Median()):
        loss = both(model(X))
        assert nodes(loss) == [1, 1, len(VECTORS)]
        loss.backward()
        assert len(seen) == 2
        assert_same_gradients(model, expected)
        model.zero_grad()
        seen.clear()
        only_a(model(X)).backward()
        assert not seen and model.b[0].weight.grad is None


def test_members_may_be_frozen_and_thawed(model):
    expected = alone(model, htv.Median())
    with htv.attach(model, htv.Median()):
        both(model(X)).backward()
        for frozen in ("a.0.bias", "common.weight"):
            model.zero_grad()
            model.get_parameter(frozen).requires_grad_(False)
            both(model(X)).backward()
            assert_same_gradients(model, expected | {frozen: None})
            model.get_parameter(frozen).requires_grad_(True)
        model.zero_grad()
        both(model(X)).backward()
    assert_same_gradients(model, expected)


def test_other_numbers_of_groups(model):
    with htv.attach(model, htv.Median()) as handle:
        for ids in ([0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 3, 3, 3], list(range(7))):
            with handle.groups(torch.tensor(ids)):
                both(model(X)).backward()
            found = {name: p.grad for name, p in model.named_parameters()}
            model.zero_grad()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    type(handle._session), "sharing_node", lambda self, tracked, *_: (tracked,)
                )
                with handle.groups(torch.tensor(ids)):
                    both(model(X)).backward()
            assert_same_gradients(model, found)
            model.zero_grad()


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_aggregate_together(rule):
    torch.manual_seed(2)
    stacks = [StackedFactors(torch.randn(8, *shape)) for shape in ((3,), (), (2, 2), (40,))]
    mixed = [*stacks, StackedFactors(torch.randn(8, 5).bfloat16())]
    linear = [stacks[0], LinearFactors(torch.randn(8, 2), torch.randn(8, 3), torch.arange(9))]
    twice = [[stacks[0], StackedFactors(torch.randn(8, 3))], [stacks[1]]]
    empty = [stacks[0], StackedFactors(torch.randn(8, 0))]
    for batches in (
        [[s] for s in stacks],
        [[s] for s in mixed],
        [[s] for s in linear],
        twice,
        [[s] for s in empty],
    ):
        found = aggregate.aggregate_together(batches, rule)
        for parts, grad in zip(batches, found, strict=True):
            expected = aggregate.aggregate(parts, rule)
            assert grad.shape == expected.shape and is_same(grad, expected)


class Moving(nn.Module):
    """Takes one of its layers to the type of its input, in the forward, as routers of mixtures
    do.
    """

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), layer

    def forward(self, x):
        y = self.first(x)
        self.second = self.second.to(torch.float32)
        return self.second(y.float())


@pytest.mark.parametrize("layer", [nn.LayerNorm, lambda size: nn.Linear(size, size)])
@pytest.mark.parametrize("rows", [(), (3,)], ids=["rows", "sequences"])
def test_a_member_that_is_moved_after_its_node_was_made(layer, rows):
    torch.manual_seed(0)
    model, x = Moving(layer(4)).double(), torch.randn(5, *rows, 4, dtype=torch.float64)
    expected = Moving(layer(4)).double()
    expected.load_state_dict(model.state_dict())
    for p in expected.second.parameters():
        p.data = p.data.float()
    found = []
    for m in (expected, model):
        with htv.attach(m, htv.Median()):
            m(x).square().sum().backward()
        found.append([p.grad for p in m.parameters()])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and is_same(a, b)


def test_each_use_sees_the_values_of_its_time():
    """`p.data = ...` gives a parameter other memory, between two uses of one forward too."""
    layer, x = nn.Linear(6, 6), X

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x)
            self.layer.weight.data = 2 * self.layer.weight.data
            return self.layer(y)

    outer, start = Twice(), layer.weight.detach().clone()
    plain = outer(x)
    layer.weight.data = start
    with htv.attach(outer, htv.Mean()):
        assert torch.equal(outer(x), plain)


def test_hooks_of_the_parameter_that_is_used_first():
    first, second, seen = nn.LayerNorm(6), nn.LayerNorm(6), []
    first.weight.register_hook(seen.append)

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.first(x), self.second(x)

    model = Apart()
    with htv.attach(model, htv.Median()):
        _, y = model(X)
        y.square().sum().backward()
    assert not seen and first.weight.grad is None and second.weight.grad is not None


class Mixed(nn.Module):
    """Layers that see one row per example, and layers that see rows of tokens."""

    def __init__(self):
        super().__init__()
        self.ids, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tokens = nn.Linear(6, 6)

    def forward(self, ids, x):
        y = self.tokens(self.ids(ids) + self.second(self.first(x))[:, None])
        return self.tokens(y.flatten(0, 1)).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_what_sees_more_rows_than_examples_has_a_node_of_its_own(rule):
    torch.manual_seed(0)
    model, ids = Mixed().double(), torch.randint(0, 9, (7, 4))
    with htv.attach(model, rule):
        loss = model(ids, X.double()).square().sum()
        # The table of ids; the tokens' matrix, which left the node made for it and the others.
        assert nodes(loss) == [1, 1, 6]
    htv.check(model, (ids, X.double()), rule)


@pytest.mark.skipif(compiled is None, reason="htv is built without compiled code")
def test_an_attribute_hides_a_parameter_of_its_name(model):
    """As for Python, where a layer is called at once as well."""
    other = nn.Linear(6, 3).weight.detach()
    model.a[1].__dict__["weight"] = other
    plain = model(X)[0]
    with htv.attach(model, htv.Mean()):
        assert torch.equal(model(X)[0], plain)
