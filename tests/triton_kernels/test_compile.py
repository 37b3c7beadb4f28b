"""Compiles every tile of the table for GPUs that need not be present, and holds it to its budget of registers.

A register spilled to memory in the inner loop is slow and silent, and so is a register too many for the programs that
should share a multiprocessor. Not yet run on hardware: these are the compiler's own numbers.
"""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from htv.triton_kernels import configs, linear, statistic  # noqa: E402

if linear.INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

# Per config of the table: most bytes of shared memory, least programs that fit a multiprocessor when rows are aligned.
BUDGET = {
    ("sm_90", 2): ((98304, 1), (49152, 2), (24576, 3), (16384, 4)),
    ("sm_80", 2): ((32768, 1), (16384, 2), (16384, 3)),
    ("sm_90", 4): ((8192, 3), (4096, 7)),
    ("sm_80", 4): ((8192, 3), (4096, 7)),
}
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY = {"sm_90": 232448, "sm_80": 101376}  # 227 KiB; 99 KiB, the least of the other architectures


def compile_linear(arch, dtype, name, config, aligned):
    kernel = linear.linear_kernel
    pointers = {
        "x_ptr": f"*{dtype}",
        "grad_output_ptr": f"*{dtype}",
        "offsets_ptr": "*i64",
        "value_ptr": "*fp32",
        "mask_ptr": "*i32",
    }
    launch = config._asdict()
    options = {n: launch.pop(n) for n in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    constants = statistic.STATISTICS[name]._asdict() | launch | {"UPCAST": False}
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    multiples_of_16 = [*pointers, "O", "I"] if aligned else ["offsets_ptr", "value_ptr", "mask_ptr"]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in multiples_of_16}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def resources(compiled, path):
    """Registers per thread, bytes of stack (that is, of spilled registers) and bytes of shared memory."""
    path.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), compiled.metadata.shared


def cases():
    for (arch, size), row in configs.LINEAR.items():
        for config, budget in zip(row, BUDGET[arch, size], strict=True):
            for dtype in ("bf16", "fp16") if size == 2 else ("fp32",):
                for name in statistic.STATISTICS:
                    for aligned in (True, False):
                        if not aligned and config.BLOCK_O * config.BLOCK_I > configs.LARGEST_UNALIGNED:
                            continue
                        marks = () if name == "and_mask" and dtype != "fp16" else (pytest.mark.slow,)
                        tile = "x".join(map(str, config[:3]))
                        label = "-".join((arch, dtype, name, tile, "aligned" if aligned else "unaligned"))
                        yield pytest.param(arch, dtype, name, config, aligned, budget, marks=marks, id=label)


@pytest.mark.parametrize("arch, dtype, name, config, aligned, budget", list(cases()))
def test_within_budget(arch, dtype, name, config, aligned, budget, tmp_path):
    compiled = compile_linear(arch, dtype, name, config, aligned)
    registers, stack, shared = resources(compiled, tmp_path / "kernel.cubin")
    most_shared, programs = budget
    if not aligned:
        programs = 1
    assert stack == 0
    assert shared <= most_shared and programs * shared <= SHARED_MEMORY[arch]
    assert programs * registers * config.num_warps * 32 <= REGISTERS, f"{registers} registers"
    assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (arch == "sm_90" and dtype != "fp32")


def test_choice_of_tile():
    hopper, ampere = configs.LINEAR["sm_90", 2], configs.LINEAR["sm_80", 2]

    def choose(capability=(9, 0), O=4096, I=4096, rows_per_group=512, aligned=True):
        return configs.choose(capability, 132, 2, O, I, rows_per_group, aligned)

    assert choose() == hopper[0]
    assert choose(rows_per_group=20) == hopper[1]
    assert choose(rows_per_group=1) == choose(rows_per_group=0.1) == hopper[-1]
    assert choose(O=1024, I=2048) == hopper[1]
    assert choose(O=64, I=64) == hopper[2]
    assert choose(aligned=False) == hopper[2]
    assert choose(capability=(8, 9)) == choose(capability=(12, 0)) == ampere[0]
    assert configs.choose((9, 0), 132, 4, 4096, 4096, 512, True) == configs.LINEAR["sm_90", 4][0]
