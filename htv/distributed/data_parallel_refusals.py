"""What DistributedDataParallel would hide from a vote of all ranks, or take from it: refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch.nn.parallel import DistributedDataParallel

from htv.engine.session import Session
from htv.errors import UnsupportedError

__all__ = ["called_now", "refuse_early_hooks", "refuse_early_steps", "refuse_hidden_gradients"]


def called_now() -> Iterator[DistributedDataParallel]:
    """Yield those whose forward is under way in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is DistributedDataParallel.forward.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back


def refuse_early_steps(session: Session) -> None:
    """Raise where an optimizer steps in backward by `_apply_optimizer_in_backward`."""
    served = [tracked.parameter for tracked in session.tracked()]
    for parameter in [*served, *session.unserved_parameters()]:
        if "_in_backward_optimizers" in vars(parameter):
            name = next(n for n, p in session.model.named_parameters() if p is parameter)
            raise UnsupportedError(
                f"parameter {name!r} has an optimizer that steps in backward "
                "(_apply_optimizer_in_backward): with the plain sum of this rank, before the ranks "
                "have met. DistributedDataParallel makes it wait by the communication hook that "
                "counts votes here, and takes one only. Remedy: a model to which it was not "
                "applied, and an optimizer that steps after backward; or FSDP2, whose "
                "register_post_accumulate_grad_hook sees the aggregate"
            )


def refuse_early_hooks(session: Session) -> None:
    """Raise where a hook would take a gradient before the ranks have met: an optimizer's step in
    backward, say.
    """
    for tracked in session.tracked():
        if tracked.parameter._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"parameter {tracked.name!r} has a hook of register_post_accumulate_grad_hook (an "
                "optimizer that steps in backward?), which DistributedDataParallel calls before "
                "the ranks have met: it would see the plain sum of this rank. Remedy: step after "
                "backward, or FSDP2, whose hooks see the aggregate"
            )


def refuse_hidden_gradients(model: DistributedDataParallel, session: Session) -> None:
    """Raise where some served parameters' gradients never come by the hook."""
    if getattr(model, "mixed_precision", None) is not None:
        raise UnsupportedError(
            "DistributedDataParallel(mixed_precision=...) trains copies of the parameters, which "
            "the attached model does not know. Remedy: torch.autocast, or a model in bfloat16"
        )
    reduced = {
        id(p)
        for name, p in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    }
    reduced -= {id(p) for p in getattr(model, "_delay_all_reduce_params", ())}
    for tracked in session.tracked():
        if tracked.parameter.requires_grad and id(tracked.parameter) not in reduced:
            raise UnsupportedError(
                f"parameter {tracked.name!r} is served, but DistributedDataParallel does not "
                "reduce its gradient: it is not part of the wrapped model, or ignored, or its "
                f"reduction is delayed. Remedy: exclude={tracked.name!r}, or wrap it"
            )
