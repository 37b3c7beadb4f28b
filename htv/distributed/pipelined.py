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

    >>> from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> model = torch.nn.Linear(2, 1)
    >>> handle = htv.attach(model, htv.AndMask(1.0))
    >>> stage = PipelineStage(model, 0, 1, torch.device("cpu"))
    >>> schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: output.mean())
    >>> htv.distributed.pipeline(schedule, handle)
    >>> x = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    >>> _ = schedule.step(x, target=torch.zeros(2, 1))
    >>> model.weight.grad
    tensor([[2., 0.]])
    >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(schedule, (ScheduleGPipe, Schedule1F1B)):
        raise TypeError(
            "schedule must be a ScheduleGPipe or Schedule1F1B, which run one stage per rank and "
            f"each micro-batch's backward in one piece; got {type(schedule).__name__}"
        )
    session = session_of(handle)
    if session.joint.of_ranks is not None or session.joint.of_group is not None:
        raise UnsupportedError(
            "a pipeline's micro-batches cannot vote together with those of other replicas. "
            "Remedy: a pipeline alone, or DistributedDataParallel with htv.distributed.ddp alone"
        )
    if schedule._stage.submod is not session.model:
        raise ValueError(
            "handle is not of the schedule's stage: attach to what PipelineStage was given, "
            "htv.attach(stage.submod, rule)"
        )
    if session.joint.in_pipeline:
        raise RuntimeError("the handle's micro-batches vote together already: call this once")
    step = schedule.step

    @functools.wraps(step)
    def one_vote(*args, **kwargs):
        if not session.attached:
            return step(*args, **kwargs)
        # The schedule scales .grad before there is any: contributions are scaled here.
        fraction = 1 / schedule._n_microbatches if schedule.scale_grads else 1.0
        with session.joint.accumulate(fraction):
            return step(*args, **kwargs)

    session.joint.in_pipeline = True
    schedule.step = one_vote
