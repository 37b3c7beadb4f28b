"""What ranks do wrong in tests of `htv.distributed`; each function runs on every rank."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import weakref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import htv
from support.rank_jobs import Skipping, skipped
from support.rank_models import aggregated, batch, gradients, made, shard

AND = htv.AndMask(0.4)


def wrapped(rule=AND, serve=True, vote="examples", stats=False, **settings):
    """Return (DistributedDataParallel, handle) of a fresh model."""
    net = made()
    handle = htv.attach(net, rule, stats=stats)
    model = DistributedDataParallel(net, **settings)
    if serve:
        htv.distributed.ddp(model, handle, vote=vote)
    return model, handle


def step(model, rank, world, part=slice(None)):
    x, y = shard(batch(), rank, world)
    F.cross_entropy(model(x[part]), y[part]).backward()


def not_served(rank, world):
    step(wrapped(serve=False)[0], rank, world)


def different_rules(rank, world):
    wrapped(htv.AndMask(0.4 if rank == 0 else 0.5))


def different_models(rank, world):
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + rank)])
    htv.attach(net, AND, process_group=dist.group.WORLD)


def second_wrapper(rank, world):
    model, _ = wrapped()
    step(DistributedDataParallel(model.module), rank, world)


def second_wrapper_of_more(rank, world):
    model, _ = wrapped()
    more = nn.Sequential(model.module, nn.Linear(5, 5).double())
    step(DistributedDataParallel(more), rank, world)


def wrapper_in_wrapper(rank, world):
    """torch lets it pass; the outer one would put the plain average into .grad."""
    model, _ = wrapped()
    step(DistributedDataParallel(model), rank, world)


def second_wrapper_asked(rank, world):
    model, handle = wrapped()
    htv.distributed.ddp(DistributedDataParallel(model.module), handle)


def second_wrapper_after_detach(rank, world):
    """What the refusals say is to be done; return the gradients."""
    model, handle = wrapped()
    step(model, rank, world)
    second = DistributedDataParallel(model.module)
    handle.detach()
    htv.distributed.ddp(second, htv.attach(model.module, AND))
    second.zero_grad()
    step(second, rank, world)
    return gradients(second)


def different_votes(rank, world):
    net = made()
    handle = htv.attach(net, AND)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle, vote="examples" if rank == 0 else "ranks")


def different_stats(rank, world):
    wrapped(stats=rank == 0)


def around_the_wrapper(rank, world):
    model, _ = wrapped()
    step(model.module, rank, world)


def a_hook_before(rank, world):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    net = made()
    handle = htv.attach(net, AND)
    model = DistributedDataParallel(net)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    htv.distributed.ddp(model, handle)


def called_twice(rank, world):
    model, handle = wrapped()
    htv.distributed.ddp(model, handle)


def stepping_in_backward(rank, world):
    net = made()
    net.c.weight.register_post_accumulate_grad_hook(lambda p: None)
    htv.distributed.ddp(DistributedDataParallel(net), htv.attach(net, AND))


def stepping_in_backward_later(rank, world):
    model, _ = wrapped()
    model.module.c.weight.register_post_accumulate_grad_hook(lambda p: None)
    step(model, rank, world)


def _optimized_in_backward(rank, world, when, exclude=(), vote="examples"):
    from torch.distributed.optim import _apply_optimizer_in_backward

    net, times = made(), iter(("before wrapping", "before", "after", "after a step"))

    def now():
        if next(times) == when:
            _apply_optimizer_in_backward(torch.optim.SGD, net.c.parameters(), {"lr": 0.1})

    handle = htv.attach(net, AND, exclude=exclude)
    now()
    model = DistributedDataParallel(net)
    now()
    htv.distributed.ddp(model, handle, vote=vote)
    now()
    for _ in range(2):
        model.zero_grad()
        step(model, rank, world)
        now()


def optimizer_in_backward_before_wrapping(rank, world):
    _optimized_in_backward(rank, world, "before wrapping")


def optimizer_in_backward_before(rank, world):
    _optimized_in_backward(rank, world, "before")


def optimizer_in_backward_before_local(rank, world):
    _optimized_in_backward(rank, world, "before", vote="local")


def optimizer_in_backward_after(rank, world):
    _optimized_in_backward(rank, world, "after")


def optimizer_in_backward_after_a_step(rank, world):
    _optimized_in_backward(rank, world, "after a step")


def optimizer_in_backward_of_excluded(rank, world):
    _optimized_in_backward(rank, world, "before", exclude="c")


def served_inside_accumulate(rank, world):
    """One rank alone may accumulate before it is told of the others."""
    net = nn.Linear(4, 2)
    handle = htv.attach(net, AND, process_group=dist.group.WORLD)
    model = DistributedDataParallel(net)
    with handle.accumulate():
        htv.distributed.ddp(model, handle)


def not_zeroed(rank, world):
    model, _ = wrapped()
    step(model, rank, world)
    step(model, rank, world)


def accumulated(rank, world):
    model, handle = wrapped()
    with handle.accumulate():
        step(model, rank, world)


def tokens(rank, world):
    model, handle = wrapped()
    with handle.tokens():
        step(model, rank, world)


def groups_on_two_ranks(rank, world):
    model, handle = wrapped()
    with handle.groups(torch.tensor([0, 0, 1, 1, 2, 2])):
        step(model, rank, world)


def order_rule_without_meeting(rank, world):
    model, _ = wrapped(htv.Median())
    with model.no_sync():
        step(model, rank, world)


def _of_parts(rank, world, rule, sizes):
    """Take a step of micro-batches of these sizes, the ranks meeting in the last."""
    model, _ = wrapped(rule)
    x, y = shard(batch(), rank, world)
    begin = 0
    for i, size in enumerate(sizes):
        part = slice(begin, begin + size)
        with model.no_sync() if i < len(sizes) - 1 else contextlib.nullcontext():
            F.cross_entropy(model(x[part]), y[part]).backward()
        begin += size


def buckets_of_unequal_ranks(rank, world):
    _of_parts(rank, world, htv.MedianOfMeans(2 * world), [4 - 2 * rank])


def buckets_of_unequal_size(rank, world):
    _of_parts(rank, world, htv.MedianOfMeans(2 * world), [5])


def a_bucket_without_groups(rank, world):
    _of_parts(rank, world, htv.MedianOfMeans(2 * world), [1])


def micro_batches_of_other_number(rank, world):
    _of_parts(rank, world, htv.MedianOfMeans(2 * world), [2, 2, 2])


def micro_batches_of_unequal_size(rank, world):
    """On rank 1 alone; both are told."""
    _of_parts(rank, world, htv.MedianOfMeans(2 * world), [3 - rank, 3 + rank])


def after_a_block_that_raised(rank, world, rule):
    """Return the gradients of a block behind one that failed when it had counted fewer voters."""
    net = made()
    handle = htv.attach(net, rule, process_group=dist.group.WORLD)
    with contextlib.suppress(ZeroDivisionError), handle.accumulate():
        step(net, rank, world, slice(2))
        raise ZeroDivisionError
    with handle.accumulate():
        step(net, rank, world)
    return gradients(net)


def votes_after_the_count(rank, world):
    """Layer b's rule has the ranks count in the first backward; the second leaves it out."""
    net = Skipping().double()
    rules = {"a": AND, "b": htv.Median()}
    handle = htv.attach(net, lambda name, _: rules[name[0]], process_group=dist.group.WORLD)
    with handle.accumulate():
        for net.use in ("ab", "a"):
            step(net, rank, world)


def order_rule_met_late(rank, world):
    """The first micro-batch does not reach the layer whose contributions are to be ranked."""
    net = Skipping().double()
    rules = {"a": AND, "b": htv.Median()}
    handle = htv.attach(net, lambda name, _: rules[name[0]])
    model = DistributedDataParallel(net, find_unused_parameters=True)
    htv.distributed.ddp(model, handle)
    net.use = "a"
    with model.no_sync():
        step(model, rank, world)
    net.use = "ab"
    step(model, rank, world)


def order_rule_of_many_rows(rank, world):
    net = nn.Linear(40, 40)
    handle = htv.attach(net, htv.Median())
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    model(torch.randn(2000, 40)).square().sum().backward()


def _group_of_micro_batches(rank, world, rules, uses):
    """Two backwards in one block, of a model that runs the layers that `uses` says."""
    net = Skipping().double()
    handle = htv.attach(net, lambda name, _: rules[name[0]], process_group=dist.group.WORLD)
    with handle.accumulate():
        for net.use in uses:
            step(net, rank, world)


def group_of_order_rules(rank, world):
    median = htv.Median()
    _group_of_micro_batches(rank, world, {"a": median, "b": median}, ("ab", "ab"))


def group_of_order_rules_first(rank, world):
    """What was exchanged in the first backward misses the voters of the second."""
    _group_of_micro_batches(rank, world, {"a": htv.Median(), "b": AND}, ("ab", "b"))


class Own(htv.Rule):
    def reduce(self, contributions):
        return contributions.mean(dim=0)


def own_rule(rank, world):
    wrapped(Own())


def waiting_at_finish(rank, world):
    model, handle = wrapped()
    with model.no_sync():
        step(model, rank, world)
    handle.finish()


def saved_in_a_step(rank, world):
    model, handle = wrapped()
    with model.no_sync():
        step(model, rank, world)
    model.state_dict()


def median_of_unequal_buckets(rank, world):
    model, _ = wrapped(htv.MedianOfMeans(world))
    step(model, rank, world, slice(2 + rank))


def one_example_in_all(rank, world):
    net = made()
    handle = htv.attach(net, AND)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    x, y = batch()
    F.cross_entropy(model(x[:1]), y[:1]).backward()


def ignored_parameters(rank, world):
    net = made()
    handle = htv.attach(net, AND)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["c.weight"])
    htv.distributed.ddp(DistributedDataParallel(net), handle)


def group_outside_accumulate(rank, world):
    net = made()
    htv.attach(net, AND, process_group=dist.group.WORLD)
    step(net, rank, world)


def old_sharding(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(made(), device_id=torch.device("cpu"))
    htv.attach(net, AND)


def not_sharded(rank, world):
    net = made()
    htv.distributed.fsdp(net, htv.attach(net, AND))


def sharded_but_not_served(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(made(), mesh=init_device_mesh("cpu", (world,)))
    htv.attach(net, AND)
    step(net, rank, world)


def replicas_of_order_rules(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    net = fully_shard(made(), mesh=mesh)
    htv.distributed.fsdp(net, htv.attach(net, htv.Median()), vote="ranks")


def replicas_of_voters(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    net = fully_shard(made(), mesh=mesh)
    htv.distributed.fsdp(net, htv.attach(net, AND), vote="ranks")


def voters_reduced_by_parts(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(made(), mesh=init_device_mesh("cpu", (world,)))
    htv.distributed.fsdp(net, htv.attach(net, AND), vote="ranks")
    net.set_is_last_backward(False)
    step(net, rank, world)


def buckets_reduced_by_parts(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(made(), mesh=init_device_mesh("cpu", (world,)))
    htv.distributed.fsdp(net, htv.attach(net, htv.MedianOfMeans(2 * world)))
    net.set_is_last_backward(False)
    step(net, rank, world)


def sharded_and_reentrant(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = made("checkpointed, reentrant")
    for part in (net.a, net):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    htv.distributed.fsdp(net, htv.attach(net, AND))
    step(net, rank, world)


def a_part_not_sharded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = made()
    fully_shard(net.a, mesh=init_device_mesh("cpu", (world,)))
    htv.distributed.fsdp(net, htv.attach(net, AND))


def one_rank_raises(rank, world):
    """On rank 1 the backward fails after the first layer's contributions are in."""
    model, _ = wrapped(bucket_cap_mb=0.004)
    step(model, rank, world)
    model.zero_grad()
    if rank == 1:

        def fail(grad):
            raise ZeroDivisionError("injected")

        model.module.a.register_full_backward_hook(lambda *_: fail(None))
    step(model, rank, world)
    return gradients(model.module)


def one_rank_dies(rank, world):
    model, _ = wrapped(bucket_cap_mb=0.004)
    step(model, rank, world)
    model.zero_grad()
    if rank == 1:
        model.module.b.register_full_backward_hook(lambda *_: os._exit(1))
    step(model, rank, world)
    return gradients(model.module)


def one_rank_skips_a_step(rank, world):
    """Rank 1 leaves out a micro-batch's error and goes on: its votes are those of another step."""
    model, handle = wrapped()
    if rank == 1:
        handle._session.joint.of_ranks.rounds.number += 1
    step(model, rank, world)


def after_detach(rank, world):
    """The model trains plainly again, and another handle may take it over."""
    model, handle = wrapped()
    step(model, rank, world)
    handle.detach()
    model.zero_grad()
    step(model, rank, world)
    plain = gradients(model.module)
    model.zero_grad()
    again = htv.attach(model.module, AND)
    htv.distributed.ddp(model, again)
    step(model, rank, world)
    return plain, gradients(model.module)


def copied_wrapper(rank, world):
    """Return the gradients of a copy, which is not attached, and those once it votes as well."""
    model, _ = wrapped()
    step(model, rank, world)
    model.zero_grad()
    other = copy.deepcopy(model)
    step(other, rank, world)
    plain = gradients(other)
    other.zero_grad()
    htv.distributed.ddp(other, htv.attach(other.module, AND))
    step(other, rank, world)
    return plain, gradients(other)


def groups_on_one_rank_each(rank, world, rule=AND):
    model, handle = wrapped(rule)
    ids = torch.tensor([0, 0, 1, 1, 2, 2]) + 10 * rank
    with handle.groups(ids):
        step(model, rank, world)
    return gradients(model.module)


def many_voters(rank, world, examples, rule=None):
    """More voters than one byte counts; return the gradients, and those of one process."""
    rule = htv.SignSum() if rule is None else rule
    torch.manual_seed(0)
    net = nn.Linear(5, 4).double()
    x = torch.randn(examples, 5, dtype=torch.float64)
    handle = htv.attach(net, rule)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    model(shard((x,), rank, world)[0]).square().mean().backward()
    found = gradients(net)
    handle.detach()
    net.zero_grad()
    htv.attach(net, rule)
    with torch.enable_grad():
        F.mse_loss(net(x), torch.zeros(examples, 4, dtype=torch.float64)).backward()
    return found, gradients(net)


def forgotten(rank, world):
    """Tell whether model, wrapper and session are freed once nobody holds them."""
    model, handle = wrapped()
    step(model, rank, world)
    left = weakref.ref(model), weakref.ref(model.module), weakref.ref(handle._session)
    del model, handle
    gc.collect()
    return [reference() is None for reference in left]


def joined(rank, world, stats=False):
    """Rank 1 runs out of examples after one step; return rank 0's gradients of the second, or what
    all ranks tell of it.
    """
    model, handle = wrapped(bucket_cap_mb=0.004, stats=stats)
    found = None
    with model.join():
        for _ in range(2 - rank):
            model.zero_grad()
            step(model, rank, world)
            found = gradients(model.module)
    return handle.stats() if stats else found


# ---- what torch itself would let through, with gradients that are no vote ----


def backward_again(rank, world):
    """DistributedDataParallel brings gradients together once per forward."""
    model, _ = wrapped()
    x, y = shard(batch(), rank, world)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def two_forwards_first(rank, world):
    model, _ = wrapped()
    x, y = shard(batch(), rank, world)
    losses = [F.cross_entropy(model(x), y), F.cross_entropy(model(2 * x), y)]
    for loss in losses:
        model.zero_grad()
        loss.backward()


def forward_alone_in_no_sync(rank, world):
    model, _ = wrapped()
    x, y = shard(batch(), rank, world)
    with model.no_sync():
        loss = F.cross_entropy(model(x), y)
    loss.backward()


def evaluated_with_gradients(rank, world):
    """A forward that no backward follows, and then a micro-batch."""
    model, _ = wrapped()
    model(shard(batch(), rank, world)[0])
    with model.no_sync():
        step(model, rank, world)


def backward_alone_in_no_sync(rank, world):
    model, _ = wrapped()
    x, y = shard(batch(), rank, world)
    loss = F.cross_entropy(model(x), y)
    with model.no_sync():
        loss.backward()


def unfrozen_after_wrapping(rank, world):
    net = made("frozen weight")
    handle = htv.attach(net, AND)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    step(model, rank, world)
    net.b.weight.requires_grad_(True)
    model.zero_grad()
    step(model, rank, world)


def dropped_micro_batch(rank, world, set_to_none, views, rule=AND):
    """zero_grad() drops a micro-batch, as without htv; return the gradients of the next step."""
    model, _ = wrapped(rule, gradient_as_bucket_view=views)
    for _ in range(2):
        with model.no_sync():
            step(model, rank, world, slice(2))
        model.zero_grad(set_to_none=set_to_none)
        step(model, rank, world)
        found = gradients(model)
        model.zero_grad(set_to_none=set_to_none)
    return found


def dropped_in_part(rank, world):
    model, _ = wrapped()
    with model.no_sync():
        step(model, rank, world)
    model.module.b.zero_grad()
    step(model, rank, world)


def dropped_before_its_backward(rank, world):
    model, _ = wrapped()
    x, y = shard(batch(), rank, world)
    with model.no_sync():
        one, other = F.cross_entropy(model(x), y), F.cross_entropy(model(2 * x), y)
        one.backward()
        model.zero_grad()
        other.backward()


def layer_left_out_once(rank, world, rule, uses):
    """One of two micro-batches does not reach layer b; return the gradients, and those of one
    process.

    uses:  the layers that each reaches.
    """
    net = Skipping().double()
    handle = htv.attach(net, rule)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    htv.distributed.ddp(model, handle)
    net.use = uses[0]
    with model.no_sync():
        step(model, rank, world, slice(3))
    net.use = uses[1]
    step(model, rank, world, slice(3, 6))
    found = gradients(model)
    handle.detach()
    contributed = {name: [] for name in found}
    for e, (x, y) in enumerate(zip(*batch(), strict=True)):
        net.zero_grad()
        net.use = uses[e % 6 // 3]
        (F.cross_entropy(net(x), y) / (3 * world)).backward()
        for name, p in net.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            contributed[name].append(grad)
    return found, aggregated({k: torch.stack(c) for k, c in contributed.items()}, rule)


def _reduced_one_by_one(rank, world, units, uses, zero=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, mesh = Skipping().double(), init_device_mesh("cpu", (world,))
    for part in [net.a, net.b, net] if units else [net]:
        fully_shard(part, mesh=mesh)
    handle = htv.attach(net, AND)
    htv.distributed.fsdp(net, handle)
    for i, net.use in enumerate(uses):
        net.set_is_last_backward(i == len(uses) - 1)
        step(net, rank, world)
        if zero is not None:
            net.zero_grad(set_to_none=zero)


def unit_left_out_of_the_last(rank, world):
    _reduced_one_by_one(rank, world, True, ("ab", "a"))


def layers_take_turns(rank, world):
    """Votes of the one and the other are of one size."""
    _reduced_one_by_one(rank, world, False, ("a", "b"))


def shards_dropped(rank, world):
    _reduced_one_by_one(rank, world, True, ("ab", "ab"), zero=True)


def shards_zeroed(rank, world):
    _reduced_one_by_one(rank, world, True, ("ab", "ab"), zero=False)


def sharded(world, parts=("",), exclude=()):
    """Return a fresh model, of which these parts were sharded, with votes of all ranks."""
    net = made()
    shard_parts(net, world, parts)
    htv.distributed.fsdp(net, htv.attach(net, AND, exclude=exclude))
    return net


def shard_parts(net, world, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for part in parts:
        fully_shard(net.get_submodule(part), mesh=init_device_mesh("cpu", (world,)))


def _changed_after_fsdp(rank, world, change):
    net = sharded(world)
    change(net)
    step(net, rank, world)


def part_sharded_late(rank, world):
    net = sharded(world, parts="anb", exclude="c")
    shard_parts(net, world, "c")
    step(net, rank, world)


def root_sharded_late(rank, world):
    net = sharded(world, parts="anbc")
    shard_parts(net, world, [""])
    step(net, rank, world)


def _caught(net, part, rank, world):
    """Run a backward that fails where the gradient of a part's output comes, in the user's code."""
    going_wrong = [True]

    def fail(grad):
        if going_wrong:
            raise ZeroDivisionError

    def watch(module, inputs, output):
        output.register_hook(fail)

    with net.get_submodule(part).register_forward_hook(watch):
        try:
            step(net, rank, world)
        except ZeroDivisionError:
            going_wrong.clear()
    assert not going_wrong


def wrapped_and_failed(rank, world):
    model, _ = wrapped()
    _caught(model, "module.b", rank, world)
    model.zero_grad()
    step(model, rank, world)


def sharded_and_failed(rank, world, part="b", parts=("a", "n", "b", "c", "")):
    net = sharded(world, parts)
    _caught(net, part, rank, world)
    net.zero_grad()
    step(net, rank, world)


def sharded_and_failed_first(rank, world):
    """Before anything came: FSDP2 leaves the gradients of the next backward apart, silently."""
    sharded_and_failed(rank, world, "")


def sharded_whole_and_failed(rank, world):
    sharded_and_failed(rank, world, "b", [""])


def sharded_and_failed_in_micro_batch(rank, world):
    net = sharded(world)
    net.set_requires_gradient_sync(False)
    _caught(net, "b", rank, world)
    net.set_requires_gradient_sync(True)
    step(net, rank, world)


def divide_factor_after(rank, world):
    _changed_after_fsdp(rank, world, lambda net: net.set_gradient_divide_factor(1.0))


def all_reduce_hook_after(rank, world):
    _changed_after_fsdp(rank, world, lambda net: net.set_all_reduce_hook(lambda sums: None))


def group_not_zeroed(rank, world):
    net = made()
    handle = htv.attach(net, AND, process_group=dist.group.WORLD)
    for _ in range(2):
        with handle.accumulate():
            step(net, rank, world)


def layer_skipped_on_one_rank(rank, world):
    """Order rules over examples meet layer by layer: here at layers that differ."""
    skipped(rank, world, htv.Median(), ("ab", "a"), "examples")


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x):
        return self.a(x), self.b(x)


def one_backward_per_head(rank, world):
    """DistributedDataParallel would reduce once both have run; examples would vote twice."""
    net = TwoHeads().double()
    handle = htv.attach(net, AND)
    model = DistributedDataParallel(net)
    htv.distributed.ddp(model, handle)
    x, y = shard(batch(), rank, world)
    for output in model(x):
        F.cross_entropy(output, y).backward()


def two_handles(rank, world):
    net = TwoHeads().double()
    handles = [htv.attach(part, AND) for part in net.children()]
    model = DistributedDataParallel(net)
    for handle in handles:
        htv.distributed.ddp(model, handle)
