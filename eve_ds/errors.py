"""A user's mistake, told in one line; never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from evaluation.files import InputError
from eve_ds.model.config import ModelConfigError
from eve_ds.weights.errors import WeightsError
from preprocessing.schema import DataError


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the file, row or option, and the mend."""


class RankError(UserError):
    """A fault that this rank alone may have met, so this rank tells it."""


STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
USER_ERRORS = (UserError, DataError, InputError, ModelConfigError, WeightsError)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 on success, 2 with one line on stderr on a user's mistake.

    All ranks meet the same mistakes in set-up, so rank 0 alone prints them.
    """
    try:
        main()
    except USER_ERRORS as error:
        if isinstance(error, RankError) or _rank() == 0:
            line = " ".join(str(error).split())
            print(f"error: {line}", file=sys.stderr, flush=True)
        _leave(2)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room or choose another folder", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)
    _leave(0)


def _rank() -> int:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
