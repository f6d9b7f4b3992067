"""Writes a file and its SHA-256 in one pass. The file gets its name when it is complete and on disk."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from preprocessing.running.storage import StoragePath, upload_file


class HashedFile:
    """A file that is hashed while it is written. `finish` gives it its name; without that, nothing is left of it.

    Until then its bytes are in a hidden file beside `target`, or, for a remote target, in an unnamed temporary file.
    """

    closed = False  # pyarrow asks for it

    def __init__(self, target: StoragePath) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self._size = 0
        self._hidden: Path | None = None
        if isinstance(target, Path):
            self._hidden = target.parent / f".{target.name}.{os.getpid()}"
        self._file: IO[bytes] = tempfile.TemporaryFile() if self._hidden is None else open(self._hidden, "wb")

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: Any) -> int:
        """Append a buffer, which may be reused afterwards. Returns its bytes. Raises OSError."""
        size = memoryview(data).nbytes
        self._hash.update(data)
        self._file.write(data)
        self._size += size
        return size

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Nothing to do before `finish`; pyarrow calls it."""

    def finish(self) -> tuple[str, int]:
        """Flush the file to disk and give it its name. Returns its SHA-256 (hexadecimal) and bytes. Raises OSError."""
        self._file.flush()
        if self._hidden is not None and isinstance(self._target, Path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._hidden, self._target)
        elif not isinstance(self._target, Path):
            upload_file(self._file, self._target)
            self._file.close()
        return self._hash.hexdigest(), self._size

    def discard(self) -> None:
        """Remove the file, unless `finish` has given it its name."""
        with suppress(OSError):  # of a full disk: the buffered end of the file no longer matters
            self._file.close()
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)
