"""Linear and bilinear layers, and a linear layer with the loss of its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.autograd.aggregation import ParameterArgument
from htv.autograd.from_parameters import Projection
from htv.autograd.linear import bilinear, linear
from htv.engine.handlers.call import (
    Call,
    Operands,
    Signature,
    behind,
    handles,
    in_python,
    signature,
    stands_alone,
)
from htv.engine.propagation import the_one_example
from htv.engine.protocols import ModeLike
from htv.engine.provenance import Constant, FromParameters
from htv.engine.usual import of_identity, put_usual, usual_mark
from htv.errors import UnsupportedError
from htv.groups import BatchLayout
from htv.ops.factors import BilinearFactors, LinearFactors

_LINEAR = signature("input, weight, bias=None")
_BILINEAR = signature("input1, input2, weight, bias=None")


@handles(F.linear, uses={"linear": LinearFactors}, modules={nn.Linear: "linear"})
def _linear(mode: ModeLike, func, args, kwargs):
    if args[2:] and not kwargs:
        y = _usual(mode, *args)
        if y is not None:
            return y
    call = Call(mode, "linear", _LINEAR, args, kwargs, "input", "weight", "bias")
    if call.tracked and type(call.layout) is Constant and torch.is_grad_enabled():
        y = mode.general(func, args, kwargs)
        if isinstance(mode.mark(y), FromParameters) and all(
            stands_alone(mode, p) for p in call.parameters
        ):
            mode.marks.put(
                y,
                FromParameters(
                    call.tracked, y, Projection(call.x, bool(behind(mode, call["weight"])))
                ),
            )
        return y
    example = the_one_example(call.layout) if call.applicable and call.x.ndim == 1 else None
    if (
        call.applicable and call.x.ndim == 1 and (mode.batch_size == 1 or example is not None)
    ):  # x.squeeze() of a batch of one, or one example in a loop over them
        row = mode.call(torch.Tensor.unsqueeze, (call.x, 0), {})
        if mode.batch_size > 1:
            mode.marks.put(row, BatchLayout(0, examples=torch.tensor([example])))
        y = mode.call(F.linear, (row, call["weight"], call["bias"]), {})
        return mode.call(torch.Tensor.squeeze, (y, 0), {})
    arguments = call.enter(features=1) if call.applicable else None
    return (
        NotImplemented
        if arguments is None
        else call.done(linear(call.x, *arguments, mode.rows[call.layout]))
    )


def _usual(mode: ModeLike, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What `_linear` does for a plain input of the batch and parameters as they stand, without
    asking for what does not matter then. None where anything is otherwise.
    """
    layout, size = usual_mark(mode.table, x), mode.batch_size
    if type(layout) is not BatchLayout or not layout.is_the_one or size == 1:
        return None
    ndim = x.ndim
    if layout.dim >= ndim - 1 or not torch.is_grad_enabled():
        return None
    own = mode.own
    of_weight, of_bias = of_identity(own, weight), of_identity(own, bias)
    if of_weight is None or not weight.requires_grad:
        return None
    if bias is not None and (of_bias is None or not bias.requires_grad):
        return None
    small = ndim == 2 and x.shape[0] == size  # flattened tokens have more rows than examples
    weight_argument = _argument(mode, "linear", of_weight, small)
    if bias is None:
        bias_argument = ParameterArgument(None)
    else:
        bias_argument = _argument(mode, "linear bias", of_bias, small)
    y = linear(x, weight_argument, bias_argument, mode.rows[layout])
    if not put_usual(mode.table, y, layout):
        mode.marks.put(y, layout)
    return y


def _argument(mode: ModeLike, use: str, mark: FromParameters, small: bool) -> ParameterArgument:
    """What stands for a parameter in a layer's call; the `use` is noted."""
    (owner,) = mark.parameters
    if use not in owner.uses:
        owner.uses.add(use)
    return owner.argument(mode.groups, mode.task, small)


@handles(F.bilinear, uses={"bilinear": BilinearFactors}, modules={nn.Bilinear: "bilinear"})
def _bilinear(mode: ModeLike, func, args, kwargs):
    call = Call(mode, "bilinear", _BILINEAR, args, kwargs, "input1", "weight", "bias")
    right = call["input2"]
    if not call.tracked or not torch.is_grad_enabled():
        return NotImplemented
    layout, other = mode.layout(call.x), mode.layout(right)
    if (
        not isinstance(layout, BatchLayout)
        or not isinstance(other, BatchLayout)
        or not layout.same(other, mode.groups.batch_size)
    ):
        raise UnsupportedError(
            f"bilinear with parameter {call.tracked[0].name!r}: both inputs must hold the batch "
            f"in the same dim; exclude={call.tracked[0].name!r} to give it a plain gradient"
        )
    arguments = call.enter(features=1)
    return (
        NotImplemented
        if arguments is None
        else call.done(bilinear(call.x, right, *arguments, mode.rows[call.layout]))
    )


def _linear_cross_entropy(mode: ModeLike, func, args, kwargs):
    """A linear layer and the loss of its logits, which are formed at once: `options`, by which
    torch forms some at a time, only say how much memory that takes.
    """
    bound = _LINEAR_CROSS_ENTROPY.bind(args, kwargs) | {"options": None}
    operands = Operands(mode, *(bound[n] for n in ("input", "linear_weight", "linear_bias")))
    if not operands.meet:
        return NotImplemented
    with mode:
        return _in_python(**bound)


if hasattr(F, "linear_cross_entropy"):  # of torch 2.13
    _LINEAR_CROSS_ENTROPY = Signature.of(F.linear_cross_entropy)
    _in_python = in_python(F.linear_cross_entropy)
    handles(F.linear_cross_entropy)(_linear_cross_entropy)
