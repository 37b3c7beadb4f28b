"""What the Triton kernels are held to, without pytest: statistics, and how results are judged."""

import torch

from htv.rules import Statistic
from htv.triton_kernels import device
from support import interpreter

if device.UPCAST:
    interpreter.hasten()
DEVICE = device.DEVICE


def statistics(groups: int) -> list[Statistic]:
    """Every statistic that so many groups have, at several parameters."""
    half = (groups + 1) // 2
    found = [
        Statistic("mean"),
        *(
            Statistic(name, count)
            for name in ("and_mask", "xor_mask")
            for count in {0, half, groups}
        ),
        Statistic("geometric_mean", half),
        Statistic("sign_sum"),
        *(Statistic("median", side) for side in (-1, 0, 1)),
        *(Statistic("median_of_means", k) for k in {1, half, groups}),
    ]
    if groups > 1:
        found.append(Statistic("sand_mask", votes=0.3 * groups, k=0.5))
    counts = {count for count in (0, 1, 2, (groups - 1) // 2) if 2 * count < groups}
    return found + [
        Statistic(name, count) for name in ("trimmed_mean", "winsorized_mean") for count in counts
    ]


EXACT = ("mean", "and_mask", "xor_mask", "sign_sum", "median")  # on integers


def assert_same(found, wanted, statistic: Statistic, scale: float = 1.0):
    """Value and mask sum against the definition in float64; bits where integers allow it.

    scale: of the contributions: what their rounding is relative to.
    """
    (value, mask_sum), (wanted_value, wanted_mask_sum) = found, wanted
    assert (
        value.dtype == torch.float32 and value.shape == wanted_value.shape and value.is_contiguous()
    )
    assert (mask_sum.dtype, mask_sum.device, mask_sum.shape) == (torch.float64, value.device, ())
    exact = statistic.name in EXACT
    # The reference divides by E and multiplies again.
    tolerance = {"rtol": 1e-7, "atol": 0.0} if exact else {"rtol": 4e-6, "atol": 1e-6 * scale}
    torch.testing.assert_close(value.double(), wanted_value, equal_nan=True, **tolerance)
    if statistic.name == "sand_mask":
        torch.testing.assert_close(mask_sum, wanted_mask_sum, rtol=1e-5, atol=1e-12)
    else:
        assert mask_sum.item() == wanted_mask_sum.item()
