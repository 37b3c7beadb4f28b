"""The tiles that products are launched with: from a tuned table where there is one, else from the
static one below and a model of what a tile costs. The same shapes always run the same code.

Every entry compiles without a register spill (tests/triton_kernels/test_compile.py). Which is
fastest where has not yet been measured on hardware.

A tuned table is a JSON file: {"version": 1, "entries": [{"arch": "sm_90", "arithmetic": "half",
"words": 2, "aligned": true, "outputs": 4096, "inputs": 4096, "parts": 1, "groups": 16, "rows":
1024, "config": {"BLOCK_O": 128, ...}, "splits": 1}, ...]}, sizes as in `Problem`. The entry of the
nearest shape (in the logarithms of its sizes) among those of the same architecture, arithmetic,
words and alignment serves, if it is near. `htv tune` writes such a file. The one that HTV_TUNED
names is taken, else `htv/tuned.json` in the user's cache, else `tuned.json` beside this file;
"HTV_TUNED=" takes none.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
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


class Problem(NamedTuple):
    """What a choice depends on. words: fp32 registers of state per coordinate, beside the product's
    own.
    """

    arch: str
    arithmetic: str  # "half", "tf32" or "fp32"
    multiprocessors: int
    words: int
    aligned: bool  # rows of both operands start at multiples of 16 bytes
    outputs: int
    inputs: int
    parts: int  # of a grouped weight: outputs and inputs are those of one
    groups: int
    rows: float  # per group, on average


_SMALL_FP32 = Config(32, 32, 16, 8, num_warps=4, num_stages=2)

# By (architecture, arithmetic), then the most words that a tile has registers for. The product
# itself takes a word more: 128 x 128 coordinates, 8 warps and 2 words are 3 * 64 of a thread's 255
# registers. 0 words: contributions alone.
TABLE: dict[tuple[str, str], dict[int, tuple[Config, ...]]] = {
    ("sm_90", "half"): {
        0: (
            Config(128, 256, 64, 8, 8, 3),
            Config(128, 128, 64, 8, 8, 3),
            Config(64, 64, 64, 8, 4, 3),
        ),
        2: (
            Config(128, 128, 64, 8, 8, 3),
            Config(64, 128, 64, 8, 8, 3),
            Config(64, 64, 64, 8, 4, 3),
        ),
        3: (Config(64, 128, 64, 8, 8, 3), Config(64, 64, 64, 8, 8, 3)),
        7: (Config(64, 64, 64, 8, 8, 3),),
    },
    ("sm_100", "half"): {
        0: (
            Config(128, 256, 64, 8, 8, 3),
            Config(128, 128, 64, 8, 8, 3),
            Config(64, 64, 64, 8, 8, 3),
        ),
        2: (
            Config(128, 128, 64, 8, 8, 3),
            Config(64, 128, 64, 8, 8, 3),
            Config(64, 64, 64, 8, 4, 3),
        ),
        3: (Config(64, 64, 64, 8, 8, 3),),
        7: (Config(64, 64, 64, 8, 8, 3),),
    },
    ("sm_80", "half"): {
        0: (Config(128, 128, 32, 8, 8, 3), Config(64, 64, 32, 8, 4, 3)),
        2: (Config(128, 64, 32, 8, 8, 3), Config(64, 64, 32, 8, 8, 3)),
        3: (Config(64, 64, 32, 8, 8, 3),),
        7: (Config(64, 64, 32, 8, 8, 3),),
    },
    **{
        (arch, "tf32"): {
            0: (Config(128, 128, 32, 8, 8, 3), Config(64, 64, 32, 8, 8, 3)),
            3: (Config(64, 64, 32, 8, 8, 3),),
            7: (Config(64, 64, 16, 8, 8, 3),),
        }
        for arch in ("sm_80", "sm_90", "sm_100")
    },
    **{
        (arch, "fp32"): {
            0: (Config(128, 128, 16, 8, 8, 3), Config(64, 64, 16, 8, 4, 2), _SMALL_FP32),
            2: (Config(64, 64, 16, 8, 4, 2), _SMALL_FP32),
            7: (Config(64, 64, 16, 8, 8, 2), _SMALL_FP32._replace(num_warps=8)),
        }
        for arch in ("sm_80", "sm_90", "sm_100")
    },
}

MOST_UNALIGNED = (
    64 * 64
)  # coordinates, and 32 rows: element-wise loads need the registers that more would take
LEAST_ROWS = 16  # of a block: what tensor cores take
MOST_SPLITS = 16
# Per multiprocessor and cycle: operations by arithmetic, and bytes from L2. What the model of costs
# knows of a device.
OPERATIONS = {
    "sm_80": {"half": 2048, "tf32": 1024, "fp32": 128},
    "sm_90": {"half": 4096, "tf32": 2048, "fp32": 256},
    "sm_100": {"half": 8192, "tf32": 4096, "fp32": 256},
}
L2_BYTES = 32
MEMORY_BYTES = 18


def architecture(capability: tuple[int, int]) -> str:
    """9.x has wgmma and 10.x tcgen05, which read both operands from shared memory and so save
    registers.
    """
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


def candidates(problem: Problem) -> list[Config]:
    """Configurations of the static table that fit, the preferred first.

    Blocks of rows longer than a group, which would be mostly padding, are shortened.
    """
    rows = TABLE[problem.arch, problem.arithmetic]
    row = rows[min(words for words in rows if words >= problem.words)]
    longest = max(LEAST_ROWS, triton.next_power_of_2(math.ceil(problem.rows)))
    if not problem.aligned:
        longest = min(longest, 32)
        row = [config for config in row if config.BLOCK_O * config.BLOCK_I <= MOST_UNALIGNED]
    return [config._replace(BLOCK_R=min(config.BLOCK_R, longest)) for config in row]


def cost(problem: Problem, config: Config, splits: int) -> float:
    """Cycles, roughly: operations or bytes from L2, whichever takes longer, the statistic at every
    group's end, whole waves of programs, and the merging of splits.
    """
    size, coordinates = (2 if problem.arithmetic == "half" else 4), config.BLOCK_O * config.BLOCK_I
    operations = 2 * coordinates / OPERATIONS[problem.arch][problem.arithmetic]
    per_row = max(operations, (config.BLOCK_O + config.BLOCK_I) * size / L2_BYTES)
    padded = max(1, math.ceil(problem.rows / config.BLOCK_R)) * config.BLOCK_R
    per_group = padded * per_row + coordinates * (1 + 2 * problem.words) / 128
    programs = config.tiles(problem.outputs, problem.inputs) * problem.parts * splits
    waves = math.ceil(programs / problem.multiprocessors)
    merged = (
        problem.words * splits * problem.parts * problem.outputs * problem.inputs * 8
        if splits > 1
        else 0
    )
    return waves * math.ceil(problem.groups / splits) * per_group + merged / (
        MEMORY_BYTES * problem.multiprocessors
    )


def choose(
    problem: Problem, most_splits: int = MOST_SPLITS, entries: tuple | None = None
) -> tuple[Config, int]:
    """A configuration and the number of splits of the groups, at most `most_splits`.

    entries: of a tuned table, instead of those of the one in force.

    Steps ask for the same again and again: what was chosen is kept, as long as the table stays.
    """
    entries = tuned() if entries is None else entries
    most_splits = max(1, min(most_splits, problem.groups, MOST_SPLITS))
    key = problem, most_splits, id(entries)
    kept = _choices.get(key)
    if kept is None:
        if len(_choices) >= MOST_CHOICES:
            _choices.clear()
        # The table is kept as well, so that its id stays its own.
        kept = _choices[key] = entries, _choose(problem, most_splits, entries)
    return kept[1]


MOST_CHOICES = 4096  # kept at a time
_choices: dict[tuple, tuple[tuple, tuple[Config, int]]] = {}


def _choose(problem: Problem, most_splits: int, entries: tuple) -> tuple[Config, int]:
    found = nearest(entries, problem)
    if found is not None:
        return found[0], min(found[1], most_splits)
    choices = (
        (config, splits) for splits in range(1, most_splits + 1) for config in candidates(problem)
    )
    return min(choices, key=lambda choice: cost(problem, *choice))


# -- tuned tables ----------------------------------------------------------------------------------

KEY = ("arch", "arithmetic", "words", "aligned")
SIZES = ("outputs", "inputs", "parts", "groups", "rows")
NEAR = math.log(8) ** 2  # one size by a factor of eight, or two by four each


def tuned() -> tuple[dict, ...]:
    """The entries of the tuned table in force. Raises ValueError if the file cannot be used."""
    named = os.environ.get("HTV_TUNED")
    if named is not None:
        return load(Path(named)) if named else ()
    for path, name in (_user_table(*map(os.environ.get, _HOMES)), _OWN_TABLE):
        if os.access(name, os.F_OK) and path.is_file():  # at every call: the first is what is cheap
            return load(path)
    return ()


_OWN_TABLE = Path(__file__).with_name("tuned.json"), str(Path(__file__).with_name("tuned.json"))
_HOMES = "XDG_CACHE_HOME", "HOME"  # what the place of a user's table depends on


@functools.lru_cache
def _user_table(cache: str | None, home: str | None) -> tuple[Path, str]:
    path = Path(cache or Path.home() / ".cache") / "htv" / "tuned.json"
    return path, str(path)


def user_table() -> Path:
    """Where a user's own tuned table is looked for."""
    return _user_table(*map(os.environ.get, _HOMES))[0]


def nearest(entries: tuple[dict, ...], problem: Problem) -> tuple[Config, int] | None:
    """Configuration and splits of the entry nearest to a problem; None where none has its `KEY` and
    is near.
    """
    alike = [
        entry for entry in entries if all(entry[name] == getattr(problem, name) for name in KEY)
    ]
    if not alike:
        return None

    def distance(entry):
        return sum(
            math.log(max(1, entry[name]) / max(1, getattr(problem, name))) ** 2 for name in SIZES
        )

    entry = min(alike, key=distance)
    if distance(entry) > NEAR:
        return None
    return Config(**entry["config"]), entry["splits"]


@functools.lru_cache
def load(path: Path) -> tuple[dict, ...]:
    """Read and check a tuned table, once per process. Raises ValueError that names the file and the
    entry.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tuned table {path} cannot be read: {error}; write it anew, or set HTV_TUNED="
        ) from error
    if (
        not isinstance(table, dict)
        or table.get("version") != 1
        or not isinstance(table.get("entries"), list)
    ):
        raise ValueError(
            f'tuned table {path} must be {{"version": 1, "entries": [...]}}; set HTV_TUNED= to do '
            "without"
        )
    for number, entry in enumerate(table["entries"]):
        wrong = _wrong(entry)
        if wrong:
            raise ValueError(
                f"tuned table {path}: entry {number}: {wrong}; set HTV_TUNED= to do without"
            )
    return tuple(table["entries"])


def _wrong(entry: object) -> str | None:
    """What an entry lacks, or None."""
    if not isinstance(entry, dict) or set(entry) != {*KEY, *SIZES, "config", "splits"}:
        return f"wants the keys {', '.join((*KEY, *SIZES, 'config', 'splits'))}"
    if (entry["arch"], entry["arithmetic"]) not in TABLE:
        return f"unknown arch and arithmetic {entry['arch']!r}, {entry['arithmetic']!r}"
    config, numbers = (
        entry["config"],
        [entry["words"], entry["splits"], *(entry[name] for name in SIZES)],
    )
    if not isinstance(config, dict) or set(config) != set(Config._fields):
        return f"config wants the keys {', '.join(Config._fields)}"
    if not all(_is_number(n) for n in (*numbers, *config.values())) or entry["splits"] < 1:
        return "sizes must be numbers of at least 0, splits at least 1"
    for name in ("BLOCK_O", "BLOCK_I", "BLOCK_R", "num_warps"):
        value, least = config[name], 1 if name == "num_warps" else LEAST_ROWS
        if not isinstance(value, int) or value < least or value & (value - 1):
            return f"{name} must be a power of two of at least {least}, got {value}"
    if not (isinstance(config["num_stages"], int) and isinstance(config["TILES_PER_COLUMN"], int)):
        return "num_stages and TILES_PER_COLUMN must be integers"
    return (
        None
        if min(config["num_stages"], config["TILES_PER_COLUMN"]) > 0
        else "num_stages must be positive"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
