"""The machine as a JSON line: card, versions, cores. A process of its own, so that the kit holds no CUDA context."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch

from eve_ds.environment import version

PACKAGES = ("deepspeed", "triton", "numpy", "pyarrow", "jsonargparse")


def facts() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cuda_found": torch.cuda.is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in PACKAGES},
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "card_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(facts()))
