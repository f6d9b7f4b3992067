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

import yaml

from eve_ds import config as config_tree
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine.agreement import decide, prove_shared
from eve_ds.errors import UserError
from preprocessing.schema import make_folder

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
    run: to raise it trains on, along the longer schedule. Called by all ranks; rank 0 alone looks and writes.

    Raises:
        UserError: no folder named, it holds another run (the first differing key is named) or files that are no run, a
            run is going on in it, or it is not one folder for all ranks.
    """
    decide(lambda: _claim(config))
    prove_shared(Path(config.output_dir), f"--output_dir {config.output_dir}")
    decide(lambda: config_tree.save(config, Path(config.output_dir) / CONFIG))
    return Path(config.output_dir)


def _claim(config: PretrainConfig | FinetuneConfig) -> None:
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
    if not _lock(folder):
        raise UserError(
            f"--output_dir {folder}: another process trains or scores in it; wait for its end, or choose another folder"
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in the folder. A config alone is what a start that failed has left."""
    return (folder / CONFIG).is_file() and bool(_contents(folder))


def _contents(folder: Path) -> set[str]:
    """What a run has made in the folder: hidden files are those of starts that were killed, and of file systems."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if name != CONFIG and not name.startswith(".")}


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
    make_folder(folder)
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
