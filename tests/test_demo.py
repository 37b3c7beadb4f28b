"""The parts of the demo: competitors, training, the materialising twin, cost and report."""

import json

import pytest
import torch
from torch import nn

import htv
from htv.data import digits
from htv.demo import cost, report
from htv.demo.training import (
    Setup,
    aggregating,
    make_network,
    make_optimizer,
    make_task,
    step,
    train,
)
from htv.demo.variants import PLAIN, parse, parse_all

SMALL = Setup(epochs=2, width=16, batch_size=16)


def test_specs_become_rules():
    assert parse("plain", 64) is PLAIN
    assert parse("and-mask", 64).rule == htv.AndMask(0.2)
    assert parse("AND-Mask:0.3", 64).rule == htv.AndMask(0.3)
    assert parse("winsorized:3", 64).rule == htv.WinsorizedMean(3)
    assert parse("trimmed:.25", 64).rule == htv.TrimmedMean(0.25)
    assert parse("median-of-means:5", 64).rule == htv.MedianOfMeans(5)


def test_plain_comes_first_and_once():
    specs = [
        variant.spec for variant in parse_all(["median,plain", "and-mask", "and-mask:0.2"], 64)
    ]
    assert specs == ["plain", "median", "and-mask:0.2"]
    assert [variant.spec for variant in parse_all(None, 64)] == [
        "plain",
        "and-mask:0.2",
        "median",
        "winsorized:0.2",
    ]


def test_a_spec_reads_back_as_itself():
    for variant in parse_all(
        ["and-mask:0.35", "median", "winsorized:2", "trimmed", "median-of-means"], 64
    ):
        assert parse(variant.spec, 64) == variant


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mode", "unknown rule 'mode'; choose from plain, and-mask"),
        ("plain:1", "unknown rule"),
        ("and-mask:1.5", r"tau must lie in \[0, 1\]"),
        ("and-mask:nan", r"tau must lie in \[0, 1\]"),
        ("and-mask:", "tau must be a number, got ''"),
        ("median:1", "takes no parameter"),
        ("winsorized:8", "use at most 7"),
        ("median-of-means:17", "17 groups"),
        ("median-of-means:2.5", "integer"),
    ],
)
def test_wrong_specs_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec, batch_size=16)


def test_the_task_is_standardised_and_only_training_labels_are_wrong():
    data = digits()
    task = make_task(data, SMALL)
    assert task.wrong.sum() == round(0.25 * len(data.train_labels))
    assert torch.equal(task.true != task.noisy, task.wrong) and torch.equal(
        task.test_labels, data.test_labels
    )
    assert abs(task.x.mean()) < 1e-4 and abs(task.x.std() - 1) < 1e-3
    assert task.x.shape == (len(data.train_labels), 64)


def test_every_variant_starts_from_the_same_weights_and_leaves_the_global_seed_alone():
    before = torch.get_rng_state()
    one, two = make_network(64, 10, SMALL), make_network(64, 10, SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_training_is_repeatable_and_the_identity_rule_is_plain():
    task = make_task(digits().subset(160, seed=0), SMALL)
    drop = ("seconds",)

    def run(rule):
        records = train(task, rule, SMALL, lambda record: None)
        return [
            {key: value for key, value in record.items() if key not in drop} for record in records
        ]

    plain = run(None)
    assert [record["epoch"] for record in plain] == [1, 2] and plain[1]["loss"] < plain[0]["loss"]
    assert plain == run(None)
    assert run(htv.Mean())[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-4)
    assert run(htv.Median())[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-4)


RULES = [
    htv.AndMask(0.2),
    htv.Median(),
    htv.WinsorizedMean(0.2),
    htv.TrimmedMean(3),
    htv.MedianOfMeans(5),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_materialising_twin_computes_the_same_gradients(rule):
    torch.manual_seed(0)
    tracked = make_network(12, 5, SMALL).double()
    twin = make_network(12, 5, SMALL).double()
    x, labels = torch.randn(16, 12, dtype=torch.float64), torch.randint(0, 5, (16,))
    with aggregating(tracked, rule):
        step(tracked, make_optimizer(tracked, SMALL), x, labels)
    cost.twin(twin, make_optimizer(twin, SMALL), x, labels, rule)()
    for ours, theirs in zip(tracked.parameters(), twin.parameters(), strict=True):
        assert ours.grad.abs().sum() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_aggregating_detaches():
    network = nn.Sequential(nn.Linear(3, 2))
    with aggregating(network, htv.Median()):
        assert "forward" in vars(network)
    assert "forward" not in vars(network)


def test_rough_times_are_told():
    calm, rough = ({"ms_per_step_quartiles": quartiles} for quartiles in ([2.0, 2.9], [2.0, 3.1]))
    assert not report.times_are_rough([calm, calm]) and report.times_are_rough([calm, rough])


def test_report_with_made_up_numbers(tmp_path):
    def result(spec, memorised, vmap):
        epochs = [
            {"epoch": e, "test_accuracy": 0.5 + e / 10, "memorised": memorised} for e in (1, 2)
        ]
        return {"spec": spec, "epochs": epochs, "final": epochs[-1], "ms_per_step": 2.0,
                "peak_bytes": 10_000_000, "vmap_ms_per_step": vmap,
                "vmap_peak_bytes": vmap}  # fmt: skip

    results = [result("plain", 0.875, None), result("median", 0.0625, 5_000_000)]
    words = report.in_words(results)
    assert "plain learnt 87.5%" in words and "median 6.2%, test accuracy +0.0 points" in words
    assert report.summary_table(results, 0.25).row_count == 2
    report.save_curves(tmp_path / "curves.png", results, "made up")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    report.save_json(tmp_path / "numbers.json", {"results": results})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"results": results}
