"""Statistics and kernels have one entry each, and what depends on them is looked up once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import htv
from htv.ops import aggregate, backend, functional, registry, schema, statistics
from htv.ops.factors import ConvFactors, ConvGeometry, LinearFactors, StackedFactors
from htv.ops.kernels import triton

PACKAGE = Path(htv.__file__).parent
NUMBERS = {
    "mean": 0, "and_mask": 1, "xor_mask": 2, "geometric_mean": 3, "sand_mask": 4, "sign_sum": 5,
    "sign_agreement": 6, "median": 7, "trimmed_mean": 8, "winsorized_mean": 9,
    "median_of_means": 10,
}  # fmt: skip
built = pytest.mark.skipif(backend.NOT_BUILT is not None, reason="built without compiled kernels")


@pytest.fixture
def scratch_entries(monkeypatch):
    """Whatever is registered in a test is gone after it."""
    for module, names in ((statistics, ("_by_name", "_by_number")), (registry, ("_kernels",))):
        for name in names:
            monkeypatch.setattr(module, name, dict(getattr(module, name)))
    yield
    registry.forget_choices()


# -- statistics ------------------------------------------------------------------------------------


def test_numbers_are_those_that_kernels_were_built_with():
    assert {name: statistics.of(name).number for name in statistics.names()} == NUMBERS
    assert statistics.parsed(statistics.table()) == NUMBERS
    for name, number in NUMBERS.items():
        assert schema.code(name) == number and statistics.by_number(number).name == name


@built
def test_the_library_s_table_is_the_registry_s():
    (library,) = PACKAGE.glob("_C*.so")
    assert backend._exported_statistics(library) == NUMBERS


@built
@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"median": 8, "trimmed_mean": 7},
            "median is 8 there and 7 here; trimmed_mean is 7 there and 8",
        ),
        ({"mode": 11}, "mode is 11 there and unknown here"),
        ({"xor_mask": None}, "xor_mask is missing there"),
    ],
)
def test_a_library_of_other_numbers_is_refused(changed, message, monkeypatch):
    table = {name: n for name, n in {**NUMBERS, **changed}.items() if n is not None}
    monkeypatch.setattr(backend, "_exported_statistics", lambda library: table)
    with pytest.raises(ImportError, match=f"{message}.*pip install --no-build-isolation -e"):
        backend._load()


@built
def test_a_library_that_does_not_tell_is_refused():
    """Of another extension module: like one built before statistics were exported, it has none."""
    (other,) = PACKAGE.glob("_host*.so")
    with pytest.raises(ImportError, match="does not tell by which numbers.*pip install"):
        backend._exported_statistics(other)


def test_a_statistic_no_kernel_knows_is_no_disagreement(scratch_entries):
    statistics.order("largest", number=11)(lambda values, statistic: values.amax(dim=0))
    statistics.require_agreement(NUMBERS, registry.statistics_of("cpp"), "the library")
    assert statistics.names()[-1] == "largest"


def test_triton_s_table_is_compared_at_the_first_call(monkeypatch):
    module = pytest.importorskip("htv.triton_kernels.statistic")
    triton._module.cache_clear()
    monkeypatch.setitem(module.NUMBERS, "median", 8)
    with pytest.raises(ImportError, match="median is 8 there and 7 here.*NUMBERS up to date"):
        triton._module("stacked")
    monkeypatch.setitem(module.NUMBERS, "median", 7)
    monkeypatch.delitem(module.NUMBERS, "mean")
    with pytest.raises(ImportError, match="mean is missing there"):
        triton._module("stacked")
    monkeypatch.setitem(module.NUMBERS, "mean", 0)
    assert triton._module("stacked").__name__ == "htv.triton_kernels.stacked"


@pytest.mark.parametrize(
    "name, number, message",
    [
        ("mode", 7, "number 7 is that of 'median', .*; take one that is free, 11"),
        ("median", 11, "there is a statistic 'median' already"),
        ("mode", -1, "must be an integer >= 0"),
        ("mode", "11", "must be an integer >= 0"),
    ],
)
@pytest.mark.parametrize("enter", [statistics.streaming, statistics.order])
def test_names_and_numbers_are_taken_once(enter, name, number, message, scratch_entries):
    with pytest.raises(ValueError, match=message):
        enter(name, number=number)(lambda values, statistic: values)
    with pytest.raises(TypeError, match="number"):
        enter("mode")


NEWCOMER = """@streaming("mean_twice", number=11)
def _mean_twice(s: Summary, statistic: Statistic):
    return 2 * s.total / s.count, None


@streaming("and_mask", number=1"""


def test_a_statistic_among_the_others_renumbers_none(tmp_path):
    """Put where a newcomer would, before those that have numbers already."""
    shutil.copytree(PACKAGE, tmp_path / "htv", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "htv" / "ops" / "reference.py"
    text = file.read_text()
    assert text.count('@streaming("and_mask", number=1') == 1
    file.write_text(text.replace('@streaming("and_mask", number=1', NEWCOMER))
    program = """
import torch, htv
from htv.ops import functional
from htv.rules import Statistic
grads = torch.randn(9, 4)
assert torch.equal(htv.median(grads), grads.median(dim=0).values)
twice, _ = functional.stacked(grads, Statistic("mean_twice"))
torch.testing.assert_close(twice, 2 * grads.mean(dim=0))
assert htv.check(torch.nn.Linear(4, 2), torch.randn(9, 4), htv.Median())
print(htv.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_a_new_streaming_statistic_of_zeros_that_is_not_zero(scratch_entries):
    """Nothing takes for granted that a statistic of zeros is zero."""

    class Lifted(htv.Rule):
        def statistic(self, num_groups):
            return htv.rules.Statistic("lifted")

    enter = statistics.streaming("lifted", number=11)
    enter(lambda s, statistic: (s.total / s.count + 1, None))
    model, ids = torch.nn.Embedding(9, 3).double(), torch.tensor([[0, 4], [4, 7], [7, 7]])
    assert htv.check(model, ids, Lifted())
    with htv.attach(model, Lifted()):
        model(ids).sum().backward()
    assert (model.weight.grad[1] == 3).all()


# -- kernels ---------------------------------------------------------------------------------------


@built
def test_every_kernel_of_the_library_is_registered_and_no_other():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert set(registry.ops("cpp")) == {op for op in schema.OPS if has(f"htv::{op}", "CPU")}
    if backend.CUDA_BUILT:
        assert set(registry.ops("cuda")) == {op for op in schema.OPS if has(f"htv::{op}", "CUDA")}


def test_every_triton_kernel_is_an_op():
    for op in registry.ops("triton"):
        assert backend.operator(op, "triton").name() == f"htv::{op}_triton"


def test_nothing_is_imported_for_a_kernel_before_its_first_call():
    program = "import sys, htv; print([m for m in sys.modules if m.partition('.')[0] == 'triton'])"
    command = [sys.executable, "-c", program]
    before = [sys.executable, "-c", program.replace(" htv;", " torch;")]  # what torch itself brings
    found, by_torch = (
        subprocess.run(c, capture_output=True, text=True, check=True).stdout
        for c in (command, before)
    )
    assert found == by_torch and "htv.triton_kernels" not in found


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mode", "cpp"), "unknown op 'mode', have stacked, linear"),
        (("linear", "metal"), "unknown backend 'metal', have cpp, cuda, triton"),
        (("linear", "cpp"), "there is a cpp kernel for linear already"),
        (("conv", "cuda"), "conv must be registered with the statistics it has"),
        (("conv", "cuda", ("mode",)), "unknown statistic 'mode'"),
        (("norm_sums", "cuda", ("mean",)), "norm_sums must be registered with no statistics"),
    ],
)
def test_what_cannot_be_registered(arguments, message, scratch_entries):
    op, server, *names = arguments
    told = {"statistics": names[0]} if names else {}
    with pytest.raises(ValueError, match=message):
        registry.register_kernel(op, server, dtypes=[torch.float32], reason="to see", **told)


def test_a_kernel_serves_once_it_is_registered(scratch_entries, monkeypatch):
    monkeypatch.setattr(backend, "NOT_BUILT", None)
    problem = backend.Problem("embedding_contributions", "", torch.device("cpu"))
    assert backend.choose(problem) == "reference"
    registry.register_kernel(
        "embedding_contributions", "cpp", dtypes=[torch.float32], reason="to see"
    )
    assert backend.choose(problem) == "cpp"
    assert backend.choose(problem._replace(dtype=torch.float64)) == "reference"
    lacks = backend.why_not("cpp", problem._replace(dtype=torch.float64))
    assert lacks == "no kernel for torch.float64, but for float32, bfloat16, float16"


def test_a_limit_on_rows(scratch_entries):
    kernel = registry.kernel("linear", "cuda")
    for longest, tracked in ((0, True), (1, True), (2, False), (None, False)):
        assert (kernel.lacks("median", torch.float32, longest) is None) == tracked
    assert kernel.lacks("median", torch.float32, 2).startswith(
        "no kernel for groups of several rows"
    )


# -- choices are made once -------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch):
    """How often a backend had to be chosen, from now on."""
    registry.forget_choices()
    made, choose = [], backend._choose
    monkeypatch.setattr(backend, "_choose", lambda problem: made.append(problem) or choose(problem))
    yield made
    registry.forget_choices()


def uses():
    grouped_rows = htv.groups.GroupedRows(htv.groups.Groups.each(6), htv.groups.BatchLayout(0))
    geometry = ConvGeometry(1, 1, 1, 1, 2)
    return [
        LinearFactors(torch.randn(6, 4), torch.randn(6, 3), torch.arange(7)),
        StackedFactors(torch.randn(6, 3)),
        ConvFactors(
            torch.randn(6, 2, 5, 5), torch.randn(6, 4, 5, 5), (3, 3), geometry, grouped_rows
        ),
    ]


def test_steps_that_are_alike_choose_once(chosen):
    for rule in (htv.AndMask(0.4), htv.Median()):
        for use in uses():
            aggregate.aggregate([use], rule)
        assert chosen
        del chosen[:]
        for use in uses():
            aggregate.aggregate([use], rule)
            functional.apply_rule(torch.randn(4, 3), rule)
        del chosen[:]
        for use in uses():
            aggregate.aggregate([use], rule)
            functional.apply_rule(torch.randn(4, 3), rule)
        assert not chosen


def test_other_settings_choose_anew(monkeypatch):
    monkeypatch.delenv("HTV_BACKEND", raising=False)
    problem = backend.Problem("stacked", "median", torch.device("cpu"))
    usual = backend.choose(problem)
    for _ in range(2):
        with htv.use_backend("reference"):
            assert backend.choose(problem) == "reference"
            with htv.use_backend("auto"):
                assert backend.choose(problem) == usual
        assert backend.choose(problem) == usual
        monkeypatch.setenv("HTV_BACKEND", "reference")
        assert backend.choose(problem) == "reference"
        monkeypatch.delenv("HTV_BACKEND")
        assert backend.choose(problem) == usual
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    with htv.use_backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert backend.choose(problem) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="named but cannot serve"):
            backend.choose(problem)
    registry.forget_choices()


def test_other_settings_take_other_ways():
    """Not the choice alone but what follows from it: the very ways of one use."""
    (linear, bias, conv), rule = uses(), htv.AndMask(0.4)
    usual = [aggregate.aggregate([use], rule) for use in (linear, bias, conv)]
    registry.forget_choices()
    for _ in range(2):
        for use, expected in zip((linear, bias, conv), usual, strict=True):
            with htv.use_backend("reference"):
                found = aggregate.aggregate([use], rule)
            torch.testing.assert_close(found, expected)
            with htv.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was named"):
                aggregate.aggregate([use], rule)


def calls_of_htv(function) -> list[str]:
    """The Python functions of htv that run, in the order of their calls."""
    found = []

    def noted(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.append(frame.f_code.co_name)

    sys.setprofile(noted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@built
@pytest.mark.parametrize("rule", [htv.AndMask(0.4), htv.Median()], ids=repr)
def test_few_calls_lead_to_the_kernel(rule):
    """A step of a small model is made of calls: each costs what a small operator does."""
    for use, most in zip(uses(), (4, 4, 7), strict=True):
        aggregate.aggregate([use], rule)
        calls = calls_of_htv(lambda use=use: aggregate.aggregate([use], rule))
        assert len(calls) <= most, calls
