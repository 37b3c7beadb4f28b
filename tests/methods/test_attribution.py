"""Shares of the gradient by tag against one example at a time; when examples were learnt; adjusted
overfit.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.data import label_noise
from htv.methods import Attribution, LearntTracker, adjusted_overfit, proper_accuracy

N = 40


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 4),
    ).double()


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 8, generator=generator, dtype=torch.float64)
    return (
        x,
        torch.randint(0, 4, (N,), generator=generator),
        torch.rand(N, generator=generator) < 0.4,
    )


@pytest.mark.parametrize("rule", [htv.Mean(), htv.Median()], ids=repr)
def test_shares_and_scores_against_one_example_at_a_time(rule):
    x, y, corrupt = images()
    model, twin = network(), network()
    scores, shares = torch.zeros(N, dtype=torch.float64), []
    generator = torch.Generator().manual_seed(2)
    with htv.attach(model, rule) as handle:
        attribution = Attribution(handle, corrupt, permutations=20)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            ids = torch.randperm(N, generator=generator)[:16]
            twin.load_state_dict(model.state_dict())
            each = [torch.autograd.grad(F.cross_entropy(twin(x[e : e + 1]), y[e : e + 1]) / 16,
                                        twin.parameters())
                    for e in ids.tolist()]  # fmt: skip
            each = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
            whole, part = each.sum(0), each[~corrupt[ids]].sum(0)
            shares.append((whole @ part / (whole @ whole)).item())
            scores[ids] += each @ whole
            optimizer.zero_grad()
            with attribution.step(ids):
                F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    assert [step.pristine for step in attribution.steps] == pytest.approx(shares, rel=1e-8)
    assert all(step.pristine + step.corrupt == pytest.approx(1) for step in attribution.steps)
    torch.testing.assert_close(attribution.scores, scores, rtol=1e-8, atol=1e-12)
    influence = attribution.influence()
    assert influence.pristine == pytest.approx(scores[~corrupt].mean().item())
    assert influence.corrupt == pytest.approx(scores[corrupt].mean().item())


def scored(products: torch.Tensor, corrupt: torch.Tensor, permutations: int = 400) -> Attribution:
    """As if a step over the whole data set had given these inner products."""
    with htv.attach(nn.Linear(1, 1), htv.Mean()) as handle:
        attribution = Attribution(handle, corrupt, permutations)
    attribution._note(torch.arange(len(products)), products)
    return attribution


def test_the_null_is_that_of_tags_without_meaning():
    corrupt = torch.arange(1000) < 300
    generator = torch.Generator().manual_seed(0)
    products = torch.rand(1000, generator=generator, dtype=torch.float64)
    (step,) = scored(products, corrupt).steps
    low, high = step.null
    assert low < 0.7 < high and high - low < 0.05  # around the share of pristine examples
    found = scored(torch.where(corrupt, 0.2, 1.0).double() * products, corrupt)
    assert found.steps[0].pristine > found.steps[0].null[1]
    assert (
        found.influence().pristine
        > found.influence().null[1]
        > found.influence().null[0]
        > found.influence().corrupt
    )


def test_the_null_covers_meaningless_tags_as_often_as_it_says():
    generator = torch.Generator().manual_seed(4)
    covered = 0
    for seed in range(100):
        products = torch.randn(200, generator=generator, dtype=torch.float64).exp()
        corrupt = label_noise(torch.zeros(200, dtype=torch.int64), 0.5, 2, seed)[1]
        (step,) = scored(products, corrupt, permutations=200).steps
        covered += step.null[0] <= step.pristine <= step.null[1]
    assert 86 <= covered <= 100


def test_a_zero_gradient_has_no_shares():
    (step,) = scored(torch.zeros(6, dtype=torch.float64), torch.arange(6) < 2).steps
    assert math.isnan(step.pristine) and math.isnan(step.corrupt) and math.isnan(step.null[0])


def test_bad_input_is_refused():
    x, y, corrupt = images()
    model = network()
    with htv.attach(model, htv.Mean()) as handle:
        with pytest.raises(ValueError, match="corrupt must be a boolean"):
            Attribution(handle, corrupt.long())
        with pytest.raises(ValueError, match="corrupt must be a boolean"):
            Attribution(handle, corrupt.tolist())
        with pytest.raises(ValueError, match="permutations"):
            Attribution(handle, corrupt, permutations=0)
        attribution = Attribution(handle, corrupt)
        run = lambda count: F.cross_entropy(model(x[:count]), y[:count]).backward()
        with pytest.raises(ValueError, match="6 ids but dim 0 of the batch has size 5"):
            with attribution.step(torch.arange(6)):
                run(5)
        outside = F.cross_entropy(model(x[:5]), y[:5])
        with pytest.raises(RuntimeError, match="run the model's forward and backward inside"):
            with attribution.step(torch.arange(5)):
                outside.backward()
        with pytest.raises(
            RuntimeError, match="cannot be nested"
        ):  # groups come in the order of their ids
            with attribution.step(torch.arange(4)), handle.groups(torch.tensor([3, 2, 1, 0])):
                run(4)
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 40\), got values from 2 to 40"):
            with attribution.step(torch.tensor([2, 40])):
                run(2)
        with pytest.raises(RuntimeError, match="saw no gradient"):
            with attribution.step(torch.arange(4)):
                pass
        with pytest.raises(RuntimeError, match="takes one backward"):
            with attribution.step(torch.arange(4)):
                run(4), run(4)
        assert attribution.steps == [] and not attribution.scores.any()
        assert not handle._session.collects_stats and handle._session.examine is None


def test_learnt_first_and_last():
    tracker = LearntTracker(4)
    everyone = torch.arange(4)
    looks = {0: [0, 0, 0, 0], 10: [1, 1, 0, 0], 20: [1, 0, 0, 1], 30: [1, 1, 0, 0]}
    for step, correct in looks.items():
        tracker.update(step, everyone, torch.tensor(correct, dtype=torch.bool))
    assert tracker.first.tolist() == [10, 10, -1, 20]
    assert tracker.last.tolist() == [10, 30, -1, -1]
    tracker.update(40, torch.tensor([2, 0]), torch.tensor([True, False]))  # only some
    assert tracker.first.tolist() == [10, 10, 40, 20] and tracker.last.tolist() == [-1, 30, 40, -1]
    with pytest.raises(ValueError, match="step must not be negative nor go back"):
        tracker.update(39, everyone, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="correct must be a boolean tensor"):
        tracker.update(50, everyone, torch.ones(4))
    for ids, message in (
        ([-1], r"ids must lie in \[0, 4\)"),
        ([0, 1], "names 2 examples"),
        ([True], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.update(50, torch.tensor(ids), torch.ones(1, dtype=torch.bool))
    assert tracker.first.tolist() == [10, 10, 40, 20]


@pytest.mark.parametrize("kind", ["uniform", "other", "permuted"])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_proper_accuracy_is_that_of_a_classifier_that_ignores_the_noise(kind, rate):
    count, generator = 200_000, torch.Generator().manual_seed(0)
    truth = torch.randint(0, 10, (count,), generator=generator)
    guess = torch.where(
        torch.rand(count, generator=generator) < 0.8, truth, torch.randint(0, 10, (count,))
    )
    accuracy = (guess == truth).double().mean().item()
    noisy, _ = label_noise(truth, rate, 10, seed=1, kind=kind)
    found = (guess == noisy).double().mean().item()
    assert found == pytest.approx(proper_accuracy(accuracy, rate, 10, kind), abs=0.005)
    assert adjusted_overfit(found, accuracy, rate, 10, kind) == pytest.approx(0, abs=0.005)


def test_adjusted_overfit_is_the_papers():
    assert adjusted_overfit(0.9, 0.8, 0.5) == pytest.approx(0.9 - (0.5 / 10 + 0.5 * 0.8))
    for change in (
        {"train_accuracy": 1.2},
        {"accuracy": -1.0},
        {"rate": 50.0},
        {"num_classes": 1},
        {"kind": "x"},
    ):
        good = dict(train_accuracy=0.9, accuracy=0.8, rate=0.5, num_classes=10, kind="uniform")
        with pytest.raises(ValueError, match=next(iter(change))):
            adjusted_overfit(**{**good, **change})
