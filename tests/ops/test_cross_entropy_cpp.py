"""The C++ ops of shifted logits at every CPU level, and what only kernels promise."""

import pytest
import torch

from htv.ops import backend
from htv.ops.cross_entropy import shifted_cross_entropy
from htv.ops.reference import compute_dtype
from support.cross_entropy_cases import (
    DTYPES,
    SIZES,
    assert_as_exact,
    assert_holds_with_infinite_and_undefined_values,
    by_torch,
    loss_and_grad,
    operands,
    options_for,
)

pytestmark = pytest.mark.skipif(
    backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
)


def test_every_cpu_level(level, one_thread):
    for dtype in DTYPES:
        for size in SIZES[1:]:
            logits, targets, shift = operands(*size, dtype)
            for name in ("plain", "all, none"):
                options, ours = options_for(name, size[1], dtype)
                found = loss_and_grad(shifted_cross_entropy, logits, targets, shift, **ours)
                exact = loss_and_grad(by_torch, logits.double(), targets, shift, **options)
                assert_as_exact(found, exact, logits)
    for dtype in DTYPES:
        assert_holds_with_infinite_and_undefined_values(600, dtype)


def test_rounding_of_gradients(level, one_thread):
    """To half precision, ties to even, denormals and overflow included: as torch rounds the float32
    gradient.
    """
    numbers = 1.0, None, -100, 0.0
    targets, shift = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 23)
    exponents = torch.linspace(-40, 40, 64).exp2()
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.randn(64, 23).to(dtype)
        rows = torch.ops.htv.shifted_cross_entropy(logits, targets, shift, *numbers)[1:]
        grad = torch.ops.htv.shifted_cross_entropy_grad(
            exponents, logits, targets, shift, *numbers, *rows
        )
        wide = torch.ops.htv.shifted_cross_entropy_grad(
            exponents, logits.float(), targets, shift, *numbers, *rows
        )
        assert torch.equal(grad, wide.to(dtype)) and (dtype == torch.bfloat16 or grad.isinf().any())


def test_results_do_not_depend_on_threads():
    logits, targets, shift = operands(300, 700, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(
                loss_and_grad(shifted_cross_entropy, logits, targets, shift, reduction="none")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contracts(dtype):
    logits, targets, shift = operands(5, 7, dtype)
    numbers = 0.5, torch.rand(7, dtype=compute_dtype(dtype)), 1, 0.1
    operator, gradient = (
        torch.ops.htv.shifted_cross_entropy,
        torch.ops.htv.shifted_cross_entropy_grad,
    )
    torch.library.opcheck(operator.default, (logits, targets, shift, *numbers))
    loss, *rows = operator(logits, targets, shift, *numbers)
    torch.library.opcheck(gradient.default, (loss, logits, targets, shift, *numbers, *rows))


def test_operands_that_do_not_fit():
    logits, targets, shift = operands(5, 7, torch.float32)
    weight = torch.ones(7)
    for change in (
        {0: logits[0]},
        {0: logits.t()},
        {0: logits.double()},
        {1: targets.int()},
        {1: targets[:4]},
        {2: shift[:4]},
        {2: shift.double()},
        {4: weight[:6]},
        {4: weight.double()},
    ):
        given = dict(enumerate((logits, targets, shift, 1.0, weight, -100, 0.0))) | change
        with pytest.raises(RuntimeError, match="htv::shifted_cross_entropy"):
            torch.ops.htv.shifted_cross_entropy(*given.values())


def test_nothing_of_the_logits_size_is_stored_but_the_gradient():
    logits, targets, shift = operands(64, 5000, torch.float32)
    logits.requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        shifted_cross_entropy(logits, targets, shift, temperature=0.5).backward()
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    )
    assert logits.numel() * 4 <= allocated < 1.1 * logits.numel() * 4
