"""On a GPU: kernels, launches and whole models, as bench/gpu.sh looks at them without pytest."""

import os

import pytest
import torch
from device_suite import PARTS, Skipped, cases

DRY = not torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(
        DRY, reason="no GPU: `bench/gpu.sh --dry` runs a selection by emulator and interpreter"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set"
    ),
    pytest.mark.filterwarnings("ignore"),
]


def listed():
    for part in PARTS:
        try:
            yield from cases(part, dry=False)
        except ImportError as error:
            yield pytest.param(None, marks=pytest.mark.skip(reason=f"{part}: {error}"), id=part)


@pytest.mark.parametrize(
    "case", [] if DRY else list(listed()), ids=lambda case: case.name if case else None
)
def test_on_the_device(case):
    try:
        case.run()
    except Skipped as reason:
        pytest.skip(str(reason))
