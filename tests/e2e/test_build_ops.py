"""``python -m eve_ds.build_ops``, stopped while it compiles. A whole compile is `make setup`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "eve_ds.build_ops"]


def environment(extensions: Path, **more: str) -> dict[str, str]:
    return os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)} | more


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
