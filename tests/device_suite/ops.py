"""Every kernel against its definition: the tables of the other tests, by an op that takes them to
the device and back.

Definitions run on the CPU, unless a table makes its tensors on the device. Memory that an op
allocates holds NaN until the op writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from device_suite import Skipped
from htv.ops import backend, reference, registry, schema
from htv.rules import Statistic
from support import cuda_emulated
from support import rank_one_cases as rank_one
from support import stacked_cases as stacked

Found = Iterator[tuple[str, Callable[[], None]]]
CUDA = torch.device("cuda")


@contextmanager
def unwritten_is_nan():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # among others, fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def poisoned(holds: Callable, *arguments) -> Callable[[], None]:
    def run() -> None:
        with unwritten_is_nan():
            holds(*arguments)

    return run


def placed(tensor: Tensor) -> Tensor:
    """On the device, as far from an aligned address as here."""
    shift = tensor.storage_offset() % 16
    there = torch.full((tensor.numel() + shift,), torch.nan, dtype=tensor.dtype, device=CUDA)
    return there[shift:].view(tensor.shape).copy_(tensor)


def there_and_back(operator: Callable) -> Callable:
    """The operator for CPU tensors: floating-point ones go to the device, results come back."""

    def op(*arguments):
        moved = (
            placed(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
        )
        return tuple(result.cpu() for result in operator(*moved))

    return op


def cuda_operator(name: str, dry: bool) -> Callable:
    """By the CUDA kernels of this build, or by the emulator; found at the first call."""

    def op(*arguments):
        if dry:
            if cuda_emulated.compiler() is None:
                raise Skipped("the emulator needs g++")
            return getattr(cuda_emulated.operators(), name)(*arguments)
        reason = backend.why_not("cuda", backend.Problem(name, "median", CUDA, longest=1))
        assert reason is None, reason
        return there_and_back(getattr(torch.ops.htv, name))(*arguments)

    return op


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cuda_stacked(dry: bool) -> Found:
    op = cuda_operator("stacked", dry)
    types, singles = stacked.DTYPES, (torch.float64, torch.float32)
    tables = {
        "random values": (
            stacked.assert_holds_on_random_values,
            types,
            (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100, 1000),
        ),
        "rows of length": (
            stacked.assert_holds_at_every_alignment,
            types,
            (0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 31, 100, 2050),
        ),
        "medians are exact": (
            stacked.assert_medians_are_exact,
            types,
            (*stacked.NETWORKS, *stacked.COUNTING),
        ),
        "inner means": (stacked.assert_inner_means_hold, singles, (*stacked.NETWORKS, 97, 300)),
        "ties and zeros": (stacked.assert_holds_with_ties_and_zeros, types, (1, 2, 4, 16, 64, 128)),
        "NaN and infinity": (stacked.assert_holds_with_nan_and_infinity, types, (2, 3, 7, 40, 70)),
    }
    for what, (holds, dtypes, sizes) in tables.items():
        for dtype in dtypes if not dry else dtypes[1:3]:
            for size in sizes if not dry else sizes[2:8:5]:
                yield f"{what}: {short(dtype)}, {size}", poisoned(holds, op, dtype, size)
    for groups in (1, 3, 8, 9, 40, 70, 150) if not dry else (9,):
        undefined = stacked.assert_undefined_bucket_means_surface
        yield f"undefined means of buckets: {groups}", poisoned(undefined, op, groups)
    for groups in (70, 513) if not dry else (70,):
        yield f"hard searches: {groups}", poisoned(stacked.assert_hard_searches_end, op, groups)
    for groups in (5, 33, 70) if not dry else (5,):
        yield (
            f"twice the same bits: {groups}",
            poisoned(stacked.assert_twice_gives_the_same_bits, op, groups),
        )


def cuda_linear(dry: bool) -> Found:
    op = cuda_operator("linear", dry)
    types = rank_one.DTYPES if not dry else (torch.float32, torch.bfloat16)
    for dtype in types:
        for lengths, out, width in rank_one.SHAPES if not dry else rank_one.SHAPES[1:3]:
            what = f"masks and sign sums: {short(dtype)}, {len(lengths)} groups, {out} x {width}"
            yield what, poisoned(rank_one.assert_counts_hold, op, dtype, lengths, out, width, dry)
        yield (
            f"NaN and infinity: {short(dtype)}",
            poisoned(rank_one.assert_holds_with_nan_and_infinity, op, dtype, dry),
        )
        if dtype != torch.float16:
            vanishing = poisoned(rank_one.assert_holds_where_products_vanish, op, dtype, dry)
            yield f"products that vanish: {short(dtype)}", vanishing
    for kind in rank_one.KINDS if not dry else rank_one.KINDS[:1]:
        for rows in rank_one.ROWS if not dry else (5, 65):
            for dtype in types if rows in (3, 24, 65) and not dry else (torch.float32,):
                what = f"order statistics: {short(dtype)}, {kind}, {rows} groups"
                yield what, poisoned(rank_one.assert_order_statistics_hold, op, dtype, kind, rows)
    for kind in ("dense", "relu") if not dry else ():
        yield (
            f"groups without rows: {kind}",
            poisoned(rank_one.assert_groups_without_rows_are_zeros, op, kind),
        )


TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def step_of(dtype: torch.dtype, dry: bool) -> int:
    """Every so many statistics: each is compiled, for some seconds."""
    if dry:
        return 6
    return 1 if dtype == torch.float32 else 3


def triton_stacked(dry: bool) -> Found:
    import stacked_table as table
    from triton_table import statistics

    for dtype in TRITON_TYPES if not dry else TRITON_TYPES[:1]:
        for groups in (1, 2, 5, 16, 33, 64, 70) if not dry else (5,):
            for statistic in [*statistics(groups), Statistic("sign_agreement")][
                :: step_of(dtype, dry)
            ]:
                what = f"{short(dtype)}, {groups} groups, {described(statistic)}"
                yield (
                    what,
                    poisoned(
                        lambda g, t, s: table.check(table.make(g, 131, t), s),
                        groups,
                        dtype,
                        statistic,
                    ),
                )
    for groups in (4, 5, 20) if not dry else (4,):
        yield f"extreme values: {groups}", poisoned(table.extreme_values_hold, groups)


def triton_linear(dry: bool) -> Found:
    import linear_table as table
    from triton_table import statistics

    for dtype in TRITON_TYPES if not dry else TRITON_TYPES[:1]:
        for name, shape in table.SHAPES.items():
            if dry and name not in ("one row per group", "empty groups"):
                continue
            for statistic in statistics(len(shape[0]))[:: step_of(dtype, dry)]:
                what = f"{name}: {short(dtype)}, {described(statistic)}"
                yield (
                    what,
                    poisoned(
                        lambda a, t, s: table.check(*table.make(*a, t), s), shape, dtype, statistic
                    ),
                )
    for statistic in table.ALL if not dry else table.ALL[1:7:5]:
        for dtype in TRITON_TYPES if not dry else TRITON_TYPES[1:2]:
            what = f"{short(dtype)}, {described(statistic)}"
            yield f"rounding: {what}", poisoned(table.assert_rounding_is_bounded, statistic, dtype)
            yield f"NaN: {what}", poisoned(table.assert_nan_poisons_its_column, 3, statistic, dtype)
        if statistic.name != "geometric_mean":
            yield (
                f"infinity: {described(statistic)}",
                poisoned(table.inf_is_an_ordinary_extreme, statistic),
            )
        outside = poisoned(table.assert_rows_outside_the_groups_are_not_read, statistic)
        yield f"rows outside the groups: {described(statistic)}", outside
    yield "ties and zeros", poisoned(table.assert_ties_and_zeros_count)
    yield (
        "no votes needed is the plain gradient",
        poisoned(table.assert_no_votes_needed_is_the_plain_gradient),
    )


def triton_conv(dry: bool) -> Found:
    import conv_table as table

    for name, shape in table.SHAPES.items():
        if dry and name not in ("1-d", "depthwise, large kernel"):
            continue
        inner = Statistic("winsorized_mean", (len(shape[0]) - 1) // 2)
        for statistic in (table.AND_MASK, table.MEDIAN, table.BUCKETS, inner)[: 2 if dry else 4]:
            for dtype in (
                TRITON_TYPES if statistic == table.AND_MASK and not dry else TRITON_TYPES[:1]
            ):
                run = poisoned(
                    lambda a, t, s: table.check(table.make(*a, t), s), shape, dtype, statistic
                )
                yield f"{name}: {short(dtype)}, {described(statistic)}", run
    for name in ("2-d", "3-d", "depthwise") if not dry else ():
        yield (
            f"channels last: {name}",
            poisoned(table.assert_channels_may_be_last_or_first, table.SHAPES[name]),
        )
    for name in ("2-d", "depthwise") if not dry else ():
        yield (
            f"NaN and infinity: {name}",
            poisoned(table.assert_nan_and_inf_hold, table.SHAPES[name]),
        )


def triton_embedding(dry: bool) -> Found:
    """Where there is such a kernel."""
    if "embedding" not in registry.ops("triton"):
        return
    from triton_table import DEVICE, assert_same, statistics

    def holds(dtype: torch.dtype, statistic: Statistic, groups: int) -> None:
        generator = torch.Generator().manual_seed(groups)
        rows, tokens, width = 40, 13, 35
        grad = torch.randn(rows, width, generator=generator).round().to(dtype)
        ids, group_index = (
            torch.randint(0, n, (rows,), generator=generator) for n in (tokens - 1, groups)
        )
        group_index = group_index.sort().values
        op = backend.operator("embedding", "triton")
        found = op(
            *(t.to(DEVICE) for t in (grad, ids, group_index)),
            tokens,
            groups,
            *schema.numbers(statistic),
        )
        wanted = reference.embedding(grad.double(), ids, group_index, tokens, groups, statistic)
        assert_same([t.cpu() for t in found], wanted, statistic, scale=groups)

    for groups in (1, 3, 6, 40) if not dry else (3,):
        for statistic in statistics(groups)[:: 5 if dry else 1]:
            problem = backend.Problem("embedding", statistic.name, torch.device(DEVICE))
            if backend.why_not("triton", problem) is None:
                for dtype in TRITON_TYPES if not dry else TRITON_TYPES[:1]:
                    what = f"{groups} groups, {short(dtype)}, {described(statistic)}"
                    yield what, poisoned(holds, dtype, statistic, groups)


def described(statistic: Statistic) -> str:
    numbers = {"count": statistic.count, "votes": statistic.votes, "k": statistic.k}
    return " ".join(
        [statistic.name, *(f"{name}={value:g}" for name, value in numbers.items() if value)]
    )


# One small call for every CUDA kernel of csrc/cuda, by the kernel's name: what a sanitizer watches.
KERNELS: dict[str, tuple[str, tuple]] = {
    "streaming": ("stacked", (5, 130, Statistic("and_mask", 2))),
    "streaming, in slices": ("stacked", (70, 9, Statistic("sand_mask", votes=1.0, k=0.5))),
    "by_network": ("stacked", (5, 130, Statistic("median"))),
    "by_network, odd rows": ("stacked", (33, 13, Statistic("winsorized_mean", 2))),
    "buckets_by_network": ("stacked", (12, 130, Statistic("median_of_means", 5))),
    "by_counting": ("stacked", (70, 33, Statistic("median"))),
    "by_counting_alone": ("stacked", (8000, 3, Statistic("median"))),
    "pack, vote": ("linear", (130, 65, 70, Statistic("and_mask", 40))),
    "decide, rank_by_network": ("linear", (20, 33, 70, Statistic("median"))),
    "decide, by_counting": ("linear", (100, 9, 21, Statistic("trimmed_mean", 30))),
}


def kernel_call(name: str, dry: bool) -> None:
    """The call of `KERNELS`, against its definition."""
    op, (*sizes, statistic) = KERNELS[name]
    if op == "stacked":
        grads = torch.randn(*sizes, generator=torch.Generator().manual_seed(0))
        stacked.assert_within_budget(cuda_operator(op, dry), grads, statistic)
        return
    x, g = rank_one.factors("relu", *sizes, torch.float32)
    offsets = torch.arange(len(x) + 1)
    value, mask_sum = cuda_operator(op, dry)(x, g, offsets, *schema.numbers(statistic))
    expected, expected_sum = reference.linear(x, g, offsets, statistic)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert mask_sum == expected_sum
