"""The memorization-aware loss against its formulas in NumPy, and under the rules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.methods import (
    MemorizationAwareLoss,
    calibration_matrix,
    class_prior_shift,
    shifted_cross_entropy,
)
from htv.tools.check import aggregated, one_group_at_a_time

N, K = 12, 3


def data(dtype=torch.float64):
    heldout = torch.randn(N, K, dtype=dtype)
    targets = torch.arange(N) % K
    ids = torch.tensor([7, 0, 3, 3, 11])
    return heldout, targets, ids


def softmax(logits, temperature):
    z = logits.double().numpy() / temperature
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def calibration(q, y, classes=K):
    joint = np.zeros((classes, classes))
    for row, c in zip(q, y.tolist(), strict=True):
        joint[:, c] += row / len(q)
    mass = joint.sum(1, keepdims=True)
    return np.where(mass > 0, joint / np.where(mass > 0, mass, 1), joint.sum(0) / joint.sum())


@pytest.mark.parametrize("temperature", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["global", "batch", "none"])
def test_formulas(kind, temperature):
    heldout, targets, ids = data()
    loss = MemorizationAwareLoss(
        heldout, targets, temperature=temperature, calibration=kind, num_classes=K
    )
    q = softmax(heldout, temperature)
    matrix = {
        "global": lambda: calibration(q, targets),
        "batch": lambda: calibration(q[ids], targets[ids]),
        "none": lambda: np.eye(K),
    }[kind]()
    wanted = torch.from_numpy(np.log(q[ids] @ matrix + 1e-6))
    torch.testing.assert_close(loss.shift(ids, targets[ids]), wanted, rtol=1e-9, atol=1e-9)
    logits = torch.randn(len(ids), K, dtype=torch.float64)
    torch.testing.assert_close(
        loss(logits, targets[ids], ids), F.cross_entropy(logits + wanted, targets[ids])
    )


def test_rows_of_the_calibration_are_distributions():
    heldout, targets, _ = data()
    for temperature in (1e-3, 1.0):
        matrix = calibration_matrix((heldout / temperature).softmax(1), targets)
        torch.testing.assert_close(matrix.sum(1), torch.ones(K, dtype=torch.float64))


def test_perfect_predictions_leave_nothing_to_learn_and_useless_ones_everything():
    targets = torch.arange(N) % K
    logits, ids = torch.randn(N, K), torch.arange(N)
    perfect = MemorizationAwareLoss(F.one_hot(targets, K).float(), targets, temperature=0.001)
    assert perfect(logits, targets, ids) < 1e-4
    useless = MemorizationAwareLoss(torch.zeros(N, K), targets)
    torch.testing.assert_close(
        useless(logits, targets, ids), F.cross_entropy(logits, targets), rtol=1e-5, atol=1e-5
    )


def test_without_eps_and_calibration_logits_are_shifted_as_they_are():
    heldout, targets, ids = data(torch.float32)
    loss = MemorizationAwareLoss(heldout, targets, temperature=0.5, calibration="none", eps=0)
    logits = torch.randn(len(ids), K)
    wanted = F.cross_entropy(logits + heldout[ids] / 0.5, targets[ids])
    torch.testing.assert_close(loss(logits, targets[ids], ids), wanted)
    torch.testing.assert_close(
        shifted_cross_entropy(logits, targets[ids], loss.shift(ids, targets[ids])), wanted
    )


@pytest.mark.parametrize("temperature", [0.001, 1.0])
def test_a_class_absent_from_training(temperature):
    heldout, targets, ids = data(torch.float32)
    targets = targets % 2
    with pytest.warns(UserWarning, match=r"classes 2 have no example"):
        loss = MemorizationAwareLoss(heldout, targets, temperature=temperature)
    shift = loss.shift(ids, targets[ids])
    assert shift.isfinite().all() and (shift[:, 2] - np.log(1e-6)).abs().max() < 1e-3
    assert (shift[:, :2].exp().sum(1) - 1).abs().max() < 1e-4
    logits = torch.randn(len(ids), K, requires_grad=True)
    loss(logits, targets[ids], ids).backward()
    assert (
        logits.grad.isfinite().all()
        and logits.grad[:, 2].abs().max() < 1e-4 < logits.grad[:, :2].abs().max()
    )


@pytest.mark.parametrize("temperature", [0.001, 1.0])
def test_a_class_absent_from_the_batch(temperature):
    """With K = 2, iterating over the classes that are present would leave no shift at all."""
    heldout, targets = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 0])
    loss = MemorizationAwareLoss(heldout, targets, temperature=temperature, calibration="batch")
    ids = torch.tensor([0, 2, 4])
    shift = loss.shift(ids, targets[ids])
    wanted = torch.tensor([1.0, 1e-6]).log().expand(3, 2)
    torch.testing.assert_close(shift, wanted, rtol=1e-3, atol=1e-4)
    assert loss(torch.randn(3, 2), targets[ids], ids).isfinite()
    assert loss(torch.randn(0, 2), targets[:0], ids[:0]).isnan()  # the mean of nothing
    ignored = torch.full((3,), -100)
    assert loss.shift(ids, ignored).isfinite().all()
    kept = torch.cat([ids, ids])
    some = loss.shift(kept, torch.cat([targets[ids], ignored]))
    torch.testing.assert_close(some[:3], shift)


def test_ids_pick_rows_whatever_the_sampler_does():
    heldout, targets, _ = data()
    loss = MemorizationAwareLoss(heldout, targets, reduction="none")
    logits = torch.randn(N, K, dtype=torch.float64)
    every = loss(logits, targets, torch.arange(N))
    ids = torch.randint(0, N, (30,))
    torch.testing.assert_close(loss(logits[ids], targets[ids], ids), every[ids])


def test_missing_predictions():
    heldout, targets, ids = data(torch.float32)
    whole = MemorizationAwareLoss(heldout[:10], targets[:10])
    heldout[10:] = torch.nan
    with pytest.raises(
        ValueError, match="heldout has no predictions for ids 10, 11: .*missing='allow'"
    ):
        MemorizationAwareLoss(heldout, targets)
    loss = MemorizationAwareLoss(heldout, targets, missing="allow")
    torch.testing.assert_close(loss.calibration_matrix, whole.calibration_matrix)
    assert loss(torch.zeros(2, K), targets[3:5], torch.tensor([3, 4])).isfinite()
    with pytest.raises(ValueError, match="heldout has no predictions for ids 11"):
        loss(torch.zeros(5, K), targets[ids], ids)
    for bad in (12, -1):
        with pytest.raises(ValueError, match=f"heldout has 12 rows, there is none for id {bad}"):
            loss(torch.zeros(1, K), targets[:1], torch.tensor([bad]))


def test_examples_to_be_ignored_take_no_part():
    heldout, targets, _ = data()
    some = targets.clone()
    some[10:] = -100
    loss, without = (
        MemorizationAwareLoss(heldout, some),
        MemorizationAwareLoss(heldout[:10], targets[:10]),
    )
    torch.testing.assert_close(loss.calibration_matrix, without.calibration_matrix)
    logits, ids = torch.randn(N, K, dtype=torch.float64), torch.arange(N)
    torch.testing.assert_close(
        loss(logits, some, ids), without(logits[:10], targets[:10], ids[:10])
    )


def test_nothing_to_calibrate_by():
    """Shifts would be the same for all classes, which is none at all."""
    heldout, targets, ids = data()
    for logits, classes in (
        (heldout[:0], targets[:0]),
        (heldout, torch.full_like(targets, -100)),
        (torch.full_like(heldout, torch.nan), targets),
    ):
        with pytest.raises(
            ValueError, match="no example has both a class and a held-out prediction"
        ):
            MemorizationAwareLoss(logits, classes, missing="allow")
        MemorizationAwareLoss(logits, classes, missing="allow", calibration="batch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_round_shifts(dtype):
    heldout, targets, ids = data(torch.float32)
    for kind in ("global", "batch", "none"):
        loss = MemorizationAwareLoss(heldout, targets, calibration=kind)
        with torch.autocast("cpu", dtype):
            found = loss.shift(ids, targets[ids])
        assert found.dtype == torch.float32 and torch.equal(found, loss.shift(ids, targets[ids]))


def test_state_dict():
    heldout, targets, ids = data(torch.bfloat16)
    loss = MemorizationAwareLoss(heldout, targets)
    other = MemorizationAwareLoss(torch.zeros_like(heldout), targets)
    assert sorted(loss.state_dict()) == ["calibration_matrix", "heldout"]
    assert loss.heldout.dtype == torch.bfloat16 and loss.calibration_matrix.dtype == torch.float32
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.shift(ids, targets[ids]), loss.shift(ids, targets[ids]))
    assert "12 examples, 3 classes, temperature=0.1, calibration='global', eps=1e-06" in repr(loss)


def test_class_priors():
    shift = class_prior_shift(torch.tensor([1, 3, 4]), tau=2.0)
    torch.testing.assert_close(shift, 2 * torch.tensor([0.125, 0.375, 0.5]).log())
    for bad in (0, np.inf):
        with pytest.raises(ValueError, match="counts of classes 1 are not above 0 and finite"):
            class_prior_shift(torch.tensor([1, bad, 4]))
    torch.testing.assert_close(
        class_prior_shift(torch.tensor([1.0, 0.0]), pseudo_count=1.0),
        torch.tensor([2 / 3, 1 / 3]).log(),
    )
    with pytest.raises(ValueError, match=r"counts must be \(K,\)"):
        class_prior_shift(torch.ones(2, 2))
    logits, targets = torch.randn(5, 3), torch.arange(5) % 3
    torch.testing.assert_close(
        shifted_cross_entropy(logits, targets, shift), F.cross_entropy(logits + shift, targets)
    )


RULES = [htv.Mean(), htv.AndMask(0.4), htv.GeometricMean(0.2), htv.Median(), htv.WinsorizedMean(1)]


@pytest.mark.parametrize("kind", ["global", "batch", "none"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_under_a_rule(rule, kind):
    """Shifts are constants: a contribution is the gradient of the example's own loss."""
    heldout, targets, _ = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, K)).double()
    loss = MemorizationAwareLoss(
        heldout, targets, calibration=kind, weight=torch.rand(K).double() + 0.5
    )
    ids = torch.tensor([7, 0, 3, 3, 11, 2])
    x, y = torch.randn(6, 4, dtype=torch.float64), targets[torch.tensor([7, 0, 3, 3, 11, 2])]
    shift = loss.shift(ids, y)
    parameters = dict(model.named_parameters())
    one = lambda e: F.cross_entropy(
        model(x[e : e + 1]) + shift[e], y[e : e + 1], loss.weight, reduction="sum"
    )
    total = loss.weight[y].sum()
    contributions = one_group_at_a_time(lambda e: one(e) / total, parameters, 6)
    with htv.attach(model, rule):
        loss(model(x), y, ids).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(
            p.grad, aggregated(contributions[name], rule), msg=lambda m, n=name: f"{n}: {m}"
        )


class WithLoss(nn.Module):
    """Computes its loss itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, K)

    def forward(self, x, y, shift):
        return shifted_cross_entropy(self.linear(x), y, shift, reduction="none")


def test_inside_of_a_served_model():
    model, x, y, shift = WithLoss(), torch.randn(6, 4), torch.arange(6) % K, torch.randn(6, K)
    parameters = dict(model.named_parameters())
    contributions = one_group_at_a_time(
        lambda e: model(*(t[e : e + 1] for t in (x, y, shift))).sum(), parameters, 6
    )
    with htv.attach(model, htv.Median()):
        model(x, y, shift).sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, aggregated(contributions[name], htv.Median()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout": torch.zeros(4)}, r"heldout must be \(N, K\)"),
        ({"heldout": torch.zeros(4, 3, dtype=torch.int64)}, r"heldout must be \(N, K\)"),
        ({"num_classes": 4}, "heldout has 3 columns, but num_classes is 4"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be \(4,\) int64"),
        (
            {"targets": torch.tensor([0, 1, 2, 3])},
            "targets must be in 0 to 2 or ignore_index, got 3",
        ),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"calibration": "class"}, "calibration must be one of global, batch, none, got 'class'"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"missing": "drop"}, "missing must be 'error' or 'allow'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"heldout": torch.zeros(4, 3), "targets": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(ValueError, match=message):
        MemorizationAwareLoss(**given | change)


def test_batches_that_do_not_fit():
    heldout, targets, ids = data(torch.float32)
    loss = MemorizationAwareLoss(heldout, targets)
    with pytest.raises(
        ValueError,
        match=r"logits must be \(B, K\) with K = 3 classes, as heldout has, got \(5, 4\)",
    ):
        loss(torch.zeros(5, 4), targets[ids], ids)
    with pytest.raises(ValueError, match=r"ids must be \(B,\) int64, one for each target"):
        loss(torch.zeros(5, 3), targets[ids], ids[:4])
    with pytest.raises(ValueError, match=r"ids must be \(B,\) int64, one for each target"):
        loss(torch.zeros(5, 3), targets[ids], ids.float())


def test_wrong_types_targets_and_devices_are_named():
    heldout, targets, ids = data(torch.float32)
    with pytest.raises(TypeError, match="heldout must be a tensor, got ndarray"):
        MemorizationAwareLoss(heldout.numpy(), targets)
    with pytest.raises(TypeError, match="targets must be a tensor, got list"):
        MemorizationAwareLoss(heldout, targets.tolist())
    loss, logits = MemorizationAwareLoss(heldout, targets, calibration="batch"), torch.zeros(5, K)
    with pytest.raises(TypeError, match=r"ids must be a tensor, \(B,\) int64, got list"):
        loss(logits, targets[ids], ids.tolist())
    for bad in (K, -1):
        with pytest.raises(ValueError, match=f"targets must be in 0 to 2, got {bad}"):
            loss(logits, torch.tensor([0, 1, bad, 0, 0]), ids)
    with pytest.raises(ValueError, match=r"logits are on meta, heldout on cpu: .*\.to\(\)"):
        loss(logits.to("meta"), targets[ids], ids)
    with pytest.raises(ValueError, match="targets are on meta, heldout on cpu"):
        loss(logits, targets[ids].to("meta"), ids)


def test_compiled():
    heldout, targets, ids = data(torch.float32)
    logits = torch.randn(len(ids), K)
    for kind in ("global", "batch"):
        loss = MemorizationAwareLoss(heldout, targets, calibration=kind)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(logits, targets[ids], ids), loss(logits, targets[ids], ids)
        )
