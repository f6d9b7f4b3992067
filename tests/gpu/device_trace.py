"""What a function does on the device: launches, host synchronizations, and time by kind of operation."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

VALUE_READ = "aten::_local_scalar_dense"  # for which the host waits; the CPU has these as well
SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # of value reads, and of copies from and to pageable memory
# Parts of the names of kernels (and of operations, on the CPU); the first kind that fits counts.
KINDS = {
    "attention": ("flash", "fmha", "attention", "cudnn", "mha"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitK", "wgmma", "sm90_", "::mm", "addmm", "bmm"),
    "softmax and loss": ("softmax", "SoftMax", "nll"),
    "normalization": ("layer_norm", "LayerNorm", "GammaBeta"),
    "compiled": ("triton",),
    "copies and cat": ("Cat", "::cat", "copy", "Memcpy"),
    "fills": ("Memset", "fill", "Fill", "zero_"),
    "indices and sorts": ("index", "sort", "Sort", "scatter", "gather", "radix", "scan", "embedding"),
    "reductions": ("reduce", "Reduce", "::sum", "::mean", "norm"),
    "communication": ("nccl", "c10d"),
    "elementwise": ("elementwise", "::add", "::mul", "::div", "foreach", "multi_tensor", "silu", "gelu"),
}
TOP = 20


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def trace(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Figures of one run, by name.

    - launches: operations on the device; on the CPU, operations of torch.
    - value_reads, host_syncs: for which the host waits; the latter are all, copies from pageable memory too.
    - wall_ms, busy_ms: of the host, and of the operations; copies beside kernels count twice.
    - ms_by_kind, and top: the names that take longest, as [ms, times, name].
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # else torch 2.11 warns
        _synchronize(device)
        began = time.perf_counter()
        run()
        _synchronize(device)
        wall = 1000 * (time.perf_counter() - began)
    calls: collections.Counter[str] = collections.Counter()
    spent: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        calls[event.name] += 1
        if on_gpu and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent[event.name] += event.self_device_time_total / 1000
            count[event.name] += 1
        elif not on_gpu and event.name.startswith("aten::"):
            spent[event.name] += event.self_cpu_time_total / 1000
            count[event.name] += 1
    kinds: collections.Counter[str] = collections.Counter()
    for name, ms in spent.items():
        kinds[kind_of(name)] += ms
    return {
        "launches": sum(count.values()),
        "value_reads": calls[VALUE_READ],
        "host_syncs": sum(calls[name] for name in SYNCS),
        "wall_ms": wall,
        "busy_ms": sum(spent.values()),
        "ms_by_kind": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
        "top": [[round(ms, 2), count[name], name[:100]] for name, ms in spent.most_common(TOP)],
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
