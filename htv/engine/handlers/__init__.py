"""The torch functions htv serves, by kind: each takes its parameters as slots and aggregates their gradients.

To serve another one, write a server in the file of its kind and register it with `htv.layers.call.serves`.
"""

from htv.engine.handlers import activation, attention, conv, embedding, linear, norm, products, recurrent
from htv.engine.handlers.call import SERVERS
from htv.engine.handlers.norm import batch_norm_refusal

__all__ = [
    "SERVERS", "activation", "attention", "batch_norm_refusal", "conv", "embedding", "linear", "norm", "products",
    "recurrent",
]  # fmt: skip
