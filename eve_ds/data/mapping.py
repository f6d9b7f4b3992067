"""One Arrow IPC file, read in place, such that a file that is cut off or goes away does not kill the process.

A memory map gives the small cells (offsets, texts, numbers) without a copy; but where a mapped file has been cut off,
a look at it ends the process by SIGBUS, without a word. So the file's size is asked for before each look (`fstat`,
a microsecond), and the images, nearly all of the bytes, are read with `pread`, which reports what is wrong. What
remains is a cut within the microseconds between the two, and a small cell that the disk cannot read; the loader tells
a worker's death in one line, too.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.errors import DataError
from preprocessing.local_files import check_regular

_BATCHES = 64  # of a file, whose descriptions are kept


class MappedFile:
    """An open Arrow IPC file. It holds two file descriptors, and closes them when nothing refers to it any more.

    Args:
        path: the file.
        size: bytes that it must have.
    Raises:
        DataError: it is missing, of another size, or no Arrow file, or it cannot be opened.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        check_regular(path)
        check_size(path, size)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # Not pyarrow's own memory_map: for each record batch it asks the kernel to read all of it, images too.
            mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            raise not_arrow(path, error) from error
        except OSError as error:
            mend = "raise `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "check disk and memory"
            raise DataError(f"{path}: cannot be opened ({error.strerror}); {mend}") from error
        try:
            mapped.madvise(mmap.MADV_RANDOM)  # a page at a time
            buffer = pa.py_buffer(mapped)
            self._address: int = buffer.address
            self.reader: Any = pa.ipc.open_file(pa.BufferReader(buffer))
            _ = self.reader.schema.names  # that they are text
            # The data stay where they are; what is kept is where that is: a few kilobytes that take long to decode.
            self._kept: Callable[[int], pa.RecordBatch] = functools.lru_cache(_BATCHES)(self.reader.get_batch)
            self._compressed: bool | None = None  # until a batch is seen
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise not_arrow(path, error) from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch. Raises pyarrow.ArrowException where it is none."""
        if self._compressed is None:
            buffers = [part for column in self.reader.get_batch(number).columns for part in column.buffers() if part]
            self._compressed = any(part.size and self.place(part) is None for part in buffers)
        return self.reader.get_batch(number) if self._compressed else self._kept(number)

    def check(self) -> None:
        """Raise DataError where the file has gone or changed its size."""
        try:
            found = os.fstat(self._descriptor)  # a tenth of the time that its path takes
        except OSError as error:  # a network file system's, for a file that was deleted elsewhere
            raise DataError(f"{self.path}: {error.strerror}; copy or prepare it again") from error
        if found.st_nlink == 0 or found.st_size != self.size:
            check_size(self.path, self.size)
            raise DataError(f"{self.path}: was replaced while it was read; start again")

    def read(self, view: pa.Buffer) -> bytes:
        """The bytes of `view`, a buffer of this file. Raises DataError where they cannot be read."""
        place = self.place(view)
        if place is None:
            return view.to_pybytes()
        start, end = place
        try:
            data = os.pread(self._descriptor, end - start, start)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); copy or prepare it again") from error
        if len(data) != end - start:
            raise DataError(f"{self.path}: ends before byte {end}: truncated; copy or prepare it again")
        return data

    def will_need(self, start: int, end: int) -> None:
        """Have the kernel read bytes `start` to `end` ahead; returns at once. Advice: it may be of no use."""
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def place(self, view: pa.Buffer) -> tuple[int, int] | None:
        """First byte of `view` in the file and the one after its last; None where a compressed batch was unpacked."""
        start = view.address - self._address
        return (start, start + view.size) if 0 <= start < self.size else None


def binary_cell(column: pa.Array, index: int) -> pa.Buffer | None:
    """The bytes of a binary cell, where they lie; None for null. (pyarrow's own scalar is a copy of them.)

    Raises IndexError where the offsets are wrong.
    """
    validity, offsets, data = column.buffers()
    place = column.offset + index
    if validity is not None and not validity[place >> 3] >> (place & 7) & 1:
        return None
    form = "<2q" if pa.types.is_large_binary(column.type) else "<2i"
    start, end = struct.unpack_from(form, offsets, place * struct.calcsize(form) // 2)
    return data.slice(start, end - start) if data is not None else pa.py_buffer(b"")


def check_offsets(column: pa.Array) -> None:
    """Raise ArrowInvalid where cells go beyond their buffers. Arrow follows offsets blindly, to the process's end."""
    kind = _as_bytes(column.type)
    (column if kind == column.type else column.view(kind)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes for texts: to check these would be to read them all, and to blame the shard for a row."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    return kind


def check_size(path: Path, size: int) -> None:
    """Raise DataError unless `path` has `size` bytes."""
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, but the split has it; copy or prepare it again") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes, expected {size}: truncated or changed; copy or prepare it again")


def not_arrow(path: Path, error: BaseException) -> DataError:
    """The error for a file that pyarrow cannot read."""
    line = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: is no readable Arrow file ({line}); copy or prepare it again")
