"""Reading raw annotation files, and folders that appear whole or not at all."""

import io
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from preprocessing.json_text import parse_json
from preprocessing.places import RemotePath, open_input
from preprocessing.schema import DataError

__all__ = [
    "check_replaceable",
    "field",
    "open_input",
    "output_folder",
    "read_json",
    "read_json_lines",
    "read_text",
    "recover",
]

AnyPath = str | os.PathLike[str] | RemotePath


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
    except json.JSONDecodeError as error:
        raise _invalid(path, error.lineno, error) from None


def read_json_lines(path: AnyPath) -> list[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank. Raises DataError as read_json does."""
    values = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                values.append((number, parse_json(line)))
            except json.JSONDecodeError as error:
                raise _invalid(path, number, error) from None
    return values


def _invalid(path: AnyPath, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}: invalid JSON at line {line} column {error.colno} ({error.msg}); fetch the file again")


def field(record: Any, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, which must be of `kinds` (a bool is no int here). Raises DataError starting with `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: is no JSON object; is this the right file?")
    value = record.get(name)
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    if name not in record:
        raise DataError(f"{where}: has no field '{name}'; is this the right file?")
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    raise DataError(f"{where}: field '{name}' is {json.dumps(value)[:40]}, not {names}; mend the file")


@contextmanager
def output_folder(target: Path, ours: Collection[str], overwrite: bool) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `target` when the block ends well, and vanishes when it fails.

    Raises DataError when `target` holds something already and `overwrite` is false, or when it holds an entry that
    matches none of the patterns in `ours`: such a folder is never deleted, whatever the user asks.
    """
    target = Path(os.path.abspath(target))
    recover(target)
    check_replaceable(target, ours, overwrite)
    partial = target.parent / f".{target.name}.partial"
    old = target.parent / f".{target.name}.old"
    try:
        for leftover in (partial, old):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another output folder") from error


def recover(target: Path) -> None:
    """Put the old folder back, should a kill have come between the two renames that `output_folder` ends with."""
    old = target.parent / f".{target.name}.old"
    if old.is_dir() and not target.exists():
        os.rename(old, target)


def check_replaceable(target: Path, ours: Collection[str], overwrite: bool) -> None:
    """Raise DataError unless `output_folder` may put a new folder at `target`."""
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; choose another output folder")
    entries = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    if entries and not overwrite:
        raise DataError(f"{target}: holds another run's files; give --overwrite to replace them, or another --out")
    for name in entries:
        if not any(fnmatch(name, pattern) for pattern in ours):
            raise DataError(f"{target}: holds {name}, which is not of this program's making; choose another --out")
