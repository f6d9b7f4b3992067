"""Reads text files line by line, plain or gzip, with a bound on the length of a line in memory."""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from preprocessing.running.storage import RemotePath, open_input

AnyPath = str | os.PathLike[str] | RemotePath
MAX_LINE = 64 << 20  # bytes: an image of 48 MB as base64
TOO_LONG = f"has more than {MAX_LINE >> 20} MiB; fix the file"
_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 20


class CutFile(Exception):
    """A truncated gzip file. `line` is the number of the first line that is lost."""

    def __init__(self, line: int) -> None:
        super().__init__("the file is cut, and what follows is lost; fetch it again")
        self.line = line


def is_compressed(path: AnyPath) -> bool:
    """Whether the file is a gzip file, by its name or its first bytes. Raises OSError."""
    with open_input(path) as file:
        return _is_packed(path, file)


def _is_packed(path: AnyPath, file: IO[bytes]) -> bool:
    """`is_compressed` of an open file, which is rewound."""
    magic = bytes(file.read(len(_MAGIC)))
    file.seek(0)
    return str(path).endswith(".gz") or magic == _MAGIC


@contextmanager
def open_text(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a text file, decompressed if it is gzip (seeking backwards is slow then)."""
    with open_input(path) as file:
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if _is_packed(path, file) else file


def _buffered(file: IO[bytes]) -> IO[bytes]:
    """`file` with a buffer. GzipFile has its own, which returns everything before the point of truncation."""
    return file if isinstance(file, gzip.GzipFile) else cast(IO[bytes], io.BufferedReader(cast(Any, file), _BUFFER))


def read_lines(file: IO[bytes], limit: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    """(first byte, line without its end) of each line of an `open_text` file; None for one longer than `limit` bytes.

    A byte order mark is removed. Raises CutFile for a truncated gzip file, and OSError, also for a damaged gzip file.
    """
    buffered = _buffered(file)
    offset = number = 0
    try:
        while line := buffered.readline(limit + 1):
            first, start = offset, 0
            offset += len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                while not line.endswith(b"\n") and (line := buffered.readline(_BUFFER)):
                    offset += len(line)
                yield first, None
                number += 1
                continue
            if not first and line.startswith(codecs.BOM_UTF8):
                start = len(codecs.BOM_UTF8)
            yield first + start, line[start:].rstrip(b"\r\n")
            number += 1
    except EOFError:
        raise CutFile(number + 1) from None
    except zlib.error as error:
        raise OSError(f"damaged at line {number + 1}: {error}") from None


def first_bytes(path: AnyPath, count: int) -> bytes:
    """The start of the first line, at most `count` bytes of it. Raises OSError."""
    with open_text(path) as file:
        try:
            return _buffered(file).readline(count).removeprefix(codecs.BOM_UTF8)
        except EOFError:
            return b""
        except zlib.error as error:
            raise OSError(f"damaged at its start: {error}") from None
