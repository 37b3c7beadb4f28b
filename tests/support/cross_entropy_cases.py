"""What the cross-entropy of shifted logits is held to: torch's of the sum, in float64."""

import math

import torch
import torch.nn.functional as F

from htv.ops.cross_entropy import shifted_cross_entropy
from htv.ops.reference import compute_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (5, 2), (7, 10), (3, 33), (4, 257), (2, 1100), (3, 5000)]
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 1},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "all": {"weight": True, "label_smoothing": 0.3, "ignore_index": 1},
    "all, none": {"weight": True, "label_smoothing": 1.0, "reduction": "none", "ignore_index": 1},
}


def operands(rows, classes, dtype=torch.float64, scale=3.0):
    torch.manual_seed(rows + classes)
    logits, shift = (
        torch.randn(rows, classes, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2)
    )
    return logits, torch.randint(0, classes, (rows,)), shift


def by_torch(logits, targets, shift, temperature=1.0, **options):
    """In float64."""
    return F.cross_entropy(logits.double() + shift.double() / temperature, targets, **options)


def loss_and_grad(function, logits, *arguments, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.linspace(0.5, 2, loss.numel()).to(loss).view(loss.shape)
    )
    return loss.detach(), grad


def options_for(name, classes, dtype):
    options = dict(OPTIONS[name])
    if "weight" in options:
        options["weight"] = torch.rand(classes, dtype=torch.float64).add(0.1)
    ours = options | (
        {"weight": options["weight"].to(compute_dtype(dtype))} if "weight" in options else {}
    )
    if "weight" in options:
        options["weight"] = ours["weight"].double()
    return options, ours


def assert_as_exact(found, exact, logits):
    """Within rounding: of float32 (or float64) arithmetic, and of the gradient to the type of the
    logits once.
    """
    (loss, grad), (exact_loss, exact_grad) = found, exact
    assert (
        loss.dtype == compute_dtype(logits.dtype)
        and grad.dtype == logits.dtype
        and grad.shape == logits.shape
    )
    eps = torch.finfo(loss.dtype).eps
    largest = logits.double().abs().nan_to_num(0, 0, 0).max().item() if logits.numel() else 0
    tolerance = eps * (40 + 8 * largest)
    torch.testing.assert_close(
        loss.double(), exact_loss, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    scale = exact_grad.abs().nan_to_num(0).max().item() if grad.numel() else 0
    rounding = torch.finfo(grad.dtype).eps if grad.dtype != loss.dtype else 0
    smallest = torch.finfo(grad.dtype).smallest_normal if rounding else 0
    torch.testing.assert_close(
        grad.double(),
        exact_grad,
        rtol=tolerance + rounding,
        atol=tolerance * scale + smallest,
        equal_nan=True,
    )


def assert_holds_with_infinite_and_undefined_values(classes, dtype):
    logits, targets, shift = operands(9, classes, dtype, scale=1.0)
    targets[:] = 1
    logits[0, 2] = -math.inf  # one class excluded
    shift[1, 3] = -math.inf
    logits[2, :-1] = -math.inf  # all but the last, the target among them
    logits[3] = -math.inf
    logits[4, 4] = math.inf
    shift[5, 4] = math.nan
    logits[6, 0], shift[6, 0] = -math.inf, math.inf
    logits[7, 1] = math.inf
    found = loss_and_grad(shifted_cross_entropy, logits, targets, shift, reduction="none")
    exact = loss_and_grad(by_torch, logits.double(), targets, shift, reduction="none")
    assert_as_exact(found, exact, logits)
    assert found[0].isnan().tolist() == [False, False, False, True, True, True, True, True, False]
    assert found[0][2] == math.inf
