"""``RUN/provenance/start_N.json``: what each start of a training run ran: code, config, versions, machines, inputs.

A file a start, never changed afterwards. Rank 0 writes it when the weights are loaded, before the first step.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eve_ds.engine.callback import Callback
from eve_ds.engine.checkout import ROOT, code
from eve_ds.engine.distributed import gather
from eve_ds.weights.model_folder import PROVENANCE, start_number, starts
from preprocessing.errors import without_secrets
from preprocessing.local_files import write_json

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

VARIABLES = re.compile(
    "RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    "|PYTHONHASHSEED|CUBLAS_WORKSPACE_CONFIG|OMPI_COMM_WORLD_(SIZE|RANK)|PMI_(SIZE|RANK)|TORCHELASTIC_RESTART_COUNT"
    "|SLURM_(JOB_ID|JOB_NAME|JOB_NODELIST|ARRAY_JOB_ID|ARRAY_TASK_ID|NNODES|NTASKS|PROCID|RESTART_COUNT)"
    "|(NCCL|GLOO|DS)_[A-Z_]+"
)  # of launchers and libraries; none of them holds a password


class Provenance(Callback):
    """Writes the file of this start. Called by all ranks, which tell where they are."""

    def fit_start(self, trainer: Trainer) -> None:
        placement = gather({"host": socket.gethostname(), "device": str(trainer.device)})
        if trainer.is_main:
            path = next_file(trainer.output_dir)
            write_json(path, start_record(trainer, placement))


def next_file(run: Path) -> Path:
    """The file of the next start of the run in folder ``run``."""
    number = max(map(start_number, starts(run)), default=0) + 1
    return run / PROVENANCE / f"start_{number:04d}.json"


def start_record(trainer: Trainer, placement: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The content of the file. ``placement``: host and device of each rank."""
    config = dataclasses.asdict(trainer.config)
    seeds = {name: config[name]["seed"] for name in ("engine", "objective") if "seed" in config.get(name, {})}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": trainer.start_step,
        "total_steps": trainer.total_steps,
        "command": without_secrets(shlex.join(sys.orig_argv)),
        "directory": os.getcwd(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
        "code": code(ROOT),
        "versions": versions(),
        "machine": machine(),
        "topology": dataclasses.asdict(trainer.topology),
        "ranks": list(placement),
        "seeds": seeds,
        "inputs": trainer.identity.tree()["inputs"],
        "config": _redacted(config),
        "deepspeed_config": _redacted(trainer.engine.config),
    }


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_secrets(str(value))


def versions() -> dict[str, str]:
    """Of Python and of each installed package, from the names of the metadata folders (PEP 427): reading the metadata
    themselves takes a second."""
    found: dict[str, str] = {}
    for folder in map(Path, reversed(sys.path)):  # an earlier folder's package is the one that is imported
        for pattern in ("*.egg-info", "*.dist-info"):
            for name, _, version in (path.stem.partition("-") for path in folder.glob(pattern)):
                if version:
                    found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def machine() -> dict[str, Any]:
    """Operating system, processor and GPUs of this host; versions of driver, CUDA and NCCL where there are any."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {"os": _os_name(), "kernel": platform.release(), "cpu": _cpu_name(), "cores": cores}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        found |= {"driver": _line("/sys/module/nvidia/version"), "cuda": torch.version.cuda}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return platform.system()


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
