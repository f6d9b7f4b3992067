"""A user's mistake, told in one line; never a traceback."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from evaluation.common import InputError
from eve_ds.data.worker import explain_worker_death
from eve_ds.model.model_config import ModelConfigError
from eve_ds.weights.errors import WeightsError
from preprocessing.shards.schema import DataError, printable


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the file, row or option, and the mend."""


class RankError(UserError):
    """A fault that this rank alone may have met, so this rank tells it."""


class StopError(BaseException):
    """The process is to end now, on request; what is to be saved is saved. No Exception: nobody else is to catch it.

    Args:
        number: the signal that asked this rank, where it did not train or score; None where the ranks agreed on it.
    """

    def __init__(self, number: int | None = None) -> None:
        self.code = STOPPED if number in (None, signal.SIGUSR1) else -int(number or 0)
        name = f"{signal.Signals(number).name}: " if number else ""
        super().__init__(f"{name}stopped on request; the same command goes on from the last checkpoint")


# How gloo tells, in the midst of a collective, that a rank has left (gloo/transport/tcp/pair.cc).
_LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Gloo connectFullMesh failed")
# Launchers end all ranks as soon as one leaves, so who has the least to say leaves last.
RANK_0_SECONDS = 30.0  # other ranks than 0, with a mistake of all: a large job's import torch at different speeds
# How gloo and the meeting place tell that a collective has waited too long.
_LATE_RANK = re.compile(r"Timed out waiting \d+ms|wait timeout after \d+ms|Timed out after \d+ seconds")
# How torch, CUDA and the system tell that memory does not suffice; and a size that is beyond any.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: |(CUDA|HIP)( error:)? out of memory|Cuda failure 2 |CUBLAS_STATUS_ALLOC_FAILED|"
    r"Cannot allocate memory|Storage size calculation overflowed"
)
_LESS_MEMORY = "of a run, make the model, the batch or a rank's share smaller (python -m eve_ds.plan tells what fits)"
LOST_RANK_SECONDS = 3.0  # a rank that found another one gone
RANKS = "EVE_DS_RANKS"  # variable: the folder in which ranks make themselves known to eve_ds.launching
STOPPED = 75  # exit code: stopped on request, and the same command goes on (EX_TEMPFAIL of sysexits.h)
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
finish_together: list[Callable[[], object]] = []  # what waits for all ranks at the exit; left out where one has failed
USER_ERRORS = (UserError, DataError, InputError, ModelConfigError, WeightsError)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and end the process with its `exit_code`.

    What is registered for the exit is done, but the interpreter is not taken down: a thread of gloo that lets go of a
    tensor meanwhile aborts the process (pytorch issue 190489), after a run that went well as after one that did not.
    """
    tell_warnings_in_a_line()
    code = exit_code(main)
    tell_launching(str(code if code >= 0 else 128 - code))
    if code < 0:  # before anything else: what is at the exit may wait for others
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        code = 128 - code  # the first process of a container does not die of signals
    if code in (0, STOPPED):
        for finish in finish_together:
            finish()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_warnings_in_a_line() -> None:
    """Warnings and log lines of our own become ``WARNING: what``, without Python's place and line of source in them.

    Those of libraries stay as they are. Other ranks than 0 name themselves.
    """
    rank = f"rank {launched_rank()}: " if launched_rank() else ""
    ours, others = f"{Path(__file__).parent}{os.sep}", warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not filename.startswith(ours):
            return others(message, category, filename, lineno, line)
        return f"WARNING: {rank}{printable(' '.join(str(message).split()))}\n"

    warnings.formatwarning = formatted
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(levelname)s: {rank}%(message)s"))
    logging.getLogger("eve_ds").addHandler(handler)


def exit_code(main: Callable[[], int | None]) -> int:
    """Run an entry point. Returns what it returns (None is 0), or 2 after one line on stderr on a user's mistake.

    ``STOPPED`` (75) after a request to stop, or -n where signal n ended it before there was anything to save.

    All ranks meet the same mistakes in set-up, so rank 0 prints them; another one waits to be ended by its launcher,
    and prints if that never comes: it alone met the mistake. A rank that finds another one gone returns 3: launchers
    then report the one that knows why.
    """
    try:
        code = main()
        sys.stdout.flush()  # here, where it may find that nobody reads
    except StopError as stop:
        print(f"rank {launched_rank()}: {stop}", file=sys.stderr, flush=True)
        return stop.code
    except USER_ERRORS as error:
        line = printable(" ".join(str(error).split()))
        if launched_rank() != 0 and not isinstance(error, RankError):
            # The launcher's: and srun reports the highest exit code, so it should be that of rank 0.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
            time.sleep(RANK_0_SECONDS)
            line = f"rank {launched_rank()}: {line}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        if not _is_unread(1):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `... | head` has seen enough
        return 0
    except OSError as error:
        full = error.errno in STORAGE_ERRORS
        if not full and error.filename is None:  # no file of the user's: a defect of ours
            raise
        where = printable(f"{error.filename}: ") if error.filename is not None else ""
        mend = "make room or choose another folder" if full else "see that it can be read and written"
        print(f"error: {where}{error.strerror}; {mend}", file=sys.stderr, flush=True)
        return 2
    except (RuntimeError, MemoryError) as error:
        if told := _told_of_memory(error):
            print(f"error: rank {launched_rank()}: {told}; {_LESS_MEMORY}", file=sys.stderr, flush=True)
            return 2
        if death := explain_worker_death(error):
            print(f"error: rank {launched_rank()}: {death}", file=sys.stderr, flush=True)
            return 2
        if _LATE_RANK.search(str(error)):
            print(f"rank {launched_rank()}: another rank does not answer, and nobody knew which", file=sys.stderr)
            return 3
        if not _LOST_RANK.search(str(error)):
            raise
        told = "another rank has ended; its message says why (without one it was killed, as for want of memory: dmesg)"
        print(f"rank {launched_rank()}: {told}", file=sys.stderr, flush=True)
        time.sleep(LOST_RANK_SECONDS)
        return 3
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:  # argparse's, after --help
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr, flush=True)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code or 0


def _told_of_memory(error: Exception) -> str:
    """What an error says of memory that does not suffice; "" where it says nothing of it."""
    if isinstance(error, MemoryError):
        return printable(" ".join(str(error).split())) or "no memory is left"
    line = next((line for line in str(error).splitlines() if _NO_MEMORY.search(line)), "")
    return printable(line.partition(". GPU ")[0].rpartition("Allocator: ")[2])


def _is_unread(descriptor: int) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)  # what is wrong is told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


def tell_launching(exit_code: str) -> None:
    """Tell eve_ds.launching, if that started us, that this process is a rank ("") or ends with ``exit_code``."""
    path = Path(os.environ.get(RANKS, "/nonexistent"), str(os.getpid()))
    with contextlib.suppress(OSError):
        if not exit_code or path.exists():
            path.write_text(exit_code)


def launched_rank() -> int:
    """This process's rank as the launcher set it, for messages."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
