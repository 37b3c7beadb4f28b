"""Every kind of factors, alone and together, against contributions formed one group at a time by
plain autograd.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import htv
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops import aggregate, backend, dispatch, limits, registry
from htv.ops.agreement import agreement, projections, squared_norms
from htv.ops.factors import (
    BilinearFactors,
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    Factors,
    GroupwiseFactors,
    LinearFactors,
    StackedFactors,
    ViewFactors,
)
from htv.ops.reference import Summary, finish
from htv.rules import Statistic
from support.oracles import RULES, by_name, stat
from support.quick import RULES as QUICK
from support.quick import STREAMING_RULES, quick, quick_pairs

E = 7
SIZES = (3, 1, 0, 2, 4, 1, 1)  # rows per group: ragged, one without any
IDS = torch.repeat_interleave(torch.arange(E), torch.tensor(SIZES))
BOUNDS = torch.tensor([0, *SIZES]).cumsum(0)


@dataclass
class Case:
    parts: list[Factors]
    contributions: torch.Tensor  # (E, *shape), float64


@pytest.fixture(params=["auto", "reference"], autouse=True)
def served_by(request):
    with backend.use_backend(request.param):
        yield


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_autograd(function, parameter, grad_output, ids=IDS, count=E):
    """(E, *shape): by group, d(function(parameter, rows) * grad_output[rows]) / d(parameter)."""
    parameter = parameter.detach().clone().requires_grad_()
    found = []
    for e in range(count):
        rows = (ids == e).nonzero().flatten()
        loss = (function(parameter, rows) * grad_output[rows]).sum()
        found.append(
            torch.autograd.grad(loss, parameter)[0] if len(rows) else torch.zeros_like(parameter)
        )
    return torch.stack(found).detach()


def linear_use(outputs, inputs, sizes=SIZES):
    """(factors, contributions) of one use of an (O, I) weight."""
    ids, bounds = (
        torch.repeat_interleave(torch.arange(E), torch.tensor(sizes)),
        torch.tensor([0, *sizes]).cumsum(0),
    )
    x, grad = randn(len(ids), inputs), randn(len(ids), outputs)
    found = by_autograd(lambda w, rows: F.linear(x[rows], w), randn(outputs, inputs), grad, ids)
    return LinearFactors(x, grad, bounds), found


def summed(*uses):
    return Case([use[0] for use in uses], sum(use[1] for use in uses))


def embedding_use(tokens=23, width=5, padding_idx=None, repeats=3):
    """Several lookups a row, of few tokens, so that many occur twice in a group and some in most
    groups.
    """
    ids = torch.randint(0, tokens // 2, (len(IDS), repeats)) * torch.randint(
        0, 2, (len(IDS), repeats)
    )
    ids[:, 0] = 3
    grad = randn(len(IDS), repeats, width)
    found = by_autograd(
        lambda w, rows: F.embedding(ids[rows], w, padding_idx=padding_idx),
        randn(tokens, width),
        grad,
    )
    return EmbeddingFactors(
        ids.flatten(), grad.flatten(0, 1), BOUNDS * repeats, tokens, padding_idx
    ), found


def conv_case(c, o, space, kernel, groups=1, weight="size", ids=None, sort=False, **options):
    """ids: of the samples; a layer that sees but some of the units where a group has none."""
    dims, ids = len(space), IDS[torch.randperm(len(IDS))] if ids is None else ids
    ids = ids.sort().values if sort else ids
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    x, weights = randn(len(ids), c, *space), randn(o, c // groups, *kernel)
    grad = randn(*function(x, weights, groups=groups, **options).shape)
    by_two = Groups.by_id(torch.arange(E).repeat_interleave(2), 2 * E, weight=weight)
    grouped_rows = GroupedRows(by_two, BatchLayout(0, examples=2 * ids))
    found = by_autograd(
        lambda w, rows: function(x[rows], w, groups=groups, **options), weights, grad, ids
    )
    if by_two.weights is not None:
        found = found * by_two.weights.reshape(-1, *(1,) * weights.dim())
    geometry = ConvGeometry(
        options.get("stride", 1),
        options.get("padding", 0),
        options.get("dilation", 1),
        groups,
        dims,
    )
    return Case([ConvFactors(x, grad, kernel, geometry, grouped_rows)], found)


def view_of(inner, view, parameter, found):
    """Factors of a view, and its contributions at their place in the parameter."""
    placed = [torch.zeros_like(parameter) for _ in range(E)]
    for whole, contribution in zip(placed, found, strict=True):
        whole.as_strided(*view).copy_(contribution)
    return ViewFactors.of(inner, view, parameter), torch.stack(placed)


def views_case(views, shape, layer=linear_use):
    parameter = randn(*shape)
    return summed(
        *(view_of(use[0], view, parameter, use[1]) for view in views for use in [layer(*view[0])])
    )


def stacked_use(*shape):
    values = randn(E, *shape)
    return StackedFactors(values), values


def bilinear_case():
    left, right, grad = randn(len(IDS), 4), randn(len(IDS), 3), randn(len(IDS), 5)
    found = by_autograd(
        lambda w, rows: F.bilinear(left[rows], right[rows], w), randn(5, 4, 3), grad
    )
    return Case([BilinearFactors(left, right, grad, BOUNDS)], found)


def groupwise_use():
    """A weight computed as A * p.t() + constant, with rows of p shared."""
    inner, found = linear_use(6, 5)
    a, parameter = randn(6, 5), randn(5, 6)
    pull_back = lambda grad: (a * grad).t()
    return GroupwiseFactors(inner, pull_back, parameter), torch.stack([pull_back(c) for c in found])


def tied_case():
    table, found = embedding_use(23, 5)
    layer, more = linear_use(23, 5)
    return Case([table, layer], found + more)


def dense(*shape, offset=0):
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), offset


CASES = {
    "linear": lambda: summed(linear_use(5, 4)),
    "recurrence": lambda: summed(
        linear_use(5, 4),
        linear_use(5, 4, (0, 2, 1, 1, 0, 3, 1)),
        linear_use(5, 4, (1,) * E),
        linear_use(5, 4, (0,) * E),
    ),
    "stacked": lambda: summed(stacked_use(6)),
    "scalar": lambda: summed(stacked_use()),
    "linear and stacked": lambda: summed(linear_use(5, 4), stacked_use(5, 4)),
    "bilinear": bilinear_case,
    "groupwise": lambda: summed(groupwise_use()),
    "groupwise and linear": lambda: summed(groupwise_use(), linear_use(5, 6)),
    "embedding": lambda: summed(embedding_use()),
    "embedding with padding": lambda: summed(embedding_use(padding_idx=3)),
    "embeddings": lambda: summed(
        embedding_use(), embedding_use(padding_idx=0), embedding_use(repeats=1)
    ),
    "tied": tied_case,
    "tied twice": lambda: summed(
        embedding_use(), linear_use(23, 5), embedding_use(), linear_use(23, 5)
    ),
    "embedding and stacked": lambda: summed(embedding_use(), stacked_use(23, 5)),
    "chunks": lambda: views_case(
        [dense(2, 4), dense(3, 4, offset=8), dense(1, 4, offset=20)], (6, 4)
    ),
    "chunk twice": lambda: views_case([dense(2, 4), dense(2, 4)], (6, 4)),
    "experts": lambda: views_case([dense(3, 4, offset=12 * e) for e in (0, 2, 3)], (4, 3, 4)),
    "transposed experts": lambda: views_case([((4, 3), (1, 4), 12 * e) for e in (0, 1)], (3, 3, 4)),
    "overlapping": lambda: views_case([dense(3, 4), dense(3, 4, offset=8)], (6, 4)),
    "transposed and whole": lambda: views_case([((4, 6), (1, 4), 0), dense(6, 4)], (6, 4)),
    "chunk and whole": lambda: views_case([dense(2, 4), dense(6, 4)], (6, 4)),
    "columns": lambda: views_case([((6, 2), (4, 1), 0), ((6, 1), (4, 1), 3)], (6, 4)),
    "views of no layer": lambda: views_case(
        [dense(2, 4), dense(2, 4, offset=8)], (6, 4), stacked_use
    ),
    "conv1d": lambda: conv_case(4, 6, (9,), (3,), padding=1),
    "conv2d": lambda: conv_case(
        4, 6, (5, 7), (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)
    ),
    "conv2d sorted": lambda: conv_case(4, 6, (5, 7), (3, 3), sort=True),
    "conv2d one sample a group": lambda: conv_case(4, 6, (9, 9), (3, 3), ids=torch.arange(E)),
    "conv2d equal groups": lambda: conv_case(4, 6, (5, 5), (3, 3), weight="equal", padding=1),
    "conv2d 1x1": lambda: conv_case(4, 6, (5, 5), (1, 1)),
    "conv2d stride beyond kernel": lambda: conv_case(4, 6, (7, 7), (2, 2), stride=3),
    "conv3d": lambda: conv_case(2, 3, (4, 3, 5), (2, 2, 3), padding=(0, 1, 1)),
    "grouped": lambda: conv_case(12, 8, (5, 5), (3, 3), groups=4, padding=1),
    "grouped wide": lambda: conv_case(4, 64, (5, 4), (3, 2), groups=2, padding=1),
    "depthwise": lambda: conv_case(10, 10, (6, 5), (3, 3), groups=10, padding=1),
    "depthwise equal groups": lambda: conv_case(
        6, 12, (9,), (3,), groups=6, stride=2, weight="equal"
    ),
}


@pytest.mark.parametrize("rule", quick(RULES, QUICK), **by_name)
@pytest.mark.parametrize("name", CASES)
def test_every_rule(name, rule):
    case = CASES[name]()
    before = [part.total() for part in case.parts]
    found = aggregate.aggregate(case.parts, rule)
    np.testing.assert_allclose(
        found, E * stat(rule, case.contributions.numpy()), rtol=1e-8, atol=1e-8
    )
    for part, total in zip(case.parts, before, strict=True):
        assert torch.equal(part.total(), total)


SLICED = [htv.AndMask(0.4, rescale=True), htv.SandMask(0.3, 0.5), htv.Median()]
SLICED = [(rule, scratch) for rule in SLICED for scratch in (1, 500)]


@pytest.mark.parametrize("rule, scratch", quick_pairs(SLICED, SLICED[::2] + SLICED[5:]), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_slices(name, rule, scratch, monkeypatch):
    monkeypatch.setattr(limits, "SCRATCH_BYTES", scratch)
    for kind in (Factors, GroupwiseFactors):
        monkeypatch.setattr(kind, "scratch", scratch)
    case = CASES[name]()
    found = aggregate.aggregate(case.parts, rule)
    np.testing.assert_allclose(
        found, E * stat(rule, case.contributions.numpy()), rtol=1e-8, atol=1e-8
    )


class Lifted(htv.Rule):
    """The largest and a quarter: where nobody contributes it is not zero."""

    def reduce(self, contributions):
        return contributions.amax(dim=0) + 0.25


@pytest.mark.parametrize("scratch", [None, 1, 500])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_of_ones_own(name, scratch, monkeypatch):
    if scratch is not None:
        monkeypatch.setattr(limits, "SCRATCH_BYTES", scratch)
        for kind in (Factors, GroupwiseFactors):
            monkeypatch.setattr(kind, "scratch", scratch)
    case = CASES[name]()
    found = aggregate.aggregate(case.parts, Lifted())
    expected = E * (case.contributions.amax(dim=0) + 0.25)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert agreement(case.parts, Lifted()).kept_fraction == 1
    for part in case.parts:
        assert dispatch.path(part, Lifted(), part.device).endswith("sliced (reduce)")
        assert math.isfinite(dispatch.extra_work(part, Lifted()))


@pytest.mark.parametrize("name", CASES)
def test_one_total_and_norms(name):
    case = CASES[name]()
    one = torch.stack([sum(part.contribution(e) for part in case.parts) for e in range(E)])
    torch.testing.assert_close(one, case.contributions, rtol=1e-9, atol=1e-9)
    total = sum(part.total() for part in case.parts)
    torch.testing.assert_close(total, case.contributions.sum(0), rtol=1e-9, atol=1e-9)
    for groups in (slice(0, 2), slice(2, 3), slice(2, 6), slice(0, E)):  # the third has no rows
        total = sum(part.total_of(groups) for part in case.parts)
        torch.testing.assert_close(total, case.contributions[groups].sum(0), rtol=1e-9, atol=1e-9)
    for part in case.parts:
        norms = [part.contribution(e).square().sum() for e in range(E)]
        torch.testing.assert_close(part.squared_norms(), torch.stack(norms), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_norms_and_projections_of_all_uses_together(name):
    case = CASES[name]()
    flat = case.contributions.reshape(E, -1)
    direction = torch.randn(case.contributions.shape[1:], dtype=torch.float64)
    found = projections(case.parts, direction)
    torch.testing.assert_close(found, flat @ direction.flatten(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        squared_norms(case.parts), flat.square().sum(1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "rule", quick([r for r in RULES if r.streaming], (*QUICK, *STREAMING_RULES)), **by_name
)
@pytest.mark.parametrize("name", CASES)
def test_summaries(name, rule):
    case, statistic = CASES[name](), rule.statistic(E)
    value, mask_sum = finish(aggregate.summarise(case.parts, statistic), statistic)
    found = aggregate.functional.normalise(value, mask_sum, statistic)
    np.testing.assert_allclose(found, stat(rule, case.contributions.numpy()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("statistic", ["and_mask", "sand_mask", "geometric_mean"])
@pytest.mark.parametrize("name", CASES)
def test_every_field_of_a_summary(name, statistic):
    case, log_offset = CASES[name](), 0.01
    found = aggregate.summarise(case.parts, Statistic(statistic), log_offset)
    exact = Summary.of(case.contributions, statistic, log_offset)
    assert found.count == exact.count
    for field, wanted in zip(found.tensors, exact.tensors, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=1e-8, atol=1e-8)
    assert len({field.data_ptr() for field in found.tensors}) == len(found.tensors)


@pytest.mark.parametrize("statistic", ["and_mask", "sand_mask", "geometric_mean"])
@pytest.mark.parametrize("name", CASES)
def test_summaries_without_kernels_of_their_own(name, statistic, monkeypatch):
    """As for float64 on a GPU: votes by what serves sign sums, all else slice by slice."""
    others = {key: k for key, k in registry._kernels.items() if not key[0].endswith("_summary")}
    monkeypatch.setattr(registry, "_kernels", others)
    registry.forget_choices()
    try:
        test_every_field_of_a_summary(name, statistic)
    finally:
        monkeypatch.undo()
        registry.forget_choices()


@pytest.mark.parametrize("rule", quick(RULES, QUICK), **by_name)
@pytest.mark.parametrize("name", CASES)
def test_agreement(name, rule):
    case, statistic = CASES[name](), rule.statistic(E)
    found, c = agreement(case.parts, rule), case.contributions
    assert found.mean_agreement == pytest.approx(c.sign().sum(0).abs().mean().item() / E, rel=1e-9)
    assert found.m_coherence == pytest.approx(
        (c.sum(0).square().sum() / c.square().sum()).item(), rel=1e-9
    )
    masked = statistic.name in ("and_mask", "xor_mask", "geometric_mean", "sand_mask")
    mask_sum = aggregate.functional.stacked(c, statistic)[1].item() if masked else c[0].numel()
    assert found.kept_fraction == pytest.approx(mask_sum / c[0].numel(), rel=1e-9)


@pytest.mark.parametrize("rule", quick(RULES, QUICK), **by_name)
@pytest.mark.parametrize(
    "name", ["embedding", "embeddings", "tied", "conv2d", "depthwise", "chunks", "recurrence"]
)
def test_nan_shows_at_its_coordinates_only(name, rule):
    case = CASES[name]()
    part = case.parts[0].inner if isinstance(case.parts[0], ViewFactors) else case.parts[0]
    part.grad_output[(5, 1, *(0,) * (part.grad_output.dim() - 2))] = torch.nan
    expected = (
        torch.stack([sum(p.contribution(e) for p in case.parts) for e in range(E)]).isnan().any(0)
    )
    assert expected.any() and not expected.all()
    assert torch.equal(aggregate.aggregate(case.parts, rule).isnan(), expected)


def test_a_bucket_of_both_infinities_surfaces_though_few_groups_touch_the_token():
    """Two groups of nine cannot move a median, but NaN is not ranked."""
    ids, grad = torch.tensor([1, 1, 0, 2, 3, 2, 0, 3, 3]), torch.ones(9, 2)
    grad[0, 0], grad[1, 0] = torch.inf, -torch.inf
    part = EmbeddingFactors(ids, grad, torch.arange(10), 5)
    found = aggregate.aggregate([part], htv.MedianOfMeans(5))  # groups 0 and 1 are a bucket
    assert found[1, 0].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("rule", [r for r in RULES if not r.streaming], **by_name)
@pytest.mark.parametrize("touching", range(1, 6))
def test_few_groups_touch_a_token(rule, touching):
    """All of one sign, and one of the other: at the border where non-zero values matter."""
    count = 6
    for signs in (torch.ones(touching), torch.ones(touching).index_fill(0, torch.tensor(0), -1)):
        ids = torch.cat([torch.full((touching,), 2), torch.full((count - touching,), 1)])
        grad = torch.cat([signs, torch.zeros(count - touching)]).double()[:, None] * torch.arange(
            1.0, 4.0
        )
        part = EmbeddingFactors(ids, grad, torch.arange(count + 1), 4)
        stacked = torch.stack([part.contribution(e) for e in range(count)])
        expected = count * stat(rule, stacked.numpy())
        np.testing.assert_allclose(
            aggregate.aggregate([part], rule), expected, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("window", [1, 6000, 20000])
@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.XorMask(0.4), htv.SignSum(), htv.SandMask(0.3, 0.5)], **by_name
)
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"weight": "equal"}], ids=str)
def test_convolutions_in_any_blocks(options, rule, window, monkeypatch):
    monkeypatch.setattr(limits, "WINDOW_BYTES", window)
    case = conv_case(16, 72, (3, 2), (3, 1), padding=(1, 0), **options)
    found = aggregate.aggregate(case.parts, rule)
    np.testing.assert_allclose(
        found, E * stat(rule, case.contributions.numpy()), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.SandMask(0.3, 0.5), htv.Median()], **by_name
)
def test_half_precision_is_computed_in_float32(rule, dtype):
    x, grad = (torch.randint(-2, 3, (E, 4, 5, 5)).to(dtype) for _ in range(2))
    for groups in (1, 4):
        grouped_rows = GroupedRows(Groups.each(E), BatchLayout(0))
        part = ConvFactors(x, grad, (3, 3), ConvGeometry(1, 1, 1, groups, 2), grouped_rows)
        found = aggregate.aggregate([part], rule)
        assert found.dtype == torch.float32
        wide = ConvFactors(x.double(), grad.double(), (3, 3), part.geometry, grouped_rows)
        torch.testing.assert_close(
            found.double(), aggregate.aggregate([wide], rule), rtol=1e-5, atol=1e-5
        )


def test_conv_memory_formats_do_not_matter():
    x, grad = randn(E, 6, 5, 5), randn(E, 8, 5, 5)
    make = lambda x, grad: ConvFactors(
        x, grad, (3, 3), ConvGeometry(1, 1, 1, 1, 2), GroupedRows(Groups.each(E), BatchLayout(0))
    )
    for rule in (htv.AndMask(0.4), htv.Median()):
        expected = aggregate.aggregate([make(x, grad)], rule)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
        torch.testing.assert_close(
            aggregate.aggregate([make(*last)], rule), expected, rtol=1e-10, atol=1e-10
        )


def largest_tensor(function):
    """Bytes of the largest tensor made while a function runs."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch():
        function()
    return largest


@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.GeometricMean(0.4), htv.Median()], **by_name
)
def test_an_embedding_costs_its_pairs(rule):
    """256 groups x 50,000 tokens x 16 would take 800 MB; the table takes 3 MB."""
    ids, grad = torch.randint(0, 50_000, (256 * 4,)), torch.randn(256 * 4, 16)
    part = EmbeddingFactors(ids, grad, torch.arange(257) * 4, 50_000)
    assert largest_tensor(lambda: aggregate.aggregate([part], rule)) <= 4 << 20


@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.SandMask(0.4, 1.0), htv.Median()], **by_name
)
@pytest.mark.parametrize(("groups", "size"), [(1, 16), (64, 16), (1, 96)], ids=str)
def test_convolutions_stay_within_bounds(rule, groups, size):
    x = torch.randn(8, 64, size, size)
    grad = torch.randn(8, 64, size, size)
    part = ConvFactors(
        x,
        grad,
        (3, 3),
        ConvGeometry(1, 1, 1, groups, 2),
        GroupedRows(Groups.each(8), BatchLayout(0)),
    )
    allowed = max(
        x.untyped_storage().nbytes() * 5 // 4, 2 * limits.SCRATCH_BYTES, limits.WINDOW_BYTES
    )
    assert largest_tensor(lambda: aggregate.aggregate([part], rule)) <= allowed


def test_paths_tell_the_truth():
    kinds = {
        "linear": ("fused", "fused"), "conv2d": ("fused", "fused"),
        "grouped wide": ("fused", "fused"), "depthwise": ("fused", "fused"),
        "embedding": ("sparse", "sparse, sliced"), "stacked": ("stacked", "stacked"),
        "bilinear": ("sliced", "sliced"), "groupwise": ("by group", "sliced"),
    }  # fmt: skip
    compiled = (
        backend.choose(backend.Problem("linear", "and_mask", torch.device("cpu"))) != "reference"
    )
    for name, (streaming, order) in kinds.items():
        part = CASES[name]().parts[0]
        for rule, style in ((htv.AndMask(0.4), streaming), (htv.Median(), order)):
            if style == "fused" and not compiled:
                by_group = isinstance(part, ConvFactors) and rule.streaming and name != "depthwise"
                style = "by group" if by_group else "sliced"
            found = dispatch.path(part, rule, part.device)
            assert found.split(" (")[0] == style
            if compiled or name != "depthwise":  # a matter of sizes, which a class does not know
                assert dispatch.path(type(part), rule, part.device) == found
        assert dispatch.path(part, htv.Mean(), part.device) == "plain sum"
    assert dispatch.path(Factors, htv.AndMask(0.4), torch.device("cpu")).startswith("sliced")


@pytest.mark.parametrize("name", CASES)
def test_extra_work_is_a_number(name):
    for part, rule in itertools.product(CASES[name]().parts, RULES):
        work = dispatch.extra_work(part, rule)
        assert (
            math.isfinite(work)
            and work >= 0
            and (work == 0) <= (isinstance(rule, htv.Mean) or part.count == 0)
        )


def test_uses_must_agree():
    with pytest.raises(ValueError, match="must agree"):
        agreement([linear_use(5, 4)[0], linear_use(4, 5)[0]], htv.Median())
