"""``python -m eve_ds.build_ops`` without and after a compile. tests/e2e/test_build_ops.py stops one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from eve_ds.build_ops import remove_stale_lock
from eve_ds.engine.environment import STAMP, environment_identity

COMMAND = [sys.executable, "-m", "eve_ds.build_ops"]


def environment(extensions: Path, **more: str) -> dict[str, str]:
    return os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)} | more


def test_what_is_built_is_not_built_again(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / STAMP).write_text(environment_identity())
    (folder / "deepspeed_shm_comm.so").touch()
    started = time.monotonic()
    result = subprocess.run(COMMAND, env=environment(tmp_path), cwd=repository, capture_output=True, text=True)
    assert time.monotonic() - started < 2
    assert result.returncode == 0 and "is built" in result.stdout


def test_without_a_compiler_it_says_so_and_training_goes_on(tmp_path: Path, repository: Path) -> None:
    result = subprocess.run(
        COMMAND, env=environment(tmp_path, CXX="no-such-compiler"), cwd=repository, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert (
        "no C++ compiler 'no-such-compiler' (Debian: apt-get install g++); runs exchange data through gloo"
        in result.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not remove_stale_lock(lock)
    lock.touch()
    assert remove_stale_lock(lock)
    assert not lock.exists()


def test_a_lock_that_a_builder_holds_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"import os, sys; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); sys.stdin.readline()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline()
    assert not remove_stale_lock(lock)
    holder.kill()
    holder.communicate()
    assert remove_stale_lock(lock)
