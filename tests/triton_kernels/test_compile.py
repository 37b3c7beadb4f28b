"""Compiles every tile of the table for GPUs that need not be present, and holds it to its budget.

A register spilled to memory in the inner loop is slow and silent, and so is a register too many for
the programs that should share a multiprocessor. Not yet run on hardware: these are the compiler's
own numbers.
"""

import json
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from htv.triton_kernels import (  # noqa: E402
    configs,
    conv,
    cross_entropy,
    device,
    embedding,
    product,
    stacked,
    statistic,
)

if device.UPCAST:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY = {
    "sm_80": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
}  # sm_80: the least of the older architectures
# By (architecture, arithmetic), then words: per config of the table, most bytes of shared memory
# and the least programs that fit a multiprocessor when rows are aligned.
BUDGET = {
    ("sm_90", "half"): {
        0: ((147456, 1), (98304, 1), (49152, 2)),
        2: ((98304, 1), (73728, 1), (49152, 2)),
        3: ((73728, 1), (49152, 1)),
        7: ((49152, 1),),
    },
    ("sm_100", "half"): {
        0: ((147472, 1), (98320, 1), (49168, 1)),
        2: ((98320, 1), (73744, 1), (49168, 2)),
        3: ((49168, 1),),
        7: ((49168, 1),),
    },
    ("sm_80", "half"): {
        0: ((32768, 1), (16384, 2)),
        2: ((32768, 1), (16384, 1)),
        3: ((16384, 1),),
        7: ((16384, 1),),
    },
    **{
        (arch, "tf32"): {0: ((98320, 1), (49168, 1)), 3: ((49168, 1),), 7: ((24592, 1),)}
        for arch in ARCHITECTURES
    },
    **{
        (arch, "fp32"): {
            0: ((32768, 1), (8192, 2), (4096, 4)),
            2: ((8192, 2), (4096, 4)),
            7: ((16384, 1), (8192, 1)),
        }
        for arch in ARCHITECTURES
    },
}
# (width, D, H, W, out D, H, W, kernel, stride, padding, dilation)
WINDOWS = (64, 1, 56, 56, 1, 56, 56, 1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1)
EXTREMES = statistic.extremes("winsorized_mean", statistic.MOST_EXTREMES)
SERVED = {  # words of the table's row: (result, statistic, COUNT)
    0: [("contribution", statistic.STREAMING["mean"], 0)],
    2: [
        ("statistic", statistic.STREAMING["and_mask"], 0),
        ("state", statistic.STREAMING["mean"], 0),
        ("state", statistic.summary("and_mask"), 0),
    ],
    3: [
        *(("statistic", statistic.STREAMING[name], 0) for name in ("sand_mask", "geometric_mean")),
        ("state", statistic.summary("sand_mask"), 0),
        ("state", statistic.summary("geometric_mean"), 1e-10),
    ],
    7: [("statistic", EXTREMES, statistic.MOST_EXTREMES)],
}


def compiled(kernel, arch, types, constants, multiples_of_16, **options):
    """types: of the arguments that are neither constants nor i32."""
    signature = {
        n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
    }
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in multiples_of_16}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def compile_product(arch, arithmetic, dtype, config, result, found, count, windows, aligned):
    pointers = {
        "x_ptr": f"*{dtype}",
        "grad_output_ptr": f"*{dtype}",
        "offsets_ptr": "*i64",
        "out_ptr": "*fp32",
        "mask_ptr": "*fp32",
    }
    tile = config._asdict()
    options = {n: tile.pop(n) for n in ("num_warps", "num_stages")}
    constants = {
        **dict(zip(("init", "update", "finalize"), found[:3], strict=True)),
        "load_x": product.load_windows if windows else product.load_rows,
        "GEOMETRY": WINDOWS if windows else None,
        "COUNT": count,
        "RESULT": result,
        "UPCAST": False,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        **tile,
        **({} if windows else {"rows": 1}),
    }
    sizes = ("O", "I", "top", "left", "height", "width", "x_stride", "grad_output_stride")
    multiples = (
        [*pointers, *sizes] if aligned else ["offsets_ptr", "out_ptr", "mask_ptr", "top", "left"]
    )
    types = pointers | {"votes": "fp32", "k": "fp32"}
    return compiled(product.product_kernel, arch, types, constants, multiples, **options)


def resources(kernel, path):
    """Registers per thread, bytes of stack (that is, of spilled registers) and bytes of shared
    memory.
    """
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), kernel.metadata.shared


def cases():
    seen = set()  # every tile is compiled for every architecture; in all its uses by `-m slow` only
    for (arch, arithmetic), rows in configs.TABLE.items():
        least = 0
        for words, row in rows.items():
            tracked = [
                case for limit, found in SERVED.items() if least <= limit <= words for case in found
            ]
            least = words + 1
            for config, budget in zip(row, BUDGET[arch, arithmetic][words], strict=True):
                for dtype in ("bf16", "fp16") if arithmetic == "half" else ("fp32",):
                    for result, found, count in tracked:
                        for windows in (False, True):
                            for aligned in (True, False):
                                small = config.BLOCK_O * config.BLOCK_I <= configs.MOST_UNALIGNED
                                if not aligned and (windows or not small):
                                    continue
                                used = (
                                    config
                                    if aligned
                                    else config._replace(BLOCK_R=min(32, config.BLOCK_R))
                                )
                                tile = arch, arithmetic, config
                                marks = (pytest.mark.slow,) if tile in seen else ()
                                seen.add(tile)
                                label = (
                                    arch,
                                    arithmetic,
                                    dtype,
                                    "x".join(map(str, used[:3])),
                                    result,
                                    str(words),
                                )
                                label += (
                                    "windows" if windows else "rows",
                                    "aligned" if aligned else "unaligned",
                                )
                                yield pytest.param(
                                    arch, arithmetic, dtype, used, result, found, count, windows,
                                    aligned, budget, marks=marks, id="-".join(label),
                                )  # fmt: skip


@pytest.mark.parametrize(
    "arch, arithmetic, dtype, config, result, found, count, windows, aligned, budget", list(cases())
)
def test_products_are_within_budget(
    arch, arithmetic, dtype, config, result, found, count, windows, aligned, budget, tmp_path
):
    kernel = compile_product(
        arch, arithmetic, dtype, config, result, found, count, windows, aligned
    )
    registers, stack, shared = resources(kernel, tmp_path / "kernel.cubin")
    most_shared, programs = budget
    if not aligned:
        programs = 1
    assert stack == 0
    assert shared <= most_shared and programs * shared <= SHARED_MEMORY[arch]
    assert programs * registers * config.num_warps * 32 <= REGISTERS, f"{registers} registers"
    ptx = kernel.asm["ptx"]
    if arithmetic == "half":
        unit = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[arch]
        assert unit in ptx
        if aligned:  # loads of the next blocks are under way, across the ends of groups
            waits = [int(n, 0) for n in re.findall(r"cp\.async\.wait_group\s+(\w+)", ptx)]
            assert max(waits) >= 1
        if arch == "sm_90" and aligned:
            assert "1" in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)


# of a thread, where more would leave too few programs for a multiprocessor to hide its loads
MOST_REGISTERS = {
    **{f"embedding-{name}": 40 for name in ("and_mask", "sand_mask", "geometric_mean")},
    **{f"embedding-{name}": 128 for name in ("median", "winsorized_mean", "median_of_means")},
    **{
        f"{name}-{size}": 128
        for name in ("loss", "gradient")
        for size in ("10-classes", "32000-classes-smoothed")
    },
}


def stacked_cases():
    one, common = {"coordinates"}, {"scale": "fp32", "votes": "fp32", "k": "fp32"}
    for size, kind, count, load in (
        (3, "median", 0, stacked.one_value),
        (16, "winsorized_mean", 3, stacked.one_value),
        (31, "trimmed_mean", 4, stacked.one_value),
        (64, "median", 0, stacked.one_value),
        (8, "median", 0, stacked.one_sum),
        (8, "median", 0, stacked.one_bucket),
    ):
        constants = {"load_value": load, "KIND": kind, "SIZE": size, "COUNT": count}
        constants |= {"BLOCK": stacked.sort_block(size)}
        types = common | {"grads_ptr": "*fp32", "value_ptr": "*fp32"}
        yield f"sort-{size}-{kind}-{load.__name__}", stacked.sort_kernel, types, constants, one
    for kind in ("median", "winsorized_mean"):
        constants = {"load_value": stacked.one_value, "KIND": kind, "BLOCK": stacked.SEARCH_BLOCK}
        types = common | {"grads_ptr": "*fp32", "value_ptr": "*fp32"}
        yield f"search-{kind}", stacked.search_kernel, types, constants, one
    for name in ("and_mask", "sand_mask", "geometric_mean"):
        found = statistic.STREAMING[name]
        constants = {"init": found.init, "finalize": found.finalize}
        types = common | {
            "grads_ptr": "*bf16",
            "states_ptr": "*fp32",
            "value_ptr": "*fp32",
            "mask_ptr": "*fp32",
        }
        more = {"update": found.update, "BLOCK": stacked.STREAMING_BLOCK}
        yield f"streaming-{name}", stacked.streaming_kernel, types, constants | more, one
        summary = statistic.summary(name)
        words = {"init": summary.init, "update": summary.update, "BLOCK": stacked.STREAMING_BLOCK}
        words |= {"COUNT": 1e-10 if name == "geometric_mean" else 0}
        pointers = {"grads_ptr": "*bf16", "out_ptr": "*fp32"}
        yield f"summary-{name}", stacked.summary_kernel, pointers, words, one
        more = {"merge": found.merge, "WORDS": found.words, "BLOCK": product.MERGE_BLOCK}
        yield f"merge-{name}", product.merge_kernel, types, constants | more, one
    rows = {
        "grad_output_ptr": "*bf16",
        "order_ptr": "*i64",
        "voter_ptr": "*i64",
        "starts_ptr": "*i64",
    }
    for name in ("and_mask", "sand_mask", "geometric_mean"):
        found = statistic.STREAMING[name]._asdict()
        del found["words"]
        constants = found | {
            "visit": embedding.ABSORB[found["update"]],
            "BLOCK": embedding.STREAMING["BLOCK"],
        }
        types = common | rows | {"value_ptr": "*fp32", "mask_ptr": "*fp32"}
        yield f"embedding-{name}", embedding.streaming_kernel, types, constants, {"D"}
    for kind in ("median", "winsorized_mean", "median_of_means"):
        buckets = kind == "median_of_means"
        constants = {"bucket_of": embedding.bucket if buckets else embedding.no_bucket}
        constants |= {"KIND": "median" if buckets else kind, "BLOCK": embedding.ORDER["BLOCK"]}
        types = common | rows | {"value_ptr": "*fp32"}
        yield f"embedding-{kind}", embedding.order_kernel, types, constants, {"D"}
    types = rows | {"tokens_ptr": "*i64", "out_ptr": "*fp32"}
    constants = {"BLOCK": embedding.STREAMING["BLOCK"]}
    yield "embedding-contributions", embedding.contributions_kernel, types, constants, {"D"}
    for taps, width in ((3, 1), (7, 1), (3, 8)):
        geometry = (width, 1, 56, 56, 1, 56, 56, 1, taps, taps, 1, 1, 1, 0, 1, 1, 1, 1, 1)
        constants = {"O": 256, "STRIDE": 256, "OUTPUTS": width, "GEOMETRY": geometry, "TAPS": taps}
        constants |= {"BLOCK_R": conv.DEPTHWISE["BLOCK_R"], "BLOCK_C": conv.DEPTHWISE["BLOCK_C"]}
        types = {
            "x_ptr": "*bf16",
            "grad_output_ptr": "*bf16",
            "offsets_ptr": "*i64",
            "out_ptr": "*fp32",
        }
        yield f"depthwise-{taps}-{width}", conv.depthwise_kernel, types, constants, set()
    for classes, options in ((10, False), (32000, True)):
        height, block = cross_entropy.tile(classes)
        constants = {"WEIGHTED": options, "SMOOTHED": options, "ROWS": height, "BLOCK": block}
        rows = {
            "logits_ptr": "*bf16",
            "shift_ptr": "*bf16",
            "targets_ptr": "*i64",
            "peak_ptr": "*fp32",
        }
        rows |= {
            "log_sum_ptr": "*fp32",
            "weight_ptr": "*fp32",
            "scale": "fp32",
            "smoothing": "fp32",
        }
        multiples = {"classes", "stride", "shift_stride"} if classes > 10 else set()
        label = f"{classes}-classes" + "-smoothed" * options
        yield (
            f"loss-{label}",
            cross_entropy.loss_kernel,
            rows | {"loss_ptr": "*fp32"},
            constants,
            multiples,
        )
        more = {"grad_ptr": "*fp32", "weight_sum_ptr": "*fp32", "grad_logits_ptr": "*bf16"}
        yield f"gradient-{label}", cross_entropy.gradient_kernel, rows | more, constants, multiples


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in ARCHITECTURES]
)
def test_other_kernels_do_not_spill(arch, part, tmp_path):
    """Every other one, for all take a minute."""
    for label, kernel, types, constants, multiples in list(stacked_cases())[part::2]:
        pointers = {n for n in types if n in kernel.arg_names and types[n].startswith("*")}
        warps = embedding.ORDER["num_warps"] if label.startswith("embedding") else 4
        found = compiled(
            kernel, arch, types, constants, pointers | multiples, num_warps=warps, num_stages=2
        )
        registers, stack, _ = resources(found, tmp_path / "kernel.cubin")
        assert stack == 0, label
        assert registers <= MOST_REGISTERS.get(label, 255), (label, registers)


def problem(**changes):
    usual = configs.Problem(
        "sm_90", "half", 132, 2, True, outputs=4096, inputs=4096, parts=1, groups=16, rows=1024
    )
    return usual._replace(**changes)


def test_choice_of_tile():
    hopper = configs.TABLE["sm_90", "half"]
    assert configs.choose(problem()) == (hopper[2][0], 1)
    assert configs.choose(problem(words=0), 1) == (hopper[0][0], 1)
    assert configs.choose(problem(words=5))[0] == hopper[7][0]
    assert configs.choose(problem(rows=20))[0].BLOCK_R == 32
    assert configs.choose(problem(rows=0.1))[0].BLOCK_R == 16
    assert configs.choose(problem(aligned=False)) == (hopper[2][2]._replace(BLOCK_R=32), 1)
    small, splits = configs.choose(problem(outputs=768, inputs=768))
    assert splits > 1 and small.tiles(768, 768) * splits >= 100  # of 132 multiprocessors
    assert configs.choose(problem(outputs=768, inputs=768), most_splits=1)[1] == 1
    assert configs.choose(problem(outputs=64, inputs=64, groups=1))[1] == 1
    for capability, arch in (
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ):
        assert configs.architecture(capability) == arch


ENTRY = {
    "arch": "sm_90", "arithmetic": "half", "words": 2, "aligned": True,
    "outputs": 4096, "inputs": 4096, "parts": 1, "groups": 16, "rows": 1024,
    "config": configs.Config(64, 64, 32, 8, 4, 2)._asdict(), "splits": 2,
}  # fmt: skip

ODD_TILE = ENTRY["config"] | {"BLOCK_O": 48}


def test_a_tuned_table_is_followed(tmp_path, monkeypatch):
    near = ENTRY | {
        "outputs": 512,
        "config": configs.Config(32, 64, 32, 8, 4, 2)._asdict(),
        "splits": 4,
    }
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"version": 1, "entries": [ENTRY, near]}))
    monkeypatch.setenv("HTV_TUNED", str(path))
    assert configs.choose(problem()) == (configs.Config(64, 64, 32, 8, 4, 2), 2)
    assert configs.choose(problem(outputs=300)) == (configs.Config(32, 64, 32, 8, 4, 2), 4)
    assert configs.choose(problem(outputs=300), most_splits=2)[1] == 2
    assert configs.choose(problem(words=3))[0] in configs.TABLE["sm_90", "half"][3]
    monkeypatch.setenv("HTV_TUNED", "")
    assert configs.choose(problem()) == (configs.TABLE["sm_90", "half"][2][0], 1)
    monkeypatch.delenv("HTV_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.choose(problem())[1] == 1
    (tmp_path / "htv").mkdir()
    path.rename(tmp_path / "htv" / "tuned.json")
    assert configs.choose(problem())[1] == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", '"version": 1'),
        (json.dumps({"version": 2, "entries": []}), '"version": 1'),
        (json.dumps({"version": 1, "entries": [{}]}), "entry 0: wants the keys"),
        (json.dumps({"version": 1, "entries": [ENTRY | {"arch": "sm_70"}]}), "sm_70"),
        (json.dumps({"version": 1, "entries": [ENTRY | {"rows": "many"}]}), "must be numbers"),
        (json.dumps({"version": 1, "entries": [ENTRY | {"splits": 0}]}), "splits at least 1"),
        (json.dumps({"version": 1, "entries": [ENTRY, ENTRY | {"config": ODD_TILE}]}),
         "entry 1: BLOCK_O must be"),
    ],
)  # fmt: skip
def test_a_tuned_table_is_checked(text, message, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    monkeypatch.setenv("HTV_TUNED", str(path))
    with pytest.raises(ValueError, match=f"tuned.json.*{re.escape(message)}"):
        configs.choose(problem())
