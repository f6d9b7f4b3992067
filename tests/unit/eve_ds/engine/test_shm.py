"""Buffers of dead ranks go, those of living ones stay: with real files in /dev/shm and real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eve_ds.engine import shm

MAP = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 4096); os.close(f)"
OPEN = "import os, sys; f = os.open(sys.argv[1], os.O_RDWR)"


def buffer(rank: int) -> Path:
    return shm.SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.getpid()}_{rank}"


@pytest.fixture
def buffers() -> Iterator[list[Path]]:
    """Two buffers, named as DeepSpeed names them."""
    paths = [buffer(rank) for rank in range(2)]
    for path in paths:
        path.write_bytes(bytes(4096))
    yield paths
    for path in paths:
        path.unlink(missing_ok=True)


def user_of(path: Path, how: str) -> subprocess.Popen[str]:
    """A process that maps or opens ``path`` and waits for a line on its standard input."""
    code = f"{how}; print('ready', flush=True); sys.stdin.readline()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("how", [MAP, OPEN])
def test_a_living_rank_keeps_its_buffer_and_a_killed_one_does_not(buffers: list[Path], how: str) -> None:
    living = user_of(buffers[0], how)
    killed = user_of(buffers[1], how)
    try:
        killed.kill()
        killed.wait()
        assert buffers[1] in shm.remove_shm_leftovers()
        assert buffers[0].exists() and not buffers[1].exists()
    finally:
        living.communicate("end\n")
    assert buffers[0] in shm.remove_shm_leftovers()
    assert not buffers[0].exists()


def test_other_names_and_other_users_files_are_left_alone(buffers: list[Path]) -> None:
    stranger = shm.SHARED_MEMORY / f"not_ours_deepspeed_allreduce_buffer_{os.getpid()}"
    another = shm.SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_127.0.0.1_{os.getpid()}_0"
    stranger.touch()
    another.touch()
    try:
        assert {stranger, another}.isdisjoint(shm.remove_shm_leftovers())
        assert stranger.exists() and another.exists()
    finally:
        stranger.unlink()
        another.unlink()


def test_a_rank_releases_its_own_buffer_alone(buffers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(os.getpid()))
    shm.release_own_buffer(1)
    assert buffers[0].exists() and not buffers[1].exists()
    shm.release_own_buffer(1)  # gone already, or never made: no error
