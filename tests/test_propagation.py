"""Where the batch is after one call: arithmetic, layers' functions, reductions, products.

Every row says where it must be; `layout_cases` checks that against what really depends on which
unit. Moves of parts of the batch, indices and writes are in test_probing.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htv.engine import torch_ops
from htv.engine.provenance import LOST
from htv.groups import BatchLayout
from support.layout_cases import (
    Operand,
    assert_all_marks,
    assert_all_of_one,
    case,
    constant,
    data,
    given,
    ids,
    names_in,
)

SIZES = [(3, 3), (3, 5), (4, 2)]  # examples and positions: as many, more, fewer


def unary_call(name):
    """How to call an operation of one tensor."""
    if name.startswith("special_"):
        return getattr(torch.special, name.removeprefix("special_"))
    for owner in (Tensor, torch, F):
        if hasattr(owner, name):
            return getattr(owner, name)
    return getattr(Tensor, f"{name}_", None) or getattr(Tensor, f"__{name}__")


COMPLEX = lambda x: x.to(torch.complex128) * (1 + 2j)
UNARY_CALLS = {
    "angle": lambda x: (x - 0.5).angle(),
    "conj_physical": lambda x: COMPLEX(x).conj_physical(),
    "mvlgamma": lambda x: (x + 3).mvlgamma(2),
    "resolve_conj": lambda x: COMPLEX(x).conj().resolve_conj(),
    "acosh": lambda x: (x + 1).acosh(),
    "alias": torch.ops.aten.alias.default,
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.2, True),
    "bernoulli": lambda x: torch.bernoulli(x),
    "ceil": lambda x: (x * 4).ceil(),
    "celu": F.celu,
    "clamp": lambda x: x.clamp(0.2, 0.8),
    "clamp_max": lambda x: x.clamp_max(0.6),
    "clamp_min": lambda x: x.clamp_min(0.6),
    "clip": lambda x: x.clip(0.2, 0.8),
    "conj": lambda x: COMPLEX(x).conj(),
    "copy": lambda x: torch.zeros(x.shape, dtype=x.dtype).copy_(x),
    "data": lambda x: x.data,
    "dropout": lambda x: F.dropout(x, 0.3),
    "empty_like": lambda x: torch.empty_like(x).zero_(),
    "fill": lambda x: x.clone().fill_(1.0),
    "floor": lambda x: (x * 4).floor(),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "hardshrink": lambda x: F.hardshrink(x * 2),
    "hardtanh": lambda x: F.hardtanh(x),
    "heaviside": lambda x: torch.heaviside(x - 0.5, torch.zeros((), dtype=x.dtype)),
    "imag": lambda x: COMPLEX(x).imag,
    "int": lambda x: (x * 9).int(),
    "long": lambda x: (x * 9).long(),
    "bool": lambda x: x.round().bool(),
    "masked_fill": lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 1, 0.0),
    "normal": lambda x: x.clone().normal_(),
    "polygamma": lambda x: torch.polygamma(1, x),
    "randint_like": lambda x: torch.randint_like(x, 5),
    "real": lambda x: COMPLEX(x).real,
    "log_sigmoid": F.logsigmoid,
    "relu": lambda x: F.relu(x - 0.5),
    "requires_grad": lambda x: x.detach().requires_grad_(x.requires_grad),
    "requires_grad_": lambda x: x.detach().requires_grad_(x.requires_grad),
    "round": lambda x: (x * 4).round(),
    "rrelu": lambda x: F.rrelu(x - 0.5),
    "sgn": lambda x: (x - 0.5).sgn(),
    "sign": lambda x: (x - 0.5).sign(),
    "softshrink": lambda x: F.softshrink(x * 2),
    "special_expit": torch.special.expit,
    "threshold": lambda x: F.threshold(x, 0.5, 0.0),
    "to": lambda x: x.to(torch.float32),
    "trunc": lambda x: (x * 4).trunc(),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.zeros((), dtype=torch.float32)),
    "uniform": lambda x: x.clone().uniform_(),
    "zero": lambda x: x.clone().zero_(),
}
SILENT = {
    *"zeros_like ones_like empty_like full_like rand_like randn_like randint_like".split(),
    *"zero fill uniform normal".split(),
}
# Of the batch in dim 0 only, for what they ask of the number of dims.
IN_CHANNELS = {"feature_dropout": 2, "feature_alpha_dropout": 2, "dropout1d": 3}
IN_CHANNELS |= {"dropout2d": 4, "dropout3d": 5}
NOT_TRIED = {
    "cuda": "no such device here",
    "requires_grad_": "the name of no operation: what is done in place is known without the dash",
}


# fmt: off
def unary(n, p):
    for name in sorted(torch_ops.UNARY - IN_CHANNELS.keys() - NOT_TRIED.keys()):
        call, silent = UNARY_CALLS.get(name) or unary_call(name), name in SILENT
        yield case(name, call, given(1, p, n, 6), 1, silent=silent)
        yield case(f"{name}, merged", call, given(BatchLayout(1, 2, 3), p, 6 * n, 6),
                   BatchLayout(1, 2, 3), silent=silent)
    for name, ndim in IN_CHANNELS.items():
        call = getattr(F, name, getattr(torch, name, None))
        yield case(name, lambda x, f=call: f(x, 0.2, True),
                   given(0, n, *(8,) * (ndim - 1)), 0)
# fmt: on


METHOD = lambda name: getattr(Tensor, name)
ELEMENTWISE_CALLS = {
    "radd": METHOD("__radd__"),
    "rmul": METHOD("__rmul__"),
    "rsub": METHOD("__rsub__"),
    "rpow": METHOD("__rpow__"),
    "rdiv": METHOD("__rdiv__"),
    "rtruediv": METHOD("__rtruediv__"),
    "truediv": METHOD("__truediv__"),
    "iadd": lambda x, y: (x + 0 * y).__iadd__(y),
    "isub": lambda x, y: (x + 0 * y).__isub__(y),
    "imul": lambda x, y: (x + 0 * y).__imul__(y),
    "itruediv": lambda x, y: (x + 0 * y).__itruediv__(y),
    "where": lambda x, y: torch.where(torch.arange(x.shape[-1]) > 0, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y + 1),
    "copysign": lambda x, y: torch.copysign(x, y - 0.5),
    "nextafter": lambda x, y: torch.nextafter((x * 2).round(), (y * 2).round()),
    "special_xlog1py": torch.special.xlog1py,
    "special_zeta": lambda x, y: torch.special.zeta(x + 1.5, y),
    "multiply": torch.multiply,
    "divide": torch.divide,
    "true_divide": torch.true_divide,
}


# fmt: off
def elementwise(n, p):
    rows = torch.randperm(n).repeat(2)
    for name in sorted(torch_ops.ELEMENTWISE):
        call = ELEMENTWISE_CALLS.get(name) or getattr(torch, name)
        yield case(f"{name}, broadcast", call, [given(1, p, n, 2), given(0, n, 2)], 1)
        yield case(f"{name}, constant", call, [given(0, n, p), constant(p)], 0)
        yield case(f"{name}, in the second", call, [constant(n, 1), given(1, 2, n, p)], 1)
        # In these every element of the result has parts of two units.
        yield case(f"{name}, crossed", call, [given(0, n, n), given(1, n, n)], LOST)
        yield case(f"{name}, shifted", call, [given(0, n, p, n), given(0, n,
                   n)][:: 1 if p == n else -1] if p == n else [given(0, n, 1, n), given(0, n, n)],
                   LOST)
        # Only some do here: the first and the last index of both orders agree.
        yield case(f"{name}, outer and times", call, [given(BatchLayout(0, 2), 2 * n, p),
                   given(BatchLayout(0, 1, 2), 2 * n, p)], LOST)
        yield case(f"{name}, picked", call, [given(BatchLayout(0, examples=rows), 2 * n, p),
                   given(BatchLayout(0, examples=rows.clone()), 2 * n, 1)],
                   BatchLayout(0, examples=rows))
        other = rows.roll(1)
        yield case(f"{name}, picked otherwise", call,
                   [given(BatchLayout(0, examples=rows), 2 * n, p),
                   given(BatchLayout(0, examples=other), 2 * n, p)], LOST)
# fmt: on


TRUTH = lambda f: lambda x, y: f(x > 0.5, y > 0.5)
COMPARING_CALLS = {
    "eq": lambda x, y: (x * 2).round().eq((y * 2).round()),
    "ne": lambda x, y: (x * 2).round().ne((y * 2).round()),
    "isclose": lambda x, y: x.isclose(y, atol=0.2),
    "logical_and": TRUTH(torch.logical_and),
    "logical_or": TRUTH(torch.logical_or),
    "logical_xor": TRUTH(torch.logical_xor),
    "and": TRUTH(METHOD("__and__")),
    "or": TRUTH(METHOD("__or__")),
    "xor": TRUTH(METHOD("__xor__")),
    "bitwise_and": TRUTH(torch.bitwise_and),
    "bitwise_or": TRUTH(torch.bitwise_or),
    "logical_not": lambda x, y: (x > y).logical_not(),
    "invert": lambda x, y: (x > y).__invert__(),
    "bitwise_not": lambda x, y: (x > y).bitwise_not(),
    "isnan": lambda x, y: (x - y).log().isnan(),
    "isinf": lambda x, y: (x - y).relu().log().isinf(),
    "isposinf": lambda x, y: (x - y).relu().reciprocal().isposinf(),
    "isneginf": lambda x, y: (x - y).relu().log().isneginf(),
    "isreal": lambda x, y: torch.complex(x - y, (y - x).relu()).isreal(),
    "signbit": lambda x, y: (x - y).signbit(),
    "isfinite": lambda x, y: (x - y).log().isfinite(),
    "floor_divide": lambda x, y: torch.floor_divide(x * 9, y),
    "floordiv": lambda x, y: METHOD("__floordiv__")(x, y),
    "rfloordiv": lambda x, y: METHOD("__rfloordiv__")(y, x * 9),
    "mod": lambda x, y: METHOD("__mod__")(x, y),
    "rmod": lambda x, y: METHOD("__rmod__")(y, x),
}


# fmt: off
def comparing(n, p):
    for name in sorted(torch_ops.COMPARING - {"equal"}):  # which returns no tensor
        call = COMPARING_CALLS.get(name) or getattr(torch, name)
        yield case(name, call, [given(1, p, n, 2), given(0, n, 2)], 1)
        if name not in ("eq", "ne"):
            yield case(f"{name}, data crossed", call, [data(0, n, n), data(1, n, n)], LOST)


def rowwise(n, p):
    """Functions of (N, C, *space), each by itself."""
    image = lambda c=2, s=4, d=2: given(0, n, c, *(s,) * d)
    for d in (1, 2, 3):
        w = torch.rand(3, 2, *(2,) * d, dtype=torch.float64)
        conv, transposed = getattr(F, f"conv{d}d"), getattr(F, f"conv_transpose{d}d")
        yield case(f"conv{d}d", lambda x, w=w, f=conv: f(x, w), image(d=d), 0)
        yield case(f"conv{d}d, named", lambda x, w=w, f=conv: f(weight=w, input=x), image(d=d), 0)
        yield case(f"conv{d}d of channels", lambda x, w=w,
                   f=conv: f(x, w[:, :1].repeat_interleave(n, 1)), given(1, p, n, *(4,) * d), LOST)
        yield case(f"conv_transpose{d}d", lambda x, w=w, f=transposed: f(x, w.transpose(0, 1)),
                   image(d=d), 0)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
            pool = getattr(F, f"{kind}{d}d")
            yield case(f"{kind}{d}d", lambda x, f=pool: f(x, 2), image(d=d), 0)
            yield case(f"{kind}{d}d of channels", lambda x, f=pool: f(x, 2),
                       given(1, p, n, *(4,) * d), LOST, given_up="channels are not told apart")
        yield case(f"group_norm, {d} dims", lambda x: F.group_norm(x, 2), image(d=d), 0)
    w = torch.rand(3, 2, 2, dtype=torch.float64)
    yield case("unbatched conv1d", lambda x: F.conv1d(x, torch.rand(n, n, 1, dtype=torch.float64)),
               given(0, n, 4), LOST)
    yield case("convolution", lambda x: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1),
               image(d=1), 0)
    yield case("fractional pooling", lambda x: F.fractional_max_pool2d(x, 2, 2,
               _random_samples=torch.full((n, 2, 2), 0.5, dtype=torch.float64)), image(), 0)
    samples = lambda d: torch.full((n, 2, d), 0.5, dtype=torch.float64)
    for d in (1, 2, 3):
        tops = lambda x, d=d: getattr(F, f"max_pool{d}d_with_indices")(x, 2)
        yield case(f"max_pool{d}d with indices", tops, image(d=d), 0)
        yield case(f"adaptive_max_pool{d}d with indices",
                   lambda x, d=d: getattr(F, f"adaptive_max_pool{d}d_with_indices")(x, 2),
                   image(d=d), 0)
        if d > 1:
            yield case(f"fractional_max_pool{d}d", lambda x, d=d: getattr(F,
                       f"fractional_max_pool{d}d")(x, 2, 2, _random_samples=samples(d)),
                       image(d=d), 0)
            yield case(f"fractional_max_pool{d}d with indices", lambda x, d=d: getattr(F,
                       f"fractional_max_pool{d}d_with_indices")(x, 2, 2,
                       _random_samples=samples(d)), image(d=d), 0)
        places = torch.arange(2**d).reshape(1, 1, *(2,) * d).expand(n, 2, *(2,) * d)
        back = lambda x, d=d, i=places: getattr(F, f"max_unpool{d}d")(x, i[:, : x.shape[1]], 2)
        yield case(f"max_unpool{d}d", back, image(s=2, d=d), 0, silent=True)
        yield case(f"lp_pool{d}d", lambda x, d=d: getattr(F, f"lp_pool{d}d")(x, 2.0, 2),
                   image(d=d), 0)
    yield case("affine_grid", lambda x: F.affine_grid(x, (n, 1, 2, 2), align_corners=False),
               given(0, n, 2, 3), 0)
    yield case("grid_sample at points of the batch", lambda x, y: F.grid_sample(x, y,
               align_corners=False), [image(), given(0, n, 2, 2, 2)], 0)
    yield case("grid_sample of a constant", lambda x, y: F.grid_sample(x, y, align_corners=False),
               [constant(n, 2, 4, 4), given(0, n, 2, 2, 2)], 0)
    yield case("grid_sample, crossed", lambda x, y: F.grid_sample(x, y, align_corners=False),
               [given(0, n, n, 4, 4), given(1, n, n, 2, 2)], LOST)
    yield case("interpolate", lambda x: F.interpolate(x, scale_factor=2.0), image(), 0)
    yield case("upsample", lambda x: F.upsample(x, scale_factor=2), image(), 0)
    grid = torch.rand(n, 2, 2, 2, dtype=torch.float64)
    yield case("grid_sample", lambda x: F.grid_sample(x, grid, align_corners=False), image(), 0)
    yield case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), image(4), 0)
    yield case("pixel_shuffle, unbatched", lambda x: F.pixel_shuffle(x, 2),
               given(BatchLayout(0, 4), 4 * n, 2, 2), LOST)
    yield case("pixel_shuffle of images", lambda x: F.pixel_shuffle(x, 2),
               given(1, p, n, 4, 2, 2), 1)
    yield case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), image(4), 0)
    yield case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), image(4), 0)
    yield case("channel_shuffle of channels", lambda x: F.channel_shuffle(x, 2),
               given(BatchLayout(1, 2), p, 2 * n, 2, 2), LOST,
               given_up="channels are not told apart")
    yield case("fold", lambda x: F.fold(x, 3, 2), given(0, n, 8, 4), 0)
    yield case("im2col", lambda x: F.unfold(x, 2), image(), 0)
    yield case("im2col of channels", lambda x: F.unfold(x, 2), given(1, p, n, 4, 4), LOST,
               given_up="channels are not told apart")
    ones = torch.ones(2, dtype=torch.float64)
    yield case("batch_norm", lambda x: F.batch_norm(x, ones, ones), image(), 0)
    yield case("instance_norm", F.instance_norm, image(), 0)
    yield case("local_response_norm", lambda x: F.local_response_norm(x, 2), image(), 0)
    yield case("prelu", lambda x: F.prelu(x - 0.5, ones / 2), image(), 0)

    yield case("layer_norm", lambda x: F.layer_norm(x, (4,)), given(1, p, n, 4), 1)
    yield case("layer_norm over two", lambda x: F.layer_norm(x, (p, 4)), given(0, n, p, 4), 0)
    yield case("layer_norm over the batch", lambda x: F.layer_norm(x, (n, 4)), given(1, p, n, 4),
               LOST)
    yield case("rms_norm", lambda x: F.rms_norm(x, (4,)), given(BatchLayout(0, 2, 3), 6 * n, 4),
               BatchLayout(0, 2, 3))
    yield case("rms_norm over the batch", lambda x: F.rms_norm(x, (n,)), given(1, p, n), LOST)
    square = torch.rand(n, n, dtype=torch.float64)
    yield case("linear", lambda x: F.linear(x, square), given(1, p, n, n), 1)
    yield case("linear over the batch", lambda x: F.linear(x, square), given(1, p, n), LOST)
    yield case("linear with its weights", F.linear, [constant(n, n), given(0, n, n)], LOST,
               given_up="a layer's weights are not looked at")
    both = torch.rand(3, 4, 2, dtype=torch.float64)
    yield case("bilinear", lambda x: F.bilinear(x, torch.ones(p, n, 2, dtype=x.dtype), both),
               given(1, p, n, 4), 1)
    yield case("bilinear of two", lambda x, y: F.bilinear(x, y, both),
               [given(1, p, n, 4), given(1, p, n, 2)], 1)
    yield case("bilinear with its weights, named", lambda x, w: F.bilinear(x, weight=w,
               input2=torch.ones(n, 2, dtype=x.dtype)), [constant(n, 4), given(0, n, 4, 2)], LOST,
               given_up="a layer's weights are not looked at")
    yield case("bilinear over the batch", lambda x: F.bilinear(x, torch.ones(p, 2, dtype=x.dtype),
               torch.rand(3, n, 2, dtype=x.dtype)), given(1, p, n), LOST)
    yield case("pad at the end", lambda x: F.pad(x, (1, 1)), given(1, p, n, 2), 1)
    yield case("pad two dims", lambda x: F.pad(x, (1, 1, 2, 0)), given(0, n, p, 2), 0)
    yield case("pad all but the batch", lambda x: F.pad(x, (0, 1, 0, 0, 2, 0)),
               given(1, p, n, 2), 1)
    yield case("pad the batch by nothing", lambda x: F.pad(x, (0, 1, 0, 0)), given(0, n, p), 0)
    yield case("cut the batch", lambda x: F.pad(x, (0, 0, 0, -1)), given(0, n, p), LOST,
               given_up="part of it is gone")
    yield case("pad the batch", lambda x: F.pad(x, (1, 1)), given(1, p, n), LOST)
    yield case("pad it circularly", lambda x: F.pad(x, (1, n - 1), mode="circular"),
               given(2, p, 2, n), LOST, given_up="not followed")
    for name in ("tril", "triu"):
        yield case(name, METHOD(name), given(0, n, 2, 3), 0, silent=True)
        yield case(f"{name} of the batch", METHOD(name), given(0, n, n), LOST,
                   given_up="part of it is nobody's",)
    yield case("view_as_real", lambda x: torch.view_as_real(COMPLEX(x)), given(1, p, n), 1)
    yield case("view_as_complex", torch.view_as_complex, given(1, p, n, 2), 1)

    table = torch.rand(7, 2, dtype=torch.float64)
    yield case("embedding", lambda i: F.embedding(i, table), ids(1, 7, p, n), 1)
    yield case("embedding of its own rows", F.embedding, [turned_ids(n), given(0, n, 2)], LOST,
               given_up="a table is not looked at")
    yield case("torch.embedding of its own rows", torch.embedding, [given(0, n, 2), turned_ids(n)],
               LOST, given_up="a table is not looked at")
    yield case("one_hot", lambda i: F.one_hot(i, 5), ids(1, 5, p, n), 1)
    yield case("bags", lambda i: F.embedding_bag(i, table), ids(0, 7, n, p), 0)
    yield case("bags over the batch", lambda i: F.embedding_bag(i, table), ids(1, 7, p, n), LOST)
    yield case("bags by offsets", lambda i: F.embedding_bag(i, table, torch.tensor([0, 2])),
               ids(0, 7, n), LOST)
# fmt: on


def turned_ids(n):
    """Constant ids that turn n rows round."""
    return Operand(None, torch.arange(n).flip(0))


REDUCTIONS = {
    "any": lambda x, *d, **k: (x > 0.7).any(*d, **k),
    "all": lambda x, *d, **k: (x > 0.3).all(*d, **k),
    "count_nonzero": lambda x, *d: (x > 0.5).count_nonzero(*d),
    "norm": lambda x, *d, **k: torch.norm(x, 2.0, *d, **k),
    "vector_norm": lambda x, *d, **k: torch.linalg.vector_norm(x, 2, *d, **k),
    "linalg_norm": lambda x, *d, **k: torch.linalg.norm(x, 2 if d else None, *d, **k),
    "linalg_vector_norm": lambda x, *d, **k: torch.linalg.vector_norm(x, 2, *d, **k),
    "logsumexp": lambda x, *d, **k: torch.logsumexp(x, *d or [tuple(range(x.dim()))], **k),
    "aminmax": lambda x, *d, **k: torch.aminmax(x, **dict(zip(["dim"], d, strict=False)), **k),
    "quantile": lambda x, *d, **k: torch.quantile(x, 0.3, *d, **k),
    "nanquantile": lambda x, *d, **k: torch.nanquantile(x, 0.3, *d, **k),
    "kthvalue": lambda x, *d, **k: (x if d else x.flatten()).kthvalue(1, *d, **k),
    "mode": lambda x, *d, **k: (x if d else x.flatten()).mode(*d, **k),
    "trapezoid": lambda x, *d: torch.trapezoid(x if d else x.flatten(), dim=d[0] if d else -1),
    "linalg_vecdot": lambda x, *d: torch.linalg.vecdot(
        x if d else x.flatten(), (x + 1 if d else x.flatten() + 1), dim=d[0] if d else -1
    ),
}
KEEP_NO_DIM = {"count_nonzero", "trapezoid", "linalg_vecdot"}
FOR_THEMSELVES = {"cosine_similarity", "linalg_matrix_norm", "pairwise_distance"}


# fmt: off
def reducing(n, p):
    for name in sorted(torch_ops.REDUCING.keys() - FOR_THEMSELVES):
        call = REDUCTIONS.get(name) or getattr(torch, name)
        yield case(f"{name} behind", lambda x, f=call: f(x, 1), given(0, n, p), 0)
        yield case(f"{name} before", lambda x, f=call: f(x, 0), given(1, p, n), 0)
        yield case(f"{name} from the end", lambda x, f=call: f(x, -1), given(1, p, n, 2), 1)
        yield case(f"{name} over the batch", lambda x, f=call: f(x, 0), given(0, n, p), LOST)
        yield case(f"{name} over the batch, from the end", lambda x, f=call: f(x, -1),
                   given(1, p, n), LOST)
        yield case(f"{name} of all", call, given(0, n, p), LOST)
        yield case(f"{name}, merged", lambda x, f=call: f(x, 0),
                   given(BatchLayout(1, 3, 2), p, 6 * n), BatchLayout(0, 3, 2))
        if name not in KEEP_NO_DIM:
            yield case(f"{name}, kept", lambda x, f=call: f(x, 0, keepdim=True), given(1, p, n), 1)
    norm, per_q = torch.linalg.matrix_norm, torch.tensor([0.2, 0.5], dtype=torch.float64)
    yield case("matrix_norm", norm, given(1, p, n, 2, 2), 1)
    yield case("matrix_norm, nuclear", lambda x: norm(x, "nuc", (0, 2)), given(1, p, n, 2), 0)
    yield case("matrix_norm of the batch", norm, given(1, p, n, 2), LOST)
    yield case("quantiles", lambda x: x.quantile(per_q, 0), given(1, p, n), 1)
    yield case("quantiles, kept", lambda x: x.quantile(per_q, 1, keepdim=True), given(0, n, p), 1)
    yield case("quantiles of the batch", lambda x: x.quantile(per_q, 0), given(0, n, p), LOST)
    yield case("as many quantiles", lambda x: x.quantile(torch.linspace(0.1, 0.9, n).double(), 0),
               given(0, n, n), LOST)
    yield case("kthvalue, default", lambda x: x.kthvalue(1).values, given(0, n, p), 0)
    yield case("kthvalue, default, of the batch", lambda x: x.kthvalue(1).values, given(1, p, n),
               LOST)
    dot = torch.linalg.vecdot
    yield case("vecdot of two", dot, [given(0, n, p), given(0, n, p)], 0)
    yield case("vecdot of the batch", dot, [given(1, p, n), given(1, p, n)], LOST)
    yield case("vecdot with a constant", dot, [constant(n, p), given(0, n, p)], 0)
    yield case("vecdot, crossed", dot, [given(0, n, n, p), given(1, n, n, p)], LOST)
    near = F.pairwise_distance
    yield case("pairwise_distance", near, [given(0, n, p), given(0, n, p)], 0)
    yield case("pairwise_distance, kept", lambda x, y: near(x, y, keepdim=True),
               [given(1, p, n, 2), given(1, p, n, 2)], 1)
    yield case("pairwise_distance of the batch", near, [given(1, p, n), given(1, p, n)], LOST)
    yield case("trapezoid along points", lambda y, x: torch.trapezoid(y, x, dim=-1),
               [given(0, n, p), given(0, n, p)], 0)
    yield case("trapezoid along the batch's", lambda y, x: torch.trapezoid(y, x, dim=0),
               [constant(n, n), given(0, n)], LOST)
    yield case("cosine_similarity of two", lambda x, y: F.cosine_similarity(x, y, dim=-1),
               [given(1, p, n, 2), given(1, p, n, 2)], 1)
    yield case("cosine_similarity, crossed", lambda x, y: F.cosine_similarity(x, y, dim=-1),
               [given(0, n, n, 2), given(1, n, n, 2)], LOST)
    yield case("two dims", lambda x: x.sum((0, 2)), given(1, p, n, 2), 0)
    yield case("two dims, named", lambda x: torch.mean(dim=(0, -1), input=x), given(1, p, n, 2), 0)
    yield case("two dims, one the batch's", lambda x: x.amax((0, 1)), given(1, p, n, p), LOST)
    yield case("NumPy's axis", lambda x: torch.sum(x, axis=0), given(1, p, n), 0)
    yield case("NumPy's axis, the batch's", lambda x: torch.sum(x, axis=0), given(0, n, n), LOST)
    yield case("larger of two", torch.max, [given(1, p, n), given(0, n)], 1)
    yield case("smaller of two", lambda x, y: torch.min(other=x, input=y),
               [given(1, p, n), given(0, n)], 1)
    yield case("larger of two crossed", torch.max, [given(0, n, n), given(1, n, n)], LOST)
    yield case("std without a dim", lambda x: x.std(False), given(0, n, p), LOST)
    yield case("cosine_similarity", lambda x, y: F.cosine_similarity(x, y),
               [given(0, n, p), constant(n, p)], 0)
    yield case("cosine_similarity, pairs", lambda x, y: F.cosine_similarity(x, y, -1),
               [given(0, n, 1, 2), constant(1, p, 2)], 0)
    yield case("cosine_similarity over the batch", lambda x, y: F.cosine_similarity(x, y, 0),
               [given(0, n, p), constant(n, p)], LOST)
    yield case("cosine_similarity with more dims", lambda x, y: F.cosine_similarity(x, y, dim=-1),
               [given(0, n, 2), constant(n, n, 2)], LOST,
               given_up="operands of unlike dims are not followed")


def multiplying(n, p):
    two = [given(0, n, p), constant(p, 2)]
    for name, call in (("matmul", torch.matmul), ("mm", torch.mm), ("@", lambda x, y: x @ y)):
        yield case(f"{name}, rows", call, two, 0)
        yield case(f"{name}, columns", call, [constant(2, p), given(1, p, n)], 1)
        yield case(f"{name}, merged rows", call,
                   [given(BatchLayout(0, 2, 3), 6 * n, p), constant(p, 2)], BatchLayout(0, 2, 3))
        yield case(f"{name}, contracted rows", call, [constant(p, n), given(0, n, n)], LOST)
        yield case(f"{name}, contracted columns", call, [given(1, n, n), constant(n, p)], LOST)
        yield case(f"{name}, all pairs", lambda x, f=call: f(x, x.t()), given(0, n, p), LOST)
        yield case(f"{name}, both contracted", lambda x, f=call: f(x.t(), x), given(0, n, n), LOST)
        yield case(f"{name}, squared", lambda x, f=call: f(x, x), given(0, n, n), LOST)
        yield case(f"{name}, rows by columns", call, [given(0, n, p), given(1, p, n)], LOST)
    yield case("named", lambda x, y: torch.matmul(other=y, input=x), two, 0)
    yield case("named, contracted", lambda x, y: torch.matmul(other=y, input=x),
               [given(1, 2, n), constant(n, n)], LOST)
    yield case("named as NumPy does", lambda x, y: torch.matmul(x2=y, x1=x),
               [given(1, 2, n), constant(n, n)], LOST)
    yield case("rmatmul", lambda x, y: METHOD("__rmatmul__")(y, x), two, 0)
    yield case("rmatmul, contracted", lambda x, y: METHOD("__rmatmul__")(y, x),
               [given(1, n, n), constant(n, n)], LOST)
    yield case("stacks", torch.matmul, [given(0, n, 2, p), constant(p, 3)], 0)
    yield case("stacks, second", torch.matmul, [constant(2, p), given(0, n, p, 3)], 0)
    yield case("stacks of both", torch.matmul, [given(1, 2, n, 2, p), given(0, n, p, 3)], 1)
    yield case("stacks shifted", torch.matmul, [given(0, n, n, 2, p), given(0, n, p, 3)], LOST)
    yield case("rows of stacks", torch.matmul, [given(1, 2, n, p), constant(2, p, n)], 1)
    yield case("columns of stacks", torch.matmul, [constant(2, n, p), given(2, 2, p, n)], 2)
    yield case("matrices by a vector", torch.matmul, [given(1, 2, n, p), constant(p)], 1)
    yield case("a vector by matrices", torch.matmul, [constant(p), given(0, n, p, 3)], 0)
    yield case("a vector by columns", torch.matmul, [constant(p), given(1, p, n)], 0)
    yield case("a vector by columns of stacks", torch.matmul, [constant(p), given(2, n, p, n)], 1)
    yield case("by a vector of the batch", torch.matmul, [constant(p, n), given(0, n)], LOST)
    yield case("a vector of the batch", torch.matmul, [given(0, n), constant(n, n)], LOST)
    yield case("mv", torch.mv, [given(0, n, p), constant(p)], 0)
    yield case("mv, contracted", torch.mv, [given(1, n, n), constant(n)], LOST)
    yield case("bmm", torch.bmm, [given(0, n, 2, p), given(0, n, p, 3)], 0)
    yield case("bmm, contracted", torch.bmm, [given(2, n, 2, n), constant(n, n, 3)], LOST)
    yield case("bmm, rows", torch.bmm, [given(1, 2, n, p), constant(2, p, n)], 1)
    yield case("addmm", torch.addmm, [constant(2), given(0, n, p), constant(p, 2)], 0)
    yield case("addmm, addend", torch.addmm, [given(0, n, 2), given(0, n, p), constant(p, 2)], 0)
    yield case("addmm, addend alone", torch.addmm, [given(0, n, 2), constant(n, p), constant(p, 2)],
               0)
    yield case("addmm, addend of a column", torch.addmm, [given(0, n), constant(2, p), constant(p,
               n)], 1)
    yield case("addmm, crossed", torch.addmm, [given(1, n, n), given(0, n, p), constant(p, n)],
               LOST)
    yield case("addmm, named", lambda a, x, y: torch.addmm(mat2=y, mat1=x, input=a),
               [constant(n), given(0, n, n), constant(n, n)], 0)
    yield case("addmm, named, contracted", lambda a, x, y: torch.addmm(a, mat2=y, mat1=x),
               [constant(n), given(1, n, n), constant(n, n)], LOST)
    yield case("baddbmm", torch.baddbmm, [constant(n, 1, 3), given(0, n, 2, p), given(0, n, p, 3)],
               0)
    yield case("baddbmm, shifted", torch.baddbmm, [given(1, n, n, 3), given(0, n, n, p),
               given(0, n, p, 3)], LOST)

    for equation, first, second, expected in (
        ("np,pk->nk", given(0, n, p), constant(p, 2), 0),
        ("np,pk->kn", given(0, n, p), constant(p, 2), 1),
        ("np,pz", given(0, n, p), constant(p, 2), 0),  # a result left out goes by the alphabet
        ("np,pk", given(0, n, p), constant(p, 2), 1),
        ("np,nk->pk", given(0, n, p), constant(n, 2), LOST),
        ("...p,pk->...k", given(1, 2, n, p), constant(p, 2), 1),
        ("...p,pk", given(1, 2, n, p), constant(p, 2), 1),
        ("...p,...p->...", given(1, 2, n, p), given(0, n, p), 1),
        ("a...,b->b...a", given(1, 2, n, p), constant(3), 1),
        ("n...,b->...bn", given(0, n, p), constant(3), 2),
        ("bnp,npk->nbk", given(1, 2, n, p), given(0, n, p, 2), 0),
        ("ij,jk->ik", given(0, n, n), given(1, n, n), LOST),
        ("ij,ij->ij", given(0, n, n), given(1, n, n), LOST),
        (" n p , p k -> n k ", given(0, n, p), constant(p, 2), 0),
    ):
        yield case(f"einsum {equation}", lambda x, y, e=equation: torch.einsum(e, x, y),
                   [first, second], expected)
        yield case(f"einsum [{equation}]", lambda x, y, e=equation: torch.einsum(e, [x, y]),
                   [first, second], expected)
    square = given(0, n, n)
    yield case("einsum, diagonal", lambda x: torch.einsum("ii->i", x), square, 0)
    yield case("einsum, itself", lambda x: torch.einsum("ij,ij->i", x, x), given(0, n, p), 0)
    yield case("einsum, itself turned", lambda x: torch.einsum("ij,ji->i", x, x), square, LOST)
    yield case("einsum, all pairs", lambda x: torch.einsum("ij,kj->ik", x, x), given(0, n, p), LOST)
    yield case("einsum, transposed", lambda x: torch.einsum("ij->ji", x), given(0, n, p), 1)
    yield case("einsum, sublists", lambda x: torch.einsum(x, [0, 1], [1, 0]), given(0, n, p), 1)

    attend = F.scaled_dot_product_attention
    yield case("attention", attend, [given(0, n, p, 4), given(0, n, 2, 4), given(0, n, 2, 4)], 0)
    yield case("attention, heads", attend, [given(1, 2, n, p, 4), constant(2, n, 3, 4),
               given(1, 2, n, 3, 4)], 1)
    yield case("attention over the batch", attend, [given(1, p, n, 4), given(1, p, n, 4),
               given(1, p, n, 4)], LOST)
    yield case("attention, keys of the batch", attend, [constant(p, 2, 4), given(1, p, n, 4),
               constant(p, n, 4)], LOST)
    yield case("attention, queries of the batch", attend, [given(1, p, n, 4), constant(p, 2, 4),
               constant(p, 2, 4)], LOST, given_up="positions are not told apart")
    yield case("attention, crossed", attend, [given(0, n, n, 2, 4), given(1, n, n, 2, 4),
               given(1, n, n, 2, 4)], LOST)
    yield case("attention, masked", lambda x, m: attend(x, x, x, attn_mask=m),
               [given(0, n, p, 4), data(0, n, 1, p)], 0)


def good(x):
    """Square matrices that can be inverted, of any."""
    return x + 3 * torch.eye(x.shape[-1], dtype=x.dtype)


def definite(x):
    return good(x @ x.mT)


def factored(x):
    return torch.linalg.lu_factor(good(x.detach()))


SQUARE = {
    "linalg_cholesky": lambda x: torch.linalg.cholesky(definite(x)),
    "linalg_cholesky_ex": lambda x: torch.linalg.cholesky_ex(definite(x))[0],
    "cholesky_inverse": lambda x: torch.cholesky_inverse(good(x)),
    "linalg_matrix_power": lambda x: torch.linalg.matrix_power(x, 2),
    "linalg_eigh": lambda x: torch.linalg.eigh(definite(x)),
    "linalg_eigvalsh": lambda x: torch.linalg.eigvalsh(definite(x)),
    "linalg_matrix_rank": lambda x: torch.linalg.matrix_rank((x * 3).round()),
    "linalg_ldl_factor": lambda x: torch.linalg.ldl_factor(definite(x))[0],
    "linalg_ldl_factor_ex": lambda x: torch.linalg.ldl_factor_ex(definite(x))[0],
    "linalg_lu": lambda x: torch.linalg.lu(good(x))[1:],
    "linalg_lu_factor": lambda x: torch.linalg.lu_factor(good(x))[0],
    "linalg_lu_factor_ex": lambda x: torch.linalg.lu_factor_ex(good(x))[0],
    "lu": lambda x: torch.lu(good(x))[0],
    "lu_unpack": lambda x: torch.lu_unpack(*torch.linalg.lu_factor(good(x)))[1:],
    "linalg_inv_ex": lambda x: torch.linalg.inv_ex(good(x))[0],
    "linalg_householder_product": lambda x: torch.linalg.householder_product(x, x[..., 0]),
    "geqrf": lambda x: torch.geqrf(x),
    "linalg_slogdet": lambda x: torch.linalg.slogdet(good(x))[1],
    "logdet": lambda x: good(x).logdet(),
}
SOLVED = {
    "linalg_solve": lambda a, b: torch.linalg.solve(good(a), b),
    "linalg_solve_ex": lambda a, b: torch.linalg.solve_ex(good(a), b)[0],
    # The driver that is taken by default rounds by what the matrix before was like.
    "linalg_lstsq": lambda a, b: torch.linalg.lstsq(good(a), b, driver="gels")[0],
    "linalg_solve_triangular": lambda a, b: torch.linalg.solve_triangular(good(a), b, upper=True),
    "triangular_solve": lambda a, b: torch.triangular_solve(b, good(a))[0],
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b, good(a)),
    "lu_solve": lambda a, b: torch.lu_solve(b, *torch.linalg.lu_factor(good(a))),
    "linalg_lu_solve": lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(good(a)), b),
    "linalg_ldl_solve": lambda a, b: torch.linalg.ldl_solve(
        *torch.linalg.ldl_factor(definite(a)), b
    ),
    "ormqr": lambda a, b: torch.ormqr(a, a[..., 0], b),
}
BY_TERMS = {name for name, terms in torch_ops.TERMS.items() if terms.count("ij") == 1 == len(
    terms.split(", ")
)}  # fmt: skip


# fmt: off
def matrices(n, p):
    """Functions of every matrix of a stack."""
    for name in sorted(BY_TERMS | {"lu_unpack", "linalg_householder_product"}):
        call = SQUARE.get(name) or getattr(torch.linalg, name.removeprefix("linalg_"))
        ignored = name == "linalg_matrix_rank"  # whose values seldom change
        yield case(name, call, given(1, 2, n, 3, 3), 1, silent=ignored)
        yield case(f"{name}, merged", call, given(BatchLayout(0, 2, 1), 2 * n, 3, 3),
                   BatchLayout(0, 2, 1), silent=ignored)
        if name not in ("geqrf", "lu_unpack"):
            yield case(f"{name} of one of the batch", lambda x, f=call: tensors_of(f(x))[0].sum(),
                       given(0, n, n), LOST)
    for name, call in SOLVED.items():
        yield case(name, call, [given(0, n, 3, 3), given(0, n, 3, 2)], 0)
        yield case(f"{name}, constant matrices", call, [constant(n, 3, 3), given(0, n, 3, 2)], 0)
        yield case(f"{name}, constant sides", call, [given(0, n, 3, 3), constant(n, 3, 2)], 0)
        yield case(f"{name}, crossed", call, [given(0, n, n, 3, 3), given(1, n, n, 3, 2)], LOST)
    solve = torch.linalg.solve
    yield case("solve, broadcast", lambda a, b: solve(good(a), b),
               [constant(3, 3), given(1, 2, n, 3, 2)], 1)
    yield case("solve, named", lambda a, b: solve(B=b, A=good(a)),
               [given(0, n, 3, 3), constant(1, 3, 2)], 0)
    yield case("solve, named, crossed", lambda a, b: solve(B=b, A=good(a)),
               [given(0, n, n, n), given(1, n, n)], LOST)
    yield case("solve for vectors", lambda a, b: solve(good(a), b),
               [given(0, n, 3, 3), given(0, n, 3)], 0)
    yield case("solve for a vector of the batch", lambda a, b: solve(good(a), b),
               [constant(n, n), given(0, n)], LOST)
    yield case("solve for columns", lambda a, b: solve(good(a), b),
               [constant(3, 3), given(1, 3, n)], LOST, given_up="columns are not told apart")
    yield case("vander", torch.linalg.vander, given(0, n, 3), 0, silent=True)
    yield case("cdist", torch.cdist, [given(0, n, p, 3), given(0, n, 2, 3)], 0)
    yield case("cdist, rows", torch.cdist, [given(0, n, 3), constant(p, 3)], 0)
    yield case("cdist, columns", torch.cdist, [constant(p, 3), given(0, n, 3)], 1)
    yield case("cdist, all pairs", torch.cdist, [given(0, n, 3), given(0, n, 3)], LOST)
    yield case("cdist, named", lambda x, y: torch.cdist(x2=y, x1=x),
               [constant(p, 3), given(0, n, 3)], 1)
    yield case("outer", torch.outer, [given(0, n), constant(p)], 0)
    yield case("outer, columns", torch.outer, [constant(p), given(0, n)], 1)
    yield case("outer, all pairs", torch.outer, [given(0, n), given(0, n)], LOST)
    yield case("addr", torch.addr, [constant(n, p), given(0, n), constant(p)], 0)
    yield case("addr, addend", torch.addr, [given(1, p, n), constant(p), given(0, n)], 1)
    yield case("addmv", torch.addmv, [given(0, n), given(0, n, p), constant(p)], 0)
    yield case("addmv, contracted", torch.addmv, [constant(n), given(1, n, n), constant(n)], LOST)
    yield case("addbmm", torch.addbmm, [given(0, n, 2), given(1, 4, n, p), constant(4, p, 2)], 0)
    yield case("addbmm, summed", torch.addbmm, [constant(n, n), given(0, n, n, p),
               constant(n, p, n)], LOST)
    yield case("inner", torch.inner, [given(1, 2, n, p), constant(3, p)], 1)
    yield case("inner, second", torch.inner, [constant(3, p), given(0, n, p)], 1)
    yield case("inner, summed", torch.inner, [given(0, n), constant(n)], LOST)
    dot = torch.tensordot
    yield case("tensordot", lambda x, y: dot(x, y, 1), [given(1, 2, n, p), constant(p, 3)], 1)
    yield case("tensordot, second", lambda x, y: dot(x, y, ([1], [0])),
               [constant(2, p), given(1, p, n)], 1)
    yield case("tensordot, pairs", lambda x, y: dot(x, y, dims=([-1, 0], [0, 1])),
               [given(1, 2, n, p), constant(p, 2)], 0)
    yield case("tensordot, summed", lambda x, y: dot(x, y, ([0], [0])),
               [given(0, n, n), constant(n, n)], LOST)
    chain = torch.linalg.multi_dot
    yield case("multi_dot", lambda x, y, z: chain([x, y, z]),
               [given(0, n, p), constant(p, 4), constant(4, 2)], 0)
    yield case("multi_dot, columns", lambda x, y, z: chain([x, y, z]),
               [constant(2, p), constant(p, 4), given(1, 4, n)], 1)
    yield case("multi_dot, summed", lambda x, y, z: chain([x, y, z]),
               [constant(n, n), given(0, n, n), constant(n, n)], LOST)
    yield case("kron", torch.kron, [given(0, n, p), constant(2, 3)], BatchLayout(0, 1, 2))
    yield case("kron, second", torch.kron, [constant(2, 3), given(0, n, p)], BatchLayout(0, 2))
    yield case("kron, all pairs", torch.kron, [given(0, n, n), given(0, n, n)], LOST)
    for name, at in (("diagonal", lambda x, a, b: x.diagonal(1, a, b)),
                     ("linalg.diagonal", lambda x, a, b: torch.linalg.diagonal(x, dim1=a, dim2=b))):
        yield case(name, lambda x, f=at: f(x, 0, 2), given(1, p + 2, n, p + 2), 0)
        yield case(f"{name}, before", lambda x, f=at: f(x, -1, -2), given(0, n, 3, 3), 0)
        yield case(f"{name} of the batch", lambda x, f=at: f(x, 0, 1), given(0, n, n + 1, 2), 1)
    yield case("diagonals, default", torch.diagonal, given(2, 3, 3, n), 0)
    yield case("diagonals of the last, default", torch.linalg.diagonal, given(0, n, 3, 3), 0)
    yield case("diag_embed", torch.diag_embed, given(1, p, n, 2), 1, silent=True)
    yield case("diag_embed in front", lambda x: x.diag_embed(0, 0, 2), given(0, n, 3), 1)
    yield case("diag_embed of the batch", torch.diag_embed, given(1, p, n), LOST,
               given_up="both dims hold it")
    yield case("renorm", lambda x: x.renorm(2, 1, 0.5), given(1, p, n), 1)
    yield case("renorm of others", lambda x: x.renorm(2, 0, 0.5), given(1, p, n), LOST)
    window = torch.ones(4, dtype=torch.float64)
    stft = lambda x: torch.stft(x, 4, 2, window=window, return_complex=True)
    yield case("stft", stft, given(0, n, 16), 0)
    yield case("stft of one", lambda x: stft(x.flatten()), given(0, n, 16), LOST)
    yield case("istft", lambda x: torch.istft(stft(x), 4, 2, window=window), given(0, n, 16), 0)


def tensors_of(results):
    return [results] if isinstance(results, Tensor) else list(results)


ELEMENT_LOSSES = {
    "gaussian_nll_loss": lambda x, y, **k: F.gaussian_nll_loss(x, y, x.detach() * 0 + 0.5, **k),
    "soft_margin_loss": lambda x, y, **k: F.soft_margin_loss(x, y.detach(), **k),
    "margin_ranking_loss": lambda x, y, **k: F.margin_ranking_loss(x, y, torch.ones_like(x), **k),
    "hinge_embedding_loss": lambda x, y, **k: F.hinge_embedding_loss(x, y.sub(0.5).sign(), **k),
}
LOSSES_BY_TERMS = {
    "triplet_margin_loss": lambda x, y, **k: F.triplet_margin_loss(x, y, y.flip(-1), **k),
    "cosine_embedding_loss": lambda x, y, **k: F.cosine_embedding_loss(
        x, y, torch.ones(x.shape[:-1]), **k
    ),
    "multi_margin_loss": lambda x, y, **k: F.multi_margin_loss(x, y.argmin(-1), **k),
    "multilabel_margin_loss": lambda x, y, **k: F.multilabel_margin_loss(
        x, F.pad(y.argmax(-1, True), (0, 3), value=-1), **k
    ),
}


def losses(n, p):
    for name in sorted(torch_ops.LOSSES):
        call = ELEMENT_LOSSES.get(name) or getattr(F, name)
        both = [given(1, p, n, 2), given(1, p, n, 2)]
        yield case(name, lambda x, y, f=call: f(x, y, reduction="none"), both, 1)
        for reduction in ("mean", "sum"):
            yield case(f"{name}, {reduction}", lambda x, y, f=call, r=reduction: f(x, y,
                       reduction=r), both, LOST)
        yield case(f"{name}, crossed", lambda x, y, f=call: f(x, y, reduction="none"),
                   [given(0, n, n), given(1, n, n)], LOST)
    nll = F.gaussian_nll_loss
    yield case("gaussian_nll_loss, a variance each", lambda x, y, v: nll(x, y, v, reduction="none"),
               [given(0, n, n), given(0, n, n), given(0, n)], 0)
    yield case("gaussian_nll_loss, crossed variances", lambda x, y, v: nll(x, y, v,
               reduction="none"), [given(1, n, n), given(1, n, n), given(0, n)], LOST)
    yield case("gaussian_nll_loss, named", lambda x, y, v: nll(x, var=v, target=y,
               reduction="none"), [given(1, n, n), given(1, n, n), given(0, n)], LOST)
    for name in sorted(torch_ops.LOSSES_BY_TERMS):
        call = LOSSES_BY_TERMS.get(name) or getattr(F, name)
        both = [given(0, n, 4), data(0, n, 4)]
        yield case(name, lambda x, y, f=call: f(x, y, reduction="none"), both, 0)
        yield case(f"{name}, mean", lambda x, y, f=call: f(x, y), both, LOST)
    targets = ids(0, 4, n)
    for name in sorted(torch_ops.LOSSES_OF_CLASSES):
        call = getattr(F, name)
        yield case(name, lambda x, i, f=call: f(x, i, reduction="none"), [given(0, n, 4), targets],
                   0)
        yield case(f"{name}, mean", lambda x, i, f=call: f(x, i), [given(0, n, 4), targets], LOST)
        yield case(f"{name} of sequences", lambda x, i, f=call: f(x, i, reduction="none"),
                   [given(0, n, 4, p), ids(0, 4, n, p)], 0)
        yield case(f"{name}, the batch last", lambda x, i, f=call: f(x, i, reduction="none"),
                   [given(2, p, 4, n), ids(1, 4, p, n)], 1)
        yield case(f"{name} of classes", lambda x, f=call: f(x, torch.zeros(p, dtype=torch.int64),
                   reduction="none"), given(1, p, n), LOST,
                   given_up="the first is picked" if name == "nll_loss" else "")
    yield case("cross_entropy with likely classes", lambda x, y: F.cross_entropy(x, y,
               reduction="none"), [given(0, n, 4), given(0, n, 4)], 0)


# fmt: on


# Operators, deprecated and internal functions that torch calls by another name when it runs them.
NOT_RUN = {
    *"iadd imul isub itruediv mod pos radd rmul rtruediv truediv".split(),
    *"upsample vector_norm".split(),
}
FAMILIES = [unary, elementwise, comparing, rowwise, reducing, multiplying, matrices, losses]
KNOWN = {
    unary: torch_ops.UNARY - NOT_TRIED.keys(),
    elementwise: torch_ops.ELEMENTWISE,
    comparing: torch_ops.COMPARING - {"equal"},
    rowwise: torch_ops.ROWWISE,
    reducing: torch_ops.REDUCING.keys(),
    multiplying: torch_ops.MULTIPLYING | {"einsum", "scaled_dot_product_attention"},
    matrices: (torch_ops.TERMS.keys() - torch_ops.LOSSES_BY_TERMS)
    | torch_ops.DIAGONALS.keys()
    | {"inner", "tensordot", "linalg_multi_dot", "kron", "renorm", "stft", "istft"},
    losses: torch_ops.LOSSES | torch_ops.LOSSES_BY_TERMS | torch_ops.LOSSES_OF_CLASSES,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For calls this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("batch_size", "positions"), SIZES)
@pytest.mark.filterwarnings("ignore")
def test_marks_are_those_expected(family, batch_size, positions):
    assert_all_marks(family(batch_size, positions), batch_size)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_every_known_operation_has_a_case(family):
    assert set(KNOWN[family]) - names_in(list(family(3, 5))) - NOT_RUN == set()


@pytest.mark.parametrize("family", [unary, elementwise, reducing], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_batch_of_one_is_all_that_one(family):
    for c in family(1, 3):
        assert_all_of_one(c)
