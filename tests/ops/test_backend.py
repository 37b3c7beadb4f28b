"""Which backend serves, and that a named one serves or raises."""

import pytest
import torch

import htv
from htv.ops import backend

CPU = torch.device("cpu")


def test_the_rule_of_choice_on_the_cpu():
    fused = "reference" if backend.NOT_BUILT else "cpp"
    assert backend.choose("stacked", "median", CPU) == fused
    assert backend.choose("linear", "and_mask", CPU) == fused
    assert backend.choose("linear", "median", CPU) == fused
    assert backend.choose("linear", "median_of_means", CPU) == "reference"  # the sliced path


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
