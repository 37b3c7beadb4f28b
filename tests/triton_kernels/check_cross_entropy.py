"""What the Triton kernels of `cross_entropy` must do. Not collected by its name: see
`test_interpreted.py`.
"""

import math

import pytest
import torch
from triton_cases import DEVICE, HALF_SLOW

from htv.ops import reference
from htv.triton_kernels import cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN and inf

SIZES = [(0, 3), (1, 1), (5, 2), (130, 10), (300, 16), (3, 33), (5, 700), (2, 4096), (3, 9001)]


def make(rows, classes, dtype=torch.float32, shift_dtype=None, scale=3.0):
    generator = torch.Generator().manual_seed(rows + classes)
    logits, shift = (torch.randn(rows, classes, generator=generator).mul(scale) for _ in range(2))
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return [t.to(DEVICE) for t in (logits.to(dtype), targets, shift.to(shift_dtype or dtype))]


def check(
    logits, targets, shift, temperature=0.7, weight=None, ignore_index=-100, label_smoothing=0.0
):
    """Against the definition in float64."""
    numbers = temperature, weight, ignore_index, label_smoothing
    found = cross_entropy.shifted_cross_entropy(logits, targets, shift, *numbers)
    grad = torch.linspace(0.5, 2, len(targets), device=DEVICE)
    gradient = cross_entropy.shifted_cross_entropy_grad(
        grad, logits, targets, shift, *numbers, *found[1:]
    )
    assert (
        gradient.shape == logits.shape
        and gradient.dtype == logits.dtype
        and gradient.is_contiguous()
    )
    wide = temperature, None if weight is None else weight.double(), ignore_index, label_smoothing
    exact = reference.shifted_cross_entropy(logits.double(), targets, shift.double(), *wide)
    exact_gradient = reference.shifted_cross_entropy_grad(
        grad.double(), logits.double(), targets, shift.double(), *wide, *exact[1:]
    )
    largest = max(
        (t.double().abs().nan_to_num(0, 0, 0).max().item() for t in (logits, shift) if t.numel()),
        default=0,
    )
    tolerance = torch.finfo(torch.float32).eps * (40 + 8 * largest)
    torch.testing.assert_close(
        found[0].double(), exact[0], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    rounding = torch.finfo(logits.dtype).eps
    smallest = torch.finfo(logits.dtype).smallest_normal
    torch.testing.assert_close(
        gradient.double(),
        exact_gradient,
        rtol=tolerance + rounding,
        atol=tolerance + smallest,
        equal_nan=True,
    )
    return found, gradient


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_options(size):
    logits, targets, shift = make(*size)
    weight = torch.linspace(0.1, 2, size[1], device=DEVICE)
    check(logits, targets, shift)
    check(logits, targets, shift[:1].expand_as(shift) if len(shift) else shift, ignore_index=1)
    check(logits, targets, shift, label_smoothing=0.1)
    check(logits, targets, shift, weight=weight, label_smoothing=0.3, ignore_index=1)


@pytest.mark.parametrize("shift_dtype", HALF_SLOW, ids=str)
@pytest.mark.parametrize("dtype", HALF_SLOW, ids=str)
def test_types(dtype, shift_dtype):
    check(*make(5, 37, dtype, shift_dtype))
    check(*make(3, 5000, dtype, shift_dtype, scale=2500.0), label_smoothing=0.1)


def test_rows_that_are_apart():
    logits, targets, shift = make(6, 50)
    check(logits[::2, 3:20], targets[:3] % 17, shift[1::2, 5:22])


@pytest.mark.parametrize("classes", [5, 5000])
def test_infinite_and_undefined_values(classes):
    logits, targets, shift = make(9, classes, scale=1.0)
    targets[:] = 1
    logits[0, 2] = shift[1, 3] = -math.inf
    logits[2, :-1] = -math.inf
    logits[3] = -math.inf
    logits[4, 4], shift[5, 4], logits[6, 0], shift[6, 0] = math.inf, math.nan, -math.inf, math.inf
    targets[7], logits[7] = -100, math.nan
    (loss, _, _), gradient = check(logits, targets, shift)
    assert loss.isnan().tolist() == [False, False, False, True, True, True, True, False, False]
    assert loss[2] == math.inf and loss[7] == 0 and (gradient[7] == 0).all()


def test_targets_outside_of_the_classes_are_not_numbers():
    logits, targets, shift = make(5, 7)
    targets[1], targets[3] = 7, -1
    weight = torch.ones(7, device=DEVICE)
    for numbers in ((1.0, None, -100, 0.0), (1.0, weight, -100, 0.1)):
        loss, *rest = cross_entropy.shifted_cross_entropy(logits, targets, shift, *numbers)
        gradient = cross_entropy.shifted_cross_entropy_grad(
            torch.ones_like(loss), logits, targets, shift, *numbers, *rest
        )
        assert loss.isnan().tolist() == [False, True, False, True, False]
        assert (
            gradient.isnan().all(dim=1).tolist()
            == gradient.isnan().any(dim=1).tolist()
            == loss.isnan().tolist()
        )


def test_wrong_operands():
    logits, targets, shift = make(4, 6)
    for bad in (
        (logits, targets[:3], shift),
        (logits.t(), targets, shift.t()),
        (logits[:, ::2], targets, shift[:, ::2]),
    ):
        with pytest.raises(ValueError, match=r"shifted_cross_entropy \(Triton\)"):
            cross_entropy.shifted_cross_entropy(*bad, 1.0, None, -100, 0.0)
    with pytest.raises(TypeError, match="must share a dtype"):
        cross_entropy.shifted_cross_entropy(logits.double(), targets, shift, 1.0, None, -100, 0.0)
    with pytest.raises(ValueError, match=r"weight must be \(6,\)"):
        cross_entropy.shifted_cross_entropy(
            logits, targets, shift, 1.0, torch.ones(5, device=DEVICE), -100, 0.0
        )
