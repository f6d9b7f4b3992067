import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocessing.shards import hashed_file
from preprocessing.shards.hashed_file import HashedFile


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def written(path: Path, data: bytes, step: int) -> tuple[str, int]:
    """Write `data` in pieces, each from memory that is reused at once."""
    memory = np.empty(step, dtype=np.uint8)
    with HashedFile(path) as file:
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            memory[: len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            assert file.write(memory[: len(piece)].data) == len(piece)
            assert file.tell() == start + len(piece) and not path.exists()
        return file.finish()


@pytest.mark.parametrize("size", [0, 1, 4096, 100_007])
@pytest.mark.parametrize("step", [1000, 50_001])
def test_the_hash_is_that_of_the_file(tmp_path: Path, size: int, step: int) -> None:
    data = content(size)
    assert written(tmp_path / "a", data, step) == (hashlib.sha256(data).hexdigest(), size)
    assert (tmp_path / "a").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_buffers_of_several_bytes_an_item_are_counted_in_bytes(tmp_path: Path) -> None:
    keys = np.arange(7, dtype="<u8")
    with HashedFile(tmp_path / "a") as file:
        assert file.write(keys) == file.tell() == 56
        assert file.finish() == (hashlib.sha256(keys.tobytes()).hexdigest(), 56)


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def note_fsync(handle: int) -> None:
        assert not (tmp_path / "a").exists()
        fsync(handle)
        synced.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", note_fsync)
    written(tmp_path / "a", content(5000), 999)
    assert synced == [5000]


def test_a_full_disk_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a full disk."""

        def __init__(self, path: Path, mode: str) -> None:
            self._file = open(path, mode)

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self._file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hashed_file, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "a", content(5000), 999)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "a") as file:
        file.write(content(50_000))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
