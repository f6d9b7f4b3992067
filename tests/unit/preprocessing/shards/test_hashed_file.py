import errno
import fcntl
import hashlib
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocessing.shards import hashed_file
from preprocessing.shards.hashed_file import HashedFile

BLOCK, CHUNK = 4096, 4 * 4096


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "_CHUNK", CHUNK)
    monkeypatch.setattr(hashed_file, "_CHUNKS", deque(maxlen=8))


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def written(path: Path, data: bytes, step: int) -> tuple[str, int]:
    """Write `data` in pieces, each from memory that is used again at once."""
    memory = np.empty(step, dtype=np.uint8)
    with HashedFile(path) as file:
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            memory[: len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            assert file.write(memory[: len(piece)].data) == len(piece)
            assert file.tell() == start + len(piece) and not path.exists()
        return file.finish()


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + BLOCK + 7]
)
@pytest.mark.parametrize("step", [1000, 3 * CHUNK + 1])
def test_all_bytes_are_there_and_hashed(tmp_path: Path, size: int, step: int) -> None:
    data = content(size)
    assert written(tmp_path / "a", data, step) == (hashlib.sha256(data).hexdigest(), size)
    assert (tmp_path / "a").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_that_refuses_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some do that take the flag: they say EINVAL at the first write."""
    refused = 0
    real = os.write

    def write(handle: int, data: Any) -> int:
        nonlocal refused
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(handle, data[:5000])  # and is interrupted after a part

    monkeypatch.setattr("preprocessing.shards.hashed_file.os.write", write)
    data = content(3 * CHUNK + 7)
    assert written(tmp_path / "a", data, 999) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (tmp_path / "a").read_bytes() == data and refused <= 1


def test_an_error_of_the_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("preprocessing.shards.hashed_file.os.write", write)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "a", content(3 * CHUNK), CHUNK)
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "a") as file:
        file.write(content(2 * CHUNK))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
