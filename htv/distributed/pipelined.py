"""One vote over the micro-batches of a pipeline: `htv.distributed.pipeline`."""

from __future__ import annotations

import functools

from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from htv.distributed.rank_votes import session_of
from htv.errors import UnsupportedError

__all__ = ["pipeline"]


def pipeline(schedule: ScheduleGPipe | Schedule1F1B, handle: object) -> None:
    """Let the examples of all micro-batches of a pipeline's step vote together.

    From then on ``schedule.step(...)`` leaves the aggregate of the whole batch in `.grad` of this
    rank's stage. The parameters of a stage see every example, so that ranks need not exchange
    votes.

    schedule:  a `ScheduleGPipe` or `Schedule1F1B` of torch.distributed.pipelining, whose stage is
               the attached module. Its scale_grads says, as always, whether losses are means.
    handle:    what `htv.attach` returned for the module of this rank's stage.

    Rules must accumulate: order rules other than MedianOfMeans(k), with k micro-batches, are
    refused at the first step. Raises TypeError for another schedule or handle, ValueError if the
    stage is not the attached module, RuntimeError if called twice.

    >>> handle = htv.attach(stage.submod, htv.AndMask(0.4))  # doctest: +SKIP
    >>> schedule = ScheduleGPipe(stage, 4, loss_fn=loss)  # doctest: +SKIP
    >>> htv.distributed.pipeline(schedule, handle)  # doctest: +SKIP
    """
    if not isinstance(schedule, (ScheduleGPipe, Schedule1F1B)):
        raise TypeError(
            "schedule must be a ScheduleGPipe or Schedule1F1B, which run one stage per rank and "
            f"each micro-batch's backward in one piece; got {type(schedule).__name__}"
        )
    session = session_of(handle)
    if session.rank_votes is not None or session.group_votes is not None:
        raise UnsupportedError(
            "a pipeline's micro-batches cannot vote together with those of other replicas. "
            "Remedy: a pipeline alone, or DistributedDataParallel with htv.distributed.ddp alone"
        )
    if schedule._stage.submod is not session.model:
        raise ValueError(
            "handle is not of the schedule's stage: attach to what PipelineStage was given, "
            "htv.attach(stage.submod, rule)"
        )
    if session.in_pipeline:
        raise RuntimeError("the handle's micro-batches vote together already: call this once")
    step = schedule.step

    @functools.wraps(step)
    def one_vote(*args, **kwargs):
        if not session.attached:
            return step(*args, **kwargs)
        # The schedule scales .grad before there is any: contributions are scaled here.
        fraction = 1 / schedule._n_microbatches if schedule.scale_grads else 1.0
        with session.accumulate(fraction):
            return step(*args, **kwargs)

    session.in_pipeline = True
    schedule.step = one_vote
