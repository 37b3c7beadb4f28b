"""What ranks run in tests of `htv.distributed`; each returns what its rank ends with."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import htv
from support.agreements import agreements, assert_agreements
from support.rank_models import (
    EXAMPLES,
    aggregated,
    assert_one_vote,
    batch,
    by_ranks,
    contributions,
    gradients,
    made,
    shard,
)
from support.ranks import Ranks


def hook_of(name: str | None):
    """Return a communication hook by its name, as `htv.distributed.ddp` takes it."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if name is None:
        return None
    if name == "powerSGD_hook":
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1.1)
        return state, powerSGD_hook.powerSGD_hook
    return dist.group.WORLD, getattr(default_hooks, name)


def data_parallel(
    rank: int,
    world: int,
    rule: htv.Rule,
    *,
    model: str = "net",
    order: str = "before",
    vote: str = "examples",
    micro: int = 1,
    sizes: list[int] | None = None,
    hook: str | None = None,
    dtype: torch.dtype = torch.float64,
    exclude: tuple[str, ...] = (),
    compiled: bool = False,
    steps: int = 2,
    stats: bool = False,
    **settings: Any,
) -> dict:
    """Train by DistributedDataParallel; return the last step's gradients, or its `stats`."""
    net = made(model, dtype)
    if order == "before":
        handle = htv.attach(net, rule, exclude=exclude, stats=stats)
    settings = {"bucket_cap_mb": 0.004, **settings}  # several buckets
    wrapped = DistributedDataParallel(net, **settings)
    if order == "after":
        handle = htv.attach(net, rule, exclude=exclude, stats=stats)
    elif order == "wrapper":
        handle = htv.attach(wrapped, rule, exclude=exclude, stats=stats)
    htv.distributed.ddp(wrapped, handle, hook=hook_of(hook), vote=vote)
    call = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    x, y = shard(batch(model, dtype), rank, world, sizes)
    for _ in range(steps):
        wrapped.zero_grad(set_to_none=not settings.get("gradient_as_bucket_view", False))
        for i, (part, labels) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            waits = wrapped.no_sync() if i < micro - 1 else contextlib.nullcontext()
            with waits:
                loss = F.cross_entropy(call(part).double(), labels, reduction="sum")
                (loss / len(x)).backward()
        handle.finish()
    return handle.stats() if stats else gradients(net)


def units_of(net: nn.Module, units: str) -> list[nn.Module]:
    """Return what is sharded, in order, by a word for it."""
    parts = [m for m in net.children() if next(m.parameters(), None) is not None]
    return {"layers and root": [*parts, net], "layers": parts, "whole": [net]}[units]


def by_columns(parameter):
    """Return where a parameter is sharded: matrices along their second dim, if that divides."""
    from torch.distributed.tensor import Shard

    divides = parameter.ndim == 2 and parameter.shape[1] % 8 == 0
    return Shard(1 if divides else 0)


def fully_sharded(
    rank: int,
    world: int,
    rule: htv.Rule,
    *,
    model: str = "net",
    order: str = "after",
    vote: str = "examples",
    micro: int = 1,
    units: str = "layers and root",
    replicas: int = 1,
    waits: str = "set_requires_gradient_sync",
    sizes: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    exclude: tuple[str, ...] = (),
    steps: int = 2,
    stats: bool = False,
    **settings: Any,
) -> dict:
    """Train by FSDP2; return the last step's gradients, whole, or its `stats`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("r", "s"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    if settings.pop("columns", False):
        settings["shard_placement_fn"] = by_columns
    if param_dtype is not None or reduce_dtype is not None:
        reduced = torch.float32 if reduce_dtype is None else reduce_dtype
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype, reduced)
    net, alone = made(model, dtype), {"recurse": False}
    if order == "before":
        handle = htv.attach(net, rule, exclude=exclude, stats=stats)
    for part in units_of(net, units):
        fully_shard(part, mesh=mesh, **settings)
    if order == "after":
        handle = htv.attach(net, rule, exclude=exclude, stats=stats)
    htv.distributed.fsdp(net, handle, vote=vote)
    x, y = shard(batch(model, dtype), rank, world, sizes)
    for _ in range(steps):
        net.zero_grad()
        for i, (part, labels) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            for unit in net.modules():
                if isinstance(unit, FSDPModule):
                    getattr(unit, waits)(i == micro - 1, **({} if "last" in waits else alone))
            (F.cross_entropy(net(part).double(), labels, reduction="sum") / len(x)).backward()
        handle.finish()
    return handle.stats() if stats else gradients(net)


def stepped_in_backward(rank: int, world: int, rule: htv.Rule) -> dict:
    """Take a step of learning rate 1 in hooks of FSDP2's backward; return what it took away."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = made()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for part in units_of(net, "layers and root"):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    htv.distributed.fsdp(net, htv.attach(net, rule))

    def take(p) -> None:
        with torch.no_grad():
            p.sub_(p.grad)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(take)
    x, y = shard(batch(), rank, world)
    F.cross_entropy(net(x), y).backward()
    return {name: before[name] - _whole(p.detach()) for name, p in net.named_parameters()}


class Skipping(nn.Module):
    """Has two layers of one shape, of which a batch uses the first, the second, or both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.use = nn.Linear(16, 5), nn.Linear(16, 5), "ab"

    def forward(self, x):
        return sum(getattr(self, name)(x) for name in self.use)


def skipped(rank: int, world: int, rule: htv.Rule, uses: tuple[str, ...], vote: str) -> dict:
    """Train a model whose ranks run the layers that `uses` says; return the gradients."""
    net = Skipping().double()
    handle = htv.attach(net, rule)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    htv.distributed.ddp(model, handle, vote=vote)
    net.use = uses[rank]
    x, y = shard(batch(), rank, world)
    F.cross_entropy(model(x), y).backward()
    return gradients(net)


def process_group(
    rank: int,
    world: int,
    rule: htv.Rule,
    *,
    model: str = "net",
    micro: int = 1,
    sizes: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    exclude: tuple[str, ...] = (),
    long: bool = False,
    steps: int = 2,
    stats: bool = False,
) -> dict:
    """Train with nothing but `attach(process_group=...)`; return the last step's gradients, or its
    `stats`.
    """
    net = made(model, dtype)
    handle = htv.attach(net, rule, exclude=exclude, stats=stats, process_group=dist.group.WORLD)
    x, y = shard(batch(model, dtype), rank, world, sizes)

    def step() -> None:
        net.zero_grad()
        for part, labels in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (F.cross_entropy(net(part).double(), labels, reduction="sum") / len(x)).backward()

    if long:
        with handle.accumulate():
            for _ in range(steps):
                step()
                handle.finish()
            return handle.stats() if stats else gradients(net)
    for _ in range(steps):
        with handle.accumulate():
            step()
    return handle.stats() if stats else gradients(net)


def half_precision_alone(rank: int, world: int, rule: htv.Rule) -> dict:
    """Return the gradients one process gets in bfloat16 for the batch of all ranks."""
    net = made(dtype=torch.bfloat16)
    htv.attach(net, rule)
    x, y = batch(dtype=torch.bfloat16)
    (F.cross_entropy(net(x).double(), y, reduction="sum") / len(x)).backward()
    return gradients(net)


def penalised(net: nn.Module, x: torch.Tensor, examples: int) -> torch.Tensor:
    """Return a loss with derivatives of the input, the mean of so many examples'."""
    x = x.detach().requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return (y.square().sum() + slope.square().sum()) / examples


def differentiated(rank: int, world: int, rule: htv.Rule, way: str) -> dict:
    """Train on derivatives of the input, "ddp", "fsdp" or "process_group"; return the gradients."""
    net = made()
    group = dist.group.WORLD if way == "process_group" else None
    handle = htv.attach(net, rule, process_group=group)
    wrapped, block = net, contextlib.nullcontext()
    if way == "ddp":
        wrapped = DistributedDataParallel(net, bucket_cap_mb=0.004)
        htv.distributed.ddp(wrapped, handle)
    elif way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for part in units_of(net, "layers and root"):
            fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
        htv.distributed.fsdp(net, handle)
    else:
        block = handle.accumulate()
    x, _ = shard(batch(), rank, world)
    with block:
        penalised(wrapped, x, len(x)).backward()
    return gradients(net)


def assert_trains(
    ranks: Ranks,
    job,
    world: int,
    rule: htv.Rule,
    *,
    sizes: list[int] | None = None,
    vote: str | None = None,
    tolerance: float = 1e-12,
    plain: tuple[str, ...] = (),
    **settings: Any,
) -> None:
    """Run a job of this module on `world` ranks, and compare with what one process gets.

    sizes:  examples per rank; default: equally many.
    vote:   as for `htv.distributed.ddp`, where the job takes it.
    plain:  names of parameters that are excluded.
    """
    if vote is not None:
        settings["vote"] = vote
    if plain:
        settings["exclude"] = plain
    found = ranks.run(partial(job, sizes=sizes, **settings), world, rule)
    sizes = [EXAMPLES // world] * world if sizes is None else sizes
    contributed = contributions(settings.get("model", "net"), sizes)
    voters = by_ranks(contributed, sizes) if vote == "ranks" else contributed
    expected = aggregated(voters, rule)
    expected.update({name: contributed[name].sum(dim=0) for name in plain})
    assert_one_vote(found, expected, tolerance)


def assert_tells(
    ranks: Ranks,
    job,
    world: int,
    rule: htv.Rule,
    *,
    sizes: list[int] | None = None,
    vote: str | None = None,
    unknown: tuple[str, ...] = (),
    tolerance: float = 1e-9,
    **settings: Any,
) -> None:
    """Run a job as `assert_trains` does, and compare how far contributions agree on all ranks with
    what one process tells of one batch.

    unknown:  fields that must be NaN.
    """
    if vote is not None:
        settings["vote"] = vote
    found = ranks.run(partial(job, sizes=sizes, stats=True, **settings), world, rule)
    sizes = [EXAMPLES // world] * world if sizes is None else sizes
    contributed = contributions(settings.get("model", "net"), sizes)
    voters = by_ranks(contributed, sizes) if vote == "ranks" else contributed
    for told in found:
        assert_agreements(told, agreements(voters, rule), unknown, tolerance)


def pipelined(
    rank: int,
    world: int,
    rule: htv.Rule,
    *,
    schedule: str = "ScheduleGPipe",
    scale: bool = True,
    serve: bool = True,
    steps: int = 2,
    stats: bool = False,
) -> dict:
    """Train by a pipeline of two stages and three micro-batches; return this rank's gradients,
    or its `stats`.
    """
    from torch.distributed import pipelining

    net, (x, y) = made(), batch()
    first, second = ("a", "n"), ("b", "c")
    stages = (
        nn.Sequential(net.a, nn.ReLU(), net.n),
        nn.Sequential(net.b, nn.GELU(), net.c),
    )
    handle = htv.attach(stages[rank], rule, stats=stats)
    stage = pipelining.PipelineStage(stages[rank], rank, world, torch.device("cpu"))
    loss = partial(F.cross_entropy, reduction="mean" if scale else "sum")
    running = getattr(pipelining, schedule)(stage, 3, loss_fn=loss, scale_grads=scale)
    if serve:
        htv.distributed.pipeline(running, handle)
    for _ in range(steps):
        net.zero_grad()
        running.step(x) if rank == 0 else running.step(target=y)
    if stats:
        return handle.stats()
    mine = {name: p.grad for name, p in net.named_parameters()}
    return {name: mine[name] for name in mine if name[0] in (first, second)[rank]}


def optimized_by_shards(rank: int, world: int, rule: htv.Rule) -> dict:
    """Take one step of ZeroRedundancyOptimizer at learning rate 1; return what it took away."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = made()
    handle = htv.attach(net, rule)
    wrapped = DistributedDataParallel(net)
    htv.distributed.ddp(wrapped, handle)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.SGD, lr=1.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, y = shard(batch(), rank, world)
    F.cross_entropy(wrapped(x), y).backward()
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


def resumed(rank: int, world: int, rule: htv.Rule, folder: str, save: bool) -> dict:
    """Train two steps and save in between, or go on from what was saved, with AdamW; return the
    parameters.
    """
    import torch.distributed.checkpoint as checkpoints
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = made()
    handle = htv.attach(net, rule)
    wrapped = DistributedDataParallel(net)
    htv.distributed.ddp(wrapped, handle)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    x, y = shard(batch(), rank, world)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()

    if save:
        step()
    model, state = get_state_dict(wrapped, optimizer)
    held = {"model": model, "optimizer": state}
    if save:
        checkpoints.save(held, checkpoint_id=folder)
    else:
        checkpoints.load(held, checkpoint_id=folder)
        set_state_dict(
            wrapped,
            optimizer,
            model_state_dict=held["model"],
            optim_state_dict=held["optimizer"],
        )
    step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def looked_at(
    rank: int, world: int, rule: htv.Rule, way: str, folder: str | None
) -> tuple[dict, list[dict], dict]:
    """Train three steps of two micro-batches, and between steps save a checkpoint, take the
    state_dict and average the weights, if there is a folder for checkpoints.

    way:  "ddp", "fsdp" or "accumulate".

    Returns what is left: the parameters, the state_dict after every step, and the average.
    """
    import torch.distributed.checkpoint as checkpoints
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = net = made()
    if way == "fsdp":
        for part in units_of(net, "layers and root"):
            fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    group = dist.group.WORLD if way == "accumulate" else None
    handle = htv.attach(net, rule, process_group=group)
    if way == "ddp":
        model = DistributedDataParallel(net)
        htv.distributed.ddp(model, handle)
    elif way == "fsdp":
        htv.distributed.fsdp(net, handle)
    average, states = {}, []
    # FSDP2 lets nobody copy its modules.
    averaging = (
        None if way == "fsdp" else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    )

    def look() -> None:
        held, state = get_state_dict(model, optimizer)
        checkpoints.save({"model": held, "optimizer": state}, checkpoint_id=folder)
        states.append({k: _whole(v).clone() for k, v in net.state_dict().items()})
        if averaging is None:
            for name, p in net.named_parameters():
                held = average.setdefault(name, p.detach().clone())
                held.mul_(0.75).add_(p.detach(), alpha=0.25)
        else:
            averaging.update_parameters(model)

    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    x, y = shard(batch(), rank, world)
    with handle.accumulate() if way == "accumulate" else contextlib.nullcontext():
        for _ in range(3):
            for i, (part, labels) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                if way == "fsdp":
                    net.set_requires_gradient_sync(i == 1)
                waits = way == "ddp" and i == 0
                with model.no_sync() if waits else contextlib.nullcontext():
                    (F.cross_entropy(model(part), labels) / 2).backward()
            handle.finish()
            if folder is not None:
                look()
            optimizer.step()
            if folder is not None:
                look()
            optimizer.zero_grad()
    if averaging is not None:
        average = dict(averaging.module.named_parameters())
    found = {k: _whole(p.detach()).clone() for k, p in net.named_parameters()}
    return found, states, {k.removeprefix("module."): _whole(p) for k, p in average.items()}


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def by_power_sgd(rank: int, world: int, rule: htv.Rule) -> dict:
    """Train with sums in matrices of low rank, ranks out of step; return the last gradients."""
    net = made("matrices")
    wrapped = DistributedDataParallel(net)
    htv.distributed.ddp(wrapped, htv.attach(net, rule), hook=hook_of("powerSGD_hook"))
    x, y = shard(batch(), rank, world)
    for number in range(12):
        wrapped.zero_grad()
        time.sleep(0.02 * ((rank + number) % world))
        F.cross_entropy(wrapped(x), y).backward()
    return gradients(net)
