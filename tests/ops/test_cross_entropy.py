"""The cross-entropy of shifted logits, whatever serves it, against torch's of the sum."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from htv.ops import backend
from htv.ops.cross_entropy import shifted_cross_entropy
from support.cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    SIZES,
    assert_as_exact,
    assert_holds_with_infinite_and_undefined_values,
    by_torch,
    loss_and_grad,
    operands,
    options_for,
)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def server(request):
    if request.param == "auto" and backend.NOT_BUILT is not None:
        pytest.skip("htv was built without compiled kernels")
    with backend.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_torch_s_of_the_sum(dtype, name):
    for size in SIZES:
        logits, targets, shift = operands(*size, dtype)
        options, ours = options_for(name, size[1], dtype)
        found = loss_and_grad(
            shifted_cross_entropy, logits, targets, shift, temperature=0.7, **ours
        )
        exact = loss_and_grad(by_torch, logits.double(), targets, shift, temperature=0.7, **options)
        if found[0].isfinite().all():  # of (1, 1) all may be ignored: NaN, below
            assert_as_exact(found, exact, logits)


@pytest.mark.parametrize("shift_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shift_has_a_type_of_its_own(dtype, shift_dtype):
    logits, targets, shift = operands(6, 37, dtype)
    for own in (
        shift.to(shift_dtype),
        shift[0].to(shift_dtype),
        shift[:1].to(shift_dtype).expand(6, -1),
    ):
        found = loss_and_grad(shifted_cross_entropy, logits, targets, own)
        assert_as_exact(found, loss_and_grad(by_torch, logits.double(), targets, own), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype):
    for size in ((4, 10), (3, 1500)):
        logits, targets, shift = operands(*size, dtype, scale=1e4 / 4)
        found = loss_and_grad(shifted_cross_entropy, logits, targets, shift)
        assert found[0].isfinite() and found[1].isfinite().all()
        assert_as_exact(found, loss_and_grad(by_torch, logits.double(), targets, shift), logits)


def test_a_small_loss_of_huge_logits_is_not_lost():
    logits = torch.tensor([[10000.0, 9990.0]])
    loss = shifted_cross_entropy(logits, torch.tensor([0]), torch.zeros(2))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 1300])
def test_infinite_and_undefined_values(classes, dtype):
    assert_holds_with_infinite_and_undefined_values(classes, dtype)


def test_ignored_rows_contribute_nothing():
    logits, targets, shift = operands(4, 9)
    targets[1], logits[1], shift[1] = -100, math.nan, math.inf
    loss, grad = loss_and_grad(shifted_cross_entropy, logits, targets, shift, label_smoothing=0.1)
    assert loss.isfinite() and grad.isfinite().all() and (grad[1] == 0).all()
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(
        loss, shifted_cross_entropy(logits[kept], targets[kept], shift[kept], label_smoothing=0.1)
    )


def test_ignored_rows_contribute_nothing_to_second_derivatives():
    logits, targets, shift = operands(4, 9)
    targets[1], logits[1], shift[1] = -100, math.nan, math.inf

    def second(logits, targets, shift):
        logits = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            shifted_cross_entropy(logits, targets, shift), logits, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    kept, found = torch.tensor([0, 2, 3]), second(logits, targets, shift)
    torch.testing.assert_close(found[kept], second(logits[kept], targets[kept], shift[kept]))
    assert (found[1] == 0).all() and found[kept].abs().max() > 1e-3


def test_a_mean_of_nothing_is_not_a_number():
    logits, targets, shift = operands(4, 9)
    for t, rows in ((torch.full((4,), -100), 4), (targets[:0], 0)):
        mean, grad = loss_and_grad(shifted_cross_entropy, logits[:rows], t, shift[:rows])
        assert mean.isnan() and F.cross_entropy(logits[:rows], t).isnan()
        assert (grad == 0).all() and grad.shape == (rows, 9)
        assert shifted_cross_entropy(logits[:rows], t, shift[:rows], reduction="sum") == 0
        assert shifted_cross_entropy(logits[:rows], t, shift[:rows], reduction="none").shape == (
            rows,
        )


def test_shapes_and_strides():
    wide, targets, shift = operands(6, 40)
    cases = [
        (wide[0], targets[0], shift[0]),
        (wide.t().contiguous().t(), targets, shift[:, ::1].t().contiguous().t()),
        (wide[:, 3:20], targets % 17, shift[:, 5:22]),
        (wide[::2, ::2], targets[::2] % 20, shift[1::2, 1::2]),
        (wide[:, :6], targets % 6, shift[:, 3]),
        (wide.view(2, 3, 40), targets.view(2, 3)[:, :1].expand(2, 40) % 3, shift.view(2, 3, 40)),
        (
            wide.view(2, 3, 4, 10),
            (targets.view(2, 3)[:, :1, None] % 3).expand(2, 4, 10),
            shift[0, :3],
        ),
    ]
    for logits, t, s in cases:
        summed = s.view(-1, *(1,) * (logits.dim() - 2)) if s.shape != logits.shape else s
        for reduction in ("mean", "none"):
            found = loss_and_grad(shifted_cross_entropy, logits, t, s, reduction=reduction)
            assert_as_exact(
                found, loss_and_grad(by_torch, logits, t, summed, reduction=reduction), logits
            )


def test_no_gradient_flows_into_the_shift():
    logits, targets, shift = operands(3, 4)
    shift.requires_grad_()
    assert not shifted_cross_entropy(logits, targets, shift).requires_grad
    shifted_cross_entropy(logits.requires_grad_(), targets, shift).backward()
    assert shift.grad is None and logits.grad is not None


@pytest.mark.parametrize("name", OPTIONS)
def test_first_to_third_derivatives(name):
    logits, targets, shift = operands(4, 5, scale=1.0)
    options, _ = options_for(name, 5, torch.float64)
    function = lambda z: shifted_cross_entropy(z, targets, shift, temperature=0.5, **options)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, logits)
    slope = lambda z: torch.autograd.grad(function(z).sum(), z, create_graph=True)[0]
    assert torch.autograd.gradgradcheck(slope, logits)


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_mode_and_transforms(name):
    logits, targets, shift = operands(4, 5, scale=1.0)
    logits[0] = logits[0].round()  # the largest may tie
    options, _ = options_for(name, 5, torch.float64)
    ours = functools.partial(shifted_cross_entropy, temperature=0.5, **options)
    function = lambda z: ours(z, targets, shift).square().sum()
    expected = lambda z: by_torch(z, targets, shift, 0.5, **options).square().sum()
    along = torch.randn_like(logits)
    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        torch.testing.assert_close(derivative(function)(logits), derivative(expected)(logits))
    found, wanted = (torch.func.jvp(f, (logits,), (along,))[1] for f in (function, expected))
    torch.testing.assert_close(found, wanted)
    each = lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([logits, 2 * logits]))
    torch.testing.assert_close(each(function), each(expected))


def test_transforms_pass_over_ignored_rows():
    logits, targets, shift = operands(3, 4)
    targets[1], logits[1, 2], shift[1, 0] = -100, math.nan, math.inf
    slope = torch.func.grad(lambda z: shifted_cross_entropy(z, targets, shift))(logits)
    assert slope.isfinite().all() and not slope[1].any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    logits, targets, shift = operands(6, 11, torch.float32)
    weight = torch.rand(11)
    function = lambda *a: shifted_cross_entropy(
        *a, weight=weight, label_smoothing=0.1, temperature=0.5
    )
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for own in (shift, shift[0]):
        found, eager = (loss_and_grad(f, logits, targets, own) for f in (compiled, function))
        torch.testing.assert_close(found, eager)


def test_autocast():
    linear, (logits, targets, shift) = torch.nn.Linear(11, 11), operands(6, 11, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(logits)
        loss = shifted_cross_entropy(output, targets, shift)
    assert output.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_torch(output, targets, shift).float())
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32


def test_targets_outside_of_the_classes():
    logits, targets, shift = operands(3, 4)
    for bad in (4, -1, -101):
        with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|targets\[1\]"):
            shifted_cross_entropy(logits, torch.tensor([0, bad, 1]), shift)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.zeros(3, 4, dtype=torch.int64)},
            TypeError,
            "logits must be a tensor of a floating",
        ),
        (
            {"shift": torch.zeros(3, 4, dtype=torch.int64)},
            TypeError,
            "shift must be a tensor of a floating",
        ),
        (
            {"shift": [0.0] * 4},
            TypeError,
            "shift must be a tensor of a floating-point type, got list",
        ),
        (
            {"targets": torch.zeros(3)},
            TypeError,
            "targets must be classes in int64, got torch.float32; for prob",
        ),
        (
            {"targets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"targets must be \(3,\).* got \(4,\)",
        ),
        (
            {"shift": torch.zeros(4, 4)},
            ValueError,
            r"shift must be \(3, 4\) as logits, or \(4,\), got \(4, 4\)",
        ),
        ({"shift": torch.zeros(3)}, ValueError, "shift must be"),
        (
            {"shift": torch.zeros(3, 4, device="meta")},
            ValueError,
            "shift is on meta, logits are on cpu",
        ),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be \(4,\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        (
            {"reduction": "total"},
            ValueError,
            "reduction must be one of mean, sum, none, got 'total'",
        ),
        ({"logits": torch.zeros(3, 0)}, ValueError, "K >= 1"),
        ({"logits": torch.zeros(())}, ValueError, "K >= 1"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {
        "logits": torch.zeros(3, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        "shift": torch.zeros(3, 4),
    }
    with pytest.raises(error, match=message):
        shifted_cross_entropy(**given | change)
