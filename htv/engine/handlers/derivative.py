"""Derivatives that a forward takes itself: forces from an energy, a velocity from a potential.

They run as they would without htv: the backward of a served layer is made of served uses. Only
where the batch is in them has to be told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htv.engine.handlers.call import handles, signature
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Lost
from htv.groups import BatchLayout

_GRAD = signature(
    "outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, only_inputs=True, "
    "allow_unused=None, is_grads_batched=False, materialize_grads=False"
)
SUMS = ("SumBackward", "MeanBackward")


@handles(torch.autograd.grad)
def _grad(mode: ModeLike, func, args, kwargs):
    grads = mode.general(func, args, kwargs)
    call = _GRAD.bind(args, kwargs)
    outputs, inputs, beside = (
        (value,) if isinstance(value, Tensor) else value
        for value in (call["outputs"], call["inputs"], call["grad_outputs"])
    )
    beside = beside or (None,) * len(outputs)
    apart = all(_is_apart(mode, *pair) for pair in zip(outputs, beside, strict=True))
    if apart and not call["is_grads_batched"]:
        for x, grad in zip(inputs, grads, strict=True):
            mark = mode.mark(x)
            if grad is not None and isinstance(mark, BatchLayout):
                mode.marks.put(grad, mark)
    return grads


def _is_apart(mode: ModeLike, output: Tensor, beside: Tensor | None) -> bool:
    """Whether a derivative of an output, times what stands beside it, is an example's where the
    input is: of what each example has, or of the sum of that.
    """
    mark, node, factor = mode.mark(output), output.grad_fn, mode.mark(beside)
    if isinstance(factor, Lost):
        return False
    if isinstance(mark, BatchLayout):
        return not isinstance(factor, BatchLayout) or factor.same(mark, mode.batch_size)
    if not isinstance(mark, Lost) or node is None:
        return not isinstance(mark, Lost)
    if isinstance(factor, BatchLayout) or not node.name().startswith(SUMS):
        return False
    return isinstance(mode.at(*node.next_functions[0]), BatchLayout)
