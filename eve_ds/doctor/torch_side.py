"""What needs torch: devices, live kernels, speeds. ``python -m eve_ds.doctor.torch_side`` prints JSON lines.

The doctor runs it as a child process. Each part is printed as soon as it is known, so a crash loses only what follows.
The GPU parts have not been run on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from evaluation.common import without_secrets

SECONDS = 0.4  # for each measurement
COPY_BYTES = 256 * 2**20  # beyond any cache's reach
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell(torch=build())
    for operation in operations(device):
        tell(**operation)
    if "--measure" in sys.argv[1:]:
        tell(speeds=speeds(device))


def tell(**part: Any) -> None:
    print(json.dumps(part), flush=True)


def build() -> dict[str, Any]:
    """torch's version and build, the devices that it sees, and the precision that ``auto`` chooses."""
    from eve_ds.engine.deepspeed_config import best_precision

    on_gpu = torch.cuda.is_available()
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version()) if on_gpu and not torch.version.hip else None
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": nccl,
        "threads": torch.get_num_threads(),
        "best_precision": best_precision(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [
            {"name": p.name, "bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in properties
        ],
    }


def operations(device: torch.device) -> Iterator[dict[str, Any]]:
    """For each operation of ``eve_ds.kernels`` {"operations.NAME": its alternatives and which one is used}."""
    from eve_ds.kernels import adam, group_activation, grouped_mm, layer_norm, permute

    asked: dict[str, Callable[[], Any]] = {
        "permute": lambda: permute.choice(device),
        "grouped_mm": lambda: grouped_mm.choice(device),
        "group_activation": lambda: group_activation.choice(device),
        "layer_norm": lambda: layer_norm.choice(device),
        "adam": lambda: adam.choice(device, offload=False),
        "adam_offload": lambda: adam.choice(device, offload=True),
    }
    for name, ask in asked.items():
        try:
            choice = ask()
        except Exception as error:  # noqa: BLE001  # a broken library is a finding, too
            yield {"operations." + name: {"error": without_secrets(f"{type(error).__name__}: {error}")[:200]}}
            continue
        alternatives = [dataclasses.asdict(alternative) for alternative in choice.alternatives]
        yield {
            "operations." + name: {
                "operation": choice.operation,
                "live": choice.live.name,
                "alternatives": alternatives,
            }
        }


def speeds(device: torch.device) -> dict[str, float]:
    """Bytes per second of copies (each byte read and written counts), FLOP per second of square matrix products."""
    found = {"memory_copy_bytes_per_s": copy_speed(torch.device("cpu"), torch.device("cpu")) * 2}
    if device.type == "cuda":
        found["device_copy_bytes_per_s"] = copy_speed(device, device) * 2
        found["host_to_device_bytes_per_s"] = copy_speed(torch.device("cpu"), device)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"matmul_{name}_flop_per_s"] = matmul_speed(device, dtype)
    return found


def copy_speed(source: torch.device, target: torch.device) -> float:
    """Bytes copied per second; from page-locked memory if the devices differ."""
    pinned = source.type != target.type
    values = torch.ones(COPY_BYTES // 4, device=source, pin_memory=pinned)
    copies = torch.zeros_like(values, device=target)
    return COPY_BYTES / quickest(lambda: copies.copy_(values, non_blocking=True), target)


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product: the fastest of those that fit into SECONDS."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    return 2 * side**3 / quickest(lambda: torch.mm(left, right, out=out), device)


def quickest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of the calls that fit into SECONDS, after one warm-up call."""
    best = float("inf")
    end = time.perf_counter() + SECONDS
    for turn in range(1000):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
        best = min(best, took) if turn else best
        if turn and time.perf_counter() > end:
            break
    return best


if __name__ == "__main__":
    main()
