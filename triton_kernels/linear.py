"""Statistics of a linear layer's per-group contributions without forming them all: the op `linear`.

Runs on CUDA tensors, and on CPU tensors when TRITON_INTERPRET=1 is set before Triton is imported.
Not yet run on hardware: tested under the interpreter, and compiled offline for sm_80, sm_90 and
sm_100.
"""

import torch

from htv.rules import Statistic
from htv.triton_kernels import configs, device, product
from htv.triton_kernels import statistic as streaming

MOST_FEATURES = (
    2**24
)  # times the rows of a block, within int32; blocks themselves start at int64 addresses


def linear(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    statistic: Statistic,
    choice=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, I), grad_output (R, O), offsets (E + 1,) -> value (O, I) fp32, mask_sum () fp64.

    The contract is that of the op `linear` in `htv.ops.schema`, except that rows of x and
    grad_output may lie apart and that `offsets` may lie on the device, where they are trusted.
    choice: (Config, splits) instead of the table's.
    """
    product.require_served("linear", statistic, len(offsets) - 1)
    _check(x, grad_output, offsets)
    if 0 in (x.shape[1], grad_output.shape[1]):
        shape = grad_output.shape[1], x.shape[1]
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros((), dtype=torch.float64)
    return product.aggregate(_factors(x, grad_output, offsets), statistic, choice)


def linear_summary(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    name: str,
    log_offset: float,
    choice=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `linear_summary` of `htv.ops.schema`, for the streaming statistic of this name; as
    `linear`.
    """
    _check(x, grad_output, offsets)
    shape = grad_output.shape[1], x.shape[1]
    if 0 in shape:
        nothing = x.new_empty((streaming.summary(name).words, 1, *shape), dtype=torch.float32)
        return streaming.summary_fields(name, nothing, len(offsets) - 1)
    return product.summary(_factors(x, grad_output, offsets), name, log_offset, choice)


def _check(x, grad_output, offsets) -> None:
    device.require("linear", "x and grad_output", x, grad_output)
    if x.dim() != 2 or grad_output.dim() != 2 or len(x) != len(grad_output):
        raise ValueError(
            "linear (Triton): wants x (R, I) and grad_output (R, O), "
            f"got {tuple(x.shape)} and {tuple(grad_output.shape)}"
        )
    (rows, inputs), outputs = x.shape, grad_output.shape[1]
    if max(inputs, outputs) > MOST_FEATURES:
        raise ValueError(
            f"linear (Triton): at most {MOST_FEATURES} features, got {inputs} and {outputs}"
        )
    device.check_offsets("linear", offsets, rows)


def problem(
    x: torch.Tensor, grad_output: torch.Tensor, offsets: torch.Tensor, statistic: Statistic
) -> tuple[configs.Problem, bool]:
    """What the choice of a tile for `linear` of the same depends on, and whether groups may be
    split.
    """
    factors = _factors(x, grad_output, offsets)
    found = product.absorbed(factors, statistic)
    words = found.words if found else int(statistic.name == "median_of_means")
    return factors.problem(words), found is not None and found.merge is not None


def _factors(x: torch.Tensor, grad_output: torch.Tensor, offsets: torch.Tensor) -> product.Factors:
    x, grad_output = (
        t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
        for t in (x, grad_output)
    )
    return product.Factors(
        x,
        grad_output,
        device.offsets_on(x.device, offsets),
        rows=1,
        parts=1,
        outputs=grad_output.shape[1],
        inputs=x.shape[1],
        channels=x.shape[1],
        load_x=product.load_rows,
        geometry=None,
    )
