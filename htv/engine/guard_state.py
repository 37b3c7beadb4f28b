"""What code compiled for an attached model depends on.

`htv.engine.compile`, which reads it, is loaded when needed.
"""

from __future__ import annotations

import itertools
import uuid
import weakref
from types import CodeType
from typing import Any

from torch import Tensor, nn

# Keys are strings in compiled graphs, which may be cached on disk: no other process can have the
# same.
keys = map(
    lambda number: f"{uuid.uuid4().hex}-{number}", itertools.count()
)  # unlike a generator, for any thread
forwards: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

PASSES: set[CodeType] = set()  # code of the frames in which a forward of a handle is under way

INTERNAL = set(vars(nn.Module())) - {"training"}


def register(forward: Any) -> str:
    """Keep `forward` by weak reference; return a key to find it by, from functions that Dynamo does
    not look into.
    """
    key = next(keys)
    forwards[key] = forward
    return key


class CompileGuardState:
    """Lists the state of a model that its forward may read.

    tensors:     (module, name) of its parameters, buffers and plain tensor attributes.
    parameters:  for each of them the parameter it was when the model was attached, or None.
    settings:    (module, name) of its plain attributes: training, dropout's p, ...
    children:    (module, name, submodule).
    classes:     of results, found so far.
    structure:   how the last result was made of tensors and classes.
    refusal:     why the forward tried last cannot be compiled, or None.
    """

    def __init__(self, model: nn.Module):
        self.tensors: list[tuple[nn.Module, str]] = []
        self.parameters: list[nn.Parameter | None] = []
        self.settings: list[tuple[nn.Module, str]] = []
        self.children: list[tuple[nn.Module, str, nn.Module]] = []
        self.classes: list[type] = []
        self.structure: tuple = ()
        self.refusal: str | None = None
        for module in model.modules():
            own = {name: v for name, v in vars(module).items() if name not in INTERNAL}
            parameters = dict(module._parameters.items())  # a ScriptModule's are no dict
            tensors = {**parameters, **dict(module._buffers.items()), **own}
            for name in [name for name, value in tensors.items() if isinstance(value, Tensor)]:
                self.tensors.append((module, name))
                self.parameters.append(parameters.get(name))
            plain = (bool, int, float, str, type(None))
            self.settings += [
                (module, name) for name, value in own.items() if isinstance(value, plain)
            ]
            self.children += [
                (module, name, child)
                for name, child in module._modules.items()
                if child is not None
            ]
