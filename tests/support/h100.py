"""An H100 as inductor sees it, on a machine without one: of a graph that was traced on the CPU, and whose forward and
backward part were divided there, it schedules the launches as it would for an H100."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor import scheduler
from torch._inductor.fx_passes import reinplace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    is_integrated=0,
    gcnArchName="",
)
OF_TORCH: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "device": lambda device: contextlib.nullcontext(),
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *args, **kwargs: None,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
}
OF_THE_COMPILER: dict[str, Any] = {
    "is_available": staticmethod(lambda: True),
    "get_device_properties": staticmethod(lambda device=None: PROPERTIES),
    "get_compute_capability": staticmethod(lambda device=None: 90),
    "is_triton_capable": staticmethod(lambda device=None: True),
    "raise_if_triton_unavailable": staticmethod(lambda device=None: None),
}


@contextlib.contextmanager
def one_h100() -> Iterator[None]:
    """Within, torch takes an H100 to be there, as far as the compiler asks; nothing can run on it."""
    interface = device_interface.CudaInterface
    patches = [(torch.cuda, name, value) for name, value in OF_TORCH.items()]
    patches += [(interface, name, value) for name, value in OF_THE_COMPILER.items()]
    patches += [
        (interface.Worker, "get_device_properties", staticmethod(lambda device=None: PROPERTIES)),
        (interface.Worker, "current_device", staticmethod(lambda: 0)),
        (_triton, "has_triton", lambda: True),
        (scheduler, "has_triton", lambda: True),
        # Called to check shapes alone, on fake tensors.
        (reinplace, "_inplace_generalized_scatter", lambda inputs, source, views: inputs),
    ]
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def move_graph(module: torch.fx.GraphModule) -> list[Any]:
    """Turn a graph traced on the CPU into the same on CUDA. Within ``one_h100``.

    Returns:
        its inputs, fake tensors on CUDA.
    """
    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    traced = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in traced if isinstance(value, Tensor))
    with mode:
        inputs = [_on_cuda(value) if isinstance(value, Tensor) else value for value in traced]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
    module.recompile()
    found = [node.meta.get("val") for node in module.graph.nodes]
    assert all(value.is_cuda for value in found if isinstance(value, Tensor))
    return inputs


def _on_cuda(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
