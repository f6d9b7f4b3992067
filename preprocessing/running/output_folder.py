"""An output folder that one process at a time writes, and that appears whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, sync_path
from preprocessing.running.storage import StoragePath, names_in

LOCK = "lock"  # the file in a work folder that is locked


@contextmanager
def locked(target: StoragePath) -> Iterator[StoragePath]:
    """Hold the lock of `target`, a file in its work folder. Yields the work folder.

    That folder is removed at the end if it holds nothing but the lock. The lock of a remote folder is a file on this
    machine. Raises UserError when another process holds the lock.
    """
    root = target.parent / f".{target.name}.work"
    if isinstance(root, Path):
        path = root / LOCK
    else:
        key = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"eve-ds-{os.getuid()}-{key}.lock"
    try:
        file = _lock(path)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be locked ({error.strerror}: {path}); see that files can be written there"
        ) from error
    if file is None:
        raise UserError(f"{target}: another process is writing it; wait for it to end, or choose another folder")
    try:
        yield root
    finally:
        if not isinstance(root, Path):
            path.unlink(missing_ok=True)
        elif names_in(root) == [LOCK]:
            path.unlink()
            with suppress(OSError):  # the next run's lock may be in it already
                root.rmdir()
        file.close()


def _lock(path: Path) -> IO[bytes] | None:
    """The locked file, or None when another process holds it."""
    while True:
        try:
            make_folder(path.parent)
            file = open(path, "ab")
        except (FileExistsError, FileNotFoundError):
            root = path.parent
            if root.is_dir() or (root.parent.is_dir() and not os.path.lexists(root)):
                continue  # another run has just made or removed it
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # the run that held the lock has removed the file


@contextmanager
def output_folder(target: Path, ours: Collection[str], overwrite: bool) -> Iterator[Path]:
    """A `new_folder` for `target`, which stays locked. A symbolic link is resolved first.

    Raises UserError when another process writes `target`, when `target` is not empty and `overwrite` is false, and when
    it holds an entry that matches none of the patterns in `ours`: such a folder is never deleted.
    """
    target = Path(os.path.realpath(target))
    with locked(target):
        _restore(target)
        check_replaceable(target, ours, overwrite)
        with new_folder(target) as partial:
            yield partial


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill. It replaces `target` when the block succeeds, and is removed when the block fails.

    The caller holds the lock of `target`, which is no symbolic link. Raises UserError when it cannot be written.
    """
    partial = target.parent / f".{target.name}.partial"
    old = _old_folder(target)
    try:
        for leftover in (partial, old):  # of a run that was killed
            _discard(leftover)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            _discard(partial)
            raise
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        sync_path(target.parent)
        _discard(old)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another output folder") from error


def recover(target: Path) -> None:
    """Restore the old folder if an earlier process was killed between the two renames at the end of `new_folder`.

    Raises UserError when another process is between them now.
    """
    target = Path(os.path.realpath(target))
    if _old_folder(target).is_dir() and not target.exists():
        with locked(target):
            _restore(target)


def _restore(target: Path) -> None:
    if _old_folder(target).is_dir() and not target.exists():
        os.rename(_old_folder(target), target)


def _old_folder(target: Path) -> Path:
    """The name of the old folder between the two renames."""
    return target.parent / f".{target.name}.old"


def _discard(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(target: Path, ours: Collection[str], overwrite: bool) -> None:
    """Raise UserError unless a new folder may take the place of `target`."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; choose another output folder")
    entries = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    if entries and not overwrite:
        raise UserError(f"{target}: holds another run's files; give --overwrite to replace them, or another --out")
    for name in entries:
        if not any(fnmatch(name, pattern) for pattern in ours):
            raise UserError(f"{target}: holds {name}, which is not of this program's making; choose another --out")
