"""Reads annotation files: text lines, JSON and JSON lines, with errors that name the file and the record."""

import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.lines import TOO_LONG, AnyPath, CutFile, open_text, read_lines
from preprocessing.local_files import json_excerpt, parse_json
from preprocessing.running.storage import StoragePath, open_input, size_of, storage_path


class BadRecord(UserError):
    """One bad record in a file that is otherwise good. `Source.faults` counts it by `reason`.

    `where` names the file and the record; `what` says what is wrong with it and how to fix it.
    """

    def __init__(self, where: str, what: str, reason: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what
        self.reason = reason


_COMPARED = 1 << 20  # bytes, of start and end of files of equal size


def read_text(path: AnyPath) -> str:
    """The file's text (UTF-8, with or without a byte order mark). Raises UserError naming the file."""
    try:
        with open_input(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8, unpacked") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; fetch it again")
    return text


def read_json(path: AnyPath) -> Any:
    """The JSON value in `path`. Raises UserError naming the file, and the line and column of invalid JSON."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        line = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: {_why_invalid(error, line)}; fetch the file again") from None


def find_copies(paths: Iterable[str | StoragePath]) -> Iterator[tuple[str | StoragePath, str | StoragePath]]:
    """(first, other) of each two paths that are the same file under two names: its records would be read twice.

    Of files of equal size, start and end are compared.
    """
    alike: dict[int, list[str | StoragePath]] = defaultdict(list)
    for path in paths:
        with suppress(OSError):  # reported when the file is read
            alike[size_of(storage_path(path))].append(path)
    for size, files in alike.items():
        known: dict[bytes, str | StoragePath] = {}
        for path in files if len(files) > 1 else ():
            with open_input(path) as file:
                ends = bytes(file.read(_COMPARED))
                file.seek(max(size - _COMPARED, 0))
                ends += bytes(file.read(_COMPARED))
            if ends in known:
                yield known[ends], path
            known.setdefault(ends, path)


def text_lines(path: AnyPath) -> Iterator[tuple[int, str | BadRecord]]:
    """(number from 1, text) of each line, or a BadRecord for a line that cannot be read. The file may be gzip.

    Raises UserError naming the file when it cannot be read or is blank.
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
                    text = BadRecord(where, "is not UTF-8 text; fix the file", "line is not UTF-8 text")
                yield number, text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except CutFile as error:
        yield error.line, BadRecord(f"{path}: line {error.line}", str(error), "lines are lost: a file is cut")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if empty:
        raise UserError(f"{path}: is empty; fetch it again")


def read_json_lines(path: AnyPath, bad: Callable[[BadRecord], None]) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each JSON line. Blank lines are skipped; invalid ones are passed to `bad`.

    Raises UserError as `text_lines` does.
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
    """What is wrong with the text: it is no JSON, or holds a number too long for Python to read."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at {line}column {error.colno} ({error.msg})"
    return f"holds a number of more than {sys.get_int_max_str_digits()} digits"


def field(record: Any, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, which must be of `kinds` (a bool is not an int here). Raises BadRecord starting with `where`."""
    if not isinstance(record, dict):
        raise BadRecord(where, "is no JSON object; is this the right file?", "record is no JSON object")
    value = record.get(name)
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    if name not in record:
        raise BadRecord(where, f"has no field '{name}'; is this the right file?", f"record has no field '{name}'")
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    what = f"field '{name}' is {json_excerpt(value)}, not {names}; fix the file"
    raise BadRecord(where, what, f"field '{name}' is not {names}")
