"""htv: keep what autograd's sum throws away. Robust statistics of per-example gradients, straight
into `.grad`.
"""

from importlib import metadata as _metadata

from htv import distributed as distributed
from htv import rules as _rules
from htv.attach import Handle, attach
from htv.engine.graph_reading import declare_rowwise as rowwise
from htv.errors import CheckError, UnsupportedError
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
from htv.tools.batchnorm import replace_batchnorm
from htv.tools.check import CheckReport, check
from htv.tools.explain import Explanation, explain

try:
    __version__ = _metadata.version("hard-to-vary")
except _metadata.PackageNotFoundError:
    __version__ = "0+source"  # not installed: run from the source folder

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
    "distributed",
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
