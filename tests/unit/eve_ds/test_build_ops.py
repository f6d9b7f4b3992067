"""``python -m eve_ds.build_ops``: what it does before, without and after a compile. A whole compile is `make setup`."""

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


def test_a_stopped_build_leaves_neither_lock_nor_compiler(tmp_path: Path, repository: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()  # as a killed build leaves it: without the removal this build would wait for ever
    child = subprocess.Popen(COMMAND, env=environment(tmp_path), cwd=repository, stdout=subprocess.PIPE, text=True)
    assert child.stdout and "which a killed build had left" in child.stdout.readline()
    deadline = time.monotonic() + 60
    while not any(name == "cc1plus" for name in _commands(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock.exists(), "the compile did not start"
    child.terminate()
    child.communicate()
    assert child.returncode == 128 + 15
    assert not lock.exists()
    assert _commands(tmp_path) == []


def _commands(folder: Path) -> list[str]:
    """Names of the other living processes that have ``folder`` in their environment."""
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                names.append((process / "comm").read_text().strip())
        except OSError:
            continue  # ended meanwhile, or another user's
    return names
