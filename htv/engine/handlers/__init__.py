"""The torch functions htv serves, by kind, one handler each.

Every module of this package is imported. To serve another function, write a module with its
handler, decorated by `handles` of `htv.engine.handlers.call`: docs/extending.md has a recipe.
"""

import importlib
import pkgutil

from htv.engine.handlers.call import FACTORS, HANDLERS, USES, batch_argument, layer_of
from htv.engine.handlers.norm import batch_norm_refusal

__all__ = ["FACTORS", "HANDLERS", "USES", "batch_argument", "batch_norm_refusal", "layer_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
