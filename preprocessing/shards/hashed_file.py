"""A file that is hashed while it is written, and that appears under its name when it is whole and on disk.

A local one is written past the page cache (O_DIRECT) where its file system can do that: a converter writes far more
than memory holds, copying it there costs as much as hashing it, and `fsync` would then wait for all of it at once.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from preprocessing.running.storage import StoragePath, upload_file

_CHUNK = 8 << 20
_BLOCK = 4096  # of which O_DIRECT wants length and place to be multiples, in the file and in memory
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_CHUNKS: deque[np.ndarray] = deque(maxlen=8)  # memory of files that are done, for those to come


class HashedFile:
    """A file being written and hashed at once; it gets its name in `finish`.

    Before that its bytes lie beside `target` in a hidden file, or, for a remote target, in an unnamed temporary file.
    A thread writes a chunk while the caller of `write` hashes it and fills the next one.
    """

    closed = False  # pyarrow asks

    def __init__(self, target: StoragePath) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self._size = 0
        self._hidden: Path | None = None
        if isinstance(target, Path):
            self._hidden = target.parent / f".{target.name}.{os.getpid()}"
        self._file: IO[bytes] = (
            tempfile.TemporaryFile(buffering=0) if self._hidden is None else open(self._hidden, "wb", buffering=0)
        )
        self._direct = False
        if self._hidden is not None:
            self._set_direct(True)
        self._disk = ThreadPoolExecutor(1, "shard-disk")
        self._writing: Future[None] | None = None
        self._chunk, self._other = _new_chunk(), _new_chunk()
        self._filled = 0

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: Any) -> int:
        """Append `data`, a buffer whose memory is free again afterwards. Raises OSError."""
        whole = np.frombuffer(data, dtype=np.uint8)
        start = 0
        while start < len(whole):
            piece = whole[start : start + _CHUNK - self._filled]
            self._chunk[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            if self._filled == _CHUNK:
                self._flush()
            start += len(piece)
        self._size += start
        return start

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Nothing to do before `finish`; pyarrow calls it."""

    def finish(self) -> tuple[str, int]:
        """Put the file in its place, on disk. Returns its SHA-256 and size."""
        self._flush()
        self._wait()
        if self._hidden is not None and isinstance(self._target, Path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._hidden, self._target)
        elif not isinstance(self._target, Path):
            upload_file(self._file, self._target)
            self._file.close()
        self._disk.shutdown()
        _CHUNKS.extend((self._chunk, self._other))
        return self._hash.hexdigest(), self._size

    def discard(self) -> None:
        """Give the file up, unless it is in its place."""
        self._disk.shutdown()
        self._file.close()
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Have the chunk written while it is hashed, and go on with the other one."""
        self._wait()
        chunk = self._chunk[: self._filled].data
        self._writing = self._disk.submit(self._put, chunk)
        self._hash.update(chunk)
        self._chunk, self._other, self._filled = self._other, self._chunk, 0

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _put(self, chunk: memoryview) -> None:
        """Write a chunk: of the last one, the blocks before its end directly."""
        blocks = len(chunk) - len(chunk) % _BLOCK
        self._write_all(chunk[:blocks])
        if blocks < len(chunk):
            self._set_direct(False)
            self._write_all(chunk[blocks:])

    def _write_all(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._file.fileno(), data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)  # a file system that wants something else of direct writes

    def _set_direct(self, direct: bool) -> None:
        """Write past the page cache from now on, where the file system can, or through it."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT if direct else flags)
            self._direct = direct
        except OSError:
            self._direct = False


def _new_chunk() -> np.ndarray:
    """Memory for a chunk, from the start of a page."""
    try:
        return _CHUNKS.pop()
    except IndexError:
        return np.frombuffer(mmap.mmap(-1, _CHUNK), dtype=np.uint8)
