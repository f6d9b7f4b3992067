"""Logging of a command: rank 0 logs, other ranks' warnings name their rank.

Modules log with ``logging.getLogger(__name__)``. What is logged below ``eve_ds`` reaches the terminal once
`setup_logging` was called; ``run_command`` does that. A program that uses EVE-DS as a library configures ``logging``
itself.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from preprocessing.redaction import printable

OUTPUT = "eve_ds.output"  # the logger of what a command reports as its result: it goes to stdout


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


_LIBRARY_FORMAT = warnings.formatwarning
