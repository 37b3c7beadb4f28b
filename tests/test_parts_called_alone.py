"""Parts of a model called one by one, and forwards that continue others."""

import pytest
import torch
import torch.nn.functional as F
from test_batch_choice import assert_votes_by_example
from torch import nn

import htv

RULE = htv.Median()
N, T = 6, 3


class Step(nn.Module):
    """Tokens of examples: (N, T, 5) -> a loss of N * T rows."""

    between = staticmethod(lambda h: torch.tanh(h).flatten(0, 1))

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def training_step(self, batch, number=0):
        x, y = batch
        return F.cross_entropy(
            self.head(type(self).between(self.encode(x))), y.flatten(), reduction="sum"
        )


BETWEEN = {
    "tanh, merged with time": lambda h: torch.tanh(h).flatten(0, 1),
    "merged and scaled": lambda h: (h * 2 + 1).reshape(-1, 8),
    "time first": lambda h: h.transpose(0, 1).contiguous().view(T * N, 8).relu(),
    "a slice of features, padded": lambda h: F.pad(h[..., :5], (0, 3)).flatten(0, 1),
    "cut and joined": lambda h: torch.cat(h.chunk(2, -1)[::-1], -1).view(-1, 8),
    "normalised": lambda h: F.layer_norm(h, (8,)).softmax(-1).flatten(0, 1),
    "steps stacked": lambda h: torch.stack(h.unbind(1), 1).flatten(0, 1),
}


def batch():
    return torch.randn(N, T, 5).double(), torch.randint(0, 4, (N, T))


@pytest.mark.parametrize("name", BETWEEN)
def test_a_forward_continues_what_an_earlier_one_knew(name):
    model, (x, _) = Step().double(), batch()
    step = lambda rows: model.head(BETWEEN[name](model.encode(x[rows]))).square().sum()
    with htv.attach(model, RULE):
        step(slice(None)).backward()
    if "first" not in name:
        assert_votes_by_example(model, step, N)
    else:  # a view of N * T rows, cut for one example
        one = lambda rows: (
            model.head(model.encode(x[rows]).transpose(0, 1).reshape(-1, 8).relu()).square().sum()
        )
        assert_votes_by_example(model, one, N)


LOST = {
    "centred": lambda h: (h - h.mean(0)).flatten(0, 1),
    "permuted": lambda h: h[torch.randperm(len(h))],
    "attention among examples": lambda h: (
        (h.flatten(1) @ h.flatten(1).t()).softmax(-1) @ h.flatten(1)[:, :8]
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_an_operation_between_forwards_loses_is_refused(name):
    model, (x, _) = Step().double(), batch()
    with (
        htv.attach(model, RULE),
        pytest.raises(htv.UnsupportedError, match="'head.weight'.*Backward.*did not see"),
    ):
        model.head(LOST[name](model.encode(x)))


@pytest.mark.parametrize("name", BETWEEN)
def test_a_block_follows_what_is_computed_between_the_calls(name):
    model, (x, y) = Step().double(), batch()
    run = lambda rows: model.head(BETWEEN[name](model.encode(x[rows]))).square().sum()
    with htv.attach(model, RULE) as handle:
        with handle.forward(x, y):
            loss = run(slice(None))
        loss.backward()
    if "first" not in name:
        assert_votes_by_example(model, run, N)


@pytest.mark.parametrize("methods", ["training_step", ("training_step",)])
def test_a_method_is_served_by_name(methods):
    model, (x, y) = Step().double(), batch()
    plain = model.training_step
    handle = htv.attach(model, RULE, methods=methods)
    model.training_step((x, y), 0).backward()
    handle.detach()
    assert model.training_step == plain and "training_step" not in vars(model)
    assert_votes_by_example(model, lambda rows: model.training_step((x[rows], y[rows])), N)


def test_a_method_that_calls_backward_itself():
    """Manual optimization: the backward inside the method is not followed as if it were the
    forward.
    """
    model, (x, y) = Step().double(), batch()
    plain = model.training_step
    model.step = lambda batch: plain(batch).backward()
    with htv.attach(model, RULE, methods="step"):
        model.step((x, y))
    assert_votes_by_example(model, lambda rows: plain((x[rows], y[rows])), N)


def test_methods_that_are_none_are_refused():
    for name in ("no_step", "encode.no_step", "nowhere.step", "forward", "encode"):
        with pytest.raises(
            ValueError, match=name.split(".")[-1] if "nowhere" not in name else "nowhere"
        ):
            htv.attach(Step(), RULE, methods=name)


def test_a_closure_that_forward_returned():
    class DeferredFactors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return lambda: self.b(h.flatten(0, 1))

    model, (x, _) = DeferredFactors().double(), batch()
    with htv.attach(model, RULE):
        model(x)().square().sum().backward()
    assert_votes_by_example(model, lambda rows: model(x[rows])().square().sum(), N)


def test_two_models_of_two_handles_continue_each_other():
    first, second = nn.Linear(5, 8).double(), nn.Linear(8, 4).double()
    x, _ = batch()
    run = lambda rows: second(first(x[rows]).relu().flatten(0, 1)).square().sum()
    with htv.attach(first, RULE), htv.attach(second, RULE):
        run(slice(None)).backward()
    assert_votes_by_example(nn.ModuleList([first, second]), run, N)


def test_forwards_of_different_numbers_of_voters_under_one_loss_are_refused_across_parameters():
    model, (x, _) = Step().double(), batch()
    with htv.attach(model, RULE):
        loss = model.encode(x).sum() + model.head(torch.randn(N * T, 8).double()).sum()
        with pytest.raises(
            htv.UnsupportedError,
            match="6 groups of 6 examples.*18 groups of 18|18 groups.*6 groups",
        ):
            loss.backward()
        model.zero_grad()
        (
            model.encode(x).sum() + model.head(torch.randn(N, 8).double()).sum()
        ).backward()  # as many: one vote


def test_blocks_and_forwards_cannot_be_nested():
    model, (x, _) = Step().double(), batch()
    with htv.attach(model, RULE) as handle:
        with (
            handle.forward(x),
            pytest.raises(RuntimeError, match="inside another forward"),
            handle.forward(x),
        ):
            pass
        model.encode(x).sum().backward()  # usable again


@pytest.mark.parametrize("use", ["groups", "packed", "tokens", "accumulate", "forward"])
def test_blocks_of_a_detached_handle_raise(use):
    handle = htv.attach(nn.Linear(5, 4), RULE)
    handle.detach()
    arguments = {
        "groups": [torch.arange(6)],
        "packed": [torch.tensor([0, 6])],
        "forward": [torch.randn(6, 5)],
    }
    with pytest.raises(RuntimeError, match=f"{use}.. of a detached handle"):
        with getattr(handle, use)(*arguments.get(use, [])):
            pass
