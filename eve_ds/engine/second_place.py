"""A second place for a run (``checkpoint.second_place``): a folder behind a URI that holds a copy of its files.

It is laid out as the run's folder. The copy of a checkpoint gets its ``complete.json`` last, so one without it is a
part of an upload and is not read. Files are compared with the hashes of ``complete.json`` on both ways.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from eve_ds.engine import watchdog
from eve_ds.engine.checkpoint import identity_in
from eve_ds.engine.checkpoint_record import DamagedError, Manifest
from eve_ds.engine.identity import Identity, summarized
from eve_ds.engine.run_folder import IDENTITY
from eve_ds.weights.model_folder import CHECKPOINTS, COMPLETE, MODEL, MODEL_EMA, newest_checkpoint, step_of
from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, sync_path
from preprocessing.running.storage import (
    StoragePath,
    names_in,
    open_input,
    open_output,
    place_of,
    remove,
    size_of,
    walk,
    write_whole,
)

CHUNK, FLUSH = 8 << 20, 64 << 20  # bytes read at a time, and bytes after which the store must have taken them
OPTION = "checkpoint.second_place (--output_hdfs)"
FETCH_PAUSES = (1.0, 5.0)  # seconds after a download that failed
_PARTIAL = ".from_second_"  # what a killed download leaves in the folder of checkpoints
_log = logging.getLogger(__name__)
Moved = Callable[[int], None]  # told of each piece, in bytes


class GoneError(Exception):
    """A local checkpoint was removed before it was copied, since there are newer ones."""


class SecondPlace:
    """The copy of the run in the folder ``run`` behind ``uri``.

    Raises:
        UserError: it is no URI of a known scheme, holds a secret, or lies in the run's folder (or around it).
    """

    def __init__(self, uri: str, run: Path) -> None:
        self.root, self.run = place_of(uri), run
        self._sent: set[tuple[str, str]] = set()  # (checkpoint, file) that this process has sent and found there
        self._seen: dict[str, tuple[int, int]] = {}  # run file that is there: its size and time
        if isinstance(self.root, Path):
            here, there = run.resolve(), self.root.resolve()
            if here == there or here in there.parents or there in here.parents:
                raise UserError(f"{OPTION}: {uri} and --output_dir {run} lie in each other; name another folder")

    def __str__(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Write, read and remove a small file. Raises UserError."""
        test, content = self.root / f".write_test_{secrets.token_hex(4)}", secrets.token_bytes(16)
        try:
            write_whole(test, content)
            with open_input(test) as file:
                same = file.read() == content
            remove(test)
        except (UserError, OSError) as error:
            raise UserError(f"{OPTION}: {error}") from error
        if not same:
            raise UserError(f"{OPTION}: {self.root} does not give back what was written; name another folder")

    def check_owner(self, identity: Identity) -> None:
        """Raise UserError if another run has copied its files there."""
        try:
            with open_input(self.root / IDENTITY) as file:
                before = Identity.from_tree(json.loads(file.read()))
        except (FileNotFoundError, json.JSONDecodeError):
            return  # nothing, or a part of an upload
        self._refuse(before, identity)

    def _refuse(self, before: Identity, identity: Identity) -> None:
        if found := before.differences(identity):
            raise UserError(
                f"{OPTION}: {self} holds another run: {summarized(found)}; make these equal to go on, or name another "
                "folder"
            )

    def complete(self) -> list[str]:
        """Names of the complete checkpoints there, oldest first. Raises UserError."""
        folder = self.root / CHECKPOINTS
        return [name for name in self._tags() if (folder / name / COMPLETE).exists()]

    def _tags(self) -> list[str]:
        names = [name for name in names_in(self.root / CHECKPOINTS) if name.removeprefix("step_").isdigit()]
        return sorted(names, key=_step)

    def upload(self, checkpoint: Path, keep: int, moved: Moved) -> None:
        """Copy a complete local checkpoint and the run's other files; then keep the newest ``keep`` there.

        Called again after a failure, it goes on with the file at which it failed.

        Raises:
            GoneError: it was removed meanwhile.
            DamagedError: a file is not what was saved.
            UserError, OSError: the second place failed.
        """
        with _gone():
            record = (checkpoint / COMPLETE).read_bytes()
        files = json.loads(record)["files"]
        target = self.root / CHECKPOINTS / checkpoint.name
        if not _holds(target / COMPLETE, record):
            remove(target / COMPLETE)  # of another save of that step, which this one replaces
            for name, (size, digest) in files.items():
                if (checkpoint.name, name) not in self._sent:
                    self._send(checkpoint, name, (size, digest), moved)
            self.upload_files(moved)  # before: the metrics of a checkpoint that is whole are there, too
            write_whole(target / COMPLETE, record)
            self._sent.clear()
        else:
            self.upload_files(moved)
        self._prune(_step(checkpoint.name), keep)

    def _send(self, checkpoint: Path, name: str, expected: tuple[int, str], moved: Moved) -> None:
        target = self.root / CHECKPOINTS / checkpoint.name / name
        with _gone():
            file = open(checkpoint / name, "rb")
        with file, open_output(target) as stream:
            found = copy_stream(file, stream, expected[0], moved)
        if found != tuple(expected):
            raise DamagedError(checkpoint, f"{name} is damaged (its hash differs)")
        if (there := size_of(target)) != expected[0]:
            raise UserError(f"{target}: has {there} bytes there, not {expected[0]}; it is sent again")
        self._sent.add((checkpoint.name, name))

    def upload_files(self, moved: Moved) -> None:
        """Copy the files of the run that have changed, all but checkpoints and hidden ones. Raises UserError, OSError.

        Of a file that grows meanwhile, what it held at first is copied.
        """
        for below, names in walk(self.run):
            if below.split("/")[0] in (CHECKPOINTS, watchdog.FOLDER):
                continue
            for name in names:
                path = self.run / below / name
                if path.is_file():
                    self._send_file(path, f"{below}/{name}" if below else name, moved)

    def _send_file(self, path: Path, name: str, moved: Moved) -> None:
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return  # a temporary file, or an older picture
        with file:
            status = os.fstat(file.fileno())
            state = status.st_size, status.st_mtime_ns
            if self._seen.get(name) == state:
                return
            target = _below(self.root, name)
            with open_output(target) as stream:
                copied, _ = copy_stream(file, stream, state[0], moved)
        if (there := size_of(target)) != copied:
            raise UserError(f"{target}: has {there} bytes there, not {copied}; it is sent again")
        self._seen[name] = state

    def _prune(self, step: int, keep: int) -> None:
        """Remove what is older than the newest ``keep`` complete checkpoints up to ``step``."""
        folder = self.root / CHECKPOINTS
        kept = [name for name in self.complete() if _step(name) <= step][-keep:]
        for name in self._tags():
            if name not in kept and _step(name) <= step:
                remove(folder / name / COMPLETE)  # first: a part of a checkpoint must not look like one
                remove(folder / name)

    def restore(self, identity: Identity, total_steps: int, resume: bool, moved: Moved) -> Path | None:
        """Download the newest sound checkpoint if it is newer than all local ones. Returns its folder, or None.

        Raises:
            UserError: it is another run's, or beyond ``total_steps``; none there is sound and there is no local one;
                there are some and ``resume`` is false; or a file could not be read or written.
        """
        found, local = self.complete(), newest_checkpoint(self.run / CHECKPOINTS)
        if found and local is None and not resume:
            raise UserError(f"{OPTION}: {self} holds a run and checkpoint.resume is false; choose another folder")
        newer = [name for name in found if local is None or _step(name) > step_of(local)]
        for name in reversed(newer):
            try:
                path = self._download(name, identity, total_steps, moved)
            except DamagedError as error:
                _log.warning("%s/%s/%s: %s; the one before it is looked for", self, CHECKPOINTS, name, error.what)
                continue
            _log.info("%s: took %s from there", self, name)
            return path
        if newer and local is None:
            raise UserError(f"{self}: no checkpoint there is sound; remove them, or name another second place")
        return None

    def _download(self, name: str, identity: Identity, total_steps: int, moved: Moved) -> Path:
        folder, source = self.run / CHECKPOINTS, self.root / CHECKPOINTS / name
        make_folder(folder)
        for left in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left)
        partial = folder / f"{_PARTIAL}{name}"
        partial.mkdir()
        try:
            with open_input(source / COMPLETE) as file:
                record = file.read()
            (partial / COMPLETE).write_bytes(record)
            manifest = Manifest.read(partial)
            self._check_run(manifest, partial, identity, total_steps)
            for below, (size, digest) in manifest.files.items():
                found = _fetch(_below(source, below), partial / below, moved)
                if found != (size, digest):
                    raise DamagedError(partial, f"{below} is damaged or missing ({found[0]} of {size} bytes)")
            self._download_files(moved)
            for path in {partial, *(file.parent for file in partial.rglob("*"))}:
                sync_path(path)
            sync_path(partial / COMPLETE)
            target = folder / name
            if target.exists():  # a part of a killed save
                shutil.rmtree(target)
            partial.rename(target)
            sync_path(folder)
            return target
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _check_run(self, manifest: Manifest, path: Path, identity: Identity, total_steps: int) -> None:
        self._refuse(identity_in(path, manifest), identity)
        if manifest.step > total_steps:
            raise UserError(
                f"{OPTION}: {self}: the run is at step {manifest.step}, and is to have {total_steps} in all; raise "
                "optimizer.total_steps (or epochs)"
            )

    def _download_files(self, moved: Moved) -> None:
        """The records that the run goes on with, and other files that are not here; no model, as it is made again."""
        for below, names in walk(self.root):
            if below.split("/")[0] in (CHECKPOINTS, MODEL, MODEL_EMA):
                continue
            for name in names:
                path = self.run / below / name
                if not path.exists() or (not below and path.suffix == ".jsonl"):
                    _fetch(_below(self.root, f"{below}/{name}" if below else name), path, moved)


def copy_stream(source: IO[bytes], target: IO[bytes], size: int | None, moved: Moved) -> tuple[int, str]:
    """Copy ``size`` bytes, or fewer if there are no more (None: all), in pieces. Returns (bytes, SHA-256) of them."""
    digest, done = hashlib.sha256(), 0
    while data := source.read(CHUNK if size is None else min(CHUNK, size - done)):
        target.write(data)
        digest.update(data)
        done += len(data)
        if done % FLUSH < CHUNK:
            target.flush()
        moved(len(data))
    return done, digest.hexdigest()


def _fetch(source: StoragePath, target: Path, moved: Moved) -> tuple[int, str]:
    """Download a file, which is on disk on return. Returns (bytes, SHA-256); (0, "") if it is not there.

    An error of the network, a UserError, is raised at the third time.
    """
    for pause in (*FETCH_PAUSES, None):
        try:
            with open_input(source) as file, open_output(target) as stream:
                return copy_stream(file, stream, None, moved)
        except FileNotFoundError:
            return 0, ""
        except UserError:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError


def _holds(path: StoragePath, content: bytes) -> bool:
    try:
        with open_input(path) as file:
            return file.read() == content
    except FileNotFoundError:
        return False


def _below(root: StoragePath, name: str) -> StoragePath:
    for part in name.split("/"):
        root = root / part
    return root


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise GoneError from error
