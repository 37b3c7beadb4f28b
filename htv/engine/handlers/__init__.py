"""The torch functions htv serves, by kind, one handler each.

To serve another one, write a handler in the file of its kind, decorated by `handles` of
`htv.engine.handlers.call`.
"""

from htv.engine.handlers import (
    activation,
    attention,
    conv,
    embedding,
    linear,
    norm,
    products,
    recurrent,
)
from htv.engine.handlers.call import HANDLERS
from htv.engine.handlers.norm import batch_norm_refusal

__all__ = [
    "HANDLERS", "activation", "attention", "batch_norm_refusal", "conv", "embedding", "linear", "norm", "products",
    "recurrent",
]  # fmt: skip
