"""One memory-mapped Arrow IPC file, read so that a file that is truncated or deleted does not kill the process.

A memory map gives the small cells (offsets, texts, numbers) without a copy, but access beyond the end of a truncated
file ends the process by SIGBUS, without a message. So the file's size is checked before each access (``fstat``, a
microsecond), and the images, nearly all of the bytes, are read with ``pread``, which reports errors. Two cases remain:
a truncation within the microseconds between check and access, and a small cell that the disk cannot read. For these the
loader reports the death of its worker in one line.
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

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular

_BATCHES = 64  # record batches of a file whose metadata is cached


class MappedFile:
    """An open Arrow IPC file. It holds two file descriptors and closes them when it is garbage-collected.

    Args:
        path: the file.
        size: expected size, bytes.
    Raises:
        UserError: it is missing, of another size, or no Arrow file, or it cannot be opened.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        check_regular(path)
        check_size(path, size)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # Not pyarrow's memory_map: that asks the kernel to read each record batch completely, with its images.
            mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            raise not_arrow_error(path, error) from error
        except OSError as error:
            advice = "raise `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "check disk and memory"
            raise UserError(f"{path}: cannot be opened ({error.strerror}); {advice}") from error
        try:
            mapped.madvise(mmap.MADV_RANDOM)  # no read-ahead around a page
            buffer = pa.py_buffer(mapped)
            self._address: int = buffer.address
            self.reader: Any = pa.ipc.open_file(pa.BufferReader(buffer))
            _ = self.reader.schema.names  # raises unless they are valid UTF-8
            # Caches metadata (a few kilobytes that are slow to decode), not data.
            self._cached_batch: Callable[[int], pa.RecordBatch] = functools.lru_cache(_BATCHES)(self.reader.get_batch)
            self._compressed: bool | None = None  # unknown until the first batch is read
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise not_arrow_error(path, error) from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch ``number``. Raises pyarrow.ArrowException if it is damaged."""
        if self._compressed is None:
            buffers = [part for column in self.reader.get_batch(number).columns for part in column.buffers() if part]
            self._compressed = any(part.size and self.byte_range(part) is None for part in buffers)
        return self.reader.get_batch(number) if self._compressed else self._cached_batch(number)

    def check(self) -> None:
        """Raise UserError if the file was deleted, replaced or changed its size."""
        try:
            found = os.fstat(self._descriptor)  # ten times as fast as os.stat of the path
        except OSError as error:  # from a network file system, after the file was deleted on another host
            raise UserError(f"{self.path}: {error.strerror}; copy or prepare it again") from error
        if found.st_nlink == 0 or found.st_size != self.size:
            check_size(self.path, self.size)
            raise UserError(f"{self.path}: was replaced while it was read; start again")

    def read(self, view: pa.Buffer) -> bytes:
        """The bytes of ``view``, a buffer of this file. Raises UserError if they cannot be read."""
        found = self.byte_range(view)
        if found is None:
            return view.to_pybytes()
        start, end = found
        try:
            data = os.pread(self._descriptor, end - start, start)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); copy or prepare it again") from error
        if len(data) != end - start:
            raise UserError(f"{self.path}: ends before byte {end}: truncated; copy or prepare it again")
        return data

    def will_need(self, start: int, end: int) -> None:
        """Advise the kernel to read bytes ``start`` to ``end`` ahead (POSIX_FADV_WILLNEED); returns immediately."""
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def byte_range(self, view: pa.Buffer) -> tuple[int, int] | None:
        """Range (start, end) of ``view`` in the file, bytes; None if it was decompressed into other memory."""
        start = view.address - self._address
        return (start, start + view.size) if 0 <= start < self.size else None


def binary_cell(column: pa.Array, index: int) -> pa.Buffer | None:
    """The bytes of a binary cell, not copied (pyarrow's own scalar copies them); None for null.

    Raises:
        IndexError: the offsets are invalid.
    """
    validity, offsets, data = column.buffers()
    position = column.offset + index
    if validity is not None and not validity[position >> 3] >> (position & 7) & 1:
        return None
    form = "<2q" if pa.types.is_large_binary(column.type) else "<2i"
    start, end = struct.unpack_from(form, offsets, position * struct.calcsize(form) // 2)
    return data.slice(start, end - start) if data is not None else pa.py_buffer(b"")


def check_offsets(column: pa.Array) -> None:
    """Raise ArrowInvalid if offsets point outside of their buffers: Arrow would follow them and crash the process."""
    dtype = _as_binary(column.type)
    (column if dtype == column.type else column.view(dtype)).validate(full=True)


def _as_binary(dtype: pa.DataType) -> pa.DataType:
    """The type with binary in place of strings: validating UTF-8 would read all texts, and reject a shard for a row."""
    if pa.types.is_string(dtype):
        return pa.binary()
    if pa.types.is_large_string(dtype):
        return pa.large_binary()
    if pa.types.is_list(dtype):
        return pa.list_(_as_binary(dtype.value_type))
    if pa.types.is_large_list(dtype):
        return pa.large_list(_as_binary(dtype.value_type))
    return dtype


def check_size(path: Path, size: int) -> None:
    """Raise UserError unless ``path`` has ``size`` bytes."""
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, but the split lists it; copy or prepare it again") from None
    if found != size:
        raise UserError(f"{path}: {found} bytes, expected {size}: truncated or changed; copy or prepare it again")


def not_arrow_error(path: Path, error: BaseException) -> UserError:
    """The error for a file that pyarrow cannot read."""
    line = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: is not a readable Arrow file ({line}); copy or prepare it again")
