"""Where kernels run, and what they take: CUDA tensors, or CPU tensors when TRITON_INTERPRET=1 was
set before Triton was imported.
"""

from __future__ import annotations

import itertools

import torch
import triton

from htv.groups import to_device_async

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UPCAST = (
    triton.knobs.runtime.interpret
)  # read when kernels are decorated: its half-precision arithmetic is wrong
DEVICE = "cpu" if UPCAST else "cuda"


def guard(tensor: torch.Tensor):
    """Launches go to the device of a tensor, on its current stream."""
    return torch.cuda.device_of(tensor)


def capability(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; one of Hopper's under the interpreter."""
    if device.type != "cuda":
        return (9, 0), 1
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def require(op: str, names: str, *tensors: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless all share a dtype of `DTYPES` and lie on one device
    that kernels run on.
    """
    dtypes, devices = {t.dtype for t in tensors}, {t.device for t in tensors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise TypeError(
            f"{op} (Triton): {names} must share a dtype among {', '.join(map(str, DTYPES))}, "
            f"got {' and '.join(str(t.dtype) for t in tensors)}"
        )
    if len(devices) > 1 or tensors[0].device.type != DEVICE:
        raise ValueError(
            f"{op} (Triton): {names} must lie on one {DEVICE} "
            f"device{' under the interpreter' * UPCAST}, "
            f"got {' and '.join(str(t.device) for t in tensors)}"
        )


def check_offsets(op: str, offsets: torch.Tensor, rows: int) -> None:
    """Offsets on the CPU are checked; those on a device are trusted, for looking at them would wait
    for it.
    """
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(
            f"{op} (Triton): offsets must be E + 1 >= 2 integers, got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    if not offsets.is_cuda:
        bounds = offsets.tolist()
        if bounds[0] < 0 or bounds[-1] > rows or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"{op} (Triton): offsets must ascend within the {rows} rows, got {bounds}"
            )


def offsets_on(device: torch.device, offsets: torch.Tensor) -> torch.Tensor:
    """Offsets where kernels read them, without waiting for the device. Groups of one size are
    counted out there.
    """
    if offsets.device == device:
        return offsets
    bounds = offsets.tolist()
    first, step = bounds[0], bounds[1] - bounds[0]
    if step > 0 and bounds == list(range(first, first + step * len(bounds), step)):
        return torch.arange(first, first + step * len(bounds), step, device=device)
    return to_device_async(offsets, device)
