"""What this device can do at most: a large bf16 product, a copy within its memory, a pinned copy from the host.

    python -m tests.gpu.ceilings

Random values: zeros run 13 % faster. Prints a JSON line.
"""

from __future__ import annotations

import json
import statistics

import torch

from eve_ds.bench.timing import milliseconds
from tests.gpu.kit_sizes import kit_device

REPEATS, WARMUP = 15, 3


def main() -> dict[str, float | int]:
    device = kit_device() or torch.device("cpu")
    on_gpu = device.type == "cuda"
    size, count = (8192, 2**30) if on_gpu else (256, 2**22)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.randint(0, 255, (count,), dtype=torch.uint8, pin_memory=on_gpu)

    def median(run: object) -> float:
        return statistics.median([milliseconds(run, device) for _ in range(WARMUP + REPEATS)][WARMUP:])  # type: ignore[arg-type]

    product = median(lambda: a @ b)
    copy = median(lambda: target.copy_(source))
    from_host = median(lambda: target.copy_(host, non_blocking=True))
    return {
        "product_size": size,
        "product_tflops": 2 * size**3 / product / 1e9,
        "device_copy_tb_per_second": 2 * count / copy / 1e9,  # read and written
        "host_to_device_gb_per_second": count / from_host / 1e6,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
