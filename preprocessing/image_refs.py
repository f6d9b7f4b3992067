"""Where an image's bytes lie: in a file, in a tar, in a line of base64, in a cell of a parquet file.

A converter only notes the places; the pipeline's workers read the bytes, so a reference is small and can be pickled.
`path` is a local path or a URI (hdfs://, s3://, gs://); `preprocessing.files.open_input` opens both.
`read` raises FileNotFoundError when there is nothing at the place, another OSError when it cannot be read, and
ValueError, in words that can be counted, when what stands there is no image data at all.
"""

import base64
import binascii
import functools
import json
import os
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.files import open_input


class ImageRef(Protocol):
    """What every reference offers."""

    @property
    def name(self) -> str:
        """How a message calls the image."""
        ...

    def read(self) -> bytes:
        """The image file's own bytes."""
        ...

    def exists(self) -> bool:
        """Whether there is anything at the place; says nothing of what it is."""
        ...


def join(folder: str | os.PathLike[str], name: str) -> str:
    """`name` below `folder`, a path or a URI (which pathlib would mangle)."""
    return os.path.join(os.fspath(folder), name)


def _is_there(path: str) -> bool:
    try:
        with open_input(path):
            return True
    except OSError:
        return False


def _read_at(path: str, offset: int, size: int) -> bytes:
    with open_input(path) as file:
        file.seek(offset)
        data = bytes(file.read(size))
    if len(data) != size:
        raise ValueError("is cut short")
    return data


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file."""

    path: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def read(self) -> bytes:
        """See ImageRef."""
        with open_input(self.path) as file:
            return bytes(file.read())

    def exists(self) -> bool:
        """See ImageRef."""
        return _is_there(self.path)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar: `size` bytes from `offset`, where its content starts."""

    path: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """See ImageRef."""
        return _read_at(self.path, self.offset, self.size)

    def exists(self) -> bool:
        """See ImageRef."""
        return _is_there(self.path)


@dataclass(frozen=True, slots=True)
class Base64Cell:
    """Base64 in a text file: `length` bytes from byte `offset`, without the quotes of JSON."""

    path: str
    offset: int
    length: int
    name: str

    def read(self) -> bytes:
        """See ImageRef."""
        return decode_base64(_read_at(self.path, self.offset, self.length))

    def exists(self) -> bool:
        """See ImageRef."""
        return _is_there(self.path)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Row `row` of row group `row_group` in `column`: bytes, a struct with a field `bytes`, or base64 text.

    Workers read rows in order, so the last columns decoded are kept: a row group is decoded once, not once a row.
    """

    path: str
    row_group: int
    row: int
    column: str
    name: str

    def read(self) -> bytes:
        """See ImageRef."""
        value = _parquet_column(self.path, self.row_group, self.column)[self.row].as_py()
        if isinstance(value, dict):  # Hugging Face's image feature: {bytes, path}
            value = value.get("bytes")
        if value is None:
            raise FileNotFoundError(f"{self.path}: row group {self.row_group} row {self.row}: {self.column} is null")
        return decode_base64(value.encode()) if isinstance(value, str) else bytes(value)

    def exists(self) -> bool:
        """See ImageRef."""
        return _is_there(self.path)


@functools.lru_cache(maxsize=2)
def _parquet_column(path: str, row_group: int, column: str) -> pa.ChunkedArray:
    with open_input(path) as file:
        try:
            return pq.ParquetFile(file).read_row_group(row_group, columns=[column]).column(column)
        except pa.ArrowException as error:
            raise ValueError("is in a broken parquet file") from error


def decode_base64(text: bytes) -> bytes:
    """The bytes of standard or URL-safe base64, padded or not, as JSON may write it ("\\/" for a slash).

    Raises ValueError when it is none.
    """
    if b"\\" in text:
        text = json.loads(b'"' + text + b'"').encode()  # JSONDecodeError is a ValueError
    text = text.translate(_STANDARD, b" \r\n\t").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError("is no base64") from None


_STANDARD = bytes.maketrans(b"-_", b"+/")
