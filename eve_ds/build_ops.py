"""Compile DeepSpeed's CPU communication operation once, in the open: ``python -m eve_ds.build_ops``.

DeepSpeed compiles ``deepspeed_shm_comm`` at the first ``init_distributed`` on a CPU, on every rank, for 30 to 140
seconds and without a word. A build killed meanwhile leaves a ``lock`` file on which every later run waits for ever.
This command does it beforehand into the project's own folder, shows the time, and removes such a lock.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from evaluation.common import Parser
from eve_ds.engine.environment import (
    OPERATION,
    STAMP,
    environment_identity,
    operation_folder,
    operation_is_built,
    prepare_environment,
)

BUILD = "from deepspeed.comm.torch import build_shm_op; print('needed' if build_shm_op() else 'not needed')"
USUAL_SECONDS = "30 to 140 s"
FALLBACK = "runs exchange data through gloo instead, training is no slower"


def main() -> None:
    Parser(prog="python -m eve_ds.build_ops", description=(__doc__ or "").split("\n")[0]).parse_args()
    prepare_environment()
    folder = operation_folder()
    if operation_is_built():
        say(f"{OPERATION} is built: {folder}")
        return
    lacking = missing_tool()
    if lacking:
        say(f"{OPERATION} is not built: {lacking}; {FALLBACK}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if remove_stale_lock(folder / "lock"):
        say(f"removed {folder / 'lock'}, which a killed build had left")
    say(f"compiling {OPERATION} once, usually {USUAL_SECONDS}")
    started = time.monotonic()
    log = folder / "build.log"
    code = build(log)
    seconds = time.monotonic() - started
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == 0 and lines and lines[-1] == "not needed":
        say(f"{OPERATION} is not needed on this machine's accelerator")
    elif code == 0:
        (folder / STAMP).write_text(environment_identity() + "\n", encoding="utf-8")
        say(f"built in {seconds:.0f} s: {folder}")
    else:
        last = lines[-1] if lines else f"exit code {code}"
        say(f"{OPERATION} could not be compiled ({last}; whole output in {log}); {FALLBACK}")


def say(text: str) -> None:
    print(f"build_ops: {text}", flush=True)


def missing_tool() -> str | None:
    """What the compile lacks on this machine and how to get it, or None."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} (Debian: apt-get install g++)"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return f"no {headers} (Debian: apt-get install python3-dev)"
    if shutil.which("ninja") is None:
        return "no ninja (pip install -r requirements.txt)"
    return None


def remove_stale_lock(lock: Path) -> bool:
    """Remove torch's build lock if no process of this host holds it open; say whether there was one to remove.

    A living builder keeps the file open (torch.utils.file_baton); those who wait for it do not.
    """
    if not lock.exists():
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(lock.resolve()):
                return False
        except OSError:
            continue  # the process has ended, or is another user's, whose builds are in another folder
    lock.unlink(missing_ok=True)
    return True


def build(log: Path) -> int:
    """Compile in a child process, its output in ``log``, and show the seconds; return the child's exit code.

    Stopped by Ctrl-C or SIGTERM, it ends the compiler too and leaves no lock.
    """
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", BUILD], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return show_progress(child)
    finally:
        if child.poll() is None:
            kill_session(child.pid)
            child.wait()
            remove_stale_lock(log.parent / "lock")


def kill_session(session: int) -> None:
    """Kill all processes of a session. Not of a process group: ninja gives each compiler a group of its own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:  # after the command's name: state, parent, group, session
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile


def show_progress(child: subprocess.Popen[bytes]) -> int:
    """Wait for ``child``: a running count of seconds on a terminal, a line every 15 s in a log file."""
    on_terminal = sys.stdout.isatty()
    interval = 1 if on_terminal else 15
    started = time.monotonic()
    while True:
        try:
            code = child.wait(timeout=interval)
        except subprocess.TimeoutExpired:
            line = f"build_ops: compiling, {time.monotonic() - started:.0f} s of {USUAL_SECONDS}"
            print(f"\r{line}" if on_terminal else line, end="" if on_terminal else "\n", flush=True)
            continue
        if on_terminal:
            print("\r\x1b[K", end="")
        return code


if __name__ == "__main__":
    main()
