"""Start programs, wait for them, and find every process that a test left, by a marker in its environment."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

INSTALL = "launch/install_test_packages.sh"
HEEDED = 1 << (signal.SIGTERM - 1)  # in SigCgt of /proc/PID/status: the process has a handler for SIGTERM


def require(*programs: str) -> None:
    """Fail, and say what to run, unless all programs are on this machine."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        raise AssertionError(f"{', '.join(missing)} not installed: run {INSTALL} (as root), which README names")


def system_program(name: str) -> str:
    """Absolute path of a daemon; sshd insists on one."""
    require(name)
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found
    return found


def run(command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, timeout: float = 240) -> str:
    """Run to the end and return the output of both streams; a failure raises with that output."""
    result = subprocess.run(
        [str(word) for word in command],
        env=dict(env),
        cwd=cwd,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}: exit code {result.returncode}\n{result.stdout}"
    return result.stdout


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Poll until ``condition()``; AssertionError naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.05)


def processes_of(marker: Path) -> list[int]:
    """Living processes that have ``marker`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and os.fsencode(marker) in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
    return [process for process in found if process != os.getpid()]


def ranks_of(marker: Path) -> list[int]:
    """Processes of eve_ds.pretrain that handle SIGTERM: no loader worker and no launcher."""
    return [process for process in processes_of(marker) if _is_rank(process)]


def _is_rank(process: int) -> bool:
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        caught = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()[0]
        ours = words[0] == sys.executable and words[words.index("-m") + 1] == "eve_ds.pretrain"  # not mpirun's own line
        return ours and bool(int(caught, 16) & HEEDED)
    return False


def stop_processes(marker: Path, seconds: float = 10) -> None:
    """End the processes that have ``marker`` in their environment: TERM, and KILL for those that stay."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in processes_of(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signum)
        deadline = time.monotonic() + seconds
        while processes_of(marker) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not processes_of(marker), f"processes {processes_of(marker)} would not end"
