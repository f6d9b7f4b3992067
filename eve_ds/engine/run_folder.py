"""A run's folder belongs to one run: the same config goes on in it, another is refused."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from eve_ds import config as config_tree
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.errors import UserError

FREE = (
    "split",
    "logging",
    "checkpoint",
    "output_dir",
    "data.num_workers",
    "optimizer.total_steps",
    "optimizer.epochs",
    "deepspeed_config",
    "engine.expert_parallel_size",
    "engine.micro_batch_size",
    "data.max_corrupt",
    "data.allow_overlap",
)
CONFIG, LOCK = "config.yaml", ".lock"
_held: list[int] = []  # descriptors of locks: closed, they would be given up


def claim(config: PretrainConfig | FinetuneConfig) -> Path:
    """Make ``config.output_dir`` this run's and store the resolved config in it.

    Settings that do not change what is learnt (``FREE``) may differ from the stored ones, and so may the length of the
    run: to raise it trains on, along the longer schedule. Called by all ranks.

    Raises:
        UserError: no folder named, it holds another run (the first differing key is named) or files that are no run, or
            a run is going on in it.
    """
    if not config.output_dir:
        raise UserError("--output_dir is missing; name a folder for checkpoints, metrics and the resolved config")
    folder = Path(config.output_dir)
    stored = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; name a folder")
    if holds_run(folder):
        if not config.checkpoint.resume:
            raise UserError(f"--output_dir {folder} holds a run and checkpoint.resume is false; choose another folder")
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{stored}: not readable YAML; choose another --output_dir") from error
        now = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))
        differing = _first_difference(before, now)
        if differing:
            key, stored_value, value = differing
            raise UserError(
                f"--output_dir {folder} holds another run: {key} is {stored_value!r} there and {value!r} here; "
                "choose another folder, or make the settings equal to resume"
            )
    elif _contents(folder):
        raise UserError(f"--output_dir {folder} holds files but no run (no config.yaml); choose an empty or new folder")
    if dist.is_initialized():
        dist.barrier()  # all ranks have looked before rank 0 writes
    first = not dist.is_initialized() or dist.get_rank() == 0
    free = [_lock(folder) if first else None]
    if dist.is_initialized():
        dist.broadcast_object_list(free, src=0)
    if not free[0]:
        raise UserError(
            f"--output_dir {folder}: another process trains or scores in it; wait for its end, or choose another folder"
        )
    if first:
        config_tree.save(config, stored)
    return folder


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in the folder. A config alone is what a start that failed has left."""
    return (folder / CONFIG).is_file() and bool(_contents(folder))


def _contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {CONFIG, LOCK} if folder.is_dir() else set()


def fingerprint(config: PretrainConfig | FinetuneConfig) -> str:
    """The same for two configs of which the one may go on where the other stopped (`claim`)."""
    return hashlib.sha256(json.dumps(_bound(dataclasses.asdict(config)), sort_keys=True).encode()).hexdigest()


def _bound(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings without those that are FREE."""
    return {
        key: _bound(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in FREE
    }


def _lock(folder: Path) -> bool:
    """Keep other runs out of the folder until this process ends, however it does; False if one is in it.

    A file system without locks keeps nobody out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit that
    except OSError as error:
        os.close(descriptor)
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    _held.append(descriptor)
    return True


def _first_difference(before: Any, now: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    before = before if isinstance(before, dict) else {}
    for key, value in now.items():
        path = f"{prefix}{key}"
        if path in FREE:
            continue
        if isinstance(value, dict):
            found = _first_difference(before.get(key), value, path + ".")
            if found:
                return found
        elif before.get(key) != value:
            return path, before.get(key), value
    return None
