"""The choice of the checkpoint that a run resumes from: the newest one that is complete and undamaged.

A checkpoint is damaged if it was read and differs from what was saved. If a read fails, it may still be undamaged: the
run then ends with an error, and nothing is renamed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eve_ds.engine import distributed
from eve_ds.engine.checkpoint_record import COMPLETE, DamagedError, Hashes, Manifest, file_sizes, hash_files
from eve_ds.engine.watchdog import mark
from eve_ds.weights.model_folder import list_folder, newest_checkpoint, path_exists
from preprocessing.errors import UserError
from preprocessing.local_files import sync_path

DAMAGED = ".damaged"
_log = logging.getLogger(__name__)


def tag_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def sound(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest complete and undamaged checkpoint in ``folder``, the same on all ranks; None before the first save.

    A damaged one is renamed, with a warning, and the one before it is checked. Called by all ranks.

    Raises:
        UserError: all are damaged, or one cannot be read or used for another reason.
    """
    while True:
        path = distributed.decide(lambda: _newest_or_none_yet(folder))
        if path is None:
            return None
        try:
            return path, check(path)
        except DamagedError as error:
            distributed.decide(functools.partial(_set_aside, error))


def _newest_or_none_yet(folder: Path) -> Path | None:
    path = newest_checkpoint(folder)
    damaged = sorted(
        path.name for path in list_folder(folder) if path.name.startswith("step_") and DAMAGED in path.name
    )
    if path is None and damaged:
        raise UserError(
            f"{folder}: no sound checkpoint is left ({', '.join(damaged)}); put a sound copy there under its name "
            "step_N, or start in another output_dir"
        )
    return path


def _set_aside(damage: DamagedError) -> None:
    """Rename a damaged checkpoint, unless another run has removed it meanwhile."""
    path = damage.path
    if not path_exists(path / COMPLETE):
        return
    names = (path.with_name(f"{path.name}{DAMAGED}{suffix}") for suffix in ("", *(f".{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    sync_path(path.parent)
    before = newest_checkpoint(path.parent)
    goes_on = f"the run goes on from {before.name}, if that is sound" if before else "there is none before it"
    _log.warning("%s is damaged: %s; it is called %s now, and %s", path, damage.what, aside.name, goes_on)


def check(path: Path) -> Manifest:
    """Read ``complete.json`` and compare files, hashes and contents with it. Called by all ranks, with one result.

    Raises:
        DamagedError: a file is missing, cut or altered.
        UserError: a file cannot be read, is not seen by all ranks, or was written for another topology than the
            manifest says.
    """
    mark(f"the check of {path}")
    manifest = distributed.decide(lambda: Manifest.read(path))
    if path.name != tag_of(manifest.step):
        raise UserError(f"{path}: holds step {manifest.step}, so it was renamed; call it {tag_of(manifest.step)} again")
    sizes = distributed.same_view(lambda: file_sizes(path, manifest.files), str(path))
    manifest.check_sizes(path, sizes)
    if broken := manifest.differing(hash_together(path, split_by_size(sizes, distributed.rank_and_world()[1]))):
        distributed.decide(lambda: _look_again(path, broken[0], manifest))
    distributed.decide(lambda: manifest.check_contents(path))
    return manifest


def _look_again(path: Path, name: str, manifest: Manifest) -> None:
    """Read again, on rank 0 and from disk, a file that seemed altered. DamagedError if it is, else UserError."""
    with open(path / name, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if hash_files(path, [name])[name] != manifest.files[name]:
        raise DamagedError(path, f"{name} is damaged (its hash differs)")
    raise UserError(
        f"{path / name}: was read wrongly once and rightly once, so it is sound: see to the disks, the network and the "
        "memory of the hosts, and start again"
    )


def split_by_size(sizes: Mapping[str, Any], parts: int) -> list[list[str]]:
    """The files' names in ``parts`` lists of about equal bytes."""
    found: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        found[least].append(name)
        loads[least] += sizes[name]
    return found


def hash_together(path: Path, shares: list[list[str]]) -> Hashes:
    """Hashes of files below ``path``; rank i hashes those of ``shares[i]``. Called by all ranks.

    Raises:
        UserError: some rank cannot read a file.
    """
    return joined(hash_share(path, shares))


def hash_share(path: Path, shares: list[list[str]]) -> tuple[Hashes, str | None]:
    """(hashes of this rank's share, None), or ({}, message) if a file cannot be read."""
    try:
        return hash_files(path, shares[distributed.rank_and_world()[0]], threads=1), None
    except UserError as error:
        return {}, f"{distributed.place()}: {error}"


def joined(mine: tuple[Hashes, str | None]) -> Hashes:
    """The results of ``hash_share`` of all ranks as one. Called by all ranks. Raises UserError as ``hash_together``."""
    parts = distributed.gather(mine)
    if mistakes := [error for _, error in parts if error]:
        raise UserError(mistakes[0])
    return dict(sorted((name, value) for part, _ in parts for name, value in part.items()))
