"""The tiles kernels are launched with: a static table, so that the same shapes always run the same code.

Every entry compiles without a register spill (tests/triton_kernels/test_compile.py). Which of them is fastest where
has not yet been measured on hardware.
"""

from typing import NamedTuple

import triton


class Config(NamedTuple):
    BLOCK_O: int
    BLOCK_I: int
    BLOCK_R: int
    TILES_PER_COLUMN: int  # height of the patch of tiles that run together
    num_warps: int
    num_stages: int

    def tiles(self, O: int, I: int) -> int:
        return triton.cdiv(O, self.BLOCK_O) * triton.cdiv(I, self.BLOCK_I)


_FP32 = (
    Config(64, 64, 16, 8, num_warps=4, num_stages=2),
    Config(32, 32, 16, 8, num_warps=4, num_stages=2),
)

# By (generation, bytes per element), the preferred first.
LINEAR = {
    ("sm_90", 2): (
        Config(128, 128, 64, 8, num_warps=8, num_stages=3),
        Config(64, 128, 32, 8, num_warps=4, num_stages=4),
        Config(64, 64, 32, 8, num_warps=4, num_stages=3),
        Config(64, 64, 16, 8, num_warps=4, num_stages=3),
    ),
    ("sm_80", 2): (
        Config(128, 64, 32, 8, num_warps=8, num_stages=3),
        Config(64, 64, 32, 8, num_warps=4, num_stages=3),
        Config(64, 64, 16, 8, num_warps=4, num_stages=3),
    ),
    ("sm_90", 4): _FP32,
    ("sm_80", 4): _FP32,
}

LARGEST_UNALIGNED = 64 * 64  # coordinates: element-wise loads need the registers that larger tiles would take


def generation(capability: tuple[int, int]) -> str:
    """Only compute capability 9.x has wgmma, which reads both operands from shared memory and so saves registers."""
    return "sm_90" if capability[0] == 9 else "sm_80"


def choose(
    capability: tuple[int, int],
    multiprocessors: int,
    element_size: int,
    O: int,
    I: int,
    rows_per_group: float,
    aligned: bool,
) -> Config:
    """The first tile that gives every multiprocessor one; else the smallest, to give one to as many as possible.

    Blocks of rows longer than a group, which would be mostly padding, are left out.
    aligned: both operands start, and all their rows do, at multiples of 16 elements.
    """
    longest = max(16, triton.next_power_of_2(int(rows_per_group)))
    fitting = [
        config
        for config in LINEAR[generation(capability), element_size]
        if config.BLOCK_R <= longest and (aligned or config.BLOCK_O * config.BLOCK_I <= LARGEST_UNALIGNED)
    ]
    filling = (config for config in fitting if config.tiles(O, I) >= multiprocessors)
    return next(filling, min(fitting, key=lambda config: config.BLOCK_O * config.BLOCK_I))
