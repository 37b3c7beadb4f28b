"""Label noise: as many as asked, wrong or by chance right as the kind says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htv.data import label_noise


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 200), rate=st.floats(0, 1), classes=st.integers(2, 12),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_exactly_the_share_is_changed(n, rate, classes, seed):
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(7))
    before = labels.clone()
    noisy, wrong = label_noise(labels, rate, classes, seed)
    assert torch.equal(labels, before)
    assert wrong.sum() == round(rate * n) and torch.equal(noisy != labels, wrong)
    assert ((noisy >= 0) & (noisy < classes)).all()
    again = label_noise(labels, rate, classes, seed)
    assert torch.equal(noisy, again[0]) and torch.equal(wrong, again[1])


def test_the_seed_matters_and_wrong_classes_are_uniform():
    labels = torch.full((90_000,), 4)
    noisy, wrong = label_noise(labels, 1.0, 10, seed=0)
    counts = noisy.bincount(minlength=10)
    assert wrong.all() and counts[4] == 0
    others = torch.cat([counts[:4], counts[5:]]).double()
    assert (
        (others - 10_000) ** 2 / 10_000
    ).sum() < 26.1  # chi-squared, 8 degrees of freedom, p = .001
    assert not torch.equal(
        label_noise(labels, 0.25, 10, seed=0)[1], label_noise(labels, 0.25, 10, seed=1)[1]
    )


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan"), 25])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got"):
        label_noise(torch.zeros(4, dtype=torch.int64), rate, 10, seed=0)


def test_one_class_cannot_be_wrong():
    with pytest.raises(ValueError, match="num_classes"):
        label_noise(torch.zeros(4, dtype=torch.int64), 0.5, 1, seed=0)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 200), rate=st.floats(0, 1), seed=st.integers(0, 2**31),
    kind=st.sampled_from(["uniform", "permuted"])
)  # fmt: skip
def test_every_kind_touches_no_more_than_the_share_and_tells_what_changed(n, rate, seed, kind):
    labels = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(7))
    noisy, wrong = label_noise(labels, rate, 5, seed, kind)
    assert torch.equal(noisy != labels, wrong) and wrong.sum() <= round(rate * n)
    assert ((noisy >= 0) & (noisy < 5)).all()
    assert torch.equal(noisy, label_noise(labels, rate, 5, seed, kind)[0])
    if kind == "permuted":
        assert torch.equal(noisy.bincount(minlength=5), labels.bincount(minlength=5))


def test_uniform_noise_is_right_by_chance_and_permuted_noise_keeps_rare_classes_rare():
    labels = (torch.arange(100_000) % 10 == 0).long()  # one in ten is of class 1
    uniform, wrong = label_noise(labels, 0.5, 10, seed=0, kind="uniform")
    assert wrong.double().mean() == pytest.approx(0.5 * 0.9, abs=0.01)
    assert uniform.bincount(minlength=10)[2:].double().mean() == pytest.approx(5000, rel=0.02)
    permuted, wrong = label_noise(labels, 0.5, 10, seed=0, kind="permuted")
    assert wrong.double().mean() == pytest.approx(0.5 * 2 * 0.1 * 0.9, abs=0.005)
    assert permuted.sum() == 10_000


def test_an_unknown_kind_is_refused():
    with pytest.raises(
        ValueError, match="kind must be 'other', 'uniform' or 'permuted', got 'random'"
    ):
        label_noise(torch.zeros(4, dtype=torch.int64), 0.5, 10, seed=0, kind="random")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "labels must be a tensor.*got a list"),
        (
            torch.zeros(4, dtype=torch.uint8),
            r"labels must be a tensor, \(N,\) int64, got shape \(4,\) and dtype torch.uint8",
        ),
        (torch.zeros(4, 10, dtype=torch.int64), r"got shape \(4, 10\)"),
        (torch.tensor([0, 10]), r"labels must lie in \[0, 10\), got values from 0 to 10"),
    ],
)
def test_what_are_no_labels_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_noise(labels, 0.5, 10, seed=0)
