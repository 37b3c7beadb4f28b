"""htv: keep what autograd's sum throws away. Robust statistics of per-example gradients, straight into `.grad`."""

from importlib import metadata as _metadata
from pathlib import Path as _Path

from htv import rules as _rules
from htv.attach import Handle, attach
from htv.batchnorm import replace_batchnorm
from htv.check import CheckReport, check
from htv.errors import CheckError, UnsupportedError
from htv.explain import Explanation, explain
from htv.history import declare_rowwise as rowwise
from htv.ops.aggregate import linear_grad
from htv.ops.agreement import Agreement
from htv.ops.backend import use_backend
from htv.ops.functional import (
    and_mask,
    geometric_mean,
    median,
    median_of_means,
    sand_mask,
    sign_agreement,
    trimmed_mean,
    winsorized_mean,
    xor_mask,
)
from htv.rules import *  # noqa: F403 -- every rule there is: a new one is public by its own __all__

try:
    __version__ = _metadata.version("hard-to-vary")
except _metadata.PackageNotFoundError:
    __version__ = "0+source"  # not installed: run from the source folder

_source = _Path(__file__).resolve().parent.parent
if (_source / "setup.py").is_file():  # there bench/ and triton_kernels/ lie beside htv/, not within
    __path__.append(str(_source))  # noqa: F405

__all__ = [
    "Agreement",
    "CheckError",
    "CheckReport",
    "Explanation",
    "Handle",
    "UnsupportedError",
    "and_mask",
    "attach",
    "check",
    "explain",
    "geometric_mean",
    "linear_grad",
    "median",
    "median_of_means",
    "replace_batchnorm",
    "rowwise",
    "sand_mask",
    "sign_agreement",
    "trimmed_mean",
    "use_backend",
    "winsorized_mean",
    "xor_mask",
]
__all__ += _rules.__all__
