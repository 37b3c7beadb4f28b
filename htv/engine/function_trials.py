"""Whether a custom autograd.Function, or a script that runs as one operation, keeps examples apart.

Nobody can read what it computes, but its backward is linear in the gradient it is given, and can be
tried: it is asked what it makes of the gradients of some examples alone. What reaches other
examples' rows mixes examples. Nothing is believed that was not tried: every forward tries again.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from htv.engine.provenance import Mark
from htv.groups import BatchLayout

__all__ = ["can_be_tried", "tried"]

# What a Function's code names where its backward starts another one, which must not happen twice.
_NESTING = {"backward", "backward_pass", "autograd", "run_backward", "checkpoint"}
CLOSE = 1e-3  # of the largest value: what rounding may change


def tried(node, number: int, inputs: list[Mark | None], batch_size: int) -> BatchLayout | None:
    """Find where the batch is in output `number` of a `node` that `can_be_tried`, by trials.

    inputs:      the marks of the tensors it was called with; with a gradient, all of the batch.
    batch_size:  how many examples there are.

    Returns None where it mixes examples, or where that cannot be tried: under torch.compile, on
    several ranks (its backward may wait for them), or if it runs a module or another backward.
    """
    graded = [m for (n, _), m in zip(node.next_functions, inputs, strict=True) if n is not None]
    if (
        not graded
        or not all(isinstance(m, BatchLayout) and not m.guess for m in graded)
        or _cannot_try(node)
    ):
        return None
    shape = tuple(node._input_metadata[number].shape)
    if batch_size == 1:
        return BatchLayout(0, times=shape[0]) if shape and shape[0] else None
    dims = sorted(range(len(shape)), key=lambda d: d != graded[0].dim)
    for dim in dims:
        layout = graded[0].at(dim)
        if shape[dim] == layout.size(batch_size) and _keeps_apart(
            node, number, layout, graded, batch_size
        ):
            return layout
    return None


def can_be_tried(node) -> bool:
    """Tell whether a `node` is a custom Function's, or a script's that runs as one operation."""
    return hasattr(type(node), "_forward_cls") or node.name().startswith("torch::jit::")


def _cannot_try(node) -> bool:
    meta = node._input_metadata
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    function = getattr(type(node), "_forward_cls", None)
    names = () if function is None else _names_in(function.backward)
    return (
        names is None
        or not _NESTING.isdisjoint(names)
        or (ranks and torch.distributed.get_world_size() > 1)
        or torch.utils._python_dispatch._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or (any(m.device.type == "cuda" for m in meta) and torch.cuda.is_current_stream_capturing())
    )


def _names_in(function) -> tuple[str, ...] | None:
    """Return what the code of a function written in Python names; None of another one."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else code.co_names


def _keeps_apart(
    node, number: int, layout: BatchLayout, graded: list[BatchLayout], batch_size: int
) -> bool:
    """Tell whether gradients of the examples at `layout` reach those same examples alone."""
    meta = node._input_metadata
    devices = {m.device.index for m in meta if m.device.type == "cuda"}
    try:
        with (
            _without_modules(),
            torch.no_grad(),
            torch._C.DisableTorchFunction(),
            torch.random.fork_rng(sorted(devices)),
        ):
            grads = [torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) for m in meta]
            draws = torch.Generator().manual_seed(0)
            whole = torch.randn(grads[number].shape, generator=draws).to(grads[number])
            run = lambda part: _run(node, [part if i == number else g for i, g in enumerate(grads)])
            wanted = run(whole)
            if all(t is None or not bool(t.any()) for t in wanted):
                return False  # nothing tells
            for bit in range((batch_size - 1).bit_length()):
                if not _splits(run, whole, wanted, layout, graded, batch_size, bit):
                    return False
        return True
    except Exception:  # it cannot be run alone, or twice
        return False


@contextmanager
def _without_modules() -> Iterator[None]:
    """Let no module run in this thread: a backward that runs one starts another backward, too."""
    mine = threading.get_ident()

    def refuse(module, args):
        if threading.get_ident() == mine:
            raise RuntimeError("a module runs in the backward of a custom autograd.Function")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _splits(run, whole: Tensor, wanted, layout: BatchLayout, graded, batch_size, bit: int) -> bool:
    """Tell whether the examples whose numbers have a `bit` and those that lack it stay apart. Every
    two examples differ in some bit.
    """
    for has in (0, 1):
        of = lambda mark, t: _rows_with(mark, t, batch_size, bit, has)  # noqa: B023
        found = run(torch.where(of(layout, whole), whole, torch.zeros_like(whole)))
        for part, full, mark in zip(found, wanted, graded, strict=True):
            if part is None and full is None:
                continue
            if part is None or full is None or part.shape != full.shape:
                return False
            mine = of(mark, part)
            alone = torch.where(mine, full, torch.zeros_like(full))
            if bool(torch.where(mine, torch.zeros_like(part), part).ne(0).any()):
                return False
            limit = CLOSE * full.abs().amax() if full.numel() else 0
            if not bool(((part - alone).abs() <= limit).all()):
                return False
    return True


def _rows_with(mark: BatchLayout, tensor: Tensor, batch_size: int, bit: int, has: int) -> Tensor:
    """Show which rows of a tensor are of examples whose number's `bit` is `has`, to be broadcast
    against it.
    """
    index = mark.index(batch_size).to(tensor.device)
    chosen = (index >> bit) % 2 == has
    return chosen.reshape(-1, *(1,) * (tensor.dim() - mark.dim - 1))


def _run(node, grads: list[Tensor]) -> list[Tensor | None]:
    """Return what the backward makes of `grads` for the inputs that want a gradient."""
    if hasattr(type(node), "_forward_cls"):
        found, needed = node.apply(*grads), node.needs_input_grad
    else:
        found, needed = node(*grads), [n is not None for n, _ in node.next_functions]
    found = found if isinstance(found, tuple) else (found,)
    wanted = [g for g, is_wanted in zip(found, needed, strict=False) if is_wanted]
    return [None if g is None else g.clone() for g in wanted]
