"""What model code does now and then: each is served as one example at a time would be, or refused
by name.

The oracle takes the loss of one example's rows of the whole batch's output, so that a model may
depend on the size of its batch.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from support.layer_table import Module
from support.oracles import assert_exact_by_example
from support.quick import RULES

N = 5


def meshgrid_of_parameters(m, x):
    grid = torch.stack(torch.meshgrid(m.p[:4], m.p, indexing="ij"), -1)
    return m.h(m.l(x) + grid.sum(-1))


def block_diagonal_weight(m, x):
    return m.h(F.linear(m.l(x), torch.block_diag(m.q[:, :3], m.w[:4, :3])))


def another_weight_by_functional_call(m, x):
    weight = m.l.weight * m.p
    return m.h(torch.func.functional_call(m.l, {"weight": weight, "bias": m.l.bias}, (x,)))


def weights_of_each_example_by_functional_call(m, x):
    made = m.g(x.mean(1)).reshape(len(x), 6, 6)
    bias = m.l.bias
    calls = [
        torch.func.functional_call(m.l, {"weight": made[e], "bias": bias}, (x[e],))
        for e in range(len(x))
    ]
    return m.h(torch.stack(calls))


def weights_made_of_parameters(m, x):
    return m.h(F.linear(x, m.g(m.p).reshape(6, 6)))


def weights_made_of_the_batch(m, x):
    return m.h(torch.bmm(x, m.g(x.mean(1)).reshape(-1, 6, 6)))


def mixed_experts_in_one_convolution(m, x):
    kernels = (x.mean(1) @ m.w).softmax(-1) @ m.w.t()
    kernels = kernels[:, None, :4, None].expand(-1, 3, -1, -1).reshape(-1, 4, 1)
    y = F.conv1d(m.l(x).reshape(1, -1, 6), kernels, groups=len(x))
    return m.h(y.reshape(len(x), 3, 6))


def a_complex_scale(m, x):
    return m.h((torch.fft.fft(m.l(x), dim=-1) * torch.complex(m.p, m.p.sin())).real)


def a_real_view_of_complex_parameters(m, x):
    filters = torch.view_as_complex(m.w[:, :2].contiguous())
    return m.h(torch.fft.ifft(torch.fft.fft(m.l(x), dim=-1) * filters, dim=-1).real)


def tied_by_a_property(m, x):
    return m.h(F.linear(torch.tanh(m.l(x)), property(lambda m: m.l.weight.t()).fget(m)))


def a_masked_mean(m, x):
    return m.h(torch.masked.mean(m.l(x), 1, mask=x > -9, keepdim=True) + m.l(x))


def a_masked_softmax(m, x):
    return m.h(torch.masked.softmax(m.l(x), 1, mask=x > -9))


def mapped_without_parameters(m, x):
    return m.h(torch.func.vmap(lambda e: e.softmax(-1))(m.l(x)))


def strided_by_hand(m, x):
    y = m.l(x).contiguous()
    return m.h(y.as_strided((4, len(x), 6), (6, 24, 1)).transpose(0, 1))


def windows_and_back(m, x):
    y = m.l(x).reshape(-1, 2, 2, 6).permute(2, 0, 1, 3).reshape(-1, 2, 6)
    return m.h(y.reshape(2, -1, 2, 6).permute(1, 0, 2, 3).flatten(1, 2))


def values_through_a_list(m, x):
    return m.h(m.l(x) + torch.tensor(x.tolist(), dtype=x.dtype))


SERVED = [
    meshgrid_of_parameters, block_diagonal_weight, another_weight_by_functional_call,
    weights_of_each_example_by_functional_call, weights_made_of_parameters,
    weights_made_of_the_batch, mixed_experts_in_one_convolution, a_complex_scale,
    a_real_view_of_complex_parameters, tied_by_a_property, a_masked_mean, a_masked_softmax,
    mapped_without_parameters, strided_by_hand, windows_and_back, values_through_a_list,
]  # fmt: skip


def made(run):
    parts = dict(p=torch.randn(6), q=torch.randn(2, 6), w=torch.randn(6, 4))
    return Module(run, l=nn.Linear(6, 6), h=nn.Linear(6, 3), g=nn.Linear(6, 36), **parts).double()


def assert_served(run, size=N):
    model, x = made(run), torch.randn(size, 4, 6).double()
    direction = torch.randn(model(x).shape).double()
    loss = lambda rows: (model(x) * direction)[rows].sum()
    assert_exact_by_example(model, loss, size, RULES)


@pytest.mark.parametrize("size", [4, 5, 6], ids=["N == T", "N", "N == D"])
@pytest.mark.parametrize("run", SERVED, ids=lambda run: run.__name__)
def test_idioms_that_are_served(run, size):
    assert_served(run, size)


def transposed_in_place(m, x):
    y = m.l(x).clone()
    y.transpose_(1, 2)
    y.transpose_(1, 2)
    return m.h(y)


def transposed(m, x):
    return m.h(m.l(x).clone().transpose(1, 2).transpose(1, 2))


def segments_of_rows(m, x):
    lengths = torch.full((len(x), 2), 2)
    return m.h(torch.segment_reduce(m.l(x), "sum", lengths=lengths, axis=1))


def segments_by_a_view(m, x):
    return m.h(m.l(x).unflatten(1, (2, 2)).sum(2))


def meshgrid_of_the_batch(m, x):
    y = m.l(x)[:, 0, 0]
    return m.h(torch.meshgrid(y, m.p.detach(), indexing="ij")[0])


def meshgrid_by_expand(m, x):
    return m.h(m.l(x)[:, 0, :1].expand(-1, 6))


def a_layer_that_is_mapped(m, x):
    return m.h(torch.func.vmap(lambda e: m.l(e).tanh())(x))


def the_layer_itself(m, x):
    return m.h(m.l(x).tanh())


def nested(m, x):
    parts = [row[:2] for row in m.l(x).unbind(0)]
    rows = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    return m.h(rows.to_padded_tensor(0.0))


def padded(m, x):
    return m.h(torch.nn.utils.rnn.pad_sequence(list(m.l(x)[:, :2].unbind(0)), batch_first=True))


def masked_tensors(m, x):
    held = torch.masked.as_masked_tensor(m.l(x), x > -9)
    return m.h(held.mean(1).get_data())


def masked_functions(m, x):
    return m.h(torch.masked.mean(m.l(x), 1, mask=x > -9))


def of_the_whole_batch(m, x):
    return F.linear(m.l(x), m.g(x.mean((0, 1))).reshape(6, 6))


REFUSED = [
    (transposed_in_place, "'transpose' at", transposed),
    (segments_of_rows, "'segment_reduce' at", segments_by_a_view),
    (meshgrid_of_the_batch, "'meshgrid' at", meshgrid_by_expand),
    (a_layer_that_is_mapped, "torch.vmap", the_layer_itself),
    (nested, "'nested_view_from_jagged' at", padded),
    (masked_tensors, "the custom autograd.Function", masked_functions),
    (of_the_whole_batch, "'mean' at", None),
]


@pytest.mark.parametrize("run, words, instead", REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_idioms_that_are_refused_and_their_remedies(run, words, instead):
    with htv.attach(model := made(run), htv.Median()):
        with pytest.raises(htv.UnsupportedError, match=words):
            model(torch.randn(N, 4, 6).double())
    if instead is not None:
        assert_served(instead)
