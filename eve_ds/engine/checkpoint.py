"""Checkpoints that are whole or not there.

DeepSpeed writes a folder per tag, not atomically. A tag is never used twice, and ``complete.json`` (sizes, SHA-256,
topology) is renamed into the folder after everything else: a folder without it is a killed run's, and is not read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from eve_ds.errors import UserError
from eve_ds.files import write_json

COMPLETE = "complete.json"
torch.serialization.add_safe_globals(
    [LossScaler, ZeroStageEnum, fragment_address]
)  # all that DeepSpeed's files need beyond tensors
MISLEADING = (
    "zero_to_fp32.py",
    "zero_to_torch.py",
)  # DeepSpeed copies these in; with experts they lose weights in silence


@dataclass(frozen=True)
class Topology:
    """What a checkpoint's files depend on. A plain load into another one can be silently wrong, so it is refused."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int


def save(engine: Any, folder: Path, step: int, topology: Topology, state: dict[str, Any]) -> Path:
    """Save ``engine`` as ``folder/step_NNNNNNNN`` and mark it whole. Called by all ranks; returns the folder."""
    tag = f"step_{step:08d}"
    target = folder / tag
    if dist.get_rank() == 0 and target.exists():
        shutil.rmtree(target)  # the rest of a save that was killed: it has no complete.json, or we would have resumed
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    if dist.get_rank() == 0:
        for script in MISLEADING:
            (folder / script).unlink(missing_ok=True)
    dist.barrier()
    hashes = _hash_together(target)
    if dist.get_rank() == 0:
        write_json(target / COMPLETE, {"step": step, "topology": vars(topology), "state": state, "files": hashes})
    dist.barrier()
    return target


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``, or None."""
    whole = [path.parent for path in folder.glob(f"step_*/{COMPLETE}")]
    return max(whole, default=None)


def check(path: Path, topology: Topology) -> dict[str, Any]:
    """Read ``complete.json`` and compare sizes, hashes and topology. Called by all ranks; returns the saved state.

    Raises:
        UserError: a file is missing or differs, or the checkpoint was written by another number of ranks.
    """
    try:
        record = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        saved, files = Topology(**record["topology"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / COMPLETE}: damaged; delete {path} to resume from the one before") from error
    if saved != topology:
        differing = [f"{k} {getattr(saved, k)} (now {v})" for k, v in vars(topology).items() if getattr(saved, k) != v]
        raise UserError(
            f"{path}: written with {', '.join(differing)}; resume with the same, or start in another output_dir"
        )
    for name, (size, _) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{path}: {name} is missing or truncated; delete this folder to resume from the one before")
    found = _hash_together(path)
    broken = [name for name, (_, digest) in files.items() if found[name][1] != digest]
    if broken:
        raise UserError(
            f"{path}: {broken[0]} is damaged (its hash differs); delete this folder to resume from the one before"
        )
    return dict(record["state"])


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and older half-written ones. Called by rank 0 alone."""
    last = newest(folder)
    if last is None:
        return
    whole = sorted(path.parent for path in folder.glob(f"step_*/{COMPLETE}"))
    half = [path for path in folder.glob("step_*") if not (path / COMPLETE).exists() and path < last]
    for path in whole[: -max(1, keep)] + half:
        (path / COMPLETE).unlink(missing_ok=True)  # first, so that a killed deletion leaves no "whole" folder
        shutil.rmtree(path)


def _hash_together(path: Path) -> dict[str, tuple[int, str]]:
    """{file: (bytes, SHA-256)} of all files below ``path``, the work shared among the ranks."""
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != COMPLETE)
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        with open(path / name, "rb") as stream:
            mine[name] = (path.joinpath(name).stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
    parts: list[dict[str, tuple[int, str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return dict(sorted((name, value) for part in parts for name, value in part.items()))
