"""Experiments on images with cues: what they share, what they conclude from made-up records, and
each one, quickly.
"""

import json

import pytest
import torch
from typer.testing import CliRunner

from htv.cli.commands import app
from htv.data import Dataset, digits
from htv.experiments import cbft, cues, images, paths
from htv.experiments.cues import CueTraining, Shuffled
from support.findings import agreement

SMALL = CueTraining(images=300, test_images=50, clean=0.1, epochs=2)
NAMES = ["cbft", "paths"]


def test_the_task_has_all_its_parts():
    task = cues.make_task(digits(), SMALL, 0.6, seed=1)
    pictures, labels = task.with_cue
    assert pictures.shape == (300, 3, 8, 8) and torch.equal(labels, task.without_cue[1])
    changed = (pictures != task.without_cue[0]).flatten(1).any(1)
    assert 0.4 < changed.double().mean() < 0.6  # .6 of nine classes out of ten
    assert (
        len(task.clean[1]) == 30
        and len(task.plentiful[1]) == 270
        and task.clean[0].shape[1:] == (3, 8, 8)
    )
    assert list(task.tests) == list(cues.SETS) and all(len(y) == 50 for _, y in task.tests.values())
    same, other = (cues.make_task(digits(), SMALL, 0.9, seed=seed) for seed in (1, 2))
    assert torch.equal(
        same.tests["RC"][0], task.tests["RC"][0]
    )  # tests do not depend on the proportion
    assert not torch.equal(other.tests["C"][0], task.tests["C"][0])


def test_batches_are_shuffled_anew_in_the_order_of_the_seed():
    part = torch.arange(10).float(), torch.arange(10)
    found = Shuffled(part, 3, seed=0)
    epochs = [[y for _, y in found] for _ in range(2)]
    assert len(found) == 3 and all(len(torch.cat(epoch).unique()) == 9 for epoch in epochs)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert torch.equal(torch.cat(epochs[0]), torch.cat([y for _, y in Shuffled(part, 3, seed=0)]))
    assert len(Shuffled(part, 100, seed=0)) == 1


def test_networks_fit_the_images_and_are_those_of_their_seed():
    task = cues.make_task(digits(), SMALL, 0.9, seed=0)
    before = torch.get_rng_state()
    one, same = (
        cues.trained(task, task.with_cue, SMALL, 3),
        cues.trained(task, task.with_cue, SMALL, 3),
    )
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert set(cues.accuracies(one, task)) == set(cues.SETS)


def test_colored_images_are_served_as_well():
    generator = torch.Generator().manual_seed(0)
    some = lambda count: (
        torch.rand(count, 3, 16, 12, generator=generator),
        torch.arange(count) % 4,
    )
    data = Dataset("rgb", 4, *some(60), *some(20))
    task = cues.make_task(data, SMALL, 0.9, seed=0)
    assert cues.make_network(task, 0)(task.clean[0]).shape == (6, 4)
    noisy = images.make_task(data, images.Training(images=60, epochs=1, learning_rate=0.1), 0.0, 0)
    for kind in ("mlp", "convnet"):
        assert images.make_network(kind, data, 0)(noisy.x).shape == (60, 4)


# -- what is concluded -----------------------------------------------------------------------------


def test_cbft_is_judged_by_its_numbers():
    def results(**special):
        relying, free = (0.8, 1.0, 0.2, 0.8), (0.8, 0.8, 0.78, 0.11)
        by_method = {name: relying for name in cbft.METHODS} | {"CBFT": free} | special
        shares = {cbft._key(name, of): share for name, shares in by_method.items()
                  for of, share in zip(cues.SETS, shares, strict=True)}  # fmt: skip
        return {variant: shares for variant in cbft.variants(cbft.Settings())}

    against = {"CBFT without invariance": (0.8, 0.6, 0.7, 0.05)}
    assert agreement("cbft", results(**against)) == [True] * 21
    swapped = {name: (0.8, 0.8, 0.8, 0.1) for name in cbft.METHODS} | {"CBFT": (0.8, 0.9, 0.7, 0.3)}
    assert agreement("cbft", results(**swapped)) == [False] * 21


def test_paths_are_judged_by_their_numbers():
    def results(heights):
        found = {}
        for variant in paths.OTHERS:
            kinds = ["linear", "quadratic"]
            kinds += (
                [kind + paths.MATCHED for kind in kinds]
                if variant in (paths.NO_CUE, paths.CUE)
                else []
            )
            found[variant] = {f"{of} at its end": 0.8 for of in cues.SETS}
            for kind in kinds:
                barriers = heights(variant, kind)
                found[variant] |= {
                    paths._key(kind, of): h for of, h in zip(cues.SETS, barriers, strict=True)
                }
                found[variant][kind] = {of: [0.1, 0.2] for of in cues.SETS}
        return found

    def as_claimed(variant, kind):
        if variant in (paths.SMALL, paths.MEDIUM):
            return 0.0, 0.05, 0.0, 0.0
        if kind.startswith("quadratic"):
            return 0.3, 0.02, 0.1, 0.0
        return (0.5,) * 4 if paths.MATCHED in kind else (1.0,) * 4

    assert agreement("paths", results(as_claimed)) == [True] * 6

    def otherwise(variant, kind):
        if variant in (paths.SMALL, paths.MEDIUM) or (variant, kind) == (
            paths.CUE,
            "linear" + paths.MATCHED,
        ):
            return (1.0,) * 4
        return (0.0, 0.2, 0.0, 0.0) if kind == "quadratic" else (0.05,) * 4

    assert agreement("paths", results(otherwise)) == [False] * 6


# -- each of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_quick_ones_run_and_report(name, tmp_path):
    if name == "paths":
        pytest.importorskip("scipy")
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["data"]["name"] == "digits" and record["findings"] and record["tables"]
    assert all(
        finding["here"] in (tmp_path / f"{name}.md").read_text() for finding in record["findings"]
    )
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
