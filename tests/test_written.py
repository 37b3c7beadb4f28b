"""Parameters written into the batch or written to by it, sparse ones, and loops over the examples.

Every case is compared with one example at a time, under rules that mask and that rank.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from support.layer_table import Module
from support.oracles import assert_exact_by_example
from support.quick import RULES


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs)


def where_positive(m, x):
    y = m.l(x)
    y[x[..., 0] > 0] = m.p
    return m.h(y)


def into_data(m, x):
    y = x.clone()
    y[:, 0] = m.p
    return m.h(torch.tanh(y) + m.l(x))


def in_front(m, x):
    y = m.l(x)
    y[:, 0] = m.p
    return m.h(y)


def a_row_for_each_place(m, x):
    y = m.l(x).clone()
    y[:, 1:3] = m.q
    return m.h(y)


def some_features(m, x):
    y = m.l(x).clone()
    y[..., [0, 2]] = m.p.exp()[:2]
    return m.h(y)


def one_number(m, x):
    y = m.l(x).clone()
    y[:, 2, 1] = m.s
    return m.h(y)


def table_times(m, x):
    y = F.embedding(torch.arange(4).repeat(len(x), 1) + 0, m.q.repeat(2, 1)).clone()
    y *= m.l(x)
    return m.h(y)


def prompts_times(m, x):
    y = F.embedding(torch.tensor([[0, 1, 1, 0]]).expand(len(x), 4), m.q)
    y *= m.l(x)
    return m.h(y)


def repeated_plus(m, x):
    y = m.p.exp().repeat(len(x), 4, 1)
    other = y
    y += m.l(x)
    return m.h(other * y)


def viewed_before(m, x):
    y = m.p.exp().repeat(len(x), 4, 1)
    view = y[:, 1:]
    y.mul_(m.l(x))
    return m.h(view)


def sparse_times(m, x):
    indices = torch.tensor([[0, 1, 5, 2], [3, 1, 0, 2]])
    weight = torch.sparse_coo_tensor(indices, m.q.flatten()[:4], (6, 6)).coalesce()
    return m.h(torch.sparse.mm(weight, m.l(x).flatten(0, 1).t()).t().reshape(x.shape))


def sparse_behind(m, x):
    weight = torch.sparse_coo_tensor(torch.tensor([[0, 1, 5, 2], [3, 1, 0, 2]]), m.p[:4], (6, 6))
    return m.h((weight @ m.l(x).flatten(0, 1).t()).t().reshape(x.shape))


def pooled_one_by_one(m, x):
    y = m.l(x)
    return m.h(torch.stack([y[e].max(0).values for e in range(len(y))]))


def layers_one_by_one(m, x):
    return torch.stack([m.h(m.l(e).mean(0)) for e in x])


def attention_one_by_one(m, x):
    made = []
    for e in m.l(x).unbind(0):
        made.append((torch.softmax(e @ e.t(), -1) @ e).sum(0))
    return m.h(torch.stack(made) * m.p)


def recurrence_one_by_one(m, x):
    made = []
    for e in x:
        state = torch.zeros(6, dtype=x.dtype)
        for token in e:
            state = torch.tanh(m.l(token) + state)
        made.append(state)
    return m.h(torch.stack(made))


def padded_one_by_one(m, x):
    lengths = (1 + 2 * (x[:, 0, 0] > 0)).tolist()
    rows = [row[:length] for row, length in zip(m.l(x).unbind(0), lengths, strict=True)]
    by_time = torch.nn.utils.rnn.pad_sequence([row[:1] for row in rows], padding_value=2.0)
    left = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    return m.h(left.sum(1) + by_time.squeeze(0))


def written_one_by_one(m, x):
    y = m.l(x)
    made = y.new_zeros(len(x), 6)
    for e in range(len(x)):
        made[e] = y[e].amax(0)
    return m.h(made)


SERVED = [
    where_positive, into_data, in_front, a_row_for_each_place, some_features, one_number,
    table_times, prompts_times, repeated_plus, viewed_before, sparse_times, sparse_behind,
    pooled_one_by_one, layers_one_by_one, attention_one_by_one, recurrence_one_by_one,
    written_one_by_one, padded_one_by_one,
]  # fmt: skip


def made(run):
    parts = dict(p=torch.randn(6), q=torch.randn(2, 6), s=torch.randn(()))
    return Module(run, l=linear(6, 6), h=linear(6, 3), **parts).double()


@pytest.mark.parametrize("size", [1, 4, 5, 6], ids=["1", "N == T", "N", "N == D"])
@pytest.mark.parametrize("run", SERVED, ids=lambda run: run.__name__)
def test_as_one_example_at_a_time(run, size):
    model, x = made(run), torch.randn(size, 4, 6).double()
    direction = torch.randn(model(x).shape).double()
    loss = lambda rows: (model(x[rows]) * direction[rows]).sum()
    assert_exact_by_example(model, loss, size, RULES if size > 1 else RULES[:1])


def sum_so_far(m, x):
    total, sums = 0, []
    for e in m.l(x):
        total = total + e.mean(0)
        sums.append(total)
    return m.h(torch.stack(sums))


def beside_another(m, x):
    y = m.l(x)
    return m.h(torch.cat([y[..., :3], y.flip(0)[..., 3:]], -1))


def next_one(m, x):
    rows = list(m.l(x))
    return m.h(torch.stack([a.mean(0) * b.mean(0) for a, b in zip(rows, rows[1:], strict=False)]))


def into_an_expanded_parameter(m, x):
    y = m.p.exp().expand(len(x), 4, 6)
    return m.h(y.mul_(m.l(x)))


def into_another_place(m, x):
    y = m.l(x)
    made = y.new_zeros(len(x), 6)
    for e in range(len(x)):
        made[len(x) - 1 - e] = y[e].amax(0)
    return m.h(made)


@pytest.mark.parametrize("run", [sum_so_far, next_one, beside_another, into_another_place])
def test_loops_that_bring_examples_together_are_refused(run):
    model = made(run)
    with htv.attach(model, htv.Median()), pytest.raises(htv.UnsupportedError, match="'h.weight'"):
        model(torch.randn(5, 4, 6).double())


def test_what_is_expanded_is_not_written_to():
    model, x = made(into_an_expanded_parameter), torch.randn(5, 4, 6).double()
    with htv.attach(model, htv.Median()):
        with pytest.raises(htv.UnsupportedError, match="'p' is used by mul.*in place.*y = y \\* x"):
            model(x)
