"""htv::together against the ops that serve its parameters one by one, and who takes which way."""

import pytest
import torch

import htv
from htv.ops import aggregate, backend, schema
from htv.ops.factors import LinearFactors, StackedFactors
from htv.ops.statistics import resolve
from support.oracles import RULES, by_name

SERVED = [rule for rule in RULES if schema.code(resolve(rule, 5).name) not in (6, 10)]


def operands(sizes, dtype, seed=0):
    """Of groups with so many rows: stacks, pairs, offsets."""
    torch.manual_seed(seed)
    groups, rows = len(sizes), sum(sizes)
    grads = [torch.randn(groups, n, dtype=dtype) for n in (3, 0, 40)]
    x = [torch.randn(rows, n, dtype=dtype) for n in (4, 33, 0)]
    grad_output = [torch.randn(rows, n, dtype=dtype) for n in (17, 1, 5)]
    return grads, x, grad_output, torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1,) * 7, (2, 0, 1, 5)], ids=["one row each", "several"])
@pytest.mark.parametrize("rule", SERVED, **by_name)
def test_is_what_the_ops_for_one_answer(rule, sizes, dtype):
    grads, x, grad_output, offsets = operands(sizes, dtype)
    numbers = schema.numbers(resolve(rule, len(sizes)))
    found = torch.ops.htv.together(grads, x, grad_output, offsets, *numbers)
    single = [torch.ops.htv.stacked(g, *numbers)[0] * len(sizes) for g in grads]
    pairs = zip(x, grad_output, strict=True)
    single += [torch.ops.htv.linear(*pair, offsets, *numbers)[0] for pair in pairs]
    assert len(found) == len(single)
    for value, expected in zip(found, single, strict=True):
        assert value.is_contiguous()
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    memory = [value.untyped_storage().data_ptr() for value in found if value.numel()]
    assert len(set(memory)) == len(memory)  # of their own: `.grad` may keep them


def test_needs_no_offsets_without_layers():
    grads, _, _, _ = operands((1,) * 5, torch.float32)
    numbers = schema.numbers(resolve(htv.Median(), 5))
    found = torch.ops.htv.together(grads, [], [], None, *numbers)
    for value, one in zip(found, grads, strict=True):
        torch.testing.assert_close(value, 5 * torch.ops.htv.stacked(one, *numbers)[0])


def test_refuses_groups_that_differ():
    grads, x, grad_output, offsets = operands((1,) * 5, torch.float32)
    numbers = schema.numbers(resolve(htv.AndMask(0.4), 5))
    with pytest.raises((RuntimeError, ValueError), match="htv::together"):
        torch.ops.htv.together([*grads, grads[0][:4]], x, grad_output, offsets, *numbers)
    with pytest.raises((RuntimeError, ValueError), match="htv::together"):
        torch.ops.htv.together([grads[0][:4]], x, grad_output, offsets, *numbers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    numbers = schema.numbers(resolve(htv.AndMask(0.4), 4))
    given = operands((2, 0, 1, 5), dtype)
    torch.library.opcheck(torch.ops.htv.together.default, (*given, *numbers))


def contributions():
    """Of parameters that may share a call, and of some that may not."""
    torch.manual_seed(1)
    each, pairs = torch.arange(9), torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 8])
    layer = LinearFactors(torch.randn(8, 4), torch.randn(8, 3), each)
    return [
        [layer],
        [StackedFactors(torch.randn(8, 3))],
        [LinearFactors(torch.randn(3, 8).t(), torch.randn(5, 8).t(), each)],
        [LinearFactors(torch.randn(8, 4), torch.randn(8, 3), pairs)],  # other bounds
        [StackedFactors(torch.randn(2, 2, 8).movedim(2, 0))],
        [layer, LinearFactors(torch.randn(8, 4), torch.randn(8, 3), each)],  # two uses
        [LinearFactors(torch.randn(8, 0), torch.randn(8, 3), each)],
        [LinearFactors(torch.randn(8, 2).double(), torch.randn(8, 2).double(), each)],
        [LinearFactors(torch.randn(8, 2).bfloat16(), torch.randn(8, 2).bfloat16(), each)],
    ]


@pytest.mark.parametrize("server", ["auto", "reference"])
@pytest.mark.parametrize("rule", RULES, **by_name)
def test_every_parameter_gets_what_it_gets_alone(rule, server):
    batches = contributions()
    with htv.use_backend(server):
        found = aggregate.aggregate_together(batches, rule)
        for parts, grad in zip(batches, found, strict=True):
            expected = aggregate.aggregate(parts, rule)
            assert grad.shape == parts[0].shape and grad.dtype == expected.dtype
            torch.testing.assert_close(grad, expected)


@pytest.mark.skipif(backend.NOT_BUILT is not None, reason="built without compiled kernels")
def test_a_small_model_takes_one_call(monkeypatch):
    operator, calls = torch.ops.htv.together.default, []

    def counted(grads, x, *others):
        calls.append((len(grads), len(x)))
        return operator(grads, x, *others)

    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    monkeypatch.setattr(backend, "operator", lambda op, server: {"together": counted}[op])
    backend.forget_choices()
    with htv.attach(model, htv.AndMask(0.4)):
        model(torch.randn(6, 5)).square().mean().backward()
    backend.forget_choices()
    assert calls == [(2, 2)]
