"""A second place for a run (``checkpoint.second_place``): a folder behind a URI that holds a copy of its files.

It is laid out as the run's folder. The copy of a checkpoint gets its ``complete.json`` last, so one without it is a
part of an upload and is not read. Files are compared with the hashes of ``complete.json`` on both ways. Likewise, the
best weights (``model_best``) are one thing, whose ``best.json`` comes last.
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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from eve_ds.engine import watchdog
from eve_ds.engine.checkpoint import identity_in
from eve_ds.engine.checkpoint_record import DamagedError, Manifest
from eve_ds.engine.identity import Identity, summarized
from eve_ds.engine.run_folder import IDENTITY
from eve_ds.weights.model_folder import (
    BEST,
    CARD,
    CHECKPOINTS,
    COMPLETE,
    MODEL,
    MODEL_BEST,
    MODEL_EMA,
    WEIGHTS,
    checkpoint_names,
    newest_checkpoint,
    read_hashes,
    step_of,
)
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
        test, content = self.root / ".write_test", secrets.token_bytes(16)
        try:
            _write(test, content)
            same = _read(test) == content
            remove(test)
        except UserError as error:
            raise UserError(f"{OPTION}: {error}") from error
        except OSError as error:
            raise UserError(f"{OPTION}: {self.root} cannot be written ({error}); name another folder") from error
        if not same:
            raise UserError(f"{OPTION}: {self.root} does not give back what was written; name another folder")

    def check_owner(self, identity: Identity) -> None:
        """Raise UserError if another run has copied its files there."""
        try:
            before = Identity.from_tree(json.loads(_read(self.root / IDENTITY) or b""))
        except ValueError:
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
        return checkpoint_names(names_in(self.root / CHECKPOINTS))

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
        files = Manifest.read(checkpoint).files
        target = self.root / CHECKPOINTS / checkpoint.name
        if _read(target / COMPLETE) != record:
            remove(target / COMPLETE)  # of another save of that step, which this one replaces
            for name, expected in files.items():
                if (checkpoint.name, name) not in self._sent:
                    self._send(checkpoint, name, expected, moved)
            self.upload_files(moved)  # before: the metrics of a checkpoint that is whole are there, too
            _write(target / COMPLETE, record)
            self._sent.clear()
        else:
            self.upload_files(moved)
        self._prune(step_of(checkpoint), keep)

    def _send(self, checkpoint: Path, name: str, expected: tuple[int, str], moved: Moved) -> None:
        target = _below(self.root / CHECKPOINTS / checkpoint.name, name)
        with _gone():
            file = open(checkpoint / name, "rb")
        with file, open_output(target) as stream:
            found = copy_stream(file, stream, expected[0], moved)
        if found != expected:
            raise DamagedError(checkpoint, f"{name} is damaged (its hash differs)")
        if (there := size_of(target)) != expected[0]:
            raise UserError(f"{target}: has {there} bytes there, not {expected[0]}; it is sent again")
        self._sent.add((checkpoint.name, name))

    def upload_files(self, moved: Moved) -> None:
        """Copy the files of the run that have changed, all but checkpoints and hidden ones. Raises UserError, OSError.

        Of a file that grows meanwhile, what it held at first is copied.
        """
        for name in _names(self.run, (CHECKPOINTS, watchdog.FOLDER, MODEL_BEST)):
            self._send_file(name, moved)
        best, there = self.run / MODEL_BEST, self.root / MODEL_BEST / BEST
        record = _read(best / BEST)  # None: none yet, or an export is under way, after which it is copied
        if record is None or record == _read(there):
            return
        remove(there)  # first: what lies beside it is a part from now on
        for name in _names(best, ()):
            if name != BEST:
                self._send_file(f"{MODEL_BEST}/{name}", moved)
        if _read(best / BEST) == record:  # else these are files of two exports
            _write(there, record)

    def _send_file(self, name: str, moved: Moved) -> None:
        path = self.run / name
        if not path.is_file():
            return
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return  # an older picture
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
        kept = [name for name in self.complete() if step_of(Path(name)) <= step][-keep:]
        for name in self._tags():
            if name not in kept and step_of(Path(name)) <= step:
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
        for left in (self.run / CHECKPOINTS).glob(f"{_PARTIAL}*"):
            shutil.rmtree(left)
        newer = [name for name in found if local is None or step_of(Path(name)) > step_of(local)]
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
        source, target = self.root / CHECKPOINTS / name, self.run / CHECKPOINTS / name
        with self._replaced(target) as partial:
            _fetch(source / COMPLETE, partial / COMPLETE, moved)
            manifest = Manifest.read(partial)
            self._check_run(manifest, partial, identity, total_steps)
            for below, (size, digest) in manifest.files.items():
                found = _fetch(_below(source, below), partial / below, moved)
                if found != (size, digest):
                    raise DamagedError(partial, f"{below} is damaged or missing ({found[0]} of {size} bytes)")
            self._download_files(moved)
            self._download_best(moved)
        return target

    @contextlib.contextmanager
    def _replaced(self, target: Path) -> Iterator[Path]:
        """A folder that takes the place of ``target``, which may be there in part, once the block ends well."""
        partial = self.run / CHECKPOINTS / f"{_PARTIAL}{target.name}"
        make_folder(partial)
        try:
            yield partial
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            sync_path(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_run(self, manifest: Manifest, path: Path, identity: Identity, total_steps: int) -> None:
        self._refuse(identity_in(path, manifest), identity)
        if manifest.step > total_steps:
            raise UserError(
                f"{OPTION}: {self}: the run is at step {manifest.step}, and is to have {total_steps} in all; raise "
                "optimizer.total_steps (or epochs)"
            )

    def _download_files(self, moved: Moved) -> None:
        """The records that the run goes on with, and other files that are not here; no model, as it is made again."""
        for name in _names(self.root, (CHECKPOINTS, MODEL, MODEL_EMA, MODEL_BEST)):
            path = self.run / name
            if not path.exists() or (path.parent == self.run and path.suffix == ".jsonl"):
                _fetch(_below(self.root, name), path, moved)

    def _download_best(self, moved: Moved) -> None:
        """The best weights, if they are whole there, in the place of those that are here."""
        source, target = self.root / MODEL_BEST, self.run / MODEL_BEST
        if not (source / BEST).exists():
            return
        try:
            with self._replaced(target) as partial:
                found = {name: _fetch(source / name, partial / name, moved)[1] for name in _names(source, ())}
                said = _hashes(partial)
                if damaged := [name for name in {WEIGHTS: None, **said} if found.get(name) != said.get(name)]:
                    raise DamagedError(target, f"{damaged[0]} is damaged or missing")
        except DamagedError as error:
            _log.warning("%s: %s; the best weights there are left out", source, error.what)


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

    Raises:
        UserError: it could not be read or written, at the third time: a network fails in either way.
    """
    for pause in (*FETCH_PAUSES, None):
        try:
            with open_input(source) as file, open_output(target) as stream:
                return copy_stream(file, stream, None, moved)
        except FileNotFoundError:
            return 0, ""
        except (UserError, OSError) as error:
            if pause is None:
                raise UserError(f"{target}: cannot be taken from {source} ({error})") from error
            time.sleep(pause)
    raise AssertionError


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files of a model folder that must be as they were written; empty if that is not known."""
    try:
        return {name: digest for name, digest in read_hashes(folder).items() if name != CARD}
    except UserError:
        return {}


def _read(path: StoragePath) -> bytes | None:
    try:
        with open_input(path) as file:
            return bytes(file.read())
    except FileNotFoundError:
        return None


def _write(path: StoragePath, content: bytes) -> None:
    with open_output(path) as file:
        file.write(content)


def _names(folder: StoragePath, without: Collection[str]) -> list[str]:
    """Paths below ``folder`` of its files, all but hidden ones and those in the folders ``without``."""
    return [f"{below}/{name}" if below else name for below, names in walk(folder, without) for name in names]


def _below(root: StoragePath, name: str) -> StoragePath:
    for part in name.split("/"):
        root = root / part
    return root


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise GoneError from error
