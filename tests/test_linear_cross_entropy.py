"""torch's linear layer with its cross-entropy, in one call: the layer's gradient is a linear
layer's, by an oracle that lets the loss of all rows reach the parameters through one row at a time.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.tools.check import aggregated, one_group_at_a_time

if not hasattr(F, "linear_cross_entropy"):
    pytest.skip("torch before 2.13 has no linear_cross_entropy", allow_module_level=True)

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]
N, FEATURES, CLASSES = 6, 4, 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1, 1.5]).double()
CHUNKED = nn.LinearCrossEntropyOptions()
INDICES = torch.tensor([0, 3, 1, 3, 4, 2])
CASES = {
    "mean": {},
    "sum, bias": dict(reduction="sum", bias=True),
    "none": dict(reduction="none"),
    "ignore_index": dict(ignore_index=3, bias=True),
    "class weights": dict(weight=WEIGHT, bias=True),
    "label smoothing": dict(label_smoothing=0.2, weight=WEIGHT),
    "class probabilities": dict(target=torch.rand(N, CLASSES).double().softmax(1)),
    "several outputs": dict(out_features=(2, 3), bias=True),
    "in chunks": dict(options=CHUNKED, bias=True),
    "in chunks, sum": dict(options=CHUNKED, reduction="sum", ignore_index=3),
    "in chunks, none": dict(options=CHUNKED, reduction="none", weight=WEIGHT),
}


class Headed(nn.Module):
    """A layer before the head that torch's module has inside."""

    def __init__(self, **options):
        super().__init__()
        self.below = nn.Linear(3, FEATURES)
        self.head = nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **options)

    def forward(self, x, target):
        return self.head(torch.tanh(self.below(x)), target)

    def logits(self, x):
        y = self.head.linear(torch.tanh(self.below(x)))
        return y.reshape(len(x), CLASSES, *self.head.out_features)

    def loss_of(self, e, x, target):
        """The loss of all, of which row e alone leads back to the parameters."""
        rows = [self.logits(x[i : i + 1]) for i in range(len(x))]
        logits = torch.cat([row if i == e else row.detach() for i, row in enumerate(rows)])
        head = self.head
        ignored = {} if head.ignore_index is None else dict(ignore_index=head.ignore_index)
        return F.cross_entropy(
            logits, target, weight=head.weight, reduction=head.reduction,
            label_smoothing=head.label_smoothing, **ignored,
        )  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", CASES)
def test_the_head_is_a_linear_layer(name, rule):
    options = dict(CASES[name])
    target = options.pop("target", INDICES)
    if "out_features" in options:
        target = (INDICES[:, None, None] + torch.arange(6).view(2, 3)) % CLASSES
    model, x = Headed(**options).double(), torch.randn(N, 3).double()
    # Each loss of reduction="none" by a factor of its own.
    total = lambda loss: (loss * torch.arange(1, N + 1)).sum() if loss.dim() else loss
    parts = one_group_at_a_time(
        lambda e: total(model.loss_of(e, x, target)), dict(model.named_parameters()), N
    )
    plain = model(x, target).detach()
    with htv.attach(model, rule):
        loss = model(x, target)
        torch.testing.assert_close(loss.detach(), plain)
        total(loss).backward()
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[parameter], rule), msg=parameter)


class Tied(nn.Module):
    """A language model whose table is the head, in rows (N, T) of tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(7, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, ids):
        h = torch.tanh(self.body(self.table(ids[:, :-1])))
        return F.linear_cross_entropy(
            h.flatten(0, 1), self.table.weight, ids[:, 1:].flatten(), ignore_index=0,
            reduction="sum", options=CHUNKED,
        )  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_head_tied_to_the_embedding(rule):
    model, ids = Tied().double(), torch.randint(0, 7, (5, 4))
    parts = one_group_at_a_time(
        lambda e: model(ids[e : e + 1]), dict(model.named_parameters()), len(ids)
    )
    with htv.attach(model, rule):
        model(ids).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, aggregated(parts[name], rule), msg=name)


def test_an_excluded_or_frozen_head_is_torchs_own():
    """Then the layer below is served, and `options` are those of the call."""
    model, x = Headed(options=CHUNKED).double(), torch.randn(N, 3).double()
    parts = one_group_at_a_time(
        lambda e: model.loss_of(e, x, INDICES), dict(model.named_parameters()), N
    )
    with htv.attach(model, htv.Median(), exclude="head"):
        model(x, INDICES).backward()
    expected = aggregated(parts["below.weight"], htv.Median())
    torch.testing.assert_close(model.below.weight.grad, expected)
    torch.testing.assert_close(model.head.linear.weight.grad, parts["head.linear.weight"].sum(0))


def test_a_compiled_model():
    target, found = INDICES, []
    model, x = Headed(bias=True, options=CHUNKED).double(), torch.randn(N, 3).double()
    for compiled in (False, True):
        model.zero_grad()
        with htv.attach(model, htv.Median()):
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            run(x, target).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_were_mixed_are_refused():
    class Mixed(Headed):
        def forward(self, x, target):
            h = self.below(x)
            return self.head(h - h.mean(0), target)

    model, x = Mixed().double(), torch.randn(N, 3).double()
    with htv.attach(model, htv.Median()):
        with pytest.raises(htv.UnsupportedError, match="'head.linear.weight'.*not known any more"):
            model(x, INDICES)
    with htv.attach(model, htv.Median(), exclude="head"):
        model(x, INDICES).backward()


def test_every_argument_is_passed_on():
    """The handler binds by name: an argument torch adds is not dropped silently."""
    known = {
        "input", "linear_weight", "target", "linear_bias", "weight", "reduction", "ignore_index",
        "label_smoothing", "options",
    }  # fmt: skip
    assert set(inspect.signature(F.linear_cross_entropy).parameters) == known
