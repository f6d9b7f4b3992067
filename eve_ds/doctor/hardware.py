"""Processors, memory and limits, from /proc, /sys and the standard library. What cannot be read is None or absent."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path
from typing import Any

from eve_ds.doctor.software import run

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
SHARED_MEMORY = Path("/dev/shm")


def cpu() -> dict[str, Any]:
    """Model, cores, the cores that this process may use, and the features that decide a matrix product's speed."""
    text = read(CPUINFO)
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    flags = fields.get("flags", fields.get("Features", "")).split()  # x86, Arm
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "quota_cores": quota(),
        "features": {name: name in flags for name in FEATURES},
    }


def quota() -> float | None:
    """Cores' worth of time that a container's limit grants; None without a limit."""
    parts = read(CPU_QUOTA).split()
    if len(parts) != 2 or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1])


def memory() -> dict[str, int | None]:
    """Bytes: main memory, /dev/shm and what is free of it; and the limit of open files."""
    fields = dict(line.split(":", 1) for line in read(MEMINFO).splitlines() if ":" in line)
    kibibytes = {name: int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable") if name in fields}
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return {
        "total_bytes": kibibytes["MemTotal"] * 1024 if "MemTotal" in kibibytes else None,
        "available_bytes": kibibytes["MemAvailable"] * 1024 if "MemAvailable" in kibibytes else None,
        "shm_bytes": shared.total if shared else None,
        "shm_free_bytes": shared.free if shared else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def nvidia() -> dict[str, Any]:
    """Driver and GPUs as nvidia-smi names them; {} where there is no driver."""
    code, output, _ = run(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"], 30)
    rows = [line.split(", ", 1) for line in output.splitlines() if ", " in line]
    if code != 0 or not rows:
        return {}
    return {"driver": rows[0][0], "gpus": [row[1] for row in rows]}


def toolkit() -> str | None:
    """Version of the CUDA compiler on PATH or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    code, output, _ = run([str(Path(home) / "bin" / "nvcc") if home else "nvcc", "-V"], 30)
    return output.rpartition("release ")[2].split(",")[0].strip() if code == 0 and "release " in output else None


def read(path: Path) -> str:
    """A file's text; "" if it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def held_open(path: Path) -> bool:
    """Whether a process of this host has a file open, as far as this user may see in /proc.

    The process that builds a torch extension keeps its ``lock`` open (torch.utils.file_baton); those that wait do not.
    """
    wanted = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:
            continue  # the process has ended, or is another user's
    return False
