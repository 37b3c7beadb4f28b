"""Bags of embeddings given by offsets: a bag is a row of the batch, whoever says so."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import htv
from htv.tools.check import aggregated, one_group_at_a_time

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
TEXT = torch.tensor([3, 1, 3, 7, 0, 8, 3, 3, 1, 9, 2])
# The last bag ends where the ids do.
BOUNDS = {
    "uneven": [0, 2, 5, 6, 10, 11],
    "an empty bag": [0, 2, 2, 6, 10, 11],
    "empty at both ends": [0, 0, 4, 5, 11, 11],
    "all in one bag": [0, 11, 11, 11, 11, 11],
}
OPTIONS = {
    "sum": dict(mode="sum"),
    "mean": dict(mode="mean"),
    "max": dict(mode="max"),
    "sum, padding_idx": dict(mode="sum", padding_idx=3),
    "mean, padding_idx": dict(mode="mean", padding_idx=-7),
    "max, padding_idx": dict(mode="max", padding_idx=3),
}


class Classifier(nn.Module):
    """A linear layer on bags; with `weighted` every id has a learnt weight."""

    def __init__(self, weighted: bool = False, **options):
        super().__init__()
        self.e, self.h = nn.EmbeddingBag(10, 3, **options), nn.Linear(3, 2)
        self.w = nn.Parameter(torch.randn(10)) if weighted else None

    def forward(self, text, offsets, weights=None):
        weights = weights if self.w is None else self.w[text]
        return self.h(torch.tanh(self.e(text, offsets, weights)))


def by_bags(model, text, bounds, weights=None, last=False):
    """(loss of all bags, loss of bag b)."""
    direction = torch.randn(len(bounds) - 1, 2).double()

    def one(b):
        mine = slice(bounds[b], bounds[b + 1])
        offsets = torch.tensor([0, bounds[b + 1] - bounds[b]][: 1 + last])
        return (model(text[mine], offsets, None if weights is None else weights[mine])[0]
                * direction[b]).sum()  # fmt: skip

    offsets = bounds if last else bounds[:-1]
    return lambda: (model(text, offsets, weights) * direction).sum(), one


def assert_votes_by_bag(
    model, whole, one, count, rule, block=lambda handle: nullcontext(), **options
):
    parameters = dict(model.named_parameters())
    parts, plain = one_group_at_a_time(one, parameters, count), whole().detach()
    model.zero_grad()
    with htv.attach(model, rule, **options) as handle:
        with block(handle):
            loss = whole()
        loss.backward()
    torch.testing.assert_close(loss.detach(), plain)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, aggregated(parts[name], rule), msg=name)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_that_the_offsets_say(options, bounds, rule):
    bounds, model = torch.tensor(BOUNDS[bounds]), Classifier(**OPTIONS[options]).double()
    assert_votes_by_bag(model, *by_bags(model, TEXT, bounds), 5, rule, batch="offsets")


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("last", [False, True], ids=["", "include_last_offset"])
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_that_packed_says(options, last, rule):
    """The examples are ids then, and those of a bag vote together."""
    bounds = torch.tensor(BOUNDS["uneven"])
    model = Classifier(**OPTIONS[options], include_last_offset=last).double()
    parts = by_bags(model, TEXT, bounds, last=last)
    assert_votes_by_bag(model, *parts, 5, rule, lambda h: h.packed(bounds))
    ids = torch.tensor([7, 7, 1, 1, 1, 3, 4, 4, 4, 4, 9])  # the same by ids, in the order of 5 bags
    order = ids.unique(return_inverse=True)[1].unique_consecutive().argsort()
    one = lambda e: parts[1](int(order[e]))
    assert_votes_by_bag(model, parts[0], one, 5, rule, lambda h: h.groups(ids))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("weights", ["given", "learnt", "learnt, the table is excluded"])
def test_weights_of_ids(weights, padding_idx, rule):
    model = Classifier(weights != "given", mode="sum", padding_idx=padding_idx).double()
    model.e.weight.requires_grad_("excluded" not in weights)
    given = torch.randn(len(TEXT)).double() if weights == "given" else None
    parts = by_bags(model, TEXT, torch.tensor(BOUNDS["an empty bag"]), given)
    model_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert ("e.weight" in model_parameters) == ("excluded" not in weights)
    contributions = one_group_at_a_time(parts[1], model_parameters, 5)
    with htv.attach(model, rule, batch="offsets"):
        parts[0]().backward()
    for name, p in model_parameters.items():
        torch.testing.assert_close(p.grad, aggregated(contributions[name], rule), msg=name)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bags_of_several_tables_beside_dense_features(rule):
    """As recommendation models have them: offsets (tables, N), a list of ids of any length each."""

    class Recommender(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.EmbeddingBag(7, 4, mode="sum") for _ in range(2))
            self.below, self.side = nn.Linear(5, 4), nn.Linear(4, 4)
            self.above = nn.Linear(3 + 4, 2)

        def forward(self, dense, offsets, lists):
            found = [t(ids, o) for t, ids, o in zip(self.tables, lists, offsets, strict=True)]
            found = [self.below(dense), torch.tanh(self.side(found[0])), found[1]]
            vectors = torch.stack(found, 1)
            pairs = torch.bmm(vectors, vectors.transpose(1, 2))
            at = torch.tril_indices(3, 3, -1)
            return self.above(torch.cat([found[0], pairs[:, at[0], at[1]]], 1))

    model, dense = Recommender().double(), torch.randn(4, 5).double()
    sizes = torch.tensor([[2, 0, 1, 3], [1, 1, 4, 2]])
    offsets = torch.cat([sizes.new_zeros(2, 1), sizes.cumsum(1)[:, :-1]], 1)
    lists = [torch.randint(0, 7, (int(n.sum()),)) for n in sizes]
    direction = torch.randn(4, 2).double()
    model_one = lambda e: model(
        dense[e : e + 1],
        torch.zeros(2, 1, dtype=torch.long),
        [ids[o[e] : o[e] + n[e]] for ids, o, n in zip(lists, offsets, sizes, strict=True)],
    )
    parts = one_group_at_a_time(
        lambda e: (model_one(e) * direction[e]).sum(), dict(model.named_parameters()), 4
    )
    with htv.attach(model, rule, batch="dense"):
        (model(dense, offsets, lists) * direction).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[name], rule), msg=name)


def test_the_layer_alone_knows_its_batch():
    """Its arguments disagree in size; a bag is an example. A batch of one bag, too."""
    for bounds in (BOUNDS["uneven"], [0, 11]):
        bounds, bag = torch.tensor(bounds), nn.EmbeddingBag(10, 2).double()
        parts = by_bags(bag, TEXT, bounds)
        assert_votes_by_bag(bag, *parts, len(bounds) - 1, htv.Median(), allow_single=True)


def test_a_bag_that_all_examples_share():
    """Ids and offsets of the model's own: not a part of any example, though of the batch's size."""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.EmbeddingBag(10, 6)
            self.register_buffer("ids", TEXT)
            self.register_buffer("starts", torch.tensor(BOUNDS["uneven"][:-1]))

        def forward(self, x):
            return x @ self.e(self.ids, self.starts).T

    for size in (5, 6):
        assert htv.check(Prototypes(), torch.randn(size, 6), htv.Median()).groups == size


def test_a_frozen_table_passes_the_batch_on():
    model, bounds = Classifier().double(), torch.tensor(BOUNDS["an empty bag"])
    model.e.requires_grad_(False)
    parts = by_bags(model, TEXT, bounds)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = one_group_at_a_time(parts[1], trained, 5)
    with htv.attach(model, htv.Median(), batch="offsets"):
        parts[0]().backward()
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, aggregated(found[name], htv.Median()), msg=name)


REFUSED = {
    "ids that were named": (
        dict(batch="text"), BOUNDS["uneven"], lambda h: nullcontext(), "bag 0 holds ids of"),
    "ids, one bag empty": (
        dict(batch="text"), [0, 1, 1, 2, 3, 11], lambda h: nullcontext(), "bag 1 is empty"),
    "groups that cut a bag": (
        {}, BOUNDS["uneven"], lambda h: h.groups(torch.arange(11) // 4), "bag 1 holds ids of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_ids_that_are_no_bags_are_refused_and_both_remedies_work(name):
    options, bounds, block, words = REFUSED[name]
    model, bounds = Classifier().double(), torch.tensor(bounds)
    with htv.attach(model, htv.Median(), **options) as handle:
        with block() if block is nullcontext else block(handle):
            with pytest.raises(htv.UnsupportedError, match=words) as caught:
                model(TEXT, bounds[:-1])
    assert "'e.weight'" in str(caught.value) and "batch='offsets'" in str(caught.value)
    parts = by_bags(model, TEXT, bounds)
    assert_votes_by_bag(model, *parts, 5, htv.Median(), batch="offsets")
    if "empty" not in name:
        assert_votes_by_bag(model, *parts, 5, htv.Median(), lambda h: h.packed(bounds))
    with htv.attach(model, htv.Median(), exclude="e.weight", batch="offsets"):
        model(TEXT, bounds[:-1]).sum().backward()


def test_one_offset_more_than_bags_names_the_block_to_use():
    model = Classifier(include_last_offset=True).double()
    bounds = torch.tensor(BOUNDS["uneven"])
    with htv.attach(model, htv.Median(), batch="offsets"):
        with pytest.raises(htv.UnsupportedError, match=r"5 bags have 6 offsets.*packed\(offsets\)"):
            model(TEXT, bounds)
    parts = by_bags(model, TEXT, bounds, last=True)
    assert_votes_by_bag(model, *parts, 5, htv.Median(), lambda h: h.packed(bounds))


def test_as_many_ids_as_bags():
    """The ids come first and have the batch's size: which of the two is the batch has to be said,
    unless every bag holds one.
    """
    model, text = Classifier().double(), TEXT[:5]
    for bounds, agree in (([0, 1, 2, 3, 4, 5], True), ([0, 2, 3, 3, 4, 5], False)):
        parts = by_bags(model, text, torch.tensor(bounds))
        assert_votes_by_bag(model, *parts, 5, htv.Median(), batch="offsets")
        if agree:
            assert_votes_by_bag(model, *parts, 5, htv.Median())
            continue
        with htv.attach(model, htv.Median()), pytest.raises(htv.UnsupportedError, match="bag 2"):
            model(text, torch.tensor(bounds)[:-1])


def test_bags_where_tokens_vote_and_where_offsets_fall():
    model, bounds = Classifier().double(), torch.tensor(BOUNDS["uneven"])
    with htv.attach(model, htv.Median(), batch="offsets") as handle:
        with handle.tokens(), pytest.raises(htv.UnsupportedError, match="tokens().*'e.weight'"):
            model(TEXT, bounds[:-1])
        for offsets in ([0, 4, 2], [1, 4], [0, 12]):
            with pytest.raises(ValueError, match="offsets must rise from 0 to at most the number"):
                model(TEXT, torch.tensor(offsets))


def test_micro_batches_of_bags():
    model, bounds = Classifier().double(), torch.tensor(BOUNDS["an empty bag"])
    one = by_bags(model, TEXT, bounds)[1]
    parts = one_group_at_a_time(one, dict(model.named_parameters()), 5)
    with htv.attach(model, htv.AndMask(0.4), batch="offsets", allow_single=True) as handle:
        with handle.accumulate():
            for b in range(5):
                one(b).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[name], htv.AndMask(0.4)), msg=name)


def test_a_compiled_model_refuses_bags_by_offsets():
    model = Classifier()
    with htv.attach(model, htv.Median(), batch="offsets"):
        with pytest.raises(Exception, match="torch.compile traces.*padded"):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            compiled(TEXT, torch.tensor([0, 2, 5]))
    assert htv.check(nn.EmbeddingBag(10, 2), TEXT[:10].view(5, 2), htv.Median()).groups == 5
