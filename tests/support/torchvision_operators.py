"""Declares the operators that a torchvision expects of its torch, where it has none of them.

Its wheel expects a torch for CUDA. Beside one for the CPU, declaring two operators is enough for
the libraries that import it. Import this before them.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:  # nobody needs it
    pass
except RuntimeError:
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
