"""Which kernels there are: one module for each backend, which registers them.

To add one, say there what it serves; docs/extending.md has the whole recipe.
"""

from htv.ops.kernels import cpp, cuda, triton

__all__ = ["cpp", "cuda", "triton"]
