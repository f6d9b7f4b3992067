"""Which checkpoint a run goes on from: the newest one that is whole and sound, found by rank 0 for all.

Damaged is what was read and is not as it was saved. A read that fails says nothing of that: the run ends with a word,
and nothing is renamed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eve_ds.engine import agreement
from eve_ds.engine.checkpoint_record import COMPLETE, DamagedError, Hashes, Manifest, file_sizes, hash_files
from eve_ds.engine.watchdog import mark
from eve_ds.errors import UserError
from eve_ds.weights.model_folder import list_folder, newest_checkpoint, path_exists
from preprocessing.shards.schema import sync_path

DAMAGED = ".damaged"


def tag_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def sound(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint under ``folder`` that is whole and sound, for all ranks the same; None before the first.

    A damaged one is renamed, with a word, and the one before it is taken. Called by all ranks.

    Raises:
        UserError: all are damaged, or one cannot be read or used for another reason.
    """
    while True:
        path = agreement.decide(lambda: _newest_or_none_yet(folder))
        if path is None:
            return None
        try:
            return path, check(path)
        except DamagedError as error:
            agreement.decide(functools.partial(_set_aside, error))


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
    """Rename a damaged checkpoint, unless it is another run's doing, which has removed it meanwhile."""
    path = damage.path
    if not path_exists(path / COMPLETE):
        return
    names = (path.with_name(f"{path.name}{DAMAGED}{suffix}") for suffix in ("", *(f".{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    sync_path(path.parent)
    before = newest_checkpoint(path.parent)
    goes_on = f"the run goes on from {before.name}, if that is sound" if before else "there is none before it"
    print(
        f"WARNING: {path} is damaged: {damage.what}; it is called {aside.name} now, and {goes_on}",
        file=sys.stderr,
        flush=True,
    )


def check(path: Path) -> Manifest:
    """Read ``complete.json`` and compare files, hashes and contents with it. Called by all ranks; all find the same.

    Raises:
        DamagedError: a file is missing, cut or altered.
        UserError: a file cannot be read, is not seen by all ranks, or was written for another topology than the
            manifest says.
    """
    mark(f"the check of {path}")
    manifest = agreement.decide(lambda: Manifest.read(path))
    if path.name != tag_of(manifest.step):
        raise UserError(f"{path}: holds step {manifest.step}, so it was renamed; call it {tag_of(manifest.step)} again")
    sizes = agreement.same_view(lambda: file_sizes(path, manifest.files), str(path))
    manifest.check_sizes(path, sizes)
    if broken := manifest.differing(hash_together(path, split_by_size(sizes, agreement.rank_and_world()[1]))):
        agreement.decide(lambda: _look_again(path, broken[0], manifest))
    agreement.decide(lambda: manifest.check_contents(path))
    return manifest


def _look_again(path: Path, name: str, manifest: Manifest) -> None:
    """Raise DamagedError if a file is found altered once more, by rank 0 and from the disk; else UserError."""
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
    """Hashes of the files below ``path`` that the ``shares`` of all ranks name. Called by all ranks.

    Raises:
        UserError: some rank cannot read a file.
    """
    return joined(hash_share(path, shares))


def hash_share(path: Path, shares: list[list[str]]) -> tuple[Hashes, str | None]:
    """Those of this rank's share; and a mistake, if it cannot read a file."""
    try:
        return hash_files(path, shares[agreement.rank_and_world()[0]], threads=1), None
    except UserError as error:
        return {}, f"{agreement.place()}: {error}"


def joined(mine: tuple[Hashes, str | None]) -> Hashes:
    """What ``hash_share`` returned on all ranks. Called by all; raises UserError as ``hash_together``."""
    parts = agreement.gather(mine)
    if mistakes := [told for _, told in parts if told]:
        raise UserError(mistakes[0])
    return dict(sorted((name, value) for part, _ in parts for name, value in part.items()))
