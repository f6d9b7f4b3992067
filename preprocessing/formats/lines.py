"""The lines of text files, plain or gzip: one at a time, and never more of one than a bound in memory."""

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
TOO_LONG = f"has more than {MAX_LINE >> 20} MiB; mend the file"
_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 20


class CutFile(Exception):
    """A gzip file that ends too early; `line` is the first line that is lost."""

    def __init__(self, line: int) -> None:
        super().__init__("the file is cut, and what follows is lost; fetch it again")
        self.line = line


def is_compressed(path: AnyPath) -> bool:
    """Whether the file is a gzip file, by its name or its first bytes. Raises OSError."""
    with open_input(path) as file:
        return _is_packed(path, file)


def _is_packed(path: AnyPath, file: IO[bytes]) -> bool:
    """`is_compressed`, of a file that is open; it stands at its start again."""
    magic = bytes(file.read(len(_MAGIC)))
    file.seek(0)
    return str(path).endswith(".gz") or magic == _MAGIC


@contextmanager
def open_text(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a file of lines, unpacked if it is gzip. To go back in the latter is slow."""
    with open_input(path) as file:
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if _is_packed(path, file) else file


def _buffered(file: IO[bytes]) -> IO[bytes]:
    """`file` with a buffer; GzipFile has one of its own, which gives all that stands before a cut."""
    return file if isinstance(file, gzip.GzipFile) else cast(IO[bytes], io.BufferedReader(cast(Any, file), _BUFFER))


def read_lines(file: IO[bytes], limit: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    """(first byte, line without its end) of each line of `open_text`'s file; None for one of more than `limit` bytes.

    A byte order mark is no part of the first one. Raises CutFile, and OSError, also where a gzip file is damaged (its
    checksum stands at its end).
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
