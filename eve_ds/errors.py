"""What a command prints: its log, and its errors. A user's mistake is one line on stderr and exit code 2, no traceback.

Rank 0 logs, and other ranks' warnings name their rank. Modules log with ``logging.getLogger(__name__)``. What is logged
below ``eve_ds`` reaches the terminal once `setup_logging` was called; ``run_command`` does that. A program that uses
EVE-DS as a library configures ``logging`` itself.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from evaluation.common import ended, flush_or_drop, mend_streams
from eve_ds.environment import launched_rank
from eve_ds.rank_failure import is_late_rank, is_lost_rank, own_failure
from preprocessing.errors import UserError, printable

OUTPUT = "eve_ds.output"  # the logger of what a command reports as its result: it goes to stdout
_LIBRARY_FORMAT = warnings.formatwarning
# Launchers end all ranks as soon as one exits, so ranks with less to report exit later.
RANK_0_SECONDS = 30.0  # for rank 0 to report a mistake of all ranks: it may import torch later than others
LOST_RANK_SECONDS = 3.0  # how long a rank waits that found another one gone
RANKS = "EVE_DS_RANKS"  # environment variable: the folder in which ranks register with eve_ds.launching
STOPPED = 75  # exit code: stopped on request, and the same command goes on (EX_TEMPFAIL of sysexits.h)
NOT_COPIED = 4  # exit code: all is done and in output_dir, and checkpoint.second_place lacks a part of it
finish_together: list[Callable[[], object]] = []  # calls at exit that wait for all ranks; skipped after a failure


def setup_logging(rank: int) -> None:
    """Send what is logged below ``eve_ds`` to stderr, one line a message, and the logger `OUTPUT` to stdout.

    - Rank 0 logs messages of level INFO as they are and warnings as ``WARNING: message``.
    - Other ranks log warnings alone, as ``WARNING: [rank 3] message``.
    - Warnings of the ``warnings`` module look the same if EVE-DS issues them; those of libraries stay as they are.

    Control characters are escaped. Calling it again replaces the former set-up.
    """
    logger = logging.getLogger("eve_ds")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Console)]:
        logger.removeHandler(handler)
    handler = _Console(logging.WARNING if rank else logging.INFO)
    handler.setFormatter(_Formatter(rank))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would have every line twice
    _format_own_warnings(rank)


class _Console(logging.Handler):
    """Writes to what ``sys.stderr`` and ``sys.stdout`` are at that moment. Errors of the stream are raised: the reader
    of ``command | head`` may have left."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.name == OUTPUT else sys.stderr
        stream.write(f"{self.format(record)}\n")
        stream.flush()


class _Formatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno > logging.INFO else ""
        line = f"{level}{self._prefix}{printable(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _format_own_warnings(rank: int) -> None:
    """Without Python's file name and source line, if they are EVE-DS's own."""
    own, prefix = f"{Path(__file__).parent}{os.sep}", f"[rank {rank}] " if rank else ""

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not filename.startswith(own):
            return _LIBRARY_FORMAT(message, category, filename, lineno, line)
        return f"WARNING: {prefix}{printable(' '.join(str(message).split()))}\n"

    warnings.formatwarning = formatted


class RankError(UserError):
    """An error that may have occurred on this rank only, so this rank reports it."""


class StopError(BaseException):
    """The process ends now, on request, with everything saved. Not an Exception, so that no handler swallows it.

    Args:
        number: the signal that this rank received outside training and scoring; None if the ranks agreed to stop.
        saves: False in a dry run, which has no checkpoint to go on from.
    """

    def __init__(self, number: int | None = None, saves: bool = True) -> None:
        self.agreed = number is None
        self.code = STOPPED if number in (None, signal.SIGUSR1) else -int(number or 0)
        name = f"{signal.Signals(number).name}: " if number else ""
        after = "the same command goes on from the last checkpoint" if saves else "a dry run saves nothing"
        super().__init__(f"{name}stopped on request; {after}")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Set up logging, run an entry point, and end the process with its `exit_code`.

    ``atexit`` functions run, but the interpreter is not finalized: a gloo thread that frees a tensor during that aborts
    the process (pytorch issue 190489), whether the run succeeded or not; and NCCL's group waits there for other ranks.
    """
    mend_streams()
    setup_logging(launched_rank())
    try:
        code = exit_code(main)
    except Exception as bug:  # noqa: BLE001  the interpreter's own end, without its finalization
        sys.excepthook(type(bug), bug, bug.__traceback__)
        code = 1
    notify_launching(str(code if code >= 0 else 128 - code))
    if code < 0:  # before the exit functions, which may wait for other ranks
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        code = 128 - code  # the first process of a container does not die of signals
    if code in (0, STOPPED, NOT_COPIED):
        for finish in finish_together:
            finish()
    atexit._run_exitfuncs()
    flush_or_drop()
    sys.stderr.flush()
    os._exit(code)


def exit_code(main: Callable[[], int | None]) -> int:
    """Run an entry point. Returns what it returns (None is 0), or 2 after one line on stderr on a user's mistake.

    Returns ``STOPPED`` (75) after a stop request, and -n if signal n arrived before there was anything to save.

    A mistake in the set-up occurs on all ranks, so rank 0 prints it. The others wait for their launcher to end them.
    If it does not, they alone have made the mistake, and print it. A rank that finds another one gone returns 3:
    launchers then report the rank that knows the reason.
    """
    try:
        return ended(main)
    except StopError as stop:
        _report(f"rank {launched_rank()}: {stop}")
        return stop.code
    except UserError as error:
        line = printable(" ".join(str(error).split()))
        if launched_rank() != 0 and not isinstance(error, RankError):
            # SIGTERM of the launcher. srun reports the highest exit code, which should be that of rank 0.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
            time.sleep(RANK_0_SECONDS)
            line = f"rank {launched_rank()}: {line}"
        _report(f"error: {line}")
        return 2
    except (RuntimeError, MemoryError) as error:
        if (code_of_failure := _failed_rank(error)) is None:
            raise
        return code_of_failure
    except SystemExit as stop:  # argparse's, after --help
        if isinstance(stop.code, str):
            _report(stop.code)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _failed_rank(error: Exception) -> int | None:
    """Report why this rank cannot go on: memory, its data loader, its GPU or another rank. None for other errors."""
    if failure := own_failure(error):
        _report(f"error: {failure}")
        return 2
    if is_late_rank(error):
        _report(f"rank {launched_rank()}: another rank does not answer, and nobody knew which")
        return 3
    if not is_lost_rank(error):
        return None
    _report(
        f"rank {launched_rank()}: another rank has ended; its message says why (without one it was killed, as for "
        "want of memory: dmesg)"
    )
    time.sleep(LOST_RANK_SECONDS)
    return 3


def _report(line: str) -> None:
    """Write the last line of a command to stderr, even if logging is not set up."""
    print(line, file=sys.stderr, flush=True)


def notify_launching(exit_code: str) -> None:
    """Tell eve_ds.launching, if that started us, that this process is a rank ("") or ends with ``exit_code``."""
    path = Path(os.environ.get(RANKS, "/nonexistent"), str(os.getpid()))
    with contextlib.suppress(OSError):
        if not exit_code or path.exists():
            path.write_text(exit_code)
