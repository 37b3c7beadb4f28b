"""Models that several ranks train without `htv.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import htv


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def ddp(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def fsdp2(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh())
    return fully_shard(net, mesh=mesh())


def tensor_parallel(net: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(net, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


WRAPS = {"ddp": ddp, "fsdp2": fsdp2, "tensor parallel": tensor_parallel}


def trained_alone(rank: int, world: int, stack: str, order: str, rule: htv.Rule) -> bool:
    """Tell whether the gradient is the plain one; or raise what training raises."""
    if stack == "accumulate":
        with htv.attach(made(), rule) as handle, handle.accumulate():
            return False
    wrap = WRAPS[stack]
    net, x = made(), torch.randn(6, 5, generator=torch.Generator().manual_seed(rank))
    if order == "before":
        htv.attach(net, rule)
    wrapped = wrap(net)
    if order == "after":
        htv.attach(net, rule)
    if order == "wrapper":
        htv.attach(wrapped, rule)
    wrapped(x).square().sum().backward()
    twin = wrap(made())
    twin(x).square().sum().backward()
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    return all(torch.allclose(_whole(p.grad), _whole(q.grad), atol=1e-6) for p, q in pairs)


def _whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad
