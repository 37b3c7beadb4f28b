"""Which backend serves, and that a named one serves or raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import htv
from htv.ops import backend, dispatch
from htv.ops.factors import ConvFactors, LinearFactors, StackedFactors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, FP64 = (
    torch.float32,
    torch.float64,
)  # contributions of half-precision factors are computed in float32


def choose(op, statistic, device=CPU, dtype=torch.float32, longest=None):
    return backend.choose(backend.Problem(op, statistic, device, dtype, longest))


@pytest.fixture
def present(monkeypatch):
    """Makes backends present or absent, on a machine with a GPU or without."""

    def present(*names):
        monkeypatch.delenv("HTV_BACKEND", raising=False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(
            backend, "NOT_BUILT", None if {"cpp", "cuda"} & {*names} else "not built"
        )
        monkeypatch.setattr(backend, "CUDA_BUILT", "cuda" in names)
        monkeypatch.setattr(backend, "TRITON_INSTALLED", "triton" in names)
        monkeypatch.setattr(backend, "_too_old", lambda device: None)
        backend.forget_choices()

    yield present
    backend.forget_choices()


# op, statistic, dtype, most rows per group (None: many) -> with cuda and triton, cuda alone, triton
# alone
TABLE = [
    ("stacked", "and_mask", FP32, None, "cuda", "cuda", "triton"),
    ("stacked", "median", FP32, None, "cuda", "cuda", "triton"),
    ("stacked", "median_of_means", FP32, None, "cuda", "cuda", "triton"),
    ("stacked", "median", FP64, None, "cuda", "cuda", "reference"),
    ("linear", "and_mask", FP32, 1, "cuda", "cuda", "triton"),
    ("linear", "and_mask", FP32, 0, "cuda", "cuda", "triton"),
    ("linear", "winsorized_mean", FP32, 1, "cuda", "cuda", "triton"),
    ("linear", "median", FP64, 1, "cuda", "cuda", "reference"),
    ("linear", "geometric_mean", FP32, 1, "triton", "reference", "triton"),
    ("linear", "median_of_means", FP32, 1, "triton", "reference", "triton"),
    ("linear", "and_mask", FP32, 2, "triton", "reference", "triton"),
    ("linear", "and_mask", FP32, None, "triton", "reference", "triton"),
    ("linear", "median", FP32, 1024, "triton", "reference", "triton"),
    ("linear", "median", FP64, 1024, "reference", "reference", "reference"),
    ("linear", "sign_agreement", FP32, 1024, "reference", "reference", "reference"),
    ("together", "and_mask", FP32, 1, "reference", "reference", "reference"),
    ("conv", "and_mask", FP32, None, "triton", "reference", "triton"),
    ("conv", "median", FP32, None, "triton", "reference", "triton"),
    ("conv", "median", FP64, None, "reference", "reference", "reference"),
    ("embedding", "and_mask", FP32, None, "triton", "reference", "triton"),
    ("embedding", "median", FP32, None, "triton", "reference", "triton"),
    ("embedding", "median", FP64, None, "reference", "reference", "reference"),
    ("shifted_cross_entropy", "mean", FP32, None, "triton", "reference", "triton"),
    ("shifted_cross_entropy_grad", "mean", FP32, None, "triton", "reference", "triton"),
    ("shifted_cross_entropy", "mean", FP64, None, "reference", "reference", "reference"),
    ("norm_sums", "mean", FP32, None, "reference", "reference", "reference"),
]


@pytest.mark.parametrize("op, statistic, dtype, longest, both, cuda, triton", TABLE)
def test_the_rule_of_choice_on_cuda(op, statistic, dtype, longest, both, cuda, triton, present):
    problem = op, statistic, CUDA, dtype, longest
    for names, server in (
        (("cuda", "triton"), both),
        (("cuda",), cuda),
        (("triton",), triton),
        ((), "reference"),
    ):
        present(*names)
        assert choose(*problem) == server, names


def test_the_rule_of_choice_on_the_cpu():
    fused = "reference" if backend.NOT_BUILT else "cpp"
    assert choose("stacked", "median") == fused
    assert choose("linear", "and_mask") == fused
    assert choose("linear", "median") == choose("together", "median") == fused
    assert choose("linear", "median_of_means") == "reference"  # the sliced path


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_gpu_backends_serve_no_other_device(device, present):
    present("cuda", "triton")
    for op in ("stacked", "linear", "conv", "embedding"):
        assert choose(op, "and_mask", torch.device(device)) in ("cpp", "reference")


def test_gpus_without_kernels_are_served_by_the_reference(present, monkeypatch):
    present("cuda", "triton")
    monkeypatch.setattr(
        backend, "_too_old", lambda device: "it needs compute capability 8.0, this GPU has 7.5"
    )
    assert choose("stacked", "median", CUDA) == choose("linear", "and_mask", CUDA) == "reference"
    with htv.use_backend("triton"), pytest.raises(RuntimeError, match="this GPU has 7.5"):
        choose("stacked", "median", CUDA)


def test_factors_tell_the_rule_what_it_asks(present):
    each = LinearFactors(torch.ones(3, 2), torch.ones(3, 4), torch.tensor([0, 1, 1, 2, 3]))
    pairs = LinearFactors(torch.ones(4, 2), torch.ones(4, 4), torch.tensor([0, 2, 4]))
    present("cuda")
    for name in ("and_mask", "sign_sum", "median", "winsorized_mean"):
        assert (
            dispatch.route(each, name, CUDA).style == "fused"
            and dispatch.route(pairs, name, CUDA).style == "sliced"
        )
    for name in ("geometric_mean", "median_of_means"):
        assert dispatch.route(each, name, CUDA).style == "sliced"
    assert (
        dispatch.path(LinearFactors, htv.Median(), CUDA)
        == "sliced (cuda); one row per group: fused (cuda)"
    )
    present("cuda", "triton")
    assert dispatch.route(pairs, "median", CUDA).style == "fused"
    assert dispatch.path(each, htv.Median(), CUDA) == "fused (cuda)"
    assert dispatch.path(pairs, htv.Median(), CUDA) == "fused (triton)"
    assert (
        dispatch.path(LinearFactors, htv.Median(), CUDA)
        == "fused (triton); one row per group: fused (cuda)"
    )
    assert dispatch.path(ConvFactors, htv.Median(), CUDA) == "fused (triton)"
    assert dispatch.path(StackedFactors, htv.Median(), CUDA) == "stacked (cuda)"
    double = LinearFactors(*(torch.ones(4, 2, dtype=torch.float64),) * 2, torch.tensor([0, 2, 4]))
    assert dispatch.path(double, htv.Median(), CUDA) == "sliced (cuda)"


@pytest.mark.parametrize("server, op", [("cuda", "stacked"), ("triton", "stacked_triton")])
def test_the_choice_is_traced(server, op, present):
    """What torch.compile(fullgraph=True) makes of a GPU's tensors, on a machine with a GPU or
    without.
    """
    present(server)
    targets = []

    def compiler(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        grads = torch.empty(5, 4, device="cuda")
        compiled = torch.compile(lambda g: 2 * htv.median(g), fullgraph=True, backend=compiler)(
            grads
        )
    assert compiled.device.type == "cuda" and compiled.shape == (4,)
    assert getattr(torch.ops.htv, op).default in targets


def test_a_stacked_statistic_compiles_whole():
    grads = torch.randn(5, 4)
    compiled = torch.compile(lambda g: 2 * htv.median(g), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grads), 2 * htv.median(grads))


def test_a_named_backend_without_a_kernel_leaves_factors_to_the_general_paths(present):
    present("cuda", "triton")
    with htv.use_backend("cuda"):
        assert (
            choose("linear", "and_mask", CUDA, longest=1)
            == choose("stacked", "and_mask", CUDA)
            == "cuda"
        )
        assert (
            choose("linear", "and_mask", CUDA, longest=2)
            == choose("conv", "and_mask", CUDA)
            == "reference"
        )
    with htv.use_backend("triton"):
        assert (
            choose("linear", "and_mask", CUDA, longest=1)
            == choose("stacked", "and_mask", CUDA)
            == "triton"
        )
        assert choose("linear", "and_mask", CUDA, FP64) == "reference"
        with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            choose("stacked", "and_mask", CUDA, FP64)
    present("cuda")
    for op in ("stacked", "linear", "conv", "embedding"):
        with (
            htv.use_backend("triton"),
            pytest.raises(RuntimeError, match="Triton is not installed"),
        ):
            choose(op, "and_mask", CUDA)
        with (
            htv.use_backend("cpp"),
            pytest.raises(RuntimeError, match="it serves the CPU, not cuda"),
        ):
            choose(op, "and_mask", CUDA)
    present("triton")
    with htv.use_backend("cuda"), pytest.raises(RuntimeError, match="not built"):
        choose("linear", "and_mask", CUDA)


def test_reference_can_be_named_and_nested():
    with htv.use_backend("reference"):
        assert choose("stacked", "median") == "reference"
        with htv.use_backend("auto"):
            assert backend.named() is None
        assert backend.named() == "reference"
    assert backend.named() is None


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_serve_raises(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        htv.use_backend(name),
        pytest.raises(RuntimeError, match=f"backend '{name}' was named but cannot serve"),
    ):
        htv.median(torch.randn(3, 2))


def test_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("HTV_BACKEND", "reference")
    assert choose("stacked", "median") == "reference"
    monkeypatch.setenv("HTV_BACKEND", "fastest")
    with pytest.raises(ValueError, match="HTV_BACKEND=fastest"):
        htv.median(torch.randn(3, 2))
    monkeypatch.setenv("HTV_BACKEND", "")  # as if it were not set
    assert backend.named() is None and htv.median(torch.ones(3, 2)).tolist() == [1, 1]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown backend"), htv.use_backend("gpu"):
        pass


def test_report_explains_every_backend():
    rows = backend.report()
    assert [name for name, _, _ in rows] == list(backend.NAMES)
    assert all(reason for _, _, reason in rows)
    assert dict((name, handles) for name, handles, _ in rows)["reference"]
