"""The machine: its description, threads, and memory bandwidth."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from eve_ds.bench.timing import Candidate
from preprocessing.errors import UserError


def use_all_cores(threads: int | None) -> None:
    """Set the number of torch threads; None: all cores available to this process, regardless of OMP_NUM_THREADS."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def choose_device(name: str) -> torch.device:
    """The torch device; ``auto`` is the GPU if there is one.

    Raises:
        UserError: torch does not know this device, or cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from error
    return device


def facts(device: torch.device) -> dict[str, Any]:
    """Description for the JSON rows: processor, cores, threads, instruction set, GPU, versions, load average."""
    found = {
        "device": str(device),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def copy_candidate(device: torch.device, size: int) -> tuple[Candidate, int]:
    """A copy of ``size`` bytes between two arrays, and the number of bytes that it reads and writes.

    Counted as in STREAM (McCalpin, https://www.cs.virginia.edu/stream), without the reads of cache lines before they
    are written. In-place operations, such as an optimizer step, read these lines anyway and can exceed this bandwidth.
    """
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    return Candidate(lambda: target.copy_(source)), 2 * size
