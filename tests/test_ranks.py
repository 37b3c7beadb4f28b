"""Several ranks: each would vote alone, so every rule but Mean raises, in whatever order things are
wrapped.
"""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import htv

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def ddp(net, **_):
    return nn.parallel.DistributedDataParallel(net)


def fsdp2(net):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(net):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def outcome(call):
    try:
        return call()
    except RuntimeError as error:
        return str(error)


def attached(wrap, order, rule):
    """What training raises, or whether the gradient is the plain one."""
    net, x = model(), torch.randn(6, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    if order == "before":
        htv.attach(net, rule)
    wrapped = wrap(net)
    if order == "after":
        htv.attach(net, rule)
    if order == "wrapper":
        htv.attach(wrapped, rule)
    wrapped(x).square().sum().backward()
    twin = wrap(model())
    twin(x).square().sum().backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    return all(torch.allclose(whole(p.grad), whole(q.grad), atol=1e-6) for p, q in pairs)


def accumulated():
    with htv.attach(model(), htv.Mean()) as handle, handle.accumulate():
        pass


def each_rank(rank, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, wrap in {"ddp": ddp, "fsdp2": fsdp2, "tensor parallel": tensor_parallel}.items():
        for order in ("before", "after") + (("wrapper",) if wrap is ddp else ()):
            for rule in (htv.AndMask(0.4), htv.Mean()):
                key = f"{name} {order} {type(rule).__name__}"
                found[key] = outcome(
                    lambda wrap=wrap, order=order, rule=rule: attached(wrap, order, rule)
                )
    found["accumulate"] = outcome(accumulated)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(each_rank, (folder,), nprocs=2, start_method="fork")
        yield torch.load(f"{folder}/found.pt")


@pytest.mark.parametrize("order", ["before", "after", "wrapper"])
def test_data_parallel(found, order):
    assert (
        "DistributedDataParallel on 2 ranks: each rank would vote alone"
        in found[f"ddp {order} AndMask"]
    )
    assert found[f"ddp {order} Mean"] is True


@pytest.mark.parametrize("stack", ["fsdp2", "tensor parallel"])
def test_sharded_models(found, stack):
    assert "sharded over ranks" in found[f"{stack} after AndMask"]
    assert "parameters changed while attached" in found[f"{stack} before AndMask"]
    assert "parameters changed while attached" in found[f"{stack} before Mean"]
    assert found[f"{stack} after Mean"] is True


def test_accumulation_over_ranks(found):
    assert "accumulate() with 2 ranks" in found["accumulate"]
