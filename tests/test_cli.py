"""The command line: help, info, clear refusals, one small demo and one small benchmark from start
to end.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from htv.bench.workloads import WORKLOADS
from htv.cli.commands import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "bench", "tune", "info"))
    for option in ("--data", "--rule", "--epochs", "--seed", "--out", "--device"):
        assert option in invoke("demo", "--help").output
    for option in (
        "--workload",
        "--variant",
        "--threads",
        "--seconds",
        "--no-peers",
        "--no-memory",
        "--quick",
        "--out",
    ):
        assert option in invoke("bench", "--help").output


def test_python_m_htv_and_what_help_does_not_import():
    program = (
        "import sys; sys.argv = ['htv', '--help']\n"
        "try:\n    import htv.__main__\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print([m for m in ('matplotlib', 'sklearn', 'htv.demo', 'htv.data', 'htv.bench') if m in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.startswith("htv ")


def test_info_lists_versions_and_backends():
    result = invoke("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    for word in ("CPU kernels", "CUDA", "cpp", "cuda", "triton", "reference"):
        assert word in result.output
    assert "Kernels" in result.output and "norm_sums" in result.output


def test_info_without_compiled_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "htv._host", None)  # importing it now fails
    monkeypatch.delattr("htv._host", raising=False)
    result = invoke("info")
    assert result.exit_code == 0 and "not built (HTV_BUILD=0" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "mode"], "unknown rule 'mode'"),
        (["--rule", "and-mask:2"], "tau must lie in [0, 1], got 2"),
        (["--rule", "winsorized:40"], "use at most 31"),
        (["--epochs", "0"], "--epochs"),
        (["--seed", "-1"], "--seed"),
        (["--device", "toaster"], "unknown device 'toaster'; use cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "unknown device"),
        (["--data", "{tmp}"], "train-images-idx3-ubyte.gz) is missing"),
        (["--data", "{tmp}/nowhere"], "does not exist"),
        (["--out", "{tmp}/file"], "is a file; name a folder"),
        (["--out", "{tmp}/file/below"], "is a file; name a folder"),
        (["--train-limit", "63"], "63 training images do not fill one batch of 64"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_mistakes_are_named_without_a_traceback(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    result = invoke("demo", "--out", tmp_path / "out", *(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert sorted(tmp_path.iterdir()) == before  # nothing was made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "mlp-relu,alexnet"], "unknown workload 'alexnet', use mlp-relu, mlp-gelu"),
        (["--variant", "mode"], "unknown variant 'mode', use plain, mean"),
        (
            ["--workload", "stacked", "--variant", "opacus:median"],
            "unknown variant 'opacus:median', use copy, mean",
        ),
        (["--threads", "0"], "--threads"),
        (["--seconds", "-1"], "--seconds"),
        (["--out", "{tmp}/file"], "is a file; name a folder"),
        (["--out", "/proc/bench"], "cannot be made"),
    ],
)
def test_mistakes_of_bench_are_named_before_anything_is_measured(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(
        "bench", "--out", tmp_path / "out", *(a.format(tmp=tmp_path) for a in arguments)
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_help_of_bench_names_every_workload():
    shown = "".join(invoke("bench", "--help").output.split())  # names are broken at hyphens
    for name, workload in WORKLOADS.items():
        kind = (
            name if workload.kind == "step" and workload.axis is None else name.rpartition("-")[0]
        )
        assert kind in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda_names_the_remedy():
    result = invoke("demo", "--device", "cuda")
    assert result.exit_code == 2 and "or use --device cpu" in result.output


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """A demo of seconds: one rule, one epoch, few images. Needs attach, and measures memory in
    three processes.
    """
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = invoke(
        "demo",
        "--rule",
        "and-mask:0.3",
        "--epochs",
        1,
        "--seed",
        5,
        "--train-limit",
        200,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    return result.output, out, json.loads((out / "demo.json").read_text())


def test_demo_writes_what_it_says(small_demo):
    output, out, _ = small_demo
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    assert str(out / "demo.json") in output and str(out / "demo.png") in output
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_records_every_number(small_demo):
    _, _, record = small_demo
    assert (
        record["setup"]["seed"] == 5
        and record["setup"]["epochs"] == 1
        and record["setup"]["device"] == "cpu"
    )
    assert record["data"] == {"name": "digits", "classes": 10, "train_images": 200,
                              "wrong_labels": 50, "test_images": 360}  # fmt: skip
    assert record["machine"]["versions"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    plain, masked = record["results"]
    assert (plain["spec"], plain["rule"]) == ("plain", None)
    assert (masked["spec"], masked["rule"]) == ("and-mask:0.3", "AndMask(tau=0.3, rescale=False)")
    for result in (plain, masked):
        assert len(result["epochs"]) == 1 and result["final"] == result["epochs"][-1]
        shares = ("test_accuracy", "memorised", "recovered", "clean_accuracy")
        assert all(0 <= result["final"][name] <= 1 for name in shares)
        assert result["final"]["memorised"] + result["final"]["recovered"] <= 1
        lower, upper = result["ms_per_step_quartiles"]
        assert 0 < lower <= result["ms_per_step"] <= upper and result["peak_bytes"] > 0
    assert plain["vmap_peak_bytes"] is None and plain["vmap_ms_per_step"] is None
    examples_by_parameters = 64 * (64 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10) * 4  # bytes
    if masked["memory_method"] != "ru_maxrss":
        assert masked["vmap_peak_bytes"] > examples_by_parameters > masked["peak_bytes"]


def test_demo_shows_the_recorded_numbers(small_demo):
    output, _, record = small_demo
    for result in record["results"]:
        (row,) = (
            line
            for line in output.splitlines()
            if line.startswith(f"{result['spec']} ") and "x)" in line
        )
        assert (
            f"{result['final']['test_accuracy']:.1%}" in row
            and f"{result['final']['memorised']:.1%}" in row
        )
        assert (
            f"{result['ms_per_step']:.1f} (" in row and f"{result['peak_bytes'] / 1e6:.1f} (" in row
        )


@pytest.fixture(scope="module")
def small_bench(tmp_path_factory):
    """A quick look at two workloads; one baseline, peak memory in processes of their own."""
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    names = ("--workload", "scaling-groups-16,stacked-3", "--workload", "mlp-relu")
    variants = ("--variant", "and-mask", "--variant", "vmap:and-mask")
    result = invoke(
        "bench", "--quick", *names, *variants, "--threads", torch.get_num_threads(), "--out", out
    )
    assert result.exit_code == 0, result.output
    return result.output, out, json.loads((out / "cpu.json").read_text())


def test_bench_writes_what_it_says(small_bench):
    output, out, _ = small_bench
    files = ["cpu-memory.png", "cpu-ratio.png", "cpu-scaling.png", "cpu.json", "cpu.md"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert all(str(out / name) in output for name in files)
    text = (out / "cpu.md").read_text()
    assert all(f"]({name})" in text for name in files[:3])


def test_bench_records_every_number(small_bench):
    output, _, record = small_bench
    assert record["machine"]["versions"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    assert record["settings"]["threads"] == record["machine"]["threads"] == torch.get_num_threads()
    assert list(record["workloads"]) == ["scaling-groups-16", "stacked-3", "mlp-relu"]
    rows = record["workloads"]["mlp-relu"]["variants"]
    assert list(rows) == ["plain", "and-mask", "vmap:and-mask"]
    for row in rows.values():
        lower, upper = row["ms_quartiles"]
        assert 0 < lower <= row["ms"] <= upper and row["runs"] >= 1
        assert (
            row["ratio"] == pytest.approx(row["ms"] / rows["plain"]["ms"]) and row["peak_bytes"] > 0
        )
    assert list(record["workloads"]["stacked-3"]["variants"]) == ["copy", "and-mask"]
    assert f"{rows['and-mask']['ratio']:.3g}"[:3] in output
    if rows["plain"]["memory_method"] != "ru_maxrss":
        examples_by_parameters = 256 * 1_863_690 * 4  # bytes
        assert (
            rows["vmap:and-mask"]["peak_bytes"]
            > examples_by_parameters
            > 4 * rows["and-mask"]["peak_bytes"]
        )


def test_tune_without_a_gpu_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytest.importorskip("triton")
    result = invoke("tune")
    assert (
        result.exit_code == 2
        and "needs an NVIDIA GPU" in result.output
        and "--dry" in result.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "16x16"], "must be OxIxExT"),
        (["--shape", "16x0x4x4"], "must be OxIxExT"),
        (["--statistic", "mode"], "unknown 'mode'; use median, and-mask, sand-mask, winsorized"),
        (["--dtype", "fp8"], "unknown 'fp8'; use bf16, fp16, fp32"),
    ],
)
def test_tune_refuses_clearly(arguments, message):
    result = invoke("tune", "--dry", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_tune_without_triton(monkeypatch):
    monkeypatch.setattr("htv.ops.backend.TRITON_INSTALLED", False)
    result = invoke("tune", "--dry")
    assert result.exit_code == 2 and "Triton is not installed" in result.output


@pytest.mark.slow
def test_tune_writes_a_table_that_is_followed(tmp_path):
    """From start to end under the interpreter; another run adds to the table."""
    pytest.importorskip("triton")
    path = tmp_path / "new" / "tuned.json"

    def run(*arguments):
        command = [sys.executable, "-m", "htv", "tune", "--dry", f"--out={path}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(path.read_text())["entries"], done.stdout

    entries, output = run("--statistic=and-mask,median")
    assert {entry["words"] for entry in entries} == {0, 2} and "2 entries in" in output
    assert all(
        (entry["outputs"], entry["groups"], entry["rows"]) == (16, 5, 4) for entry in entries
    )
    entries, _ = run("--statistic=and-mask", "--shape=32x16x5x4")
    assert sorted(entry["outputs"] for entry in entries) == [16, 16, 32]
    program = (
        "from htv.triton_kernels import configs\n"
        f"entry = configs.load(configs.Path({str(path)!r}))[-1]\n"
        "sizes = {name: entry[name] for name in (*configs.KEY, *configs.SIZES)}\n"
        "problem = configs.Problem(multiprocessors=1, **sizes)\n"
        "assert configs.choose(problem) == (configs.Config(**entry['config']), entry['splits'])\n"
    )
    environment = {**os.environ, "HTV_TUNED": str(path)}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode
        == 0
    )
