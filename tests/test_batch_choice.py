"""Which arguments of a forward hold the examples: by size, by name, in containers, in packed
sequences.
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import htv
from htv.tools.check import aggregated, one_group_at_a_time
from support.layer_table import Module

RULE = htv.Median()


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, adjacency, x):
        return self.b(torch.relu(adjacency @ self.a(x)).mean(1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, x, scale):
        return self.a(x) * scale


def assert_votes_by_example(model, run, count):
    """Gradients are the aggregate of those of run(rows), one example at a time."""
    parts = one_group_at_a_time(
        lambda e: run(slice(e, e + 1)), dict(model.named_parameters()), count
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, aggregated(parts[name], RULE), rtol=1e-9, atol=1e-11, msg=name
        )


def test_size_one_beside_larger_sizes_is_a_constant():
    model = Graph().double()
    adjacency, x = torch.rand(1, 3, 3).double(), torch.randn(6, 3, 5).double()
    with htv.attach(model, RULE) as handle:
        model(adjacency, x).square().sum().backward()
        assert handle._session.voters.source == "'x' of shape (6, 3, 5), examples in dim 0"
    assert_votes_by_example(model, lambda rows: model(adjacency, x[rows]).square().sum(), 6)


@pytest.mark.parametrize("order", [("adjacency", "x"), ("x", "adjacency")])
def test_the_order_of_keyword_arguments_decides_nothing(order):
    model = Graph().double()
    values = {"adjacency": torch.rand(1, 3, 3).double(), "x": torch.randn(6, 3, 5).double()}
    with htv.attach(model, RULE):
        model(**{name: values[name] for name in order}).square().sum().backward()
    run = lambda rows: model(values["adjacency"], values["x"][rows]).square().sum()
    assert_votes_by_example(model, run, 6)


def test_sizes_that_disagree_are_refused_until_one_is_named():
    model = Named().double()
    x, scale = torch.randn(6, 5).double(), torch.rand(4).double()
    with htv.attach(model, RULE):
        with pytest.raises(
            ValueError, match=r"'x' of shape \(6, 5\), 'scale' of shape \(4,\).*batch='x'"
        ):
            model(x, scale)
    with htv.attach(model, RULE, batch="x"):
        model(x, scale).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows], scale).square().sum(), 6)


def test_ids_say_how_many_examples_there_are():
    model = Named().double()
    x, scale = torch.randn(6, 5).double(), torch.rand(4).double()
    with htv.attach(model, RULE) as handle, handle.groups(torch.arange(6)):
        model(x, scale).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows], scale).square().sum(), 6)


def test_a_name_that_is_no_argument_is_refused():
    with htv.attach(model := Named(), RULE, batch="inputs"):
        with pytest.raises(ValueError, match="batch='inputs' is no tensor argument.*'x'.*'scale'"):
            model(torch.randn(6, 5), torch.rand(4))
    with pytest.raises(TypeError, match="batch must be a name"):
        htv.attach(Named(), RULE, batch=3)


def test_arguments_named_together_must_agree():
    with htv.attach(model := Named(), RULE, batch=("x", "scale")):
        with pytest.raises(ValueError, match="named by attach.*disagree"):
            model(torch.randn(6, 5), torch.rand(4))


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


class Plain:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    "wrap",
    [Batch, Plain, lambda x: {"x": x}, lambda x: [x]],
    ids=["dataclass", "object", "dict", "list"],
)
@pytest.mark.parametrize("ids", [False, True])
def test_examples_in_a_container(wrap, ids):
    def read(batch):
        if isinstance(batch, dict):
            return batch["x"]
        return batch[0] if isinstance(batch, list) else batch.x

    model, x = (
        Module(lambda m, b: m.a(read(b)), a=nn.Linear(5, 4)).double(),
        torch.randn(6, 5).double(),
    )
    with htv.attach(model, RULE) as handle:
        if ids:
            with handle.groups(torch.arange(6)):
                model(wrap(x)).square().sum().backward()
        else:
            model(wrap(x)).square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(wrap(x[rows])).square().sum(), 6)


# -- one voter -------------------------------------------------------------------------------------

NEED_SEVERAL = [
    htv.AndMask(0.4),
    htv.Median(),
    htv.WinsorizedMean(0.2),
    htv.XorMask(0.4),
    htv.GeometricMean(0.2),
]
NEED_ONE = [htv.Mean(), htv.AndMask(0.0), htv.SignSum(), htv.TrimmedMean(0), htv.MedianOfMeans(1)]


@pytest.mark.parametrize("rule", NEED_SEVERAL, ids=repr)
def test_one_voter_is_refused_unless_it_is_meant(rule):
    model, x = nn.Linear(5, 4), torch.randn(1, 5)
    with htv.attach(model, rule) as handle:
        with pytest.raises(
            ValueError,
            match=r"one group alone votes \('input' of shape \(1, 5\).*allow_single=True",
        ):
            model(x)
        with (
            handle.groups(torch.zeros(6, dtype=torch.long)),
            pytest.raises(ValueError, match="one group alone"),
        ):
            model(torch.randn(6, 5))
    with htv.attach(model, rule, allow_single=True):
        model(x).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("rule", NEED_ONE, ids=repr)
def test_rules_that_need_no_others_take_one_voter(rule):
    model = nn.Linear(5, 4)
    with htv.attach(model, rule):
        model(torch.randn(1, 5)).sum().backward()


def test_one_voter_in_all_micro_batches_is_refused():
    model = nn.Linear(5, 4)
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        with pytest.raises(ValueError, match="all micro-batches"), handle.accumulate():
            model(torch.randn(1, 5)).sum().backward()
        assert model.weight.grad is None
        with handle.accumulate():
            for _ in range(3):
                model(torch.randn(1, 5)).sum().backward()
    assert model.weight.grad is not None


# -- packed sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("sort", [True, False])
def test_the_examples_of_a_packed_sequence_vote(cls, sort):
    for lengths in ((1, 1, 1), (2, 1, 2), (1, 4, 2), (3, 3, 3), (2, 2, 4)):
        lengths = sorted(lengths, reverse=True) if sort else lengths
        model = cls(4, 5).double()
        sequences = [torch.randn(n, 4).double() for n in lengths]
        run = lambda rows: sum(model(s.unsqueeze(1))[0].square().sum() for s in sequences[rows])
        with htv.attach(model, RULE):
            out, _ = model(pack_sequence(sequences, enforce_sorted=sort))
            pad_packed_sequence(out)[0].square().sum().backward()
        assert_votes_by_example(model, run, 3)


@pytest.mark.parametrize("per_row", [False, True], ids=["an id per example", "an id per row"])
def test_groups_of_packed_examples(per_row):
    model = nn.GRU(4, 5).double()
    sequences = [torch.randn(n, 4).double() for n in (2, 4, 1, 3)]
    packed, ids = pack_sequence(sequences, enforce_sorted=False), torch.tensor([7, 2, 7, 2])
    rows = torch.cat([packed.sorted_indices[:n] for n in packed.batch_sizes.tolist()])
    with htv.attach(model, RULE) as handle, handle.groups(ids[rows] if per_row else ids):
        model(packed)[0].data.square().sum().backward()
    alone = lambda s: model(s.unsqueeze(1))[0].square().sum()
    run = lambda rows: sum(alone(sequences[i]) for i in ((1, 3), (0, 2))[rows.start])
    assert_votes_by_example(model, run, 2)


def test_rows_of_one_packed_example_with_different_ids_are_refused():
    model, packed = nn.GRU(4, 5), pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with htv.attach(model, RULE) as handle:
        with handle.groups(torch.arange(5)), pytest.raises(ValueError, match="different ids"):
            model(packed)
        with (
            handle.groups(torch.arange(4)),
            pytest.raises(ValueError, match="one id per example, or one per row"),
        ):
            model(packed)


def test_layouts_without_rows_are_refused_by_name():
    model = nn.Linear(5, 4)
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    with htv.attach(model, RULE) as handle:
        for x, word in (
            (torch.eye(5).to_sparse(), "sparse"),
            (torch.eye(5).to_sparse_csr(), "sparse"),
            (nested, "nested"),
        ):
            with pytest.raises(htv.UnsupportedError, match=f"argument 'input' is a {word} tensor"):
                model(x)
        with handle.packed(nested.offsets()):  # the remedy
            model(nested.values()).sum().backward()
    assert model.weight.grad is not None


# -- who says so -----------------------------------------------------------------------------------


def test_check_and_explain_and_refusals_say_which_argument_it_was():
    model, x = Graph(), (torch.rand(1, 3, 3), torch.randn(6, 3, 5))
    source = "'x' of shape (6, 3, 5), examples in dim 0"
    assert htv.check(model, x, RULE).batch == source
    explanation = htv.explain(model, x)
    assert explanation.batch == source and str(explanation).endswith(f"the batch: {source}")
    mixing = Module(lambda m, x: m.b(m.a(x) - m.a(x).mean(0)), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    with htv.attach(mixing, RULE), pytest.raises(htv.UnsupportedError) as caught:
        mixing(torch.randn(6, 5))
    message = str(caught.value)
    assert "'mean' at " in message and "test_batch_choice.py:" in message
    assert "'args[0]' of shape (6, 5)" in message
    lost = htv.explain(mixing, torch.randn(6, 5)).lost
    assert (
        len(lost) == 1 and lost[0].startswith("'mean' at ") and "test_batch_choice.py:" in lost[0]
    )
