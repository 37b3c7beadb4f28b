"""Micro-batches inside `handle.accumulate()` vote as one large batch does."""

import copy
import warnings

import pytest
import torch
from test_attach import Module
from torch import nn
from torch.utils.checkpoint import checkpoint

import htv
from htv.bench.models import mlp
from htv.ops import aggregate, backend
from support import rank_models
from support.agreements import assert_agreements
from support.oracles import RULES, by_name

STREAMING = [rule for rule in RULES if rule.streaming]
ORDER = [rule for rule in RULES if not rule.streaming and not isinstance(rule, htv.MedianOfMeans)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def large_batch(model, x, rule, ids=None):
    model.zero_grad()
    with htv.attach(model, rule) as handle:
        with handle.groups(torch.arange(len(x)) if ids is None else ids):
            loss = model(x).square().sum() / len(x)
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    return found


def accumulated(model, x, rule, sizes, ids=None):
    """One block of micro-batches of these sizes."""
    ids = torch.arange(len(x)) if ids is None else ids
    with htv.attach(model, rule) as handle:
        with handle.accumulate():
            for part, own in zip(x.split(sizes), ids.split(sizes), strict=True):
                with handle.groups(own):
                    (model(part).square().sum() / len(x)).backward()
                assert all(p.grad is None for p in model.parameters())
    return gradients(model)


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("rule", STREAMING, **by_name)
@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 6, 2, 3], [12]], ids=str)
def test_streaming_rules_equal_one_large_batch(rule, sizes):
    model, x = mlp().double(), torch.randn(12, 12).double()
    assert_equal_gradients(accumulated(model, x, rule, sizes), large_batch(model, x, rule))


def test_groups_of_several_examples():
    model, x = mlp().double(), torch.randn(12, 12).double()
    ids = torch.tensor([3, 1, 3, 1, 7, 7, 5, 5, 9, 5, 9, 9])
    rule = htv.AndMask(0.5)
    assert_equal_gradients(
        accumulated(model, x, rule, [6, 6], ids), large_batch(model, x, rule, ids)
    )


@pytest.mark.skipif(backend.NOT_BUILT is not None, reason="htv was built without compiled kernels")
@pytest.mark.parametrize("rule", STREAMING, **by_name)
def test_layers_that_kernels_serve_are_passed_over_once(rule, monkeypatch):
    """Neither group by group nor slice by slice, nor for sum and votes apart."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    x = torch.randn(6, 3, 6, 6)

    def refused(*arguments):
        raise AssertionError("there is a kernel for it")

    expected = large_batch(model, x, rule)
    for module, name in (
        (aggregate, "_summary_by_group"),
        (aggregate, "_one_use"),
        (aggregate.sliced, "summary"),
    ):
        monkeypatch.setattr(module, name, refused)
    found = accumulated(model, x, rule, [2, 4])
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_median_of_means_takes_micro_batches_as_buckets():
    model, x, rule = mlp().double(), torch.randn(12, 12).double(), htv.MedianOfMeans(3)
    assert_equal_gradients(accumulated(model, x, rule, [4, 4, 4]), large_batch(model, x, rule))
    with pytest.raises(RuntimeError, match="needs 3 micro-batches"):
        accumulated(model, x, rule, [6, 6])
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_some_micro_batches_do_not_reach():
    """Its groups there count as such that contribute nothing."""
    experts = lambda m, x: m.a(x) if bool((x[:, 0] > 0).all()) else m.b(x)
    model = Module(experts, a=nn.Linear(3, 2), b=nn.Linear(3, 2)).double()
    x = torch.randn(9, 3).double()
    x[:4, 0], x[4:, 0] = x[:4, 0].abs(), -x[4:, 0].abs()
    both = lambda m, x: torch.where(x[:, :1] > 0, m.a(x), m.b(x))
    for rule in (htv.AndMask(0.3), htv.GeometricMean(0.3), htv.SandMask(0.3, 0.5)):
        found = accumulated(model, x, rule, [4, 5])
        model.function = both
        assert_equal_gradients(found, large_batch(model, x, rule))
        model.function = experts
        model.zero_grad()


@pytest.mark.parametrize("rule", ORDER, **by_name)
def test_order_rules_are_refused_and_name_median_of_means(rule):
    with htv.attach(mlp(), rule) as handle:
        with (
            pytest.raises(ValueError, match=r"'0.weight'.*MedianOfMeans\(k\)"),
            handle.accumulate(),
        ):
            pass


def test_what_was_in_grad_before_stays():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    expected = large_batch(model, x, htv.AndMask(0.4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = accumulated_over(model, x, htv.AndMask(0.4))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad + 1)


def accumulated_over(model, x, rule):
    with htv.attach(model, rule) as handle, handle.accumulate():
        for part in x.split(2):
            (model(part).square().sum() / len(x)).backward()
    return gradients(model)


def test_a_block_that_raises_leaves_nothing_behind():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        with pytest.raises(ZeroDivisionError), handle.accumulate():
            model(x).sum().backward()
            raise ZeroDivisionError
        assert all(p.grad is None for p in model.parameters())
        model(x).square().sum().backward()
        found = gradients(model)
        model.zero_grad()
        with handle.accumulate():
            model(x).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, found[name])


def test_misuse_is_refused():
    model, x = mlp(), torch.randn(6, 12)
    with htv.attach(model, htv.AndMask(0.4)) as handle:
        with pytest.raises(RuntimeError, match="nested"), handle.accumulate(), handle.accumulate():
            pass
        with pytest.raises(RuntimeError, match="call backward"), handle.accumulate():
            torch.autograd.grad(model(x).sum(), list(model.parameters()))
        with pytest.raises(ValueError, match="id occurs in two micro-batches"), handle.accumulate():
            for _ in range(2):
                with handle.groups(torch.arange(6)):
                    model(x).sum().backward()
        with pytest.raises(ValueError, match="tokens"), handle.accumulate(), handle.tokens():
            model(x).sum().backward()
        with (
            pytest.raises(ValueError, match="same number of examples per group"),
            handle.accumulate(),
        ):
            for ids in (torch.arange(6), torch.tensor([7, 7, 7, 8, 8, 9])):
                with handle.groups(ids, weight="equal"):
                    model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_do_not_vote_twice(reentrant):
    """A reentrant checkpoint has a backward pass of its own, inside the other."""
    model = rank_models.Checkpointed(reentrant).double()
    x, y = rank_models.batch()
    rule, found = htv.AndMask(0.4), {}
    for sizes in ([12], [4, 4, 4]):
        with htv.attach(model, rule) as handle, handle.accumulate():
            for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
                loss = nn.functional.cross_entropy(model(part), labels, reduction="sum")
                (loss / len(x)).backward()
        found[len(sizes)] = gradients(model)
        model.zero_grad()
    with htv.attach(model, rule):
        nn.functional.cross_entropy(model(x), y).backward()
    for grads in found.values():
        assert_equal_gradients(grads, gradients(model))


def test_a_long_block_with_finish():
    model, x = nn.Linear(3, 2).double(), torch.randn(12, 3).double()
    rule = htv.AndMask(0.5)
    with htv.attach(model, rule) as handle, handle.accumulate():
        for part in x.split(6):
            for micro in part.split(2):
                (model(micro).square().sum() / 6).backward()
            handle.finish()
            found = gradients(model)
            handle.finish()  # nothing waits
            assert gradients(model) == found
            model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert_equal_gradients(found, large_batch(model, x[6:], rule))


def test_a_vote_onto_the_aggregate_of_the_last_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    with htv.attach(model, htv.AndMask(0.5)) as handle:
        with pytest.raises(RuntimeError, match=r"finish\(\) outside accumulate"):
            handle.finish()
        holds = r"'(bias|weight)' holds the aggregate.*zero_grad"
        with pytest.raises(RuntimeError, match=holds), handle.accumulate():
            model(x).square().sum().backward()
            handle.finish()
            model(x).square().sum().backward()
        model.zero_grad(set_to_none=False)
        with handle.accumulate():
            model(x).square().sum().backward()


def test_a_checkpoint_in_the_middle_of_a_step_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    with htv.attach(model, htv.AndMask(0.5)) as handle, handle.accumulate():
        model.state_dict()
        model(x).square().sum().backward()
        with pytest.raises(RuntimeError, match=r"state_dict\(\) in the middle of a step: 1 back"):
            model.state_dict()
        copy.deepcopy(model).state_dict()
        handle.finish()
        model.state_dict()
    assert not model._state_dict_pre_hooks


def test_excluded_parameters_accumulate_plainly():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    plain = torch.autograd.grad(model(x).sum(), model.bias)[0]
    with htv.attach(model, htv.AndMask(0.4), exclude="bias") as handle, handle.accumulate():
        for part in x.split(2):
            model(part).sum().backward()
    torch.testing.assert_close(model.bias.grad, plain)


def test_detaching_inside_drops_what_was_gathered():
    model = nn.Linear(2, 1)
    handle = htv.attach(model, htv.AndMask(0.5))
    with handle.accumulate():
        model(torch.randn(3, 2)).mean().backward()
        handle.detach()
    assert model.weight.grad is None


def test_one_group_alone_may_be_told_of_once():
    model = nn.Linear(2, 1)
    with htv.attach(model, htv.AndMask(0.5), allow_single="warn"):
        with pytest.warns(UserWarning, match="one group alone votes"):
            model(torch.ones(1, 2)).mean().backward()
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.ones(1, 2)).mean().backward()
    with pytest.raises(ValueError, match="allow_single must be"):
        htv.attach(model, htv.AndMask(0.5), allow_single="maybe")


def test_a_reentrant_checkpoint_votes_once():
    """Its part of the backward is a pass of its own, inside the one of its micro-batch."""
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)]).double()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            x = self.parts[0](x).relu()
            x = checkpoint(lambda h: self.parts[1](h).relu(), x, use_reentrant=True)
            return self.parts[2](x)

    model, x = Checkpointed(), torch.randn(6, 5, dtype=torch.float64)
    expected = large_batch(model, x, htv.AndMask(0.5))
    model.zero_grad()
    with htv.attach(model, htv.AndMask(0.5)) as handle, handle.accumulate():
        for part in x.chunk(3):
            (model(part).square().sum() / len(x)).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)


class Leaving(nn.Module):
    """Layers of several kinds, the last of which is for `some` of the examples: for all, for none,
    or by a column of zeros and ones.
    """

    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 4, 2)
        self.norm, self.last, self.some = nn.LayerNorm(4), nn.Linear(4, 4), True

    def forward(self, ids):
        x = self.norm(self.conv(self.words(ids).transpose(1, 2)).mean(dim=2))
        return x if self.some is False else x + self.last(x).tanh() * self.some


@pytest.mark.parametrize("rule", [*STREAMING, htv.MedianOfMeans(3)], **by_name)
@pytest.mark.parametrize("leaves", [False, True], ids=["", "a layer left out of the second"])
def test_how_far_all_micro_batches_agree(rule, leaves):
    """As the contributions of one batch do, where a layer left out contributes zeros."""
    model, ids = Leaving().double(), torch.randint(0, 9, (12, 5))
    with htv.attach(model, rule, stats=True) as handle:
        with handle.accumulate():
            for i, part in enumerate(ids.split(4)):
                model.some = not (leaves and i == 1)
                (model(part).square().sum() / 12).backward()
                assert handle.stats() == {}  # the vote has not ended
        found = handle.stats()
    model.zero_grad()
    model.some = torch.ones(12, 1, dtype=torch.float64)
    if leaves:
        model.some[4:8] = 0
    with htv.attach(model, rule, stats=True) as handle:
        (model(ids).square().sum() / 12).backward()
        assert_agreements(found, handle.stats())


def test_how_far_examples_agreed_is_of_the_last_vote():
    model, x = nn.Linear(3, 2).double(), torch.randn(12, 3).double()
    with htv.attach(model, htv.AndMask(0.5), stats=True) as handle, handle.accumulate():
        for part in x.split(6):
            for i, micro in enumerate(part.split(2)):
                (model(micro).square().sum() / 6).backward()
                if i == 1:
                    before = handle.stats()
            handle.finish()
            model.zero_grad()
        found = handle.stats()
        assert before.keys() == found.keys() and before != found
    with htv.attach(model, htv.AndMask(0.5), stats=True) as handle:
        for part, told in zip(x.split(6), (before, found), strict=True):
            (model(part).square().sum() / 6).backward()
            model.zero_grad()
            assert_agreements(told, handle.stats())
