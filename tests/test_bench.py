"""The benchmark: what is measured, that baselines compute the same gradients, what becomes of
failures, the report.
"""

import json
import math

import pytest
import torch
from torch import nn

import htv
from htv.bench import (
    baselines,
    breakdown,
    distributed,
    models,
    plots,
    report,
    run,
    simulate,
    targets,
    workloads,
)
from htv.bench.workloads import PEERS, RULES, WORKLOADS, Stacked, TrainingStep

SETTINGS = run.Settings(
    threads=torch.get_num_threads(), seconds=0.0, peer_seconds=0.1, rounds=(1, 1), memory=False
)


def small(**changes):
    parts = {
        "name": "small",
        "model": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        "batch": lambda: (torch.randn(6, 5), torch.randint(0, 3, (6,))),
        "winsorize": 1,
    }
    return TrainingStep(**parts | changes)


def test_the_workloads_are_those_of_the_published_comparison():
    facts = {name: workload.facts() for name, workload in WORKLOADS.items()}
    assert facts["mlp-relu"] == facts["mlp-gelu"]
    assert facts["mlp-relu"]["parameters"] == 1_863_690 and facts["mlp-relu"]["input"] == [256, 784]
    tokens = (
        1000 * 256
        + 4 * (4 * 256 + 256 * 769 - 256 + 3 * 256 + 257 * 256 + 257 * 1024 + 1025 * 256)
        + 257 * 1000
    )
    assert facts["transformer"]["parameters"] == tokens and facts["transformer"]["input"] == [
        16,
        128,
    ]
    assert round(facts["resnet18"]["parameters"] / 1e6, 1) == 11.2 and facts["resnet18"][
        "input"
    ] == [32, 3, 64, 64]
    assert facts["llama-block"]["input"] == [4, 512, 1024]
    assert [
        facts[name]["winsorize"] for name in ("mlp-relu", "transformer", "resnet18", "llama-block")
    ] == [8, 1, 8, 1]
    assert facts["stacked-32"] == {"groups": 32, "coordinates": 4 << 20, "winsorize": 8}
    assert {f"stacked-{groups}" for groups in (3, 8, 32, 128, 512)} <= set(WORKLOADS)
    assert {facts[name]["axis"] for name in facts if name.startswith("scaling")} == {
        "groups",
        "width",
        "rows",
    }


def test_targets_and_quick_workloads_exist():
    for target in targets.TARGETS:
        assert target.variant in WORKLOADS[target.workload].variants
        if "over" in target.number:
            assert (
                target.number.removeprefix("speed-up over ") in WORKLOADS[target.workload].variants
            )
    assert set(workloads.QUICK) <= set(WORKLOADS)


def test_workloads_by_name_or_beginning():
    assert [w.name for w in workloads.selected(["mlp"])] == ["mlp-relu", "mlp-gelu"]
    assert [w.name for w in workloads.selected(["resnet18", "stacked-3", "resnet18"])] == [
        "resnet18",
        "stacked-3",
    ]
    assert len(workloads.selected(None)) == len(WORKLOADS)
    with pytest.raises(ValueError, match="unknown workload 'ml', use mlp-relu"):
        workloads.selected(["ml"])


@pytest.mark.parametrize("variant", PEERS)
def test_baselines_compute_the_gradients_of_htv(variant):
    method, _, rule = variant.partition(":")
    pytest.importorskip(method) if method in baselines.DISTRIBUTIONS else None
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, targets = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    rule = small().rules()[rule] if rule != "median" else htv.Median("lower")

    def gradients(step):
        step()
        return [parameter.grad.clone() for parameter in model.parameters()]

    def tracked():
        with htv.attach(model, rule):
            model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), targets).backward()

    wanted = gradients(tracked)
    assert any(grad.abs().sum() > 0 for grad in wanted)
    found = gradients(baselines.step(method, model, x, targets, rule))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_baselines_average_over_tokens(method):
    torch.manual_seed(1)
    model, ids = models.transformer(11, 8, heads=2, layers=1).double(), torch.randint(0, 11, (4, 6))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    baselines.step(method, model, ids, ids, htv.TrimmedMean(0))()
    found = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_baseline_that_is_not_installed_says_how_to_install_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opacus", None)
    rows = run.measure(small(), ["plain", "opacus:median"], SETTINGS, lambda doing: None)
    assert "not installed (pip install opacus)" in rows["opacus:median"]["error"]


def test_a_failing_baseline_is_reported_with_its_own_error(monkeypatch):
    def broken(*arguments):
        raise NotImplementedError("no rule for\nthis layer")

    monkeypatch.setitem(baselines.METHODS, "vmap", broken)
    record = recorded([small()], ["mean", "median", "loop:median", "vmap:median"])
    rows = record["workloads"]["small"]["variants"]
    assert list(rows) == ["plain", "mean", "median", "loop:median", "vmap:median"]
    assert rows["vmap:median"] == {"error": "NotImplementedError: no rule for"}
    text = report.markdown(record, {})
    assert "- small vmap:median: `NotImplementedError: no rule for`" in text
    (row,) = (
        line for line in report.peers(record).splitlines() if line.startswith("| small | median |")
    )
    assert row.endswith("| fails | - | - |") and report.times(rows["loop:median"]["ratio"]) in row


def test_an_own_variant_that_fails_does_not_end_the_run_but_is_not_a_success(monkeypatch, tmp_path):
    from rich.console import Console

    too_many = small(winsorize=3)  # of six
    arguments = (SETTINGS, ["mean", "winsorized"], False, tmp_path, Console(quiet=True))
    assert not run.run([too_many], *arguments) and run.run([small()], *arguments)
    with pytest.raises(ZeroDivisionError):  # but there must be a unit
        run.measure(small(model=lambda: 1 // 0), ["plain"], SETTINGS, lambda doing: None)


def test_baselines_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(TrainingStep, "materialised_bytes", lambda self: 10**15)
    rows = run.measure(small(), ["plain", "median", "loop:median"], SETTINGS, lambda doing: None)
    assert (
        "left out: needs about 2500000.0 GB" in rows["loop:median"]["error"]
        and "ms" in rows["median"]
    )


def test_a_slow_baseline_is_called_once():
    calls = []
    workload = small()
    step = lambda variant: calls.append(variant) or torch.randn(1 << 17).sort()
    object.__setattr__(workload, "prepare", lambda variant: lambda: step(variant))
    settings = run.Settings(threads=2, seconds=0.0, peer_seconds=0.0, rounds=(3, 3), memory=False)
    rows = run.measure(workload, ["plain", "median", "loop:median"], settings, lambda doing: None)
    assert [rows[variant]["runs"] for variant in rows] == [3, 3, 1]
    assert calls == ["plain", "median", "loop:median"] + 3 * ["plain", "median"]


def recorded(chosen, variants=None):
    return run.measure_all(chosen, SETTINGS, variants)


def test_stacked_rows_tell_bandwidth():
    workload = Stacked(3, 1000)
    record = recorded([workload])
    rows = record["workloads"]["stacked-3"]["variants"]
    assert list(rows) == list(workload.variants) and rows["copy"]["of_copy"] == 1.0
    for variant, moved in (("copy", 24_000), ("median", 16_000), ("torch:median", 16_000)):
        assert rows[variant]["gb_per_s"] == pytest.approx(moved / (1e6 * rows[variant]["ms"]))
    assert "| (3, 0.000953674 Mi) | torch:sort |" in report.stacked(record)


def made_up():
    """A record in which every number can be told from its place."""

    def row(ratio):
        return {"ms": 20 * ratio, "ms_quartiles": [19 * ratio, 21 * ratio], "runs": 7,
                "ratio": ratio, "peak_bytes": 10**6, "peak_ratio": ratio / 100}  # fmt: skip

    def step(variants, **facts):
        return {"kind": "step", "unit": "plain", "variants": variants} | facts

    ours = {
        name: row(ratio) for name, ratio in zip(RULES, (1.0, 1.1, 1.15, 24.26, 312.4), strict=True)
    }
    stacked = {"copy": {"ms": 10.0, "ratio": 1.0, "gb_per_s": 12.0, "of_copy": 1.0},
               "median": {"ms": 5.0, "ratio": 0.5, "gb_per_s": 6.0, "of_copy": 0.5},
               "torch:median": {"ms": 120.0, "ratio": 12.0, "gb_per_s": 0.25,
                                "of_copy": 0.02}}  # fmt: skip
    facts = {"versions": {"torch": "9.9"}, "cpu": "Abacus", "threads": 2, "cpu_capability": "beads"}
    scaling = step({"plain": row(1.0), "median": row(3.0)}, axis="rows", value=4)
    return {
        "command": "htv bench", "date": "2026-01-02T03:04:05+00:00", "took_seconds": 600,
        "machine": facts, "settings": {"peer_seconds": 2.0},
        "peers": {"opacus": "1.6", "backpack": "not installed"},
        "workloads": {
            "mlp-relu": step(ours | {"vmap:median": row(99.96),
                                     "opacus:median": {"error": "ValueError: `no`"}}),
            "stacked-3": {"kind": "stacked", "groups": 3, "coordinates": 1 << 22,
                          "variants": stacked},
            "stacked-32": {"kind": "stacked", "groups": 32, "coordinates": 1 << 22,
                           "variants": stacked},
            "scaling-rows-4": scaling,
        },
    }  # fmt: skip


def test_the_report_shows_the_recorded_numbers():
    text = report.markdown(made_up(), {"ratio": "cpu-ratio.png"})
    assert (
        "`htv bench`, 2026-01-02, Abacus, 2 threads, beads, torch 9.9, opacus 1.6; 10 minutes."
        in text
    )
    assert (
        "| mlp-relu | 20 ms, 1 MB | 1.10x, 0.01x | 1.15x, 0.01x | 24.3x, 0.24x | 312x, 3.12x |"
        in text
    )
    assert "| mlp-relu | median | 24.3x, 0.24x | - | 100.0x, 1.00x | fails | - |" in text
    assert "| (3, 4 Mi) | median | 5.0 ms | 6 | 50.0% | 12 |" in text
    assert "| rows 4 | 20.0 ms | - | - | 3.00x, 0.03x | - |" in text
    assert "![Time of a step over plain](cpu-ratio.png)" in text and "scaling.png" not in text


def test_targets_are_met_or_not():
    rows = report.targets(made_up()).splitlines()[2:]
    assert (
        "| mlp-relu | and-mask | time over plain | <= 1.15 | 1.15 | met |" in rows
    )  # exactly is enough
    assert "| mlp-relu | median | time over plain | <= 2 | 24.26 | **not met** |" in rows
    assert (
        "| stacked-32 | median | speed-up over torch:median | >= 25 | 24.00 | **not met** |" in rows
    )
    assert "| stacked-3 | median | share of copy bandwidth | >= 0.5 | 0.50 | met |" in rows
    assert (
        "| mlp-relu | winsorized | peak memory over plain | <= 1.05 | 3.12 | **not met** |" in rows
    )
    assert len(rows) == 8  # nothing is said of what was not measured


def test_the_report_on_a_screen_keeps_every_cell():
    text = report.markdown(made_up(), {"ratio": "cpu-ratio.png"})
    shown = report.on_screen(text)
    assert "![" not in shown and "| ---" not in shown
    for line in text.splitlines():
        cells = (
            [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        )
        if cells and not set(cells) <= {"---"}:
            assert any(all(cell in other for cell in cells) for other in shown.splitlines()), line


def test_plots(tmp_path):
    written = plots.save(made_up(), tmp_path, "cpu")
    assert written == {kind: f"cpu-{kind}.png" for kind in ("ratio", "memory", "scaling")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in written.values())
    only_stacked = {"workloads": {"stacked-3": made_up()["workloads"]["stacked-3"]}}
    assert plots.save(only_stacked, tmp_path, "none") == {}


def test_a_record_is_json():
    record = recorded([small()], ["mean"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record | {
        "settings": record["settings"] | {"rounds": [1, 1]}
    }
    assert (
        record["machine"]["threads"] == SETTINGS.threads
        and record["peers"].keys() == baselines.DISTRIBUTIONS.keys()
    )
    lower, upper = record["workloads"]["small"]["variants"]["mean"]["ms_quartiles"]
    assert 0 < lower <= upper


def test_a_breakdown_accounts_for_all_of_a_step():
    threads = torch.get_num_threads()
    try:
        record = breakdown.measure("mlp-relu", threads=1, rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert set(record["wall_ms"]) == {"plain", "mean", "and-mask", "median", "winsorized"}
    assert (
        "htv::linear" in record["operations_ms"]
        and "plain" not in record["operations_ms"]["htv::linear"]
    )
    for variant, wall in record["wall_ms"].items():
        parts = sum(times.get(variant, 0.0) for times in record["operations_ms"].values())
        assert parts + record["other_operations_ms"][variant] + record["left_ms"][
            variant
        ] == pytest.approx(wall)
    assert all(name in breakdown.table(record) for name in record["operations_ms"])
    assert 0 < record["calls"]["plain"] < record["calls"]["mean"] <= record["calls"]["and-mask"]
    assert f"plain {record['calls']['plain']:,}" in breakdown.table(record)


def test_simulated_bytes_are_those_of_the_library():
    """Votes of 8 x 4 groups take a byte beside the eight that FSDP2 sends per parameter."""
    model, cluster = simulate.MODELS["8B"], simulate.CLUSTERS["8"]
    assert round(model.parameters / 1e9, 2) == 8.03
    found = {cost.rule: cost for cost in simulate.costs(model, cluster, 4, 4096)}
    plain, masked = found["Mean"], found["AndMask, XorMask"]
    assert plain.sent == 8 * model.parameters * 7 / 8
    assert masked.sent == pytest.approx(plain.sent * 9 / 8) and masked.voters == 32
    by_ranks, means = found["order rules of ranks"], found["MedianOfMeans(16)"]
    assert by_ranks.sent == plain.sent and by_ranks.voters == 8
    assert means.sent == pytest.approx(plain.sent * 12 / 8) and means.voters == 32
    assert means.memory > 2 * by_ranks.memory and means.compute == plain.compute
    assert found["order rules of examples"].refused
    few = simulate.costs(model, cluster, 1, 64)[-1]
    assert not few.refused and few.sent > plain.sent


def test_models_to_simulate(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text('{"width": 64, "hidden": 128, "layers": 2, "keys": 32, "vocabulary": 100}')
    model = simulate.model_of(str(path))
    assert model.name == "tiny" and model.parameters == 2 * 36864 + 2 * 6400 + 64 * 5
    path.write_text('{"width": 64, "heads": 2}')
    with pytest.raises(ValueError, match="heads"):
        simulate.model_of(str(path))
    with pytest.raises(ValueError, match="no model"):
        simulate.model_of("9B")


def test_several_ranks_are_measured(tmp_path):
    text = distributed.run([2], True, tmp_path)
    record = json.loads((tmp_path / "distributed.json").read_text())
    found = record["ranks"]["2"]
    assert set(found) == set(distributed.variants(2)) and "DDP AndMask" in text
    if not math.isnan(found["DDP plain"]["bytes"]):  # votes are bytes beside four
        more = found["DDP AndMask"]["bytes"] / found["DDP plain"]["bytes"] - 1
        assert 0.13 < more < 0.17  # half of them, and a bit for each
