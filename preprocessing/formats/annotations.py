"""Reading raw annotation files, and folders that one process at a time writes, and that appear whole or not at all."""

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from preprocessing.formats.json_text import parse_json, shown
from preprocessing.formats.lines import TOO_LONG, AnyPath, CutFile, open_text, read_lines
from preprocessing.running.storage import Place, names_in, open_input, place, size_of
from preprocessing.shards.schema import DataError, make_folder, sync_path

__all__ = [
    "LOCK",
    "BadRecord",
    "check_replaceable",
    "copies",
    "field",
    "locked",
    "new_folder",
    "open_input",
    "output_folder",
    "read_json",
    "read_json_lines",
    "read_text",
    "recover",
    "text_lines",
]


class BadRecord(DataError):
    """One record at fault, in a file that is else sound: `Source.faults` counts it by `reason`.

    `where` names the file and the record, `what` says what is wrong with it and how to mend it.
    """

    def __init__(self, where: str, what: str, reason: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.reason = reason


LOCK = "lock"  # the file in a work folder that is locked
_COMPARED = 1 << 20  # bytes, of start and end of files of equal size


def read_text(path: AnyPath) -> str:
    """The file's text (UTF-8, with or without a byte order mark). Raises DataError naming the file."""
    try:
        with open_input(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); give the JSON file, unpacked") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not text.strip():
        raise DataError(f"{path}: is empty; fetch it again")
    return text


def read_json(path: AnyPath) -> Any:
    """The JSON value in `path`. Raises DataError naming the file, and line and column of what is no JSON."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        line = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}: {_why_invalid(error, line)}; fetch the file again") from None


def copies(paths: Iterable[str | Place]) -> Iterator[tuple[str | Place, str | Place]]:
    """(first, other) of those that are one file under two names: what they hold would be there twice.

    Of files of equal size, start and end are compared.
    """
    alike: dict[int, list[str | Place]] = defaultdict(list)
    for path in paths:
        with suppress(OSError):  # whoever reads it says so
            alike[size_of(place(path))].append(path)
    for size, files in alike.items():
        known: dict[bytes, str | Place] = {}
        for path in files if len(files) > 1 else ():
            with open_input(path) as file:
                ends = bytes(file.read(_COMPARED))
                file.seek(max(size - _COMPARED, 0))
                ends += bytes(file.read(_COMPARED))
            if (first := known.setdefault(ends, path)) is not path:
                yield first, path


def text_lines(path: AnyPath) -> Iterator[tuple[int, str | BadRecord]]:
    """(number from 1, text) of each line, or what is wrong with it. The file may be gzip.

    Raises DataError naming the file when it cannot be read, or holds nothing but blanks.
    """
    empty = True
    try:
        with open_text(path) as file:
            for number, (_, line) in enumerate(read_lines(file), 1):
                where = f"{path}: line {number}"
                empty = empty and line is not None and not line.strip()
                try:
                    text = BadRecord(where, TOO_LONG, "line is too long") if line is None else line.decode()
                except UnicodeDecodeError:
                    text = BadRecord(where, "is not UTF-8 text; mend the file", "line is not UTF-8 text")
                yield number, text
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except CutFile as error:
        yield error.line, BadRecord(f"{path}: line {error.line}", str(error), "lines are lost: a file is cut")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if empty:
        raise DataError(f"{path}: is empty; fetch it again")


def read_json_lines(path: AnyPath, bad: Callable[[BadRecord], None]) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank and is JSON; the others are handed to `bad`.

    Raises DataError as `text_lines` does.
    """
    for number, line in text_lines(path):
        if isinstance(line, BadRecord):
            bad(line)
        elif line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                what = f"{_why_invalid(error)}; fetch the file again"
                bad(BadRecord(f"{path}: line {number}", what, "line is invalid JSON"))
            else:
                yield number, value


def _why_invalid(error: ValueError, line: str = "") -> str:
    """What is wrong with text that is no JSON, or that holds a number which Python refuses to read."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at {line}column {error.colno} ({error.msg})"
    return f"holds a number of more than {sys.get_int_max_str_digits()} digits"


def field(record: Any, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, which must be of `kinds` (a bool is no int here). Raises BadRecord starting with `where`."""
    if not isinstance(record, dict):
        raise BadRecord(where, "is no JSON object; is this the right file?", "record is no JSON object")
    value = record.get(name)
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    if name not in record:
        raise BadRecord(where, f"has no field '{name}'; is this the right file?", f"record has no field '{name}'")
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    what = f"field '{name}' is {shown(value)}, not {names}; mend the file"
    raise BadRecord(where, what, f"field '{name}' is not {names}")


@contextmanager
def locked(target: Place) -> Iterator[Place]:
    """Hold the lock of `target`, a file in its work folder; gives that folder, which goes if the lock is all it holds.

    The lock of a remote folder is one of this machine. Raises DataError when another process holds it.
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
        raise DataError(
            f"{target}: cannot be locked ({error.strerror}: {path}); see that files can be written there"
        ) from error
    if file is None:
        raise DataError(f"{target}: another process is writing it; wait for it to end, or choose another folder")
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
                continue  # it came or went meanwhile: another run begins, or has just ended
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # the run that held it has removed it meanwhile


@contextmanager
def output_folder(target: Path, ours: Collection[str], overwrite: bool) -> Iterator[Path]:
    """A `new_folder` for `target`, which is locked meanwhile; where `target` is a link, for what it leads to.

    Raises DataError when another process is at work on `target`, when that holds something already and `overwrite` is
    false, or when it holds an entry that matches none of the patterns in `ours`: such a folder is never deleted,
    whatever the user asks.
    """
    target = Path(os.path.realpath(target))
    with locked(target):
        _put_back(target)
        check_replaceable(target, ours, overwrite)
        with new_folder(target) as partial:
            yield partial


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `target` when the block ends well, and vanishes when it fails.

    The caller holds the lock of `target`, which is no link. Raises DataError when there is no room for the new folder.
    """
    partial = target.parent / f".{target.name}.partial"
    old = _old(target)
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
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another output folder") from error


def recover(target: Path) -> None:
    """Put the old folder back, should a kill have come between the two renames that `new_folder` ends with.

    Raises DataError when another process is between them.
    """
    target = Path(os.path.realpath(target))
    if _old(target).is_dir() and not target.exists():
        with locked(target):
            _put_back(target)


def _put_back(target: Path) -> None:
    if _old(target).is_dir() and not target.exists():
        os.rename(_old(target), target)


def _old(target: Path) -> Path:
    """Where the old folder is between the two renames."""
    return target.parent / f".{target.name}.old"


def _discard(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(target: Path, ours: Collection[str], overwrite: bool) -> None:
    """Raise DataError unless a new folder may take the place of `target`."""
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; choose another output folder")
    entries = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    if entries and not overwrite:
        raise DataError(f"{target}: holds another run's files; give --overwrite to replace them, or another --out")
    for name in entries:
        if not any(fnmatch(name, pattern) for pattern in ours):
            raise DataError(f"{target}: holds {name}, which is not of this program's making; choose another --out")
