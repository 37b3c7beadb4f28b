"""Experiments (d) to (h): what they share, what they conclude from made-up records, and each of
them, quickly.
"""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import htv
from htv.cli.commands import app
from htv.data import DataError, digits
from htv.experiments import images, rolling
from htv.experiments.experiment import load
from htv.experiments.images import Training
from support.findings import agreement

SMALL = Training(images=300, epochs=4, learning_rate=0.1, batch_size=64, test_images=50, looks=2)
NAMES = ["memorisation", "winsorized", "rolling", "attribution", "coherence", "difficulty"]


def quietly(share, now=""):
    pass


def test_a_task_is_a_subset_with_noise_on_the_training_part_alone():
    data = digits()
    task = images.make_task(data, SMALL, 0.5, seed=1)
    assert task.x.shape == (300, 64) and task.test_x.shape == (50, 64)
    assert (
        torch.equal(task.true != task.noisy, task.wrong)
        and 0.35 < task.wrong.double().mean() < 0.55
    )
    again, other = (images.make_task(data, SMALL, 0.5, seed=seed) for seed in (1, 2))
    assert torch.equal(task.x, again.x) and torch.equal(task.noisy, again.noisy)
    assert torch.equal(task.test_x, again.test_x) and not torch.equal(task.test_x, other.test_x)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_networks_are_those_of_their_seed_and_are_served(kind):
    data = digits()
    before = torch.get_rng_state()
    one, same, other = (images.make_network(kind, data, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    x = images.make_task(data, SMALL, 0.0, 0).x[:7]
    assert one(x).shape == (7, 10)
    htv.check(one.double(), x.double(), htv.AndMask(0.3))


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="'mlp' or 'convnet'"):
        images.make_network("transformer", digits(), 0)


def trained(rule, **look):
    data = digits()
    task, network = images.make_task(data, SMALL, 0.25, 0), images.make_network("mlp", data, 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=SMALL.learning_rate)
    curves = images.fit(network, task, optimizer, SMALL, 0, quietly, rule=rule, **look)
    assert "forward" not in vars(network)
    return curves


def test_fitting_looks_when_it_should_and_is_repeatable():
    curves = trained(None)
    assert curves["epoch"] == [0, 2, 4] and all(len(values) == 3 for values in curves.values())
    assert curves == trained(None)
    assert curves["train_accuracy"][-1] > curves["train_accuracy"][0] + 0.1
    assert trained(htv.Mean())["clean_accuracy"] == pytest.approx(
        curves["clean_accuracy"], abs=0.03
    )
    assert trained(htv.AndMask(1.0))["train_accuracy"][-1] < curves["train_accuracy"][-1]
    assert trained(None, look=lambda: {"seen": 1}) == {"epoch": [0, 2, 4], "seen": [1, 1, 1]}
    assert images.last({"epoch": [1, 2], "a": [3, 4]}) == {"a": 4}
    assert images.seed_mean([[1.0, 2.0], [3.0, 6.0]]) == [2.0, 4.0]


# -- what is concluded -----------------------------------------------------------------------------


def test_memorisation_is_judged_by_its_numbers():
    settings = load("memorisation").full

    def results(collapses: bool, learns: bool):
        found = {}
        for variant in load("memorisation").variants(settings):
            _, labels, tau = variant.split(", ")
            tau = float(tau.removeprefix("tau "))
            masked = tau > 0 and collapses
            found[variant] = {
                "real": {"train_accuracy": 0.8 if masked else 1.0, "test_accuracy": 0.79},
                "random": {"train_accuracy": 0.15 if masked else 1.0, "test_accuracy": 0.1},
                "25% noise": {"train_accuracy": 0.7, "test_accuracy": 0.75, "best_test": 0.76,
                              "memorised": 0.9 if learns or not tau else 0.05},
            }[labels]  # fmt: skip
        return found

    assert agreement("memorisation", results(True, False)) == [True] * 8
    assert agreement("memorisation", results(False, True)) == [False, False, False, True] * 2
    assert (
        agreement("memorisation", results(True, False), classes=100)
        == [True, True, False, True] * 2
    )  # 5% is more


def test_winsorized_is_judged_by_its_numbers():
    settings = load("winsorized").full
    assert settings.percentiles == (0, 1, 2, 4, 8)

    def results(beyond, underfit=0.1):
        """beyond: by percentile, how far training accuracy lies above the proper one in noise."""
        found = {}
        for rate in settings.rates:
            for c, above in zip(settings.percentiles, beyond, strict=True):
                train = 1 - underfit * (c == 8) if rate == 0 else rate / 10 + 1 - rate + above
                found[f"{rate:.0%} noise, c = {c:g}"] = {
                    "overfit": above, "train_accuracy": train, "test_accuracy": 0.8,
                }  # fmt: skip
        return found

    assert agreement("winsorized", results([0.5, 0.3, 0.01, 0.01, 0.0])) == [True] * 4
    assert agreement("winsorized", results([0.5, 0.3, 0.2, 0.1, 0.0])) == [True, False, False, True]
    assert agreement("winsorized", results([0.1, 0.3, 0.01, 0.1, 0.0], 0.0)) == [False] * 4


def test_rolling_is_judged_by_its_numbers():
    def results(**memorised):
        common = {"clean_accuracy": 1.0, "train_accuracy": 0.8, "test_accuracy": 0.7,
                  "best_test": 0.8, "matched": None}  # fmt: skip
        curves = lambda value: {"memorised": [0.0, 2 * value], "gap": [-0.2, 2 * value]}
        return {
            v: {**common, "memorised": 0.99, "gap": 0.4, "curves": curves(value)}
            for v, value in memorised.items()
        }

    assert rolling._when([0.1, 0.5, 0.9, 0.95], 0.8, [0.0, 0.2, 0.6, 0.7]) == pytest.approx(0.5)
    assert rolling._when([0.1, 0.5], 0.8, [0.0, 0.2]) is None
    assert agreement("rolling", results(SGD=0.9, M3=0.3, RM3=0.3, RA3=0.85)) == [True] * 4
    assert agreement("rolling", results(SGD=0.9, M3=0.9, RM3=0.5, RA3=0.5)) == [False] * 4


def test_attribution_is_judged_by_its_numbers():
    rates = {"25% noise": 0.75, "50% noise": 0.5, "75% noise": 0.25}

    def results(first, last, pristine, corrupt):
        common = {"last_epoch_f_c": last, "crossing": None, "pristine_learnt": pristine,
                  "corrupt_learnt": corrupt, "train_accuracy": 0.9}  # fmt: skip
        return {
            v: {**common, "share_of_pristine": p, "early_f_p": p + first} for v, p in rates.items()
        }

    assert agreement("attribution", results(0.2, 0.6, 3.0, 30.0)) == [True, True, True]
    assert agreement("attribution", results(0.2, 0.6, 3.0, None)) == [
        True,
        True,
        True,
    ]  # half never were
    assert agreement("attribution", results(0.0, 0.4, 9.0, 10.0)) == [False, False, False]


def test_coherence_is_judged_by_its_numbers():
    real = {"start": 20.0, "early": 300.0, "peak": 300.0, "peak_epoch": 2, "m_coherence": 1.1,
            "train_accuracy": 1.0, "examples": 2000}  # fmt: skip
    random = {
        **real,
        "start": 1.2,
        "early": 2.0,
        "peak": 90.0,
        "peak_epoch": 90,
        "m_coherence": 1.5,
    }
    assert agreement("coherence", {"real labels": real, "random labels": random}) == [True] * 4
    assert agreement("coherence", {"real labels": random, "random labels": real}) == [
        False,
        True,
        False,
        False,
    ]


def test_difficulty_is_judged_by_its_numbers():
    def results(easy, hard):
        common = {"train_accuracy": 1.0, "train_images": 100, "test_images": 50, "easy_share": 0.8}
        return {
            v: {**common, "test_accuracy": a}
            for v, a in {"easy": easy, "hard": hard, "any": 0.8}.items()
        }

    assert agreement("difficulty", results(0.9, 0.5)) == [True, True]
    assert agreement("difficulty", results(0.6, 0.55)) == [False, True]


def test_too_few_hard_examples_are_named():
    experiment = load("difficulty")
    settings = replace(experiment.quick, pool=40)
    with pytest.raises(DataError, match="digits: .* hard examples of 40 are too few"):
        experiment.run_one(settings, "hard", 0, digits(), quietly)


# -- each of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_quick_ones_run_and_report(name, tmp_path):
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["data"]["name"] == "digits" and record["findings"] and record["tables"]
    assert all(
        finding["here"] in (tmp_path / f"{name}.md").read_text() for finding in record["findings"]
    )
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
