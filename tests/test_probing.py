"""Where the batch is after one call that moves, joins, picks or writes parts of it."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from htv.engine import torch_ops
from htv.engine.probing import WRITING
from htv.engine.provenance import LOST
from htv.groups import BatchLayout
from support.layout_cases import (
    Operand,
    assert_all_marks,
    assert_all_of_one,
    case,
    constant,
    given,
    ids,
    names_in,
)

SIZES = [(3, 3), (3, 5), (4, 2)]  # examples and positions: as many, more, fewer


def picked(*batch_size):
    return BatchLayout(0, examples=torch.tensor(batch_size))


def whole(*values):
    """Constant ids."""
    return Operand(None, torch.tensor(values))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For calls this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# fmt: off
def permuting(n, p):
    x = lambda: given(0, n, p, 2)
    yield case("transpose", lambda x: x.transpose(0, 1), x(), 1)
    yield case("transpose back", lambda x: x.transpose(1, 0), given(1, p, n, 2), 0)
    yield case("transpose others", lambda x: x.transpose(-1, -2), x(), 0)
    yield case("transpose, named", lambda x: torch.transpose(x, dim0=-1, dim1=0), x(), 2)
    yield case("permute", lambda x: x.permute(2, 0, 1), x(), 1)
    yield case("permute, a tuple", lambda x: x.permute((1, -1, 0)), x(), 2)
    yield case("permute, a function", lambda x: torch.permute(x, (1, 0, 2)), x(), 1)
    yield case("permute, merged", lambda x: x.permute(2, 1, 0),
               given(BatchLayout(0, 2, 3), 6 * n, p, 2), BatchLayout(2, 2, 3))
    backwards = torch.arange(n).flip(0)
    yield case("permute, picked", lambda x: x.permute(1, 0),
               given(BatchLayout(0, examples=backwards), n, p),
               BatchLayout(1, examples=backwards))
    yield case("swapaxes", lambda x: x.swapaxes(0, 2), x(), 2)
    yield case("swapdims", lambda x: torch.swapdims(x, 0, 1), x(), 1)
    yield case("movedim", lambda x: x.movedim(0, -1), x(), 2)
    yield case("movedim, several", lambda x: x.movedim((0, 1), (2, 0)), x(), 2)
    yield case("moveaxis", lambda x: torch.moveaxis(x, 1, 0), x(), 1)
    for name in ("T", "H"):
        yield case(name, lambda x, name=name: getattr(x, name), given(0, n, p), 1)
    for name in ("mT", "mH"):
        yield case(name, lambda x, name=name: getattr(x, name), given(1, 2, n, p), 2)
    yield case("t", lambda x: x.t(), given(1, p, n), 0)
    yield case("adjoint", lambda x: x.adjoint(), given(2, 2, p, n), 1)
    yield case("in place", lambda x: x.clone().transpose_(0, 1), x(), LOST,
               given_up="its old shape is gone")


def reshaping(n, p):
    m = 2 * n
    yield case("flatten with before", lambda x: x.flatten(0, 1), given(1, p, n, 2),
               BatchLayout(0, p))
    yield case("flatten with behind", lambda x: x.flatten(1), given(1, p, n, 2),
               BatchLayout(1, 1, 2))
    yield case("flatten all", lambda x: x.flatten(), given(1, p, n, 2), BatchLayout(0, p, 2))
    yield case("reshape with both", lambda x: x.reshape(2, -1, 1), given(2, 2, p, n, 3),
               BatchLayout(1, p, 3))
    yield case("unflatten before", lambda x: x.unflatten(0, (2, -1)),
               given(BatchLayout(0, 2, 3), 6 * n, 4), BatchLayout(1, 1, 3))
    yield case("unflatten behind", lambda x: x.unflatten(0, (2 * n, 3)),
               given(BatchLayout(0, 2, 3), 6 * n, 4), BatchLayout(0, 2))
    yield case("unflatten both", lambda x: x.view(2, n, 3, 4),
               given(BatchLayout(0, 2, 3), 6 * n, 4), 1)
    yield case("units cut in two", lambda x: x.view(m, 2), given(0, n, 4), BatchLayout(0, 1, 2))
    yield case("other dims", lambda x: x.view(n, 2, p), given(0, n, 2 * p), 0)
    yield case("units mixed", lambda x: x.view(n + 1, n), given(0, n, n + 1), LOST)
    yield case("units mixed behind", lambda x: x.reshape(p, n, 2), given(0, n, 2, p),
               0 if p == n else LOST)
    yield case("units mixed, merged", lambda x: x.view(n, 2), given(BatchLayout(0, 2), m), LOST)
    yield case("units mixed before", lambda x: x.reshape(2, n, 6), given(1, 3, n, 4), LOST)
    yield case("view_as", lambda x, y: x.view_as(y), [given(0, n, 2 * p), constant(n, 2, p)], 0)
    yield case("reshape_as", lambda x, y: x.reshape_as(y), [given(1, 2, n, p), constant(m, p)],
               BatchLayout(0, 2))
    yield case("unsafe_view", lambda x: torch.ops.aten._unsafe_view(x, [m, p]), given(1, 2, n, p),
               BatchLayout(0, 2))
    yield case("squeeze", lambda x: x.squeeze(), given(1, 1, n, 1, p), 0)
    yield case("squeeze a dim", lambda x: x.squeeze(-2), given(1, 1, n, 1, p), 1)
    backwards = torch.arange(n).flip(0)
    mine = lambda *shape: given(BatchLayout(0, examples=backwards), *shape)
    twice = backwards.repeat_interleave(2)
    yield case("picked, cut in two", lambda x: x.view(m, p), mine(n, 2 * p),
               BatchLayout(0, examples=twice))
    yield case("picked, joined", lambda x: x.view(n, 2, p),
               given(BatchLayout(0, examples=twice), m, p), BatchLayout(0, examples=backwards))
    yield case("picked, other dims", lambda x: x.view(n, 2, p), mine(n, 2 * p),
               BatchLayout(0, examples=backwards))
    yield case("picked, behind a new dim", lambda x: x.reshape(1, n, p), mine(n, p),
               BatchLayout(1, examples=backwards))
    yield case("picked, mixed", lambda x: x.view(2, n),
               given(BatchLayout(0, examples=twice.roll(1)), m),
               LOST)
    yield case("picked, with before", lambda x: x.flatten(0, 1),
               given(BatchLayout(1, examples=backwards), 2, n, p), LOST,
               given_up="what was picked is not followed there")
    yield case("unsqueeze", lambda x: x.unsqueeze(0), given(0, n, p), 1)
    yield case("unsqueeze at it", lambda x: x.unsqueeze(1), given(1, p, n), 2)
    yield case("unsqueeze behind", lambda x: x.unsqueeze(-1), given(1, p, n), 1)
    yield case("unsqueeze right behind", lambda x: x.unsqueeze(dim=1), given(0, n, p), 0)
    yield case("unsqueeze, NumPy's axis", lambda x: torch.unsqueeze(x, axis=0), given(0, n, p), 1)
    yield case("unsqueeze in place", lambda x: x.clone().unsqueeze_(0), given(0, n, p), LOST,
               given_up="its old shape is gone")
    yield case("expand", lambda x: x.expand(n, p), given(0, n, 1), 0)
    yield case("expand in front", lambda x: x.expand(n, n, p), given(0, n, p), 1)
    yield case("expand_as", lambda x, y: x.expand_as(y), [given(0, n, 1), constant(p, n, 2)], 1)
    yield case("broadcast_to", lambda x: torch.broadcast_to(x, (n, n, p)), given(0, n, 1), 1)
    yield case("repeat others", lambda x: x.repeat(1, 2), given(0, n, p), 0)
    yield case("repeat it", lambda x: x.repeat(2, 1), given(0, n, p), BatchLayout(0, 2))
    yield case("repeat it, merged", lambda x: x.repeat((2, 1)),
               given(BatchLayout(0, 3, 2), 6 * n, p), BatchLayout(0, 6, 2))
    yield case("repeat in front", lambda x: x.repeat(n, 1, 1), given(0, n, p), 1)
    yield case("repeat in front and it", lambda x: x.repeat(2, 3, 1), given(0, n, p),
               BatchLayout(1, 3))
    yield case("repeat, picked", lambda x: x.repeat(2, 1), mine(n, p),
               BatchLayout(0, examples=backwards.repeat(2)))
    yield case("tile fewer", lambda x: x.tile((2,)), given(0, n, p), 0)
    yield case("tile it", lambda x: torch.tile(x, (2, 1)), given(0, n, p), BatchLayout(0, 2))
    yield case("tile it, last", lambda x: x.tile((2,)), given(1, p, n), BatchLayout(1, 2))


def joining(n, p):
    backwards = torch.arange(n).flip(0)
    pair = [given(0, n, p), given(0, n, p)]
    for name in ("cat", "concat", "concatenate"):
        join = getattr(torch, name)
        yield case(f"{name} others", lambda x, y, f=join: f([x, y], 1), pair, 0)
        yield case(f"{name} with a constant", lambda x, y, f=join: f([y, x], dim=-1),
                   [given(0, n, p), constant(n, 2)], 0)
        yield case(f"{name}, NumPy's axis", lambda x, y, f=join: f((x, y), axis=1), pair, 0)
        yield case(f"{name} it", lambda x, y, f=join: f([x, y]), pair, BatchLayout(0, 2))
        yield case(f"{name} it with a constant", lambda x, y, f=join: f([x, y]),
                   [given(0, n, p), constant(n, p)], LOST)
        yield case(f"{name}, crossed", lambda x, y, f=join: f([x, y]),
                   [given(0, n, n), given(1, n, n)], LOST)
        yield case(f"{name} orders", lambda x, y, f=join: f([x, y]),
                   [given(0, n, p), given(BatchLayout(0, examples=backwards), n, p)],
                   BatchLayout(0, examples=torch.cat([torch.arange(n), backwards])))
        yield case(f"{name} beside another order", lambda x, y, f=join: f([x, y], 1),
                   [given(0, n, p), given(BatchLayout(0, examples=backwards), n, p)], LOST)
    yield case("cat it, merged", lambda x, y: torch.cat([x, y]),
               [given(BatchLayout(0, 1, 2), 2 * n, p), given(0, n, p)],
               BatchLayout(0, examples=torch.cat([torch.arange(n).repeat_interleave(2),
                                                  torch.arange(n)])))
    yield case("a row beside constants", torch.add, [given(picked(1), 1, p), constant(n, p)],
               BatchLayout(0, examples=torch.ones(n, dtype=torch.int64)))
    yield case("stack", lambda x, y: torch.stack([x, y]), pair, 1)
    yield case("stack behind", lambda x, y: torch.stack([x, y], 1), pair, 0)
    yield case("stack last", lambda x, y: torch.stack([x, y], dim=-1),
               [given(1, p, n), given(1, p, n)], 1)
    apart = lambda x: torch.stack([x[i] for i in range(n)])
    yield case("stack of every example", apart, given(0, n, p), 0)
    yield case("stack of them in another order", lambda x: torch.stack(x.unbind()[::-1], 1),
               given(0, n, p), BatchLayout(1, examples=backwards))
    yield case("stack of some", lambda x: torch.stack([x[0], x[-1]]), given(0, n, p),
               picked(0, n - 1))
    for name, ndim in (("atleast_1d", 1), ("atleast_2d", 2), ("atleast_3d", 3)):
        shown = getattr(torch, name)
        yield case(name, shown, given(0, n), {1: 0, 2: 1, 3: 1}[ndim])
        if n > 1:  # it is given back as it is
            yield case(f"{name} of more", shown, given(1, p, n, 1), 1)
        yield case(f"{name} of several", lambda x, y, f=shown: f(x, y), pair, 0)
    wide = given(0, n, p), given(1, 2, n, 1)
    yield case("broadcast_tensors", torch.broadcast_tensors, wide, 1)
    yield case("hstack", lambda x, y: torch.hstack([x, y]), pair, 0)
    yield case("hstack of one dim", lambda x, y: torch.hstack([x, y]), [given(0, n), given(0, n)],
               BatchLayout(0, 2))
    yield case("vstack", lambda x, y: torch.vstack([x, y]), [given(0, n), given(0, n)], 1)
    yield case("row_stack", lambda x, y: torch.row_stack((x, y)), pair, BatchLayout(0, 2))
    yield case("dstack", lambda x, y: torch.dstack([x, y]), pair, 0)
    yield case("dstack of one dim", lambda x, y: torch.dstack([x, y]), [given(0, n), given(0, n)],
               1)
    yield case("column_stack", lambda x, y: torch.column_stack([x, y]), [given(0, n),
               given(0, n, p)], 0)
    yield case("column_stack with a constant", lambda x, y: torch.column_stack(tensors=[y, x]),
               [given(0, n, p), constant(n)], 0)
    yield case("dstack, crossed", lambda x, y: torch.dstack([x, y]),
               [given(0, n, n), given(1, n, n)], LOST)
    yield case("stack, NumPy's axis", lambda x: torch.stack([x] * n, axis=1), given(0, n, p), 0)
    yield case("stack, crossed", lambda x, y: torch.stack([x, y]), [given(0, n, n), given(1, n, n)],
               LOST)
# fmt: on


ABS = lambda x: x.abs() if x.is_complex() else x
SHIFTS = {
    "softmax": lambda x, d: x.softmax(d),
    "log_softmax": lambda x, d: F.log_softmax(x, dim=d),
    "softmin": lambda x, d: F.softmin(x, dim=d),
    "gumbel_softmax": lambda x, d: F.gumbel_softmax(x, dim=d),
    "cumsum": lambda x, d: x.cumsum(d),
    "cumprod": lambda x, d: x.cumprod(d),
    "cummax": lambda x, d: x.cummax(d)[0],
    "cummin": lambda x, d: x.cummin(d)[0],
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
    "sort": lambda x, d: x.sort(dim=d)[0],
    "argsort": lambda x, d: x.argsort(d),
    "topk": lambda x, d: x.topk(2, d)[0],
    "normalize": lambda x, d: F.normalize(x, dim=d),
    "diff": lambda x, d: x.diff(dim=d),
    "unfold": lambda x, d: x.unfold(d, 2, 1),
    "index_fill": lambda x, d: x.index_fill(d, torch.tensor([1]), 0.0),
    "cumulative_trapezoid": lambda x, d: torch.cumulative_trapezoid(x, dim=d),
    "gradient": lambda x, d: torch.gradient(x, dim=d)[0],
    **{
        name: lambda x, d, f=name: ABS(getattr(torch.fft, f)(x, dim=d))
        for name in ("fft", "ifft", "rfft", "hfft", "ihfft")
    },
    "irfft": lambda x, d: torch.fft.irfft(x, 5, d),
    **{
        f"{name}n": lambda x, d, f=f"{name}n": ABS(getattr(torch.fft, f)(x, dim=(d,)))
        for name in ("fft", "ifft", "rfft", "hfft", "ihfft")
    },
    "irfftn": lambda x, d: torch.fft.irfftn(x, (5,), (d,)),
}


# fmt: off
def along(n, p):
    for name, call in SHIFTS.items():
        many = max(p, 3)
        yield case(name, lambda x, f=call: f(x, 1), given(0, n, many), 0)
        yield case(f"{name}, from the end", lambda x, f=call: f(x, -1), given(1, 2, n, many), 1)
        yield case(f"{name}, merged", lambda x, f=call: f(x, 0),
                   given(BatchLayout(1, 2, 3), many, 6 * n), BatchLayout(1, 2, 3))
        yield case(f"{name} it", lambda x, f=call: f(x, 0), given(0, n, p), LOST)
        yield case(f"{name} it, the last", lambda x, f=call: f(x, -1), given(1, p, n), LOST)
    yield case("softmax without a dim", lambda x: F.softmax(x), given(0, n, p), LOST,
               given_up="torch chooses the dim")
    yield case("sort, default", lambda x: x.sort()[0], given(0, n, p), 0)
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
        plane, all_of = getattr(torch.fft, f"{name}2"), getattr(torch.fft, f"{name}n")
        yield case(f"{name}2", plane, given(1, p, n, 3, 4), 1)
        yield case(f"{name}2 in front", lambda x, f=plane: f(x, dim=(0, 1)),
                   given(2, 3, 4, n), 2)
        yield case(f"{name}2 of the batch", plane, given(1, 3, n, 4), LOST)
        yield case(f"{name}n of all", all_of, given(0, n, 3, 4), LOST)
        yield case(f"{name}n of the last by their sizes", lambda x, f=all_of: f(x, (3, 4)),
                   given(0, n, 3, 4), 0)
    for name in ("fftshift", "ifftshift"):
        shift = getattr(torch.fft, name)
        yield case(name, lambda x, f=shift: f(x, 1), given(0, n, p), 0)
        yield case(f"{name} it", lambda x, f=shift: f(x, 0), given(0, n, p),
                   BatchLayout(0, examples=shift(torch.arange(n))))
        yield case(f"{name} of all", shift, given(0, n, p),
                   BatchLayout(0, examples=shift(torch.arange(n))))
    across = given(0, n, 3), given(0, n, 3)
    yield case("cross", lambda x, y: torch.cross(x, y, dim=1), across, 0)
    yield case("cross, default", torch.cross, across, LOST, given_up="torch chooses the dim") \
        if n != 3 else case("cross of the batch, default", torch.cross, across, LOST)
    yield case("linalg.cross", torch.linalg.cross, across, 0)
    yield case("linalg.cross with a constant", torch.linalg.cross, [constant(n, 3), across[1]], 0)
    yield case("linalg.cross, crossed", torch.linalg.cross, [given(0, n, n, 3), given(1, n, n, 3)],
               LOST)
    if n == 3:
        yield case("linalg.cross of the batch", lambda x, y: torch.linalg.cross(x, y, dim=0),
                   across, LOST)
    yield case("msort", torch.msort, given(1, p, n), 1)
    yield case("msort of the batch", torch.msort, given(0, n, p), LOST)
    yield case("flipud", torch.flipud, given(1, p, n), 1)
    yield case("flipud it", torch.flipud, given(0, n, p),
               BatchLayout(0, examples=torch.arange(n).flip(0)))
    yield case("fliplr", torch.fliplr, given(0, n, p), 0)
    yield case("rot90", lambda x: x.rot90(2, (1, 2)), given(0, n, p, 2), 0)
    yield case("rot90 of it", lambda x: x.rot90(), given(0, n, p), 1)
    yield case("rot90 back", lambda x: torch.rot90(x, -1), given(0, n, p),
               BatchLayout(1, examples=torch.arange(n).flip(0)))
    yield case("vsplit", lambda x: x.vsplit(2), given(1, 2, n), 1)
    yield case("vsplit it", lambda x: x.vsplit([1]), given(0, n, 2),
               [picked(0), picked(*range(1, n))])
    yield case("hsplit", lambda x: torch.hsplit(x, 2), given(0, n, 4), 0)
    yield case("hsplit of one dim", lambda x: torch.hsplit(x, [1]), given(0, n),
               [picked(0), picked(*range(1, n))])
    yield case("dsplit", lambda x: torch.dsplit(x, 2), given(1, p, n, 2), 1)
    yield case("cumulative_trapezoid along the batch's points",
               lambda x: torch.cumulative_trapezoid(torch.ones(2, n, dtype=x.dtype), x, dim=1),
               given(0, n), LOST)
    yield case("glu", lambda x: F.glu(x), given(0, n, 2 * p), 0)
    yield case("glu it", lambda x: F.glu(x, 0),
               given(0, n, p) if n % 2 == 0 else given(BatchLayout(0, 2), 2 * n, p), LOST,
               given_up="" if n % 2 == 0 else "its halves are not followed")
    turned, back = torch.arange(p).flip(0), torch.arange(n).flip(0)
    yield case("flip", lambda x: x.flip(1), given(0, n, p), 0)
    yield case("flip two", lambda x: x.flip(0, 2), given(1, p, n, 2), 1)
    yield case("flip two, a tuple", lambda x: torch.flip(x, (0, 2)), given(1, p, n, 2), 1)
    yield case("flip it", lambda x: x.flip(0), given(0, n, p), BatchLayout(0, examples=back))
    yield case("flip it among others", lambda x: x.flip(1, 0), given(0, n, p),
               BatchLayout(0, examples=back))
    yield case("roll", lambda x: x.roll(1, 1), given(0, n, p), 0)
    yield case("roll it", lambda x: x.roll(1, dims=0), given(0, n, p),
               BatchLayout(0, examples=torch.arange(n).roll(1)))
    yield case("roll all", lambda x: x.roll(1), given(0, n, p), LOST)
    yield case("index_select", lambda x: x.index_select(1, turned), given(0, n, p), 0)
    yield case("index_select it", lambda x: x.index_select(0, back), given(0, n, p),
               BatchLayout(0, examples=back))
    yield case("index_select it, named", lambda x: torch.index_select(dim=0, index=back, input=x),
               given(0, n, p), BatchLayout(0, examples=back))
    yield case("index_select ids, named", lambda x: torch.index_select(dim=0, index=back, input=x),
               ids(0, 9, n, p), BatchLayout(0, examples=back))
    yield case("index_select of a table", lambda i, t: t.index_select(0, i),
               [ids(0, 4, n), constant(4, p)], 0)
    yield case("index_select of columns", lambda i, t: t.index_select(1, i),
               [ids(0, n, n), constant(n, n)], LOST, given_up="columns of a table are not followed")
    chosen = ids(0, n, n)
    chosen.fixed = True  # which rows are picked is data
    yield case("index_select by the batch", lambda x, i: x.index_select(0, i),
               [given(0, n, p), chosen], BatchLayout(0, examples=chosen.tensor))
    row = torch.arange(n).flip(0)[:, None].expand(n, p).contiguous()
    yield case("gather", lambda x: x.gather(1, turned.expand(n, p)), given(0, n, p), 0)
    yield case("gather it", lambda x: x.gather(0, row), given(0, n, p),
               BatchLayout(0, examples=back))
    yield case("gather by the batch", lambda x, i: x.gather(1, i),
               [given(0, n, p), ids(0, p, n, p)], 0)
    yield case("gather of a table", lambda i, t: t.gather(1, i), [ids(0, 4, n, p), constant(n, 4)],
               0)
    yield case("gather fewer", lambda x: x.gather(1, torch.zeros(n - 1, 2, dtype=torch.int64)),
               given(0, n, p), LOST, given_up="fewer rows are not followed")
    yield case("take_along_dim", lambda x: x.take_along_dim(turned[None], 1), given(0, n, p), 0)
    yield case("take_along_dim it", lambda x: x.take_along_dim(row, 0), given(0, n, p),
               BatchLayout(0, examples=back))
    yield case("take_along_dim of a table", lambda i, t: t.take_along_dim(i, 1),
               [ids(0, 4, n, p), constant(1, 4)], 0)
    yield case("take_along_dim, flat", lambda x: x.take_along_dim(torch.arange(n)), given(0, n, n),
               picked(*[0] * n))
    yield case("narrow", lambda x: x.narrow(1, 0, 1), given(0, n, p), 0)
    yield case("narrow it", lambda x: x.narrow(0, 1, 2), given(0, n, p), picked(1, 2))
    yield case("narrow it to one", lambda x: x.narrow(0, n - 1, 1), given(0, n, p), picked(n - 1))
    yield case("narrow it, merged", lambda x: x.narrow(0, 0, n), given(BatchLayout(0, 2), 2 * n, p),
               0)
    yield case("chunk", lambda x: x.chunk(2, 1), given(0, n, p), 0)
    yield case("chunk it", lambda x: x.chunk(n), given(0, n, p), [picked(k) for k in range(n)])
    yield case("chunk its copies", lambda x: x.chunk(2), given(BatchLayout(0, 2), 2 * n, p), 0)
    yield case("split", lambda x: x.split(1, -1), given(0, n, p), 0)
    yield case("split it", lambda x: x.split([n - 1, 1]), given(0, n, p),
               [picked(*range(n - 1)), picked(n - 1)])
    yield case("split_with_sizes", lambda x: x.split_with_sizes([1, p - 1], 1), given(0, n, p), 0)
    yield case("tensor_split", lambda x: x.tensor_split(2, 1), given(0, n, p), 0)
    yield case("tensor_split it", lambda x: x.tensor_split([1]), given(0, n, p),
               [picked(0), picked(*range(1, n))])
    yield case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), given(0, n, p), 0)
    yield case("repeat_interleave it", lambda x: x.repeat_interleave(2, 0), given(0, n, p),
               BatchLayout(0, 1, 2))
    yield case("repeat_interleave it unevenly", lambda x: x.repeat_interleave(torch.arange(n), 0),
               given(0, n, p),
               BatchLayout(0, examples=torch.arange(n).repeat_interleave(torch.arange(n))))
    yield case("unfold it, one by one", lambda x: x.unfold(0, 1, 1), given(0, n, p), 0)
    yield case("diff with its like", lambda x, y: x.diff(dim=1, prepend=y),
               [given(0, n, p), given(0, n, 1)], LOST,
               given_up="what is put in front is not followed")


def indexing(n, p):
    idx, two = torch.tensor([1, 0]), torch.tensor([[1, 0], [0, 1]])
    mask = torch.arange(p) != 1
    x, behind = (lambda: given(0, n, p, 2)), (lambda: given(1, p, n, 2))
    for text, operand, expected in (
        (":", x(), 0), ("...", x(), 0), ("None", x(), 1), (":, None", x(), 0),
        ("..., None", x(), 0),
        (":, 0", x(), 0), ("0", behind(), 0), ("1, ..., 0", behind(), 0), ("..., 0", behind(), 1),
        ("None, 0, :, None", behind(), 1), ("1:", behind(), 1), (":, :, 1:", behind(), 1),
        (":, ::2", x(), 0),
        (":, idx", x(), 0), ("idx", behind(), 1), ("two", behind(), 2), ("two, :, 0", behind(), 2),
        ("mask", behind(), 1), (":, mask", x(), 0), ("..., idx", behind(), 1),
        (":, :, [1, 0]", behind(), 1),
        ("[1, 0]", behind(), 1), ("True", behind(), 2), ("True", given(1, n, n), 2),
        (":, True", behind(), 2),
        ("torch.tensor(True)", behind(), 2), ("torch.tensor(1)", behind(), 0),
        (":, torch.tensor(1)", x(), 0),
        (":, idx, idx", x(), 0), ("idx, :, idx", behind(), 1),
        ("idx, 0, idx", given(3, 2, p, 2, n), 1),
        ("mask, :, 0", behind(), 1), ("[[1, 0], [0, 1]][0]", behind(), 1),
        # what takes a part of it shows which by the units' numbers
        ("1", x(), picked(*[1] * p)), ("1:", x(), picked(*range(1, n))), ("idx", x(), picked(1, 0)),
        ("[1, 0, 0]", x(), picked(1, 0, 0)),
        (":, 1:", behind(), BatchLayout(1, examples=torch.arange(1, n))),
        ("::2", x(), picked(*range(0, n, 2))), ("idx, idx", x(), picked(1, 0)), ("two", x(), LOST),
        ("torch.arange(n) != 1", x(), picked(*[k for k in range(n) if k != 1])),
        (":n", given(BatchLayout(0, 2), 2 * n, p), 0),
        ("::2", given(BatchLayout(0, 1, 2), 2 * n, p), 0),
    ):  # fmt: skip
        known = {"torch": torch, "idx": idx, "two": two, "mask": mask, "n": n}
        take = eval(f"lambda x: x[{text}]", known)
        yield case(f"x[{text}] of {operand.layout}", take, operand, expected)
    scattered = given(0, 2, 2, n, 2) if n == 2 else given(2, 2, 2, n, 2)
    for text in ("idx, :, :, idx", "[1, 0], :, :, [1, 0]", "(1, 0), :, :, (1, 0)", "a, :, :, a"):
        take = eval(f"lambda x: x[{text}]", {"idx": idx, "a": idx.numpy()})
        yield case(f"x[{text}]", take, scattered, 2)
    every = torch.arange(n) % 2
    first = lambda text: eval(f"lambda x: x[{text}]", {"a": every, "np": every.numpy()})
    for text in ("a", "np"):
        yield case(f"x[:, {text}, :, {text}] to the front", first(f":, {text}, :, {text}"),
                   given(0, n, 2, 3, 2), 1)
    yield case("select", lambda x: x.select(1, 0), x(), 0)
    yield case("select before", lambda x: x.select(0, 0), behind(), 0)
    yield case("select, named", lambda x: torch.select(x, dim=-1, index=0), behind(), 1)
    yield case("select, NumPy's axis", lambda x: x.select(axis=0, index=0), behind(), 0)
    yield case("select it", lambda x: x.select(0, 1), x(), picked(*[1] * p))
    yield case("unbind", lambda x: x.unbind(1), x(), 0)
    yield case("unbind it", lambda x: x.unbind(), given(0, n, p),
               [picked(*[k] * p) for k in range(n)])
    yield case("unbind before", lambda x: x.unbind(), behind(), 0)
    yield case("iterate", lambda x: list(x), behind(), 0)
    yield case("rows of a table", lambda i, t: t[i], [ids(1, 4, p, n), constant(4, 2)], 1)
    yield case("columns of a table", lambda i, t: t[:, i], [ids(0, 4, n), constant(n, 4)], LOST,
               given_up="columns of a table are not followed")
    yield case("take", lambda x: x.take(torch.arange(n * p).flip(0).reshape(n, p)),
               given(0, n, p), BatchLayout(0, examples=torch.arange(n).flip(0)))
    yield case("take of all", lambda x: x.take(torch.arange(n * p).reshape(p, n)), given(0, n, p),
               LOST if p != n else 0)
    yield case("as_strided", lambda x: x.as_strided((n, p), (2 * p, 2)), given(0, n, 2 * p), 0)
    yield case("as_strided of a view", lambda x: x[:, 1:].as_strided((n, 1), (3, 1)),
               given(0, n, 3), 0)
    yield case("as_strided beyond it", lambda x: x[1:].as_strided((n, 2), (2, 1), 0),
               given(0, n, 2), LOST, given_up="memory is not looked at")
    yield case("as_strided across it", lambda x: x.as_strided((n, 2), (1, n)), given(0, n, 2),
               LOST) if n != 2 else case("as_strided, transposed", lambda x: x.as_strided((2, n),
               (1, 2)), given(0, n, 2), 1)
    yield case("diagonal", torch.diagonal, given(0, n, n), 0)
    yield case("linalg.diagonal", torch.linalg.diagonal, given(0, n, n), 0)
    keep = torch.arange(n) != 1
    yield case("masked_select of rows", lambda x: x.masked_select(keep[:, None]), given(0, n, 1),
               picked(*[k for k in range(n) if k != 1]))
    yield case("masked_select", lambda x: x.masked_select(keep), given(0, n, n),
               BatchLayout(0, 1, n - 1))


def writing(n, p):
    def into(target, write):
        def call(*operands):
            t = torch.zeros(target, dtype=torch.float64)
            write(t, *operands)
            return t

        return call

    def over(write):
        def call(x, *operands):
            t = x.clone()
            write(t, *operands)
            return t

        return call

    def set_to(index):
        return lambda t, v: t.__setitem__(index, v)

    all_, back = slice(None), torch.arange(n).flip(0)
    columns = torch.tensor([1, 0])
    yield case("zeros, all", into((n, p), set_to(all_)), given(0, n, p), 0)
    yield case("zeros, a column", into((n, p), set_to((all_, 1))), given(0, n), 0, silent=True)
    yield case("zeros, a column, turned", into((n, n), set_to(1)), given(0, n), 1, silent=True)
    yield case("zeros, columns", into((n, 2), set_to((all_, columns))), given(0, n, 2), 0)
    yield case("zeros, rows in another order", into((n, p), set_to(back)), given(0, n, p), LOST,
               given_up="places of a target are in order")
    diagonal = torch.arange(n), torch.arange(n)
    yield case("zeros, the diagonal", into((n, n), set_to(diagonal)), given(0, n), LOST,
               given_up="both dims hold it")
    yield case("a column", over(set_to((all_, 1))), [given(0, n, p), given(0, n)], 0)
    yield case("a row before", over(set_to(1)), [given(1, p, n), given(0, n)], 1)
    yield case("a row of it", over(set_to(1)), [given(0, n, n), given(0, n)], LOST)
    yield case("rows in another order", over(set_to(back)), [given(0, n, p), given(0, n, p)], LOST,
               given_up=("its units are other ones'"))
    yield case("a constant", over(lambda t: t.__setitem__((all_, 1), 0.0)), given(0, n, p), 0)
    yield case("crossed", over(set_to(all_)), [given(0, n, n), given(1, n, n)], LOST,
               given_up="it was all the other's")
    yield case("lost", over(lambda t, y: t.__setitem__((all_, 1), y.sum())),
               [given(0, n, p), given(0, n)], LOST)
    index = torch.tensor([1, 0])
    for name in ("index_add", "index_copy"):
        write = getattr(torch, name)
        yield case(f"{name} columns", lambda x, v, f=write: f(x, 1, index, v),
                   [given(0, n, p), given(0, n, 2)], 0)
        yield case(f"{name} rows", lambda x, v, f=write: f(x, 0, back, v),
                   [given(0, n, p), given(0, n, p)], LOST,
                   given_up="" if name == "index_add" else "its units are other ones'")
        yield case(f"{name}, named", lambda x, v, f=write: f(input=x, dim=1, index=index, source=v),
                   [given(0, n, p), given(0, n, 2)], 0)
        yield case(f"{name} into zeros", lambda v, f=write: f(torch.zeros(n, 2, dtype=v.dtype), 1,
                   index, v), given(0, n, 2), 0)
    to = index.expand(n, 2)
    for name, more in (("scatter", ()), ("scatter_add", ()), ("scatter_reduce", ("sum",))):
        write = getattr(torch, name)
        yield case(f"{name} columns", lambda x, v, f=write, m=more: f(x, 1, to, v, *m),
                   [given(0, n, p), given(0, n, 2)], 0)
        rows = back[:, None].expand(n, 2)
        yield case(f"{name} rows", lambda x, v, f=write, m=more: f(x, 0, rows, v, *m),
                   [given(0, n, 2), given(0, n, 2)], LOST,
                   given_up="its units are other ones'" if not more and name == "scatter" else "")
    yield case("scatter a part of more", lambda x, v: x.scatter(1, to[:, :1], v),
               [given(0, n, n), given(1, n, n)], LOST)
    yield case("scatter_add of a part", lambda x, v: x.scatter_add(0, back[: n - 1, None].expand(
               n - 1, n), v), [given(0, n, n), given(1, n, n)], LOST)
    yield case("index_reduce columns", lambda x, v: x.index_reduce(1, index, v, "prod"),
               [given(0, n, p), given(0, n, 2)], 0)
    yield case("index_reduce rows", lambda x, v: x.index_reduce(0, back, v, "amax"),
               [given(0, n, p), given(0, n, p)], LOST)
    yield case("select_scatter", lambda x, v: x.select_scatter(v, 1, 0),
               [given(0, n, p), given(0, n)], 0)
    yield case("select_scatter, named", lambda x, v: torch.select_scatter(src=v, input=x, dim=1,
               index=0), [given(0, n, p), given(0, n)], 0)
    yield case("select_scatter of a row", lambda x, v: x.select_scatter(v, 0, 0),
               [given(0, n, n), given(0, n)], LOST)
    yield case("slice_scatter", lambda x, v: x.slice_scatter(v, 1, 0, 1),
               [given(0, n, p), given(0, n, 1)], 0)
    yield case("slice_scatter, named", lambda x, v: x.slice_scatter(v, dim=1, start=1),
               [given(0, n, 3), given(0, n, 2)], 0)
    yield case("slice_scatter of a row", lambda x, v: x.slice_scatter(v, 0, 0, 1),
               [given(0, n, n), given(1, 1, n)], LOST)
    yield case("diagonal_scatter", lambda x, v: x.diagonal_scatter(v, 0, 1, 2),
               [given(0, n, 2, 2), given(0, n, 2)], 0)
    yield case("diagonal_scatter of the batch", lambda x, v: x.diagonal_scatter(v),
               [given(0, n, n), given(0, n)], 0)
    yield case("put", lambda x, v: x.put(torch.arange(0, n * p, p), v), [given(0, n, p),
               given(0, n)], 0)
    yield case("put elsewhere", lambda x, v: x.put(torch.arange(0, n * p, p).flip(0), v,
               accumulate=True), [given(0, n, p), given(0, n)], LOST)
    first = torch.arange(p) == 0
    yield case("masked_scatter", lambda x, v: x.masked_scatter(first, v), [given(0, n, p),
               given(0, n)], 0)
    yield case("masked_scatter of more", lambda x, v: x.masked_scatter(first, v), [given(0, n, p),
               given(0, n, 2)], LOST)
    yield case("masked_scatter into zeros", lambda v: torch.zeros(n, p, dtype=v.dtype)
               .masked_scatter(first >= 0, v), given(0, n, p), 0)
    yield case("masked_scatter, broadcast", lambda x: x.masked_scatter(torch.eye(n, dtype=bool),
               torch.zeros(n, dtype=x.dtype)), given(0, n), LOST, given_up="it is broadcast")
    yield case("scatter of more", lambda x, v: x.scatter(1, to[:, :1], v),
               [given(0, n, p), given(0, n, 2)], 0)
    yield case("scatter a number", lambda x: x.scatter(1, to, 0.5), given(0, n, max(p, 3)), 0)
    here = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    yield case("index_put", lambda x, v: x.index_put(here, v), [given(0, n, p), given(0, n)], 0)
    yield case("index_put elsewhere", lambda x, v: x.index_put((back, here[1]), v, accumulate=True),
               [given(0, n, p), given(0, n)], LOST)

    def base_and_views(write):
        def call(y):
            base = torch.zeros(n, p, 2, dtype=torch.float64)
            view, other, apart = base[:, 1], base[:, 1:].flatten(1), base[:, 0]
            write(view, y)
            return base, view, other, apart

        return call

    for name, write in (("copy_", lambda v, y: v.copy_(y)), ("add_", lambda v, y: v.add_(y)),
                        ("setitem", lambda v, y: v.__setitem__(slice(None), y))):  # fmt: skip
        yield case(f"a view, {name}", base_and_views(write), given(0, n, 2), 0, silent=True)


def padding(n, p):
    steps = max(p, 2)
    lengths = torch.tensor([steps, *[steps - 1] * (n - 1)])
    packed = BatchLayout(0, examples=torch.tensor([*list(range(n)) * (steps - 1), 0]))
    pack = lambda x: pack_padded_sequence(x, lengths, batch_first=True)
    yield case("packed", lambda x: pack(x).data, given(0, n, steps, 2), packed)
    yield case("packed, steps first", lambda x: pack_padded_sequence(x, lengths).data,
               given(1, steps, n, 2), packed)
    yield case("padded again", lambda x: pad_packed_sequence(pack(x), batch_first=True)[0],
               given(0, n, steps, 2), 0)
    yield case("padded, steps first", lambda x: pad_packed_sequence(pack(x))[0],
               given(0, n, steps, 2), 1)
# fmt: on


FAMILIES = [permuting, reshaping, joining, along, indexing, writing, padding]
KNOWN = {
    permuting: torch_ops.PERMUTING,
    reshaping: torch_ops.RESHAPING | torch_ops.EXPANDING | {"unsqueeze", "repeat", "tile"},
    joining: torch_ops.CONCATENATING | {"stack"},
    along: torch_ops.ALONG.keys(),
    indexing: {
        "getitem",
        "select",
        "unbind",
        "masked_select",
        "take",
        "as_strided",
        "diagonal",
        "linalg_diagonal",
    },
    writing: WRITING.keys(),
    padding: {"pack_padded_sequence", "pad_packed_sequence"},
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("batch_size", "positions"), SIZES)
@pytest.mark.filterwarnings("ignore")
def test_marks_are_those_expected(family, batch_size, positions):
    assert_all_marks(family(batch_size, positions), batch_size)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_every_known_operation_has_a_case(family):
    assert set(KNOWN[family]) - names_in(list(family(3, 5))) == set()


def test_all_that_moves_is_known_here():
    known = set().union(*KNOWN.values())
    assert torch_ops.MOVING <= known


@pytest.mark.parametrize("family", [permuting, joining], ids=lambda f: f.__name__)
def test_a_batch_of_one_is_all_that_one(family):
    for c in family(1, 3):
        if not c.given_up:
            assert_all_of_one(c)
