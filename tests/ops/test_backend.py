"""Which backend serves, and that a named one serves or raises."""

import pytest
import torch

import htv
from htv.ops import backend, paths
from htv.ops.factors import LinearFactors

CPU = torch.device("cpu")


def test_the_rule_of_choice_on_the_cpu():
    fused = "reference" if backend.NOT_BUILT else "cpp"
    assert backend.choose("stacked", "median", CPU) == fused
    assert backend.choose("linear", "and_mask", CPU) == fused
    assert backend.choose("linear", "median", CPU) == fused
    assert backend.choose("linear", "median_of_means", CPU) == "reference"  # the sliced path


def test_cuda_takes_linear_layers_with_one_row_per_group(monkeypatch):
    monkeypatch.setattr(backend, "NOT_BUILT", None)
    monkeypatch.setattr(backend, "_has_kernel", lambda op, key: op in ("stacked", "linear"))
    device = torch.device("cuda")
    each = LinearFactors(torch.ones(3, 2), torch.ones(3, 4), torch.tensor([0, 1, 1, 2, 3]))
    pairs = LinearFactors(torch.ones(4, 2), torch.ones(4, 4), torch.tensor([0, 2, 4]))
    with htv.use_backend("cuda"):
        for name in ("and_mask", "sign_sum", "median", "winsorized_mean"):
            assert backend.choose("linear", name, device) == backend.choose("stacked", name, device) == "cuda"
            assert paths.style_of(each, name, device) == "fused" and paths.style_of(pairs, name, device) == "sliced"
        for name in ("geometric_mean", "median_of_means"):
            assert paths.style_of(each, name, device) == "sliced"
    assert backend.choose("linear", "median", device) == "reference"  # only where named: not yet run on hardware


def test_reference_can_be_named_and_nested():
    with htv.use_backend("reference"):
        assert backend.choose("stacked", "median", CPU) == "reference"
        with htv.use_backend("auto"):
            assert backend.named() is None
        assert backend.named() == "reference"
    assert backend.named() is None


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_serve_raises(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with htv.use_backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' was named but cannot serve"):
        htv.median(torch.randn(3, 2))


def test_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("HTV_BACKEND", "reference")
    assert backend.choose("stacked", "median", CPU) == "reference"
    monkeypatch.setenv("HTV_BACKEND", "fastest")
    with pytest.raises(ValueError, match="HTV_BACKEND=fastest"):
        htv.median(torch.randn(3, 2))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown backend"), htv.use_backend("gpu"):
        pass


def test_report_explains_every_backend():
    rows = backend.report()
    assert [name for name, _, _ in rows] == list(backend.NAMES)
    assert all(reason for _, _, reason in rows)
    assert dict((name, serves) for name, serves, _ in rows)["reference"]
