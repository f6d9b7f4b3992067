"""References to images: to a file, to bytes in a tar, to a line of base64, to a cell of a parquet file.

Converters make references and the pipeline's workers read the bytes. A reference is small and can be pickled.
`path` is a local path or a URI (hdfs://, s3://, gs://); `running.storage.open_input` opens both.
`read` raises FileNotFoundError when there is no image, also where the name is too long for a file; another OSError when
it cannot be read; and ValueError, with a message that the manifest counts by, when the data cannot be an image.
"""

import base64
import binascii
import errno
import functools
import json
import os
import stat
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.running.storage import is_remote, open_input


class ImageRef(Protocol):
    """The interface of a reference."""

    @property
    def name(self) -> str:
        """The name of the image in messages."""
        ...

    def read(self) -> bytes:
        """The image file's own bytes."""
        ...

    def exists(self) -> bool:
        """Whether the file is there; it may still hold no image."""
        ...


def join(folder: str | os.PathLike[str], name: str) -> str:
    """`name` below `folder`, a path or a URI (which pathlib would mangle)."""
    return os.path.join(os.fspath(folder), name)


def image_in(folder: str, name: str) -> "FileImage | OutsideImage":
    """The image file `name` below `folder`. Links may lead out of the folder, the name itself may not."""
    if ".." not in name and not name.startswith("/"):
        return FileImage(f"{folder}/{name}" if folder[-1:] not in ("/", "") else folder + name)  # as join, but faster
    path = join(folder, name)
    if not is_remote(folder):
        whole = os.path.abspath(path)  # without `..`, which means another folder after a link
        if whole.startswith(os.path.join(os.path.abspath(folder), "")):
            return FileImage(whole)
    elif not escapes_folder(name):
        return FileImage(path)
    return OutsideImage(name)


def escapes_folder(name: str) -> bool:
    """Whether the name of a file in a folder is absolute or has a part `..`."""
    return name.startswith("/") or ".." in name.split("/")


def _is_readable(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path) and os.access(path, os.R_OK)  # opening a pipe would block
    try:
        with open_input(path):
            return True
    except OSError:
        return False


def _missing_if_too_long(error: OSError) -> OSError:
    """`error`, or FileNotFoundError in its place if the name is too long for any file."""
    if error.errno != errno.ENAMETOOLONG:
        return error
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.filename)


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
        try:
            if not is_remote(self.path) and not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ValueError("is no regular file")
            with open_input(self.path) as file:
                return bytes(file.read())
        except OSError as error:
            raise _missing_if_too_long(error) from None

    def read_into(self, room: memoryview) -> memoryview | None:
        """The file's bytes at the start of `room`; None when they do not fit, or the file is not a local one."""
        if is_remote(self.path):
            return None
        size = 0
        # io.open takes a third longer for a small file. Without O_NONBLOCK, opening a pipe would block.
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _missing_if_too_long(error) from None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("is no regular file")
            while count := os.readv(file, [room[size:] if size else room]):
                size += count
                if size == status.st_size:
                    break
        finally:
            os.close(file)
        return room[:size] if size < len(room) else None

    def exists(self) -> bool:
        """See ImageRef."""
        return _is_readable(self.path)


@dataclass(frozen=True, slots=True)
class OutsideImage:
    """An image whose name leads out of the folder of images. It is never read."""

    name: str

    def read(self) -> bytes:
        """See ImageRef."""
        raise ValueError("path leads out of the folder of images")

    def exists(self) -> bool:
        """See ImageRef."""
        return False


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
        return _is_readable(self.path)


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
        return _is_readable(self.path)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Row `row` of row group `row_group` in `column`: bytes, a struct with a field `bytes`, or base64 text.

    The last two columns decoded are cached: workers read rows in order, so each row group is decoded once.
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
        return _is_readable(self.path)


@functools.lru_cache(maxsize=2)
def _parquet_column(path: str, row_group: int, column: str) -> pa.ChunkedArray:
    with open_input(path) as file:
        try:
            return pq.ParquetFile(file).read_row_group(row_group, columns=[column]).column(column)
        except (pa.ArrowException, MemoryError) as error:
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
