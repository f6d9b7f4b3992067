"""What the doctor finds on a machine without a fault."""

from __future__ import annotations

from typing import Any

HEALTHY: dict[str, Any] = {
    "environ": {"PATH": ""},
    "pins": {"torch": "2.13.0", "deepspeed": "0.19.8", "mpi4py": "4.1.2"},
    "versions": {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "mpi4py": None, "triton": None},
    "torch": {"version": "2.13.0+cpu", "cuda": None, "devices": []},
    "memory": {"shm_bytes": 2**33, "shm_free_bytes": 2**33, "open_files": 65536},
    "cores": 4,
}
