"""Tables: the C++ op against its definition, and through factors of lookups."""

import pytest
import torch

import htv
from htv.ops import backend, reference, schema
from htv.ops.aggregate import aggregate
from htv.ops.factors import EmbeddingFactors

pytestmark = pytest.mark.skipif(
    backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
)

RULES = (htv.AndMask(0.4), htv.AndMask(0.0), htv.AndMask(1.0), htv.XorMask(0.3), htv.SignSum())
SIZES = [
    (0, 3, 4, 2),
    (1, 1, 1, 1),
    (40, 7, 5, 3),
    (60, 17, 33, 8),
    (200, 70, 3, 30),
    (90, 300, 50, 16),
]  # R, D, V, E


def lookups(size, dtype, whole):
    """Rows of any voters in any order; small integers tie and cancel exactly."""
    rows, features, tokens, groups = size
    generator = torch.Generator().manual_seed(rows + features)
    grad = torch.randint(-2, 3, (rows, features), generator=generator).to(dtype)
    if not whole:
        grad = torch.randn(rows, features, generator=generator).to(dtype)
    ids = torch.randint(0, tokens, (rows,), generator=generator)
    return grad, ids, torch.randint(0, groups, (rows,), generator=generator), tokens, groups


def both(lookup, rule):
    statistic = rule.statistic(lookup[-1])
    return torch.ops.htv.embedding(*lookup, *schema.numbers(statistic)), reference.embedding(
        *lookup, statistic
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_on_ties_and_cancellations(size, dtype, rule, level):
    (value, kept), (expected, expected_kept) = both(lookups(size, dtype, whole=True), rule)
    assert (
        value.dtype == expected.dtype
        and torch.equal(value, expected)
        and kept.item() == expected_kept.item()
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rounding_is_that_of_sums(size):
    lookup = lookups(size, torch.float32, whole=False)
    (value, kept), (expected, expected_kept) = both(lookup, htv.AndMask(0.4))
    torch.testing.assert_close(value, expected)
    assert kept.item() == expected_kept.item()


def test_special_values():
    grad, ids, group_index, *sizes = lookups((60, 17, 5, 4), torch.float32, whole=True)
    grad[3, 2], grad[5, 16], grad[7, 0], grad[8, 0], grad[9, 1] = (
        torch.nan,
        torch.inf,
        torch.inf,
        -torch.inf,
        1e-45,
    )
    ids[7] = ids[8]
    for rule in RULES:
        (value, kept), (expected, expected_kept) = both((grad, ids, group_index, *sizes), rule)
        torch.testing.assert_close(value, expected, equal_nan=True)
        assert kept.item() == expected_kept.item() and value.isnan().any()


def test_results_do_not_depend_on_threads():
    lookup, threads, found = (
        lookups((3000, 600, 200, 16), torch.float32, whole=False),
        torch.get_num_threads(),
        [],
    )
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(both(lookup, htv.AndMask(0.4))[0])
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.AndMask(0.4, rescale=True), htv.XorMask(0.3)], ids=str
)
def test_factors_of_two_lookups_equal_those_by_pytorch(rule):
    torch.manual_seed(0)
    bounds = torch.tensor([0, 10, 10, 25, 40])
    uses = [(torch.randint(0, 9, (40,)), torch.randn(40, 20)) for _ in range(2)]

    def parts():
        return [EmbeddingFactors(ids, grad, bounds, 9, padding_idx=3) for ids, grad in uses]

    fused = aggregate(parts(), rule)
    with backend.use_backend("reference"):
        torch.testing.assert_close(fused, aggregate(parts(), rule))
    assert (fused != 0).any() and (fused[3] == 0).all()


def test_bad_arguments_are_named():
    grad, ids, group_index, tokens, groups = lookups((40, 7, 5, 3), torch.float32, whole=True)
    numbers = schema.numbers(htv.AndMask(0.4).statistic(groups))
    for bad, argument in (
        ((grad, ids + 1, group_index, tokens, groups), "ids"),
        ((grad, -ids - 1, group_index, tokens, groups), "ids"),
        ((grad, ids, group_index, tokens, groups - 1), "voter"),
        ((grad, ids[1:].contiguous(), group_index, tokens, groups), "ids"),
        ((grad, ids, group_index.int(), tokens, groups), "voter"),
        ((grad.t(), ids, group_index, tokens, groups), "grad_output"),
        ((grad, ids, group_index, -1, groups), "num_embeddings"),
    ):
        with pytest.raises(RuntimeError, match=argument):
            torch.ops.htv.embedding(*bad, *numbers)
    median = schema.numbers(htv.Median().statistic(groups))
    with pytest.raises(RuntimeError, match="statistic"):
        torch.ops.htv.embedding(grad, ids, group_index, tokens, groups, *median)


def test_opcheck():
    lookup = lookups((40, 7, 5, 3), torch.float32, whole=True)
    numbers = schema.numbers(htv.AndMask(0.4).statistic(3))
    torch.library.opcheck(torch.ops.htv.embedding.default, (*lookup, *numbers))
