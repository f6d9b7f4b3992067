"""A user's mistake, told in one line; never a traceback."""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from evaluation.files import InputError
from eve_ds.data.faults import explain_worker_death
from eve_ds.model.config import ModelConfigError
from eve_ds.weights.errors import WeightsError
from preprocessing.schema import DataError, without_secrets


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the file, row or option, and the mend."""


class RankError(UserError):
    """A fault that this rank alone may have met, so this rank tells it."""


# How gloo tells, in the midst of a collective, that a rank has left (gloo/transport/tcp/pair.cc).
_LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Gloo connectFullMesh failed")
# Launchers end all ranks as soon as one leaves, so who has the least to say leaves last.
RANK_0_SECONDS = 30.0  # other ranks than 0, with a mistake of all: a large job's import torch at different speeds
LOST_RANK_SECONDS = 3.0  # a rank that found another one gone
STOPPED = 75  # exit code: stopped on request, and the same command goes on (EX_TEMPFAIL of sysexits.h)
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
USER_ERRORS = (UserError, DataError, InputError, ModelConfigError, WeightsError)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and end the process with its `exit_code`.

    What is registered for the exit is done, but the interpreter is not taken down: a thread of gloo that lets go of a
    tensor meanwhile aborts the process (pytorch issue 190489), after a run that went well as after one that did not.
    """
    code = exit_code(main)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(main: Callable[[], int | None]) -> int:
    """Run an entry point. Returns what it returns (None is 0), or 2 after one line on stderr on a user's mistake.

    All ranks meet the same mistakes in set-up, so rank 0 prints them; another one waits to be ended by its launcher,
    and prints if that never comes: it alone met the mistake. A rank that finds another one gone returns 3: launchers
    then report the one that knows why.
    """
    try:
        code = main()
    except USER_ERRORS as error:
        line = without_secrets(" ".join(str(error).split()))
        if _rank() != 0 and not isinstance(error, RankError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's
            time.sleep(RANK_0_SECONDS)
            line = f"rank {_rank()}: {line}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room or choose another folder", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if death := explain_worker_death(error):
            print(f"error: rank {_rank()}: {death}", file=sys.stderr, flush=True)
            return 2
        if not _LOST_RANK.search(str(error)):
            raise
        print(f"rank {_rank()}: another rank has ended; its message says why", file=sys.stderr, flush=True)
        time.sleep(LOST_RANK_SECONDS)
        return 3
    except KeyboardInterrupt:
        return 130
    return code or 0


def _rank() -> int:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
