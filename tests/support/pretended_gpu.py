"""A CUDA device that is not there: its tensors lie on the CPU, and whatever would wait for a device
raises `Waits`.

Operations run below autograd as they would on a GPU, so device and dtype of every tensor, and with
them all choices, are a GPU's. What is left out are its streams, its kernels and its memory.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
# The size of the result, or a number for the host, is known only when the device is done.
READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero,
    aten.nonzero_numpy, aten.argwhere, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.masked_select, aten.bincount,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Waits(AssertionError):
    """An operation that makes the host wait for the device."""


class OnDevice(Tensor):
    """A tensor of the pretended device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA,
        )  # fmt: skip
        self.inner = inner
        return self

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        raise Waits("tolist() of a tensor on the device")

    def numpy(self):
        raise Waits("numpy() of a tensor on the device")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def moves(func, args, kwargs) -> str | None:
    """ "in" or "out" where an operation copies between the host and the device."""
    if func.overloadpacket is aten._to_copy:
        there, wanted = isinstance(args[0], OnDevice), kwargs.get("device")
        goes = there if wanted is None else torch.device(wanted).type == "cuda"
        return _direction(there, goes)
    if func.overloadpacket in (aten.copy_, aten.copy):
        there, source = isinstance(args[0], OnDevice), isinstance(args[1], OnDevice)
        return _direction(source, there)
    return None


def _direction(is_there: bool, goes_there: bool) -> str | None:
    if is_there == goes_there:
        return None
    return "in" if goes_there else "out"


def _on_the_host(argument):
    if isinstance(argument, torch.device):
        return CPU
    return argument.inner if isinstance(argument, OnDevice) else argument


def waits(func, args, kwargs) -> str | None:
    """Why an operation on the device would wait for it, or None."""
    if func.namespace == "htv":
        return None  # it takes offsets on the host; what it does is watched
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    moved = moves(func, args, kwargs)
    if moved == "out":
        return "copies to the host"
    if moved == "in":
        source = args[0] if func.overloadpacket is aten._to_copy else args[1]
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return (
            None
            if asynchronous and hasattr(source, "pinned")
            else "copies at once, or what is not pinned"
        )
    if not any(isinstance(t, OnDevice) for t in tensors):
        return None
    if func.overloadpacket in READS:
        return "asks for values"
    if func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None:
        return "asks for the size of the result"
    if func.overloadpacket in INDEXED and any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    ):
        return "takes a mask for an index"
    if any(t.dim() > 0 and not isinstance(t, OnDevice) for t in tensors):
        return "takes a tensor on the host beside those on the device"
    return None


def run(func, args, kwargs):
    if (
        func.namespace == "aten"
    ):  # within an operator of htv, torch does not take composite ones apart
        with Device():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    reason = waits(func, args, kwargs)
    if reason:
        raise Waits(f"{func} {reason}")
    if func.overloadpacket is aten.is_pinned:
        return hasattr(args[0], "pinned")
    if func.overloadpacket in (aten.pin_memory, aten._pin_memory):
        pinned = args[0].clone()
        pinned.pinned = True
        return pinned
    if func.namespace == "htv":
        with Device():
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    devices = [
        torch.device(d).type for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device)
    ]
    there = "cuda" in devices or (
        "cpu" not in devices and any(isinstance(t, OnDevice) for t in tree_leaves(args))
    )
    given, options = tree_map(_on_the_host, (args, kwargs))
    if func.overloadpacket is aten._to_copy and moves(func, args, kwargs) is not None:
        out = func(*given, **options).clone()  # a copy, though both are on the CPU
    else:
        out = func(*given, **options)
    if not there:
        return out
    wrapped = tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class Device(TorchDispatchMode):
    """Makes what is asked for on a CUDA device on the pretended one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct Guard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device only() { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return only(); }
  Device getDevice() const override { return only(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, only()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, only()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def build_guard(folder: Path) -> list[str]:
    """The libraries to load before torch is imported, so that its autograd believes in a device."""
    if hasattr(torch._C, "_cuda_getDeviceCount"):
        return []
    source, library, home = (
        folder / "guard.cpp",
        folder / "guard.so",
        Path(torch.__file__).parent,
    )
    source.write_text(GUARD)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        abi,
        f"-I{home / 'include'}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(
        [*command, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"],
        check=True,
        capture_output=True,
    )
    return [str(home / "lib" / "libtorch_cpu.so"), str(library)]


@contextlib.contextmanager
def pretended(monkeypatch):
    """Inside, "cuda" is the pretended device."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    with torch.autograd.set_multithreading_enabled(False), Device():
        yield


def moved(model: nn.Module) -> nn.Module:
    """A model's parameters and buffers on the device; those that are tied stay so."""
    on_device = {
        p: nn.Parameter(OnDevice(p.detach().clone()), p.requires_grad) for p in model.parameters()
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, on_device[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, OnDevice(buffer.clone()))
    return model


def values(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor
