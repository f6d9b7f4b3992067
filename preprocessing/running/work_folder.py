"""The folder in which a split is written, part by part. It survives a kill and is removed when the split is finished.

    DIR/.train.work/lock          held by the run that writes (the system releases it when the run dies)
                    job.json      what all parts depend on; if it has changed, the work starts over
                    records/      part-000007.json exists when that part is done
                    split/        shards, then the manifest; becomes DIR/train by rename

Behind a URI, shards are written to DIR/train itself, each as a whole (object stores cannot rename a folder); the split
is finished when its manifest exists, which is written last. The lock of a remote folder is a file on this machine. Runs
on two machines are noticed at the end, by the run's id in job.json, and only one of them succeeds.
"""

import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from preprocessing.errors import UserError
from preprocessing.local_files import dump_json, make_folder, parse_json, sync_path, sync_tree
from preprocessing.running.output_folder import LOCK, check_replaceable, locked
from preprocessing.running.parts import record_name
from preprocessing.running.storage import StoragePath, names_in, remove, size_of, write_whole
from preprocessing.shards.schema import MANIFEST
from preprocessing.shards.writer import SPLIT_FILES

_JOB = "job.json"


@dataclass(frozen=True)
class Work:
    """A split that is being written. `restarted` says why earlier work was discarded, if it was."""

    target: StoragePath
    root: StoragePath
    run: str
    restarted: str

    @property
    def shards(self) -> StoragePath:
        """The folder of the shards."""
        return self.root / "split" if isinstance(self.root, Path) else self.target

    @property
    def records(self) -> StoragePath:
        """The folder of the records of parts."""
        return self.root / "records"

    def done(self) -> list[int]:
        """Numbers of the parts that have a record."""
        names = names_in(self.records)
        return [int(name[5:-5]) for name in names if name.startswith("part-") and name.endswith(".json")]

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of a part; None if it or one of its shards is missing."""
        try:
            record: dict[str, Any] = parse_json((self.records / record_name(index)).read_bytes())
            whole = all(size_of(self.shards / shard["file"]) == shard["bytes"] for shard in record["shards"])
        except (FileNotFoundError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            return None
        return record if whole else None

    def forget(self, index: int) -> None:
        """Remove a part's record, so that the part is written again."""
        remove(self.records / record_name(index))

    def clean(self, keep: Collection[str]) -> None:
        """Remove the files of earlier runs and killed workers from `shards`: all of our files but those in `keep`."""
        for name in names_in(self.shards):
            ours = isinstance(self.root, Path) or any(fnmatch(name, pattern) for pattern in SPLIT_FILES)
            if ours and name not in keep:
                remove(self.shards / name)

    def publish(self) -> None:
        """Move the finished split to `target`, replacing what is there, and remove the work folder."""
        if isinstance(self.root, Path) and isinstance(self.target, Path):
            _replace_folder(self.root / "split", self.target, self.root / "old")
        _remove_contents(self.root)

    def check_only_writer(self) -> None:
        """Raise UserError when another run has taken over the folder (only possible behind a URI)."""
        if _read_job(self.root).get("run") != self.run:
            raise UserError(f"{self.target}: another run has begun to write it; see that one only is at work")


@contextmanager
def open_work(target: StoragePath, job: dict[str, Any], overwrite: bool) -> Iterator[Work]:
    """The work folder of `target`, with what an earlier run of the same `job` left in it, locked against other runs.

    Raises UserError when another process writes `target`, and when `target` may not be replaced. If the block fails
    before any part is done, the folder is removed; else it stays for the next run.
    """
    try:
        with locked(target) as root:
            if isinstance(target, Path):
                check_replaceable(target, SPLIT_FILES, overwrite)
            work = _begin(target, root, job, overwrite)
            try:
                yield work
            except BaseException:
                if not work.done():
                    work.clean(())
                    _remove_contents(root)
                raise
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); choose another --out") from error


def remove_leftover(target: StoragePath) -> None:
    """Remove the work folder of a finished split, which a kill at the very end may have left."""
    root = target.parent / f".{target.name}.work"
    if isinstance(root, Path) and root.is_dir() and not (root / "split").exists() and (target / MANIFEST).exists():
        with locked(target):
            _remove_contents(root)


def _remove_contents(root: StoragePath) -> None:
    """Remove all but the lock from a work folder. Releasing the lock removes the folder."""
    if isinstance(root, Path):
        for name in names_in(root):
            if name != LOCK:
                remove(root / name)
    else:
        remove(root)


def _begin(target: StoragePath, root: StoragePath, job: dict[str, Any], overwrite: bool) -> Work:
    run = uuid.uuid4().hex
    earlier = _read_job(root)
    changed = sorted(name for name in job if earlier.get("job", {}).get(name) != job[name]) if earlier else []
    if not earlier or changed:
        _remove_contents(root)
    if not isinstance(target, Path) and overwrite:
        remove(target / MANIFEST)  # first, since the shards that it describes will change
    elif not isinstance(target, Path) and not earlier and names_in(target):
        raise UserError(f"{target}: holds another run's files; give --overwrite to replace them, or another --out")
    work = Work(target, root, run, f"{', '.join(changed)} changed" if changed else "")
    for folder in (work.shards, work.records):
        if isinstance(folder, Path):
            make_folder(folder)
    if isinstance(root, Path):
        for name in names_in(work.shards):
            if name.startswith("."):  # left by a killed worker
                remove(work.shards / name)
    write_whole(
        root / _JOB, dump_json({"run": run, "job": job}), sync=False
    )  # a truncated file counts as none: see _read_job
    return work


def _read_job(root: StoragePath) -> dict[str, Any]:
    try:
        content = (root / _JOB).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        job = parse_json(content)
    except ValueError:  # truncated or foreign, so the files beside it cannot be trusted either
        return {}
    return job if isinstance(job, dict) else {}


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    """Rename `new` to `target`. After a kill between the two renames, the next run renames `new`."""
    sync_tree(new)
    if old.exists():
        remove(old)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    sync_path(target.parent)
