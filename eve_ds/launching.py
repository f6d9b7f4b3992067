"""Runs a launcher, passes signals on to its ranks, waits for all of them and returns their exit code.

    python -m eve_ds.launching deepspeed --num_gpus 8 --module eve_ds.pretrain ARGS
    python -m eve_ds.launching torchrun --nproc_per_node 8 --module eve_ds.pretrain ARGS

Launchers handle signals differently: the deepspeed command dies of TERM and leaves its ranks behind; its per-node
launcher and torchrun kill them after 30 s, mpirun after one. Under this command the launcher gets no signal. TERM, INT,
HUP and USR1 go to the ranks of this host, which save and end, however long that takes, and the launcher ends after
them. It may run as process 1 of a container, which no signal without a handler ends. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eve_ds.engine.signals import SIGNALS
from eve_ds.errors import RANKS, STOPPED, run_command
from preprocessing.errors import UserError, without_secrets

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
POLL_SECONDS = 0.2
MOST_INFORMATIVE = (2, STOPPED, 3)  # exit codes of ranks, the most informative first; those of signals come after them


class Guard:
    """One launcher and the ranks that it started on this host.

    Args:
        command: the launcher's command line.
        folder: in which each rank writes a file named by its process id; at its end, the file holds its exit code.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command, self.folder = command, folder
        self._signals: list[int] = []  # signals received, in order
        self._passed: dict[str, int] = {}  # how many of them each rank was sent ("": the launcher)

    def run(self) -> int:
        """Start the launcher; returns the exit code when it and all ranks have ended."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is for the ranks, too
                signal.signal(number, lambda number, _: self._signals.append(number))
        try:
            launcher = subprocess.Popen(
                self.command,
                env=os.environ | {RANKS: str(self.folder)},
                start_new_session=True,
                preexec_fn=_end_with_guard,
            )
        except OSError as error:
            raise UserError(f"{self.command[0]}: cannot be started ({error.strerror}); name a launcher") from error
        code: int | None = None
        while code is None or self._living():
            if code is None:
                code = launcher.poll()
            self._pass_on(launcher)
            self._reap(launcher)
            time.sleep(POLL_SECONDS)
        return self._result(code)

    def _living(self) -> list[str]:
        """Process ids of the ranks that have registered and not ended."""
        return [each.name for each in self.folder.iterdir() if not each.read_text() and self._is_ours(each.name)]

    def _is_ours(self, process: str) -> bool:
        """Whether the process runs and was started from here. Ids from a container inside of this one mean others."""
        try:
            return os.fsencode(f"{RANKS}={self.folder}") in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def _pass_on(self, launcher: subprocess.Popen[bytes]) -> None:
        """Send each rank the signals that it has not got yet, also those from before it registered.

        If there is no rank, end the launcher instead: it may hang in its own start or end.
        """
        asked, ranks = len(self._signals), self._living()
        for rank in ranks:
            for number in self._signals[self._passed.get(rank, 0) : asked]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(rank), number)
            self._passed[rank] = asked
        if not ranks and asked > self._passed.get("", 0):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
        self._passed[""] = asked

    def _reap(self, launcher: subprocess.Popen[bytes]) -> None:
        """Collect the exit codes of orphans, which have become children of this process."""
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):  # none is left
            while (child := os.waitid(os.P_ALL, 0, ended)) and child.si_pid != launcher.pid:
                os.waitpid(child.si_pid, 0)

    def _result(self, code: int) -> int:
        """The exit code of the ranks; if none failed, that of the launcher."""
        written = [each.read_text() for each in self.folder.iterdir()]
        if not written and signal.SIGUSR1 in self._signals:  # during start-up: a scheduler may queue the job again
            return STOPPED
        codes = {int(text) for text in written if text}
        code = 128 - code if code < 0 else code
        died = int("" in written)  # without writing an exit code
        return next((each for each in MOST_INFORMATIVE if each in codes), max(codes, default=0) or code or died)


def _end_with_guard() -> None:
    """Runs in the child before exec: the kernel is to send the launcher USR1 when the guard dies.

    Launchers pass USR1 on to their ranks or die of it. Ranks on this host notice by themselves that the guard is gone,
    but those of srun are no descendants of it.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGUSR1, 0, 0, 0)


def main() -> int:
    command = sys.argv[1:]
    if not command:
        raise UserError("no launcher named; as in: python -m eve_ds.launching deepspeed --module eve_ds.pretrain ...")
    if command[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    for word in command:  # the launcher would log it, and process lists show it
        if (shown := without_secrets(word)) != word:
            raise UserError(
                f"{shown}: holds a user, a password or a key; leave them out, and give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or by AWS_PROFILE"
            )
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="eve-ds-ranks-") as folder:
        return Guard(command, Path(folder)).run()


if __name__ == "__main__":
    run_command(main)
